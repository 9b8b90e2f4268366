"""Routes, keys, answers and failures of the HTTP server."""

from __future__ import annotations

import hmac
import json
import queue
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import unquote

import h11

from ring_mlx.engine.events import End, Event, PrefillProgress
from ring_mlx.errors import RingError
from ring_mlx.serve import ollama, routes
from ring_mlx.serve.answer import Answer, Piece
from ring_mlx.serve.choices import Choices, asked
from ring_mlx.serve.engine import Engine
from ring_mlx.serve.failures import ApiError, GoneError, bad, busy, of_answer
from ring_mlx.serve.fields import Fields, read_object
from ring_mlx.serve.large import LARGE_BYTES
from ring_mlx.serve.left_out import HEADER
from ring_mlx.serve.protocol import ApiRequest
from ring_mlx.serve.replies import model_of
from ring_mlx.serve.routes import Api
from ring_mlx.serve.wire import JSON, Headers, Wire
from ring_mlx.system.terminal_text import note

POLL_S, KEEP_ALIVE_S = 0.05, 5.0
OPEN = ("/health", "/")
UNLOGGED = (*OPEN, "/metrics")  # what programs ask all the time


class Handler(Wire):
    """Answers the requests of one connection, one after the other."""

    def _answer(self) -> None:
        """Answer; a failure is sent as JSON unless the client has left, and the connection stays usable."""
        try:
            self._route()
        except (GoneError, OSError):
            self._count("gone")
            raise GoneError from None
        except ApiError as e:
            self._refuse(e)
        except Exception:  # noqa: BLE001 a traceback is for the server's log
            note(traceback.format_exc())
            self._refuse(ApiError(500, "the server failed; see its log.", code="internal_error"))

    def _route(self) -> None:
        route, named = routes.found(self._path())
        self._check_hosts()
        if self.method == "OPTIONS" and self.server.hosts.grants(self.headers.get("origin")):
            self._preflight()
            return
        if route not in OPEN:
            self._check_key()
        methods = routes.METHODS.get(route, ())
        if not methods or (route, self.method) == ("/", "GET"):
            raise ApiError(404, f"there is no {self._path()[:100]} here; see docs/serve.md.", code="unknown_url")
        if self.method not in methods:
            allowed = ", ".join(methods)
            raise ApiError(405, f"this route takes {allowed}.", code="method_not_allowed", headers={"Allow": allowed})
        if api := routes.APIS.get(route):
            self._generate(api)
            return
        answers: dict[str, Callable[[], None]] = {
            "/": lambda: self._send(200, b""),
            routes.COUNT: lambda: self._measure(routes.APIS[routes.MESSAGES]),
            routes.RESPONSE: lambda: self._stored(named),
            routes.MODELS: lambda: self._models(None),
            routes.MODEL: lambda: self._models(named),
            routes.TAGS: self._tags,
            routes.SHOW: self._show,
            "/health": self._health,
            "/metrics": self._metrics,
        }
        answers[route]()

    def _check_hosts(self) -> None:
        """Refuse web pages of other places; a client without ``Host`` (HTTP/1.0) is no browser."""
        hosts, origin = self.server.hosts, self.headers.get("origin")
        for name in self.authorities:
            if not hosts.allows(name):
                text = f"{name[:100]!r} is no name of this server; use its address, or start with --allowed-hosts."
                raise ApiError(403, text, code="host_not_allowed")
        foreign = self.headers.get("sec-fetch-site", "").lower() == "cross-site"
        if foreign if origin is None else not hosts.allows_origin(origin):
            text = f"the web page {(origin or '')[:100]!r} may not ask here; start with --allowed-hosts to let it."
            raise ApiError(403, text, code="origin_not_allowed")

    def _preflight(self) -> None:
        """Tell a browser that an allowed page may send its request; the key comes with that request."""
        asked = self.headers.get("access-control-request-headers", "")
        headers = {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Allow-Headers": asked}
        self._send(200, b"", "text/plain", headers)

    def _check_key(self) -> None:
        key = self.server.api_key
        if key is None:
            return
        scheme, _, given = self.headers.get("authorization", "").partition(" ")
        keys = [self.headers.get("x-api-key", ""), given.strip(" \t") if scheme.lower() == "bearer" else ""]
        if not any(hmac.compare_digest(k.encode("latin-1"), key) for k in keys):
            raise ApiError(
                401,
                "no key, or a wrong one; send Authorization: Bearer KEY, or X-Api-Key: KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _health(self) -> None:
        models = self.server.models
        self._send(200 if models.state == "ok" else 503, {"status": models.state, "model": models.first.name})

    def _metrics(self) -> None:
        text = self.server.metrics.text(self.server.models.gauges())
        self._send(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def _models(self, named: str | None) -> None:
        models, is_anthropic = self.server.models, "anthropic-version" in self.headers
        names = models.names if named is None else [named]
        found = [(name, models.find(name)) for name in names]
        data = [model_of(name, self.server.created, one.context_tokens, is_anthropic) for name, one in found]
        if named is not None:
            self._send(200, data[0])
            return
        more = {"has_more": False, "first_id": names[0], "last_id": names[-1]} if is_anthropic else {}
        self._send(200, {"object": "list", "data": data, **more})

    def _tags(self) -> None:
        models = self.server.models
        tags = [ollama.tag_of(name, models.find(name), self.server.created) for name in models.names]
        self._send(200, {"models": tags})

    def _show(self) -> None:
        fields = Fields(read_object(self._body()))
        self._send(200, ollama.shown(self.server.models.find(fields.text(fields.either("model", "name")))))

    # Generation

    @contextmanager
    def _prepared(self, api: Api) -> Iterator[tuple[list[ApiRequest], Engine, str]]:
        """The requests of a body, ready to be answered, their engine, which stays loaded, and the model's name for the answer.

        A large request, or one that goes on from much, waits for its turn.
        """
        models, turns = self.server.models, self.server.large
        client = self._client()
        models.check(client)
        body = self._body()
        self.cost.read = time.perf_counter()
        with ExitStack() as use, ExitStack() as turn:
            turn.enter_context(turns.turn(len(body), self._gone, client))
            given = read_object(body)
            name = Fields(given).text("model")
            one = models.find(name)
            self.cost.model = one.name
            if not models.is_ready(one):
                turn.close()  # others may be prepared while this one waits for its model
                engine = use.enter_context(models.use(one, self._gone))
                turn.enter_context(turns.turn(len(body), self._gone, client))
            else:
                engine = use.enter_context(models.use(one, self._gone))
            if len(body) <= LARGE_BYTES:
                turn.enter_context(turns.turn(self.server.stored.size_of(given), self._gone, client))
            request = api.parse(given, engine.settings.sampling, self.server.stored)
            request.client, self.cost.request = client, request
            if not request.is_text:
                self.server.calls.restore(request.prompt)
            requests = asked(request, lambda one: engine.prepare(one, self._gone))
            if request.left_out and self.server.strict:
                names = ", ".join(request.left_out)
                text = f"not honoured here: {names}; leave this out, or start without --strict."
                raise bad(text, request.left_out[0], "unsupported_parameter")
            turn.close()
            if request.left_out:
                self.server.left_out.tell(request.left_out)
            yield requests, engine, models.shown(name, one)

    def _measure(self, api: Api) -> None:
        with self._prepared(api) as (requests, _, _):
            assert requests[0].prepared is not None
            self._send(200, {"input_tokens": len(requests[0].prepared.prompt.ids)})

    def _stored(self, named: str) -> None:
        kept = self.server.stored.get(named)
        if self.method == "GET":
            self._send(200, kept.response)
            return
        self.server.stored.drop(named)
        self._send(200, {"id": named, "object": "response", "deleted": True})

    def _generate(self, api: Api) -> None:
        with self._prepared(api) as (requests, engine, name):
            request = requests[0]
            if len(requests) > 1:
                reply: Answer = Choices(requests, name, engine.settings.max_batch)
            else:
                reply = api.reply(request, name)
            self.cost.answer = reply
            try:
                reply.enter(engine)
                if request.stream:
                    self._stream(reply)
                else:
                    self._whole(reply)
            finally:
                reply.leave(engine)

    def _whole(self, reply: Answer) -> None:
        for event in self._events(reply):
            if isinstance(event, End):
                self._send(200, reply.whole(event), headers=_told(reply.request))
            elif event is not None:
                reply.take(event)

    def _stream(self, reply: Answer) -> None:
        """Server-sent events; the status is sent with the first event, so that an earlier failure has its own status."""
        quiet_since, progress = time.monotonic(), "waiting"
        for event in self._events(reply):
            if isinstance(event, PrefillProgress):
                progress = f"reading {event.done}/{event.total}"
                reply.take(event)
            silent = event is None or isinstance(event, PrefillProgress)
            if silent and time.monotonic() - quiet_since < KEEP_ALIVE_S:
                continue
            if self._reply is None:
                self._reply = reply
                head = {"Content-Type": reply.content_type, "Cache-Control": "no-cache", **_told(reply.request)}
                self._write(self._head(200, head))
                self._tell(reply.first())
            if event is None or isinstance(event, PrefillProgress):
                self._piece(reply.alive(progress))
            else:
                self._tell(reply.last(event) if isinstance(event, End) else reply.add(event))
            quiet_since = time.monotonic()
        self._piece(reply.last_line)
        self._end_stream("200")

    def _tell(self, pieces: Iterable[Piece]) -> None:
        assert self._reply is not None
        for piece in pieces:
            self._piece(self._reply.line(piece))

    def _piece(self, text: str) -> None:
        if text:
            self._write(h11.Data(data=text.encode()))

    def _end_stream(self, status: str) -> None:
        self._write(h11.EndOfMessage())
        self._count(status)

    def _send(
        self, status: int, body: dict[str, Any] | bytes, kind: str = JSON, headers: Headers | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        head = self._head(status, {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})})
        self._write(head, h11.Data(data=b"" if self.method == "HEAD" else data), h11.EndOfMessage())
        self._count(str(status))

    def _events(self, reply: Answer) -> Iterator[Event | None]:
        """The events; the log explains an empty reply. None while there are no events.

        Raises GoneError if the client has left; ApiError if the answer failed, or the server closes.
        """
        while True:
            try:
                event = reply.next_event(POLL_S)
            except queue.Empty:
                event = None
            if self._gone():
                raise GoneError
            if isinstance(event, RingError):
                raise of_answer(event)
            if isinstance(event, End) and event.reason == "stopped":
                raise busy("the server is closing.")
            if isinstance(event, End):
                self.cost.finish = reply.reason(event)
                self.server.calls.keep(reply.every_call)
            yield event
            if isinstance(event, End):
                if why := reply.why_empty(event):
                    note(f"[serve] {why}")
                return

    def _refuse(self, e: ApiError) -> None:
        """Send a failure: with its status, or as an event of a stream that has begun."""
        if self._reply is not None:
            self._closing = True
            self._tell(self._reply.failed(e))
            self._end_stream("broken")
        else:
            body = routes.failure_of(routes.found(self._path())[0])(e)
            self._send(e.status, body, headers=e.headers)

    def _path(self) -> str:
        return unquote(self.path.partition("?")[0]).rstrip("/") or "/"

    def _client(self) -> str:
        """Who asks: an address, and what stands for the key."""
        key = f"{self.headers.get('authorization', '')} {self.headers.get('x-api-key', '')}"
        return f"{self.client_address[0]} {hash(key)}"

    def _count(self, status: str) -> None:
        """Count and log a request; unknown routes share one label, so that clients cannot make up labels."""
        route = routes.found(self._path())[0]
        label = route.rstrip("/") if route in routes.METHODS and route != "/" else "other"
        self.server.metrics.count("http_requests_total", route=label, status=status)
        if self.server.request_log is not None and route not in UNLOGGED:
            line = self.cost.line(self.client_address[0], self.method, label, status)
            self.server.request_log.write(line)


def _told(request: ApiRequest) -> dict[str, str]:
    """The header that names what was left out."""
    return {HEADER: ", ".join(request.left_out)} if request.left_out else {}
