"""The listening socket with its engine; knows how both start and end, not what they do."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from ring_mlx.errors import OptionError
from ring_mlx.serve.engine import Engine
from ring_mlx.serve.failures import busy
from ring_mlx.serve.handler import Handler
from ring_mlx.serve.metrics import Metrics
from ring_mlx.serve.settings import Settings

if TYPE_CHECKING:
    from ring_mlx.serve.engine import Load


class Server(ThreadingHTTPServer):
    """Serves one model; a thread a connection, and one for the model.

    Args:
        settings: Of the model's side.
        host, port: Where to listen; port 0 takes a free one, which ``server_port`` names.
        api_key: What clients must send, or None.
        max_body_bytes: Longer bodies are refused.
        max_connections: More are refused.
        log_requests: Print a line for each.
        load: As for `Engine`.

    Raises:
        OptionError: If the address cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        settings: Settings,
        host: str = "127.0.0.1",
        port: int = 8080,
        *,
        api_key: str | None = None,
        max_body_bytes: int = 32 << 20,
        max_connections: int = 256,
        log_requests: bool = False,
        load: Load | None = None,
    ) -> None:
        self.api_key, self.max_body_bytes, self.log_requests = api_key, max_body_bytes, log_requests
        self.metrics, self.created = Metrics(), int(time.time())
        self._free = threading.BoundedSemaphore(max_connections)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as e:
            raise OptionError(f"{host}:{port} cannot be listened on ({e}); give another --host or --port.") from None
        self.engine = Engine(settings, self.metrics, load)

    def server_bind(self) -> None:
        """Bind, without asking a name server who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def start(self) -> threading.Thread:
        """Serve on another thread."""
        thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="ring-mlx http", daemon=True)
        thread.start()
        return thread

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, or a short refusal where there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = json.dumps(busy("too many connections.").body()).encode()
        head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        try:
            request.settimeout(1)
            request.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is no event; anything else is told in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"ring-mlx: [serve] a connection failed ({type(error).__name__}: {error}).", file=sys.stderr)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Answer no more, end what runs, save; returns whether the model's thread is at rest."""
        at_rest = self.engine.close(timeout_s)
        self.shutdown()
        self.server_close()
        return at_rest
