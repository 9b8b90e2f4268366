"""``ring-mlx chat --web``: only its own page on this machine gets in, and what it shows is the chat."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys

import aiohttp
import pytest
from aiohttp import web

from ring_mlx.cli import build_parser, main
from tests import browser
from tests.tui_pilot import chat
from tui import command
from tui.web import HOST, Child, Page, words

CHILD = f"exec {sys.executable} -m tests.page_child"
MOST_S = 60.0


def serving(script, line=CHILD):
    """Run a script of a page and an HTTP client while the page is served."""

    async def run():
        with socket.create_server((HOST, 0)) as listening:
            page = Page(line, listening.getsockname()[1])
            runner = web.AppRunner(await page.application())
            await runner.setup()
            await web.SockSite(runner, listening).start()
            try:
                async with aiohttp.ClientSession() as client, asyncio.timeout(MOST_S):
                    await script(page, client)
            finally:
                await runner.cleanup()

    asyncio.run(run())


class Shown:
    """What a page has received."""

    def __init__(self, ws):
        self.ws, self.text = ws, ""

    async def until(self, text):
        while text not in self.text:
            message = await self.ws.receive()
            if message.type != aiohttp.WSMsgType.BINARY:
                raise AssertionError((message, self.text[-500:]))
            self.text += message.data.decode()

    async def keys(self, text):
        await self.ws.send_json(["stdin", text])

    async def closed(self):
        while (await self.ws.receive()).type not in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED):
            pass


async def opened(page, client, **headers):
    headers = {"Origin": page.public_url, **headers}
    return Shown(await client.ws_connect(f"{page.address}ws?width=80&height=24", headers=headers))


def test_only_its_own_page_gets_in(capsys):
    async def script(page, client):
        async def status(address, **headers):
            async with client.get(address, headers=headers) as answer:
                return answer.status

        async def page_of():
            async with client.get(page.address) as answer:
                return await answer.text(), answer.headers

        assert capsys.readouterr().out.count(page.address) == 1
        text, headers = await page_of()
        assert f'data-session-websocket-url="ws://{HOST}:{page.port}/' in text
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert await status(f"{page.address}static/js/textual.js") == 200
        assert await status(page.address, Origin=page.public_url) == 200
        for address in (page.public_url, f"{page.public_url}/ws", f"{page.public_url}/static/js/textual.js"):
            assert await status(address) == 404
        for path in ("static/..%2f..%2fserver.py", "static/%2fetc/passwd", "static//etc/passwd", "download/x"):
            assert await status(page.address + path) in (403, 404)
        for origin in ("http://evil.example", "null", f"http://localhost:{page.port}", f"http://{HOST}"):
            assert await status(page.address, Origin=origin) == 403
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                await opened(page, client, Origin=origin)
        for host in ("evil.example", f"evil.example:{page.port}", f"localhost:{page.port}", HOST):
            assert await status(page.address, Host=host) == 403
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                await opened(page, client, Host=host)
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await client.ws_connect(f"{page.address}ws")

    serving(script, "exit 9")  # no chat is started


def test_a_page_shows_the_chat_and_a_second_one_ends_the_first(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")  # of the terminal, not of the page

    async def script(page, client):
        first = await opened(page, client)
        await first.until("Ask something")
        for strange in (
            "no json",
            "[]",
            "{}",
            '["stdin", 5]',
            '["resize", {}]',
            '["resize", {"width": "x"}]',
            '["x", 1]',
        ):
            await first.ws.send_str(strange)
        await first.ws.send_bytes(b"\0")
        await first.ws.send_str('["stdin", "\\ud800"]')
        await first.keys("\x1b[200~pas\x1b\x11ted\x1b[201~")  # Ctrl+Q in a paste is no key
        await first.until("ted")
        await first.ws.send_json(["resize", {"width": 10**9, "height": 30}])
        second = await opened(page, client)
        await first.closed()
        await second.until("Ask something")
        await second.keys("\x11")  # Ctrl+Q
        await second.closed()

    serving(script)


def test_a_page_whose_chat_cannot_start_is_told(capfd):
    async def script(page, client):
        await (await opened(page, client)).closed()

    serving(script, "sleep 0.2; echo what is wrong >&2; exit 3")
    assert "what is wrong" in capfd.readouterr().out


def test_the_chat_ends_where_its_server_was_killed(tmp_path):
    child = {**os.environ, command.PAGE: "tui.page_driver:PageDriver"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-m", "tests.page_child"], stdin=pipe, stdout=pipe, env=child) as process:
        assert process.stdout.readline() == b"__GANGLION__\n"
        process.stdin.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdout.read()
        assert process.wait(MOST_S) == 0


@pytest.mark.parametrize(
    ("url", "is_opened"),
    [
        ("https://a.example/", True),
        ("mailto:a@b.example", True),
        ("javascript:alert(1)", False),
        ("file:///etc/x", False),
    ],
)
def test_a_link_leaves_the_page_or_is_not_opened(url, is_opened):
    sent = []

    async def send(text):
        sent.append(json.loads(text))

    async def nothing(*_):
        pass

    child = Child("", write_bytes=nothing, write_str=send, close=nothing, download_manager=None)
    asyncio.run(child.on_meta(json.dumps({"type": "open_url", "url": url, "new_tab": True}).encode()))
    assert bool(sent) is is_opened


def test_a_page_offers_no_file():
    async def script(d):
        titles = {c.title for c in d.app.get_system_commands(d.app.screen)}
        assert "Screenshot" in titles
        d.app._driver.__class__ = type("Web", (type(d.app._driver),), {"is_web": True})
        assert {c.title for c in d.app.get_system_commands(d.app.screen)} == titles - {"Screenshot"}

    chat(script)


def parsed(line):
    parser = argparse.ArgumentParser()
    command.add(parser)
    return parser.parse_args(line)


def test_options_reach_the_chat():
    line = [
        "--web",
        "--port",
        "0",
        "--model=-x",
        "--resume",
        "--temp",
        "0",
        "--seed",
        "0",
        "--expert-cache-bytes",
        "8GB",
        "--thinking-start",
        "open",
    ]
    given = parsed([*line, "--system-prompt", "it's\n$(x) é", "--answer-room", "0", "--decay-layer-offset=-1"])
    again = parsed(list(words(given)))
    assert vars(again) == {**vars(given), "web": False, "port": None}
    full = build_parser(["chat", "--web", "--no-tune"]).parse_args(["chat", "--web", "--no-tune"])
    assert "--no-tune" in list(words(full))
    assert build_parser(["chat"]).parse_args(["chat", *words(full)]).no_tune


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--web --plain", "[option] --web has screens and --plain has none; leave one out."),
        ("--web --port 65536", "[option] --port 65536 is no port of --web; give --web and a number up to 65535."),
        ("--port 80", "[option] --port 80 is no port of --web; give --web and a number up to 65535."),
        ("--web --port {}", "[option] port {} cannot be had (Address already in use); give another --port, or none"),
    ],
)
def test_wrong_options(capsys, line, said):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["chat", *line.format(port).split()]) == 2
    assert capsys.readouterr().err.startswith(f"ring-mlx: {said.format(port)}")


def test_without_textual_serve_there_is_a_remedy(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["chat", "--web"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ring-mlx: [install] the package textual_serve is missing; install it: ")
    assert said.endswith(" textual_serve\n")
    assert said.count("\n") == 1


@pytest.mark.skipif(browser.PATH is None, reason="needs Chromium")
def test_in_a_browser(tmp_path, monkeypatch):
    """Typed into a page, and what another page can do with its address."""

    drawn = []

    async def on_data(child, payload):
        drawn.append(payload.decode())
        await child.remote_write_bytes(payload)

    monkeypatch.setattr(Child, "on_data", on_data)

    async def until(shown, script):
        while not await shown.evaluate(script):
            await asyncio.sleep(0.1)

    async def script(page, client):
        async with browser.Browser(tmp_path) as shown:
            await shown.call("Page.navigate", url=page.address)
            await until(shown, "document.body?.classList.contains('-first-byte')")
            await shown.click(200, 300)
            await shown.call("Input.insertText", text="hello")
            while "hello" not in "".join(drawn):
                await asyncio.sleep(0.1)
            outside = [
                s for s in shown.seen if isinstance(s, str) and not s.startswith((page.address, "about:", "data:"))
            ]
            assert all("fonts.googleapis" in s for s in outside)  # asked for by the page, and refused by its policy
            evil = await other_origin()
            await shown.call("Page.navigate", url=evil[0])
            said = await shown.evaluate(
                f"new Promise(r => {{ const s = new WebSocket({json.dumps(page.address.replace('http', 'ws') + 'ws')});"
                "s.onopen = () => r('open'); s.onerror = () => r('refused'); })"
            )
            assert said == "refused"
            read = f"fetch({json.dumps(page.address)}).then(() => 'read', () => 'refused')"
            assert await shown.evaluate(read) == "refused"
            await evil[1].cleanup()

    async def other_origin():
        async def blank(request):
            return web.Response(text="<!DOCTYPE html><title>other</title>", content_type="text/html")

        app = web.Application()
        app.add_routes([web.get("/", blank)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        return f"http://{HOST}:{runner.addresses[0][1]}/", runner

    serving(script)
