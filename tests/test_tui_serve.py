"""`fitcheck --serve`: the screen in a real browser, and nobody else's pages at it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from screen import question

from fitcheck import FitCheckError, fit
from fitcheck.cli import main
from fitcheck.text import gib
from fitcheck.tui import state
from fitcheck.tui.state import State

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
served = pytest.mark.skipif(
    find_spec("textual_serve") is None, reason="needs textual-serve (fitcheck-rlhf[serve])"
)
# Keeps the page's terminal: what it shows is in its buffer, the canvas has only pixels.
CAPTURE = """
Object.defineProperty(Object.prototype, 'terminal', {configurable: true, set(value) {
  window.captured = value;
  Object.defineProperty(this, 'terminal', {value, writable: true, configurable: true});
}});
"""
ROWS = """
(() => {
  const terminal = window.captured, rows = [];
  if (!terminal) return '';
  for (let i = 0; i < terminal.rows; i++)
    rows.push(terminal.buffer.active.getLine(i)?.translateToString(true) ?? '');
  return rows.join('\\n');
})()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def address() -> Iterator[str]:
    """Where a server answers, in a process of its own that is ended with the test."""
    state.save(State(question(), live=False))
    port = free_port()
    command = [sys.executable, "-m", "fitcheck", "--serve", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                if server.poll() is None and status(f"http://localhost:{port}/") == 200:
                    break
                time.sleep(0.1)
            yield f"localhost:{port}"
        finally:
            server.terminate()


def status(url: str, **headers: str) -> int:
    """The HTTP status; 0: nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as r:
            return int(r.status)
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code
    except OSError:
        return 0


@served
def test_only_this_machines_own_page_may_connect(address: str) -> None:
    page, channel = f"http://{address}/", f"http://{address}/ws"
    assert status(page) == 200
    assert status(page, Host="evil.example") == 403
    assert status(channel, Origin="http://evil.example") == 403
    assert status(channel, Origin=f"http://{address}") != 403
    with urllib.request.urlopen(page, timeout=20) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe-eval" not in policy
    port = int(address.rpartition(":")[2])
    listening = {
        socket_.laddr.ip
        for child in psutil.Process().children()
        for socket_ in child.net_connections("tcp")
        if socket_.status == psutil.CONN_LISTEN and socket_.laddr.port == port
    }
    assert listening and listening <= {"127.0.0.1", "::1"}


@served
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_a_browser_shows_the_verdict_and_a_key_changes_it(address: str, tmp_path: Path) -> None:
    first = f"needs {gib(fit(question()).peak_bytes)}"
    second = f"needs {gib(fit(question(tuning='lora')).peak_bytes)}"

    async def session() -> None:
        async with Browser(tmp_path) as browser:
            await browser.open(f"http://{address}/")
            shown = await browser.wait_for(first)
            assert "DOES NOT FIT" in shown and "Llama-3.1-8B" in shown
            await browser.press("h")
            assert "DOES NOT FIT" in await browser.wait_for(second)

    asyncio.run(session())


class Browser:
    """Headless Chromium, driven over its debugging protocol."""

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.calls = 0

    async def __aenter__(self) -> Browser:
        import aiohttp

        port = free_port()
        options = ["--headless=new", "--disable-gpu", "--window-size=1000,600"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no sandbox to run in
        options += [f"--user-data-dir={self.profile}", f"--remote-debugging-port={port}"]
        assert CHROMIUM is not None
        quiet = subprocess.DEVNULL
        self.child = subprocess.Popen([CHROMIUM, *options], stdout=quiet, stderr=quiet)
        self.http = aiohttp.ClientSession()
        for _ in range(300):
            try:
                async with self.http.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [tab for tab in await answer.json() if tab["type"] == "page"]
            except aiohttp.ClientError:
                pages = []
            if pages:
                break
            await asyncio.sleep(0.1)
        self.socket = await self.http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
        return self

    async def __aexit__(self, *fault: object) -> None:
        await self.socket.close()
        await self.http.close()
        self.child.terminate()
        self.child.wait()

    async def call(self, method: str, **parameters: Any) -> Any:
        self.calls += 1
        me = self.calls
        await self.socket.send_json({"id": me, "method": method, "params": parameters})
        while True:
            said = await self.socket.receive_json()
            if said.get("id") == me:
                return said["result"]

    async def open(self, url: str) -> None:
        await self.call("Page.enable")
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=CAPTURE)
        await self.call("Page.navigate", url=url)

    async def rows(self) -> str:
        result = await self.call("Runtime.evaluate", expression=ROWS)
        return str(result["result"].get("value", ""))

    async def wait_for(self, words: str) -> str:
        """The page's terminal as text, once the words are on it."""
        shown = ""
        for _ in range(300):
            shown = await self.rows()
            if words in shown:
                return shown
            await asyncio.sleep(0.1)
        raise AssertionError(f"no {words!r} in:\n{shown}")

    async def press(self, key: str) -> None:
        await self.call("Runtime.evaluate", expression="window.captured.focus()")
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "fitcheck.tui.serve", raising=False)
    monkeypatch.setitem(sys.modules, "textual_serve.server", None)
    assert main(["--serve"]) == 2
    said = capsys.readouterr().err
    assert "serving needs" in said and "fitcheck-rlhf[serve]" in said


@pytest.mark.parametrize("port", ["0", "70000", "x"])
def test_a_port_that_is_none(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["--serve", "--port", port]) == 2
    except FitCheckError:
        pytest.fail("not told as a mistake")
    assert "port" in capsys.readouterr().err
