"""The listening socket and the engine behind it."""

from __future__ import annotations

import json
import resource
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.model_thread import TELLING_S
from ring_mlx.errors import OptionError
from ring_mlx.serve.calls import Calls
from ring_mlx.serve.engine import Engine, Settings
from ring_mlx.serve.failures import busy
from ring_mlx.serve.handler import Handler
from ring_mlx.serve.hosts import Hosts
from ring_mlx.serve.large import LargeTurns
from ring_mlx.serve.left_out import Log
from ring_mlx.serve.models import Models, Served
from ring_mlx.serve.request_log import RequestLog
from ring_mlx.serve.responses.stored import Stored
from ring_mlx.serve.slots import Slots
from ring_mlx.system.terminal_text import note

if TYPE_CHECKING:
    from ring_mlx.engine.model_thread import Load

# One body's, and those of all requests together.
MOST_BODY_BYTES, MOST_BODIES_BYTES = 8 << 20, 128 << 20
# The model's thread waits so long for a thread that parses or renders, several times a token; Python's own 5 ms add up.
SWITCH_S = 0.0005


class Server(socketserver.ThreadingTCPServer):
    """Serves models; a thread a connection, and one a model in memory.

    Args:
        served: The models' side; see `Models` for this, ``aliases``, ``keep_s`` and ``load``.
        host, port: Where to listen; port 0 takes a free one, which ``server_port`` names.
        api_key: What clients must send, or None.
        max_body_bytes: Longer bodies are refused.
        max_connections: Beyond them, those that wait for their client are closed, or the new one is refused.
        allowed_hosts: Names that clients may ask for, beside this machine's own; see `Hosts`.
        allowed_origins: Web pages of other places that may ask and read.
        strict: Refuse requests with fields that are not honoured, instead of naming these in a header.
        log_requests: Print a line for each.
        request_log: Gets a line of JSON for each.

    Raises:
        OptionError: If the address cannot be used, or the key or a name can never occur in a request.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        served: Settings | Sequence[Served],
        host: str = "127.0.0.1",
        port: int = 8080,
        *,
        api_key: str | None = None,
        max_body_bytes: int = MOST_BODY_BYTES,
        max_connections: int = 256,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        strict: bool = False,
        log_requests: bool = False,
        request_log: RequestLog | None = None,
        aliases: Mapping[str, str] | None = None,
        keep_s: float | None = None,
        load: Load | None = None,
    ) -> None:
        self.api_key = _key(api_key) if api_key is not None else None
        self.max_body_bytes, self.strict, self.log_requests = max_body_bytes, strict, log_requests
        self.request_log = request_log
        self.metrics, self.created = Metrics(), int(time.time())
        self.hosts = Hosts(host, allowed_hosts, allowed_origins)
        self.stored, self.calls, self.left_out, self.large = Stored(max_body_bytes), Calls(), Log(), LargeTurns()
        self.slots = Slots(max_connections, max(MOST_BODIES_BYTES, max_body_bytes))
        _allow_files(2 * max_connections)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as e:
            raise OptionError(f"{host}:{port} cannot be listened on ({e}); give another --host or --port.") from None
        served = [Served(served)] if isinstance(served, Settings) else served
        self.models = Models(served, self.metrics, aliases, keep_s, load)

    @property
    def engine(self) -> Engine:
        """The first model's, while it is in memory or on its way there: always, where there is one model."""
        assert self.models.first.engine is not None
        return self.models.first.engine

    def service_actions(self) -> None:
        """Called several times a second."""
        self.models.let_go_idle()

    def server_bind(self) -> None:
        """Bind, and note the port that the system chose."""
        super().server_bind()
        self.server_port = int(self.server_address[1])

    def start(self) -> threading.Thread:
        """Serve on another thread."""
        sys.setswitchinterval(SWITCH_S)
        thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="ring-mlx http", daemon=True)
        thread.start()
        return thread

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, or a short refusal where there are too many."""
        if self.slots.take(request):
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
            self.slots.free(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error in one line, but not a broken connection."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            note(f"[serve] a connection failed ({type(error).__name__}: {error}).")

    def close(self, timeout_s: float = 30.0) -> bool:
        """Stop answering, end running requests, save; returns whether the models' threads are at rest."""
        at_rest, until = self.models.close(timeout_s), time.monotonic() + TELLING_S
        while not self.models.is_idle and time.monotonic() < until:  # clients are told
            time.sleep(0.01)
        self.shutdown()
        self.server_close()
        if self.request_log is not None:
            self.request_log.close()
        return at_rest


def _key(text: str) -> bytes:
    """The bytes that clients must send: a key from the environment need not be UTF-8."""
    key = text.strip().encode("utf-8", "surrogateescape")
    if not key or any(byte < 0x20 or byte == 0x7F for byte in key):
        raise OptionError("the API key is empty or has a control character, which no header can hold; give another.")
    return key


def _allow_files(count: int) -> None:
    """Let the process open this many more files: macOS allows 256 by default, fewer than the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 256 + count if hard == resource.RLIM_INFINITY else min(256 + count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
