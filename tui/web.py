"""``ring-mlx chat --web``: the chat as a page for a browser on this machine, by textual-serve.

Only who knows the address gets in: it holds a secret, and requests that another page makes are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from aiohttp import WSMsgType, web
from textual_serve.app_service import AppService
from textual_serve.server import Server

from ring_mlx import RingError
from tui.page_driver import PageDriver

HOST, TITLE = "127.0.0.1", "ring-mlx"
MOST_CELLS, MOST_BYTES = 1000, 8_000_000  # of a window's sides, and of a message, such as a long paste
CLOSE_S, SHUTDOWN_S = 1.0, 30.0
NOT_PASSED = ("command", "run", "web", "port", "plain")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self' ws://{}; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PortError(RingError):
    """The page cannot be served at a port."""

    origin = "option"


class Child(AppService):
    """The process of the chat that a page shows."""

    def _build_environment(self, width: int = 80, height: int = 24) -> dict[str, str]:
        found = super()._build_environment(width, height)
        return {**found, "TERM": "xterm-256color", "TEXTUAL_DRIVER": f"{PageDriver.__module__}:{PageDriver.__name__}"}

    async def on_meta(self, data: bytes) -> None:
        """Pass on what is no text; of links only those that leave the page."""
        given = json.loads(data)
        if given["type"] != "open_url" or str(given["url"]).startswith(("http://", "https://", "mailto:")):
            await super().on_meta(data)

    async def run(self) -> None:
        """Pass on what the process writes; the page is told when it has ended, however that came."""
        try:
            await super().run()
            if self._process is not None:
                await self._process.wait()
        finally:
            await self.remote_close()


class Page(Server):
    """Serves one chat at a time: a second page, or the same one loaded again, ends the first.

    Args:
        command: Starts the chat.
        port: Of the address.
    """

    def __init__(self, command: str, port: int) -> None:
        super().__init__(command, HOST, port, TITLE, f"http://{HOST}:{port}")
        self._secret, self._turn = secrets.token_urlsafe(16), asyncio.Lock()
        self._shown: web.WebSocketResponse | None = None

    @property
    def address(self) -> str:
        return f"{self.public_url}/{self._secret}/"

    async def application(self) -> web.Application:
        """All routes are below the secret."""
        outer = web.Application(middlewares=[self._guard])
        outer.on_response_prepare.append(self._add_headers)
        outer.add_subapp(f"/{self._secret}", await self._make_app())
        return outer

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update({name: value.format(f"{HOST}:{self.port}") for name, value in HEADERS.items()})

    async def on_startup(self, app: web.Application) -> None:
        """Say where the chat is."""
        print(f"ring-mlx: the chat is at {self.address} for a browser on this machine; Ctrl+C ends it.", flush=True)

    async def on_shutdown(self, app: web.Application) -> None:
        await self._end()
        async with self._turn:  # it is saved by then
            pass

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Run a chat for a page until one of them ends."""
        shown = web.WebSocketResponse(timeout=CLOSE_S, heartbeat=15, max_msg_size=MOST_BYTES)
        await shown.prepare(request)
        await self._end()
        self._shown = shown

        async def write(data: bytes) -> None:
            with contextlib.suppress(ConnectionError):  # a page that was closed; the process ends soon
                await shown.send_bytes(data)

        async def close() -> None:
            await shown.close()

        async with self._turn:
            child = Child(
                self.command,
                write_bytes=write,
                write_str=shown.send_str,
                close=close,
                download_manager=self.download_manager,
            )
            await child.start(*(_cells(request.query.get(name)) for name in ("width", "height")))
            try:
                await self._pass_on(shown, child)
            finally:
                await child.stop()
        return shown

    async def _end(self) -> None:
        """End the chat that is shown."""
        shown, self._shown = self._shown, None
        if shown is not None:
            await shown.close()

    async def _pass_on(self, shown: web.WebSocketResponse, child: AppService) -> None:
        """Give what the page sends to the process; a message of another form is left out."""
        async for message in shown:
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
                kind, given = (*message.json(), None)[:2] if message.type == WSMsgType.TEXT else ("", None)
                if kind == "stdin":
                    await child.send_bytes(given.encode("utf-8", "replace")) if given else None
                elif kind == "resize":
                    await child.set_terminal_size(_cells(given["width"]), _cells(given["height"]))
                elif kind == "ping":
                    await shown.send_json(["pong", given])
                elif kind in ("blur", "focus"):
                    await (child.blur() if kind == "blur" else child.focus())

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what another page, or another name for this machine, asks for: browsers say both."""
        origin = request.headers.get("Origin")
        needs_origin = request.headers.get("Upgrade") is not None
        if request.host != f"{HOST}:{self.port}" or (
            origin != self.public_url and (needs_origin or origin is not None)
        ):
            raise web.HTTPForbidden(text="This page is only for its own address.")
        return await handler(request)


def _cells(value: Any) -> int:
    return min(max(int(value or 0), 1), MOST_CELLS)


def words(args: argparse.Namespace) -> Iterator[str]:
    """The options of a command line as words, without those of the page."""
    for name, value in vars(args).items():
        if name not in NOT_PASSED and value is not None and value is not False and not callable(value):
            flag = f"--{name.replace('_', '-')}"
            yield flag if value is True else f"{flag}={value}"


def serve(args: argparse.Namespace) -> int:
    """Serve the chat until Ctrl+C; returns the exit code.

    Raises:
        PortError: If the port cannot be had.
    """
    try:
        listening = socket.create_server((HOST, args.port or 0))
    except OSError as e:
        raise PortError(
            f"port {args.port} cannot be had ({os.strerror(e.errno or 0)}); give another --port, or none for a free one."
        ) from None
    command = shlex.join([sys.executable, "-m", "ring_mlx", "chat", *words(args)])
    with listening:
        page = Page(f"exec {command}", listening.getsockname()[1])
        web.run_app(page.application(), sock=listening, print=None, access_log=None, shutdown_timeout=SHUTDOWN_S)
    return 0
