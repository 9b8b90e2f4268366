"""The bytes of one HTTP connection: bodies in, JSON and streams out, clients that leave; knows no route."""

from __future__ import annotations

import json
import select
import socket
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from ring_mlx import __version__
from ring_mlx.serve.failures import ApiError, bad

if TYPE_CHECKING:
    from ring_mlx.serve.server import Server

DRAIN_BYTES = 8 << 20


class GoneError(Exception):
    """The client has left."""


class Wire(BaseHTTPRequestHandler):
    """What the routes speak through."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"ring-mlx/{__version__}", ""
    timeout = 60  # a client that neither sends nor reads for so long has left
    disable_nagle_algorithm = True
    server: Server
    _started = _read_body = _chunked = False  # of the request at hand: stream begun, body read, stream in chunks

    def handle(self) -> None:
        """As the base class, but a client that vanishes is no event."""
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request, where that is wanted."""
        if self.server.log_requests:
            print(f"ring-mlx: {self.address_string()} {format % args}", file=sys.stderr)

    def _gone(self) -> bool:
        """Whether the client has closed its side."""
        try:
            poll = select.poll()  # select.select takes no file number above 1023
            poll.register(self.connection, select.POLLIN)
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _body(self) -> bytes:
        """The request's body.

        Raises:
            ApiError: 411, 413 or 415, or 400 where its length makes no sense.
            GoneError: If it ends early.
        """
        length, most = self.headers.get("Content-Length"), self.server.max_body_bytes
        if self.headers.get("Transfer-Encoding") or length is None:
            raise ApiError(411, "the body has no Content-Length; send one.", code="length_required")
        if not (length.isascii() and length.isdigit() and len(length) < 19):
            raise bad(f"Content-Length {length[:30]!r} is not a number.", code="bad_http")
        if int(length) > most:
            self._drain(int(length))
            text = f"the body of {length} bytes exceeds {most}; shorten it, or start with --max-body."
            raise ApiError(413, text, code="body_too_large")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise GoneError
        self._read_body = True
        kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Also keeps web pages out: a page cannot send this type to another origin without being allowed to.
            raise ApiError(415, "the body must be sent as Content-Type: application/json.", code="bad_content_type")
        return body

    def _drain(self, length: int) -> None:
        """Read some of a body that is refused, so that a client that only sends sees the answer."""
        left = min(length, DRAIN_BYTES)
        try:
            while left and (got := self.rfile.read(min(left, 1 << 16))):
                left -= len(got)
        except OSError:
            pass

    def _send(
        self,
        status: int,
        body: dict[str, Any] | bytes,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.server.metrics.count("http_requests_total", route=self._route_label(), status=str(status))

    def _event(self, piece: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(piece, ensure_ascii=False)}\n\n")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def _end_stream(self, status: str) -> None:
        if self._chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.server.metrics.count("http_requests_total", route=self._route_label(), status=status)

    def _begin_stream(self) -> None:
        self._started = True
        self._chunked = self.request_version >= "HTTP/1.1"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        if self._chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()

    def _route_label(self) -> str:
        """What the metrics call the route."""
        return "other"
