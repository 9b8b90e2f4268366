"""A headless Chromium by its own protocol, for the test of the chat's page."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; ``seen`` are the addresses that it asked for, ``failed`` those that failed.

    Args:
        folder: For what the browser writes.
    """

    def __init__(self, folder):
        self._folder, self._count, self.seen, self.failed = folder, 0, [], []

    async def __aenter__(self):
        flags = ["--headless", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={self._folder}"]
        nothing = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(
            str(PATH), *flags, "about:blank", stdout=nothing, stderr=nothing, start_new_session=True
        )
        while not (said := self._folder / "DevToolsActivePort").exists() or "\n" not in said.read_text():
            await asyncio.sleep(0.05)
        self._http = aiohttp.ClientSession()
        pages = await (await self._http.get(f"http://127.0.0.1:{said.read_text().split()[0]}/json")).json()
        address = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        self._socket = await self._http.ws_connect(address, max_msg_size=0)
        for name in ("Page", "Network"):
            await self.call(f"{name}.enable")
        return self

    async def __aexit__(self, *_):
        await self._http.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also what a start script has started
        await self._process.wait()

    async def call(self, method, **given):
        """The result of a command of the protocol."""
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": given})
        while (message := await self._socket.receive_json()).get("id") != self._count:
            if message["method"] == "Network.requestWillBeSent":
                self.seen.append(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketHandshakeResponseReceived":
                self.seen.append(message["params"]["response"]["status"])
        return message.get("result", {})

    async def evaluate(self, script):
        """The value of a script, waited for if it is a promise."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    async def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
