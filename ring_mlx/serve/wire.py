"""HTTP/1.1 on one connection: reads requests and bodies, writes answers, notices slow and lost clients.

h11 reads and writes the protocol. Where it is lenient, and where a proxy may read
a request differently, this refuses: bare line ends, folded headers, a header twice that may come once, two lengths of one body.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import socketserver
import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus

import h11

from ring_mlx import __version__
from ring_mlx.serve.answer import Answer
from ring_mlx.serve.failures import ApiError, GoneError, bad
from ring_mlx.serve.request_log import Cost
from ring_mlx.serve.shared import Shared
from ring_mlx.serve.slots import Stage
from ring_mlx.system.terminal_text import note

# Seconds for all of a request's head, all of its body, between two requests, for one piece of an answer to be taken, and
# to let a client that is refused go on sending until it has read why.
HEAD_S, BODY_S, IDLE_S, SEND_S, LINGER_S = 10.0, 60.0, 60.0, 60.0, 5.0
MOST_HEAD_BYTES, MOST_HEADERS, MOST_CHUNKS, READ_BYTES = 1 << 16, 100, 1 << 15, 1 << 16
JSON = "application/json"
Headers = Mapping[str, str]
NOT_HTTP = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|\n[ \t]|[\0-\x08\x0b\x0c\x0e-\x1f]")
NOT_STRICT = "this is not HTTP/1.1 (a control character, a bare or folded line)."
ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE)
ONCE = {
    *("authorization", "content-encoding", "content-length", "content-type", "expect", "host", "origin"),
    *("sec-fetch-site", "transfer-encoding", "x-api-key"),
}


class Wire(socketserver.BaseRequestHandler):
    """One connection, as the routes read and write it."""

    server: Shared  # type: ignore[assignment]

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._forget()

    def _forget(self) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD_BYTES)
        self.method, self.path, self.authorities = "", "/", list[str]()
        self.headers: dict[str, str] = {}
        self._reply: Answer | None = None  # of a stream that has begun
        self._closing = False  # whether this request is the last
        self.cost = Cost()

    def handle(self) -> None:
        """Answer one request after the other, until either side closes."""
        try:
            while self._next_request():
                self._answer()
                if self._closing or {self._http.our_state, self._http.their_state} != {h11.DONE}:
                    break
            self._linger()
        except (GoneError, OSError):
            pass

    def _next_request(self) -> bool:
        """Read a head; False if there is none, or one that has been refused."""
        self._forget()
        try:
            head = self._read_head()
            self.server.slots.work(self.request)
            self.cost = Cost()
            if head:
                self._parse(head)
            return bool(head)
        except h11.RemoteProtocolError as e:
            self._refuse(_not_http(e))
        except ApiError as e:
            self._refuse(e)
        return False

    def _read_head(self) -> bytes:
        """The bytes of a head; empty where the client has none to send."""
        self.server.slots.wait(self.request, Stage.IDLE)
        buffer, seen, deadline = bytearray(self._buffer), 0, time.monotonic() + IDLE_S
        while True:
            if buffer.startswith(b"\r\n"):  # RFC 9112, 2.2: one may stand before a request
                del buffer[:2]
            end = buffer.find(b"\r\n\r\n", max(0, seen - 3))
            size = end + 4 if end >= 0 else len(buffer)
            _check_head(buffer, max(0, seen - 1), size)
            if end >= 0:
                self._buffer = bytes(buffer[size:])
                return bytes(buffer[:size])
            if buffer and not seen:
                deadline = time.monotonic() + HEAD_S
                self.server.slots.wait(self.request, Stage.HEAD)
            seen = len(buffer)
            try:
                data = self._receive(deadline)
            except TimeoutError:
                if not buffer:
                    return b""
                raise ApiError(408, f"the head took more than {HEAD_S:g} s.", code="timeout") from None
            if not data:
                return b""
            buffer += data

    def _parse(self, head: bytes) -> None:
        """The request of a head. Raises ApiError or h11.RemoteProtocolError if it is wrong."""
        self._http.receive_data(head)
        event = self._http.next_event()
        assert isinstance(event, h11.Request)
        self.method, target = event.method.decode(), event.target.decode()
        absolute = ABSOLUTE.fullmatch(target)
        self.path = absolute[2] if absolute else target
        lines = [line.decode("latin-1").partition(":") for line in head.split(b"\r\n")[1:-2]]
        names = [name.lower() for name, _, _ in lines]
        self.headers = {name: line[2].strip(" \t") for name, line in zip(names, lines, strict=True)}
        named = self.headers.get("host"), absolute[1] if absolute else None
        self.authorities = [name for name in named if name is not None]
        if event.http_version not in (b"1.0", b"1.1"):
            raise ApiError(505, "only HTTP/1.1 and HTTP/1.0 are spoken here.", code="bad_http")
        if len(names) > MOST_HEADERS:
            raise ApiError(431, f"{len(names)} headers are more than {MOST_HEADERS}.", code="bad_http")
        for name in ONCE:
            if names.count(name) > 1:
                raise bad(f"the header {name} came twice; send it once.", code="bad_http")
        if "transfer-encoding" in names and ("content-length" in names or event.http_version == b"1.0"):
            raise bad("Transfer-Encoding takes HTTP/1.1 and no Content-Length.", code="bad_http")
        if "," in self.headers.get("content-length", ""):
            raise bad("Content-Length is a list; send one number.", code="bad_http")
        if "transfer-encoding" not in names and int(self.headers.get("content-length", "0")) == 0:
            self._http.next_event()  # so that h11 sees the end of an empty body

    def _body(self) -> bytes:
        """The request's body.

        Raises ApiError 408, 411, 413, 415 or 417, or 400 where it is not HTTP; GoneError if it ends early.
        """
        length, most = self.headers.get("content-length"), self.server.max_body_bytes
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        coding = self.headers.get("content-encoding", "identity").lower()
        if kind != JSON:
            # Also keeps web pages out: a page cannot send this type to another origin without being allowed to.
            raise ApiError(415, "the body must be sent as Content-Type: application/json.", code="bad_content_type")
        if coding != "identity":
            text = f"Content-Encoding {coding[:40]!r} is not read here; send the body as it is."
            raise ApiError(415, text, code="bad_content_encoding", headers={"Accept-Encoding": "identity"})
        if self.headers.get("expect", "100-continue").lower() != "100-continue":
            raise ApiError(417, "the only Expect is 100-continue.", code="bad_http")
        if length is None and "transfer-encoding" not in self.headers:
            self._closing = True  # what follows may be a body, and must not be taken for a request
            raise ApiError(411, "the body has no Content-Length; send one, or chunks.", code="length_required")
        if length is not None and int(length) > most:
            raise _too_large(int(length), most)
        if self._http.they_are_waiting_for_100_continue:
            self._write(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))
        self.server.slots.wait(self.request, Stage.BODY)
        try:
            return self._read_body(most)
        except TimeoutError:
            raise ApiError(408, f"the body took more than {BODY_S:g} s.", code="timeout") from None
        except h11.RemoteProtocolError as e:
            raise _not_http(e) from None
        finally:
            self.server.slots.work(self.request)

    def _read_body(self, most: int) -> bytes:
        body, chunks, deadline = bytearray(), 0, time.monotonic() + BODY_S
        tail = bytearray(self._buffer)  # as much as the trailers of a body in chunks may take
        if self._buffer and self._http.their_state is h11.SEND_BODY:
            self._http.receive_data(self._buffer)
            self._buffer = b""
        while self._http.their_state is h11.SEND_BODY:
            event = self._http.next_event()
            if isinstance(event, h11.Data):
                body += event.data
                chunks += event.chunk_start
                if len(body) > most:
                    raise _too_large(len(body), most)
                self.server.slots.hold(self.request, len(body))
                if chunks > MOST_CHUNKS:
                    text = f"the body has more than {MOST_CHUNKS} chunks; send larger ones."
                    raise ApiError(413, text, code="bad_http")
            elif event is h11.NEED_DATA:
                data = self._receive(deadline)
                if not data:
                    raise GoneError
                tail += data
                if len(tail) > 4 * MOST_HEAD_BYTES:
                    del tail[: -2 * MOST_HEAD_BYTES]
                self._http.receive_data(data)
            elif isinstance(event, h11.EndOfMessage) and "transfer-encoding" in self.headers:
                self._check_trailers(tail.removesuffix(self._http.trailing_data[0]), len(event.headers))
        self._buffer = self._http.trailing_data[0] or self._buffer
        return bytes(body)

    def _check_trailers(self, sent: bytearray, count: int) -> None:
        """Refuse an end of a body in chunks where h11 is lenient: its last line, ``count`` trailers, an empty line."""
        lines = sent.split(b"\r\n")[-3 - count :]
        if NOT_HTTP.search(b"\r\n".join([b"", *lines])):
            self._closing = True  # what follows may be a part of this body
            raise bad(NOT_STRICT, code="bad_http")

    def _receive(self, deadline: float) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.request.settimeout(left)
        return bytes(self.request.recv(READ_BYTES))

    def _linger(self) -> None:
        """Let a client that is still sending read its answer: closing now would lose it."""
        self.server.slots.wait(self.request, Stage.IDLE)
        self.request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(TimeoutError):
            while self._http.their_state is not h11.DONE and self._receive(deadline):
                pass

    def _gone(self) -> bool:
        """Whether the client has closed its side."""
        try:
            poll = select.poll()  # select.select takes no file number above 1023
            poll.register(self.request, select.POLLIN)
            return bool(poll.poll(0)) and not self.request.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _write(self, *events: h11.Event) -> None:
        data = b"".join(self._http.send(event) or b"" for event in events)
        self.request.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            data = data[self.request.send(data) :]
        if data:
            self.server.slots.wait(self.request, Stage.SEND)
            self.request.settimeout(SEND_S)
            self.request.sendall(data)
            self.server.slots.work(self.request)

    def _head(self, status: int, headers: Headers) -> h11.Response:
        own = {"Server": f"ring-mlx/{__version__}", "Date": formatdate(usegmt=True)}
        if self._closing or self._http.their_state is not h11.DONE:
            own["Connection"] = "close"  # neither must a body that is not read
        if self.server.hosts.grants(origin := self.headers.get("origin")):
            own |= {"Access-Control-Allow-Origin": str(origin), "Vary": "Origin"}
        if self.server.log_requests:
            note(f"{self.client_address[0]} {self.method} {self.path[:200]} {status}")
        phrase, lines = HTTPStatus(status).phrase, list({**own, **headers}.items())
        return h11.Response(status_code=status, reason=phrase, headers=lines)

    def _answer(self) -> None:
        raise NotImplementedError

    def _refuse(self, e: ApiError) -> None:
        raise NotImplementedError


def _check_head(head: bytearray, start: int, end: int) -> None:
    """Refuse what more lenient readers than h11 could take for something else, and what is too long."""
    if NOT_HTTP.search(head, start, end):
        raise bad(NOT_STRICT, code="bad_http")
    if end > MOST_HEAD_BYTES:
        status, what = (414, "address is") if head.find(b"\r\n", 0, MOST_HEAD_BYTES) < 0 else (431, "headers are")
        raise ApiError(status, f"the {what} longer than {MOST_HEAD_BYTES} bytes.", code="bad_http")


def _not_http(e: h11.RemoteProtocolError) -> ApiError:
    why = str(e).partition(": bytearray")[0]  # what follows is the line itself, which may be long or a key
    return bad(f"this is not HTTP/1.1 ({why}).", code="bad_http")


def _too_large(length: int, most: int) -> ApiError:
    text = f"the body of {length} bytes exceeds {most}; shorten it, or start with --max-body."
    return ApiError(413, text, code="body_too_large")
