"""A headless Chromium driven through its DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 30.0  # seconds: two busy cores start a browser slowly


def find() -> str | None:
    """The path of a Chromium on this machine; None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `evaluate` runs JavaScript in it, `wait` until an expression holds."""

    def __init__(self, path: str, width: int = 1200, height: int = 800):
        self._loop = asyncio.new_event_loop()
        self._profile = tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-port=0", f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}",
             "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._count = 0
        self.complaints: list[str] = []  # uncaught errors of the page's scripts, and requests to other hosts
        try:
            self._run(self._connect())
        except BaseException:
            self.close()
            raise

    def _run(self, coroutine):
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, PATIENCE))

    async def _connect(self) -> None:
        told = Path(self._profile.name) / "DevToolsActivePort"
        while not (told.is_file() and told.read_text().count("\n")):
            assert self._process.poll() is None, "the browser ended at its start"
            await asyncio.sleep(0.05)
        port = told.read_text().split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as response:
            tab = next(tab for tab in await response.json() if tab["type"] == "page")
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Network"):
            await self._call(f"{domain}.enable")

    async def _call(self, method: str, **params):
        self._count += 1
        number = self._count
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(message["params"]["exceptionDetails"])[:500])
        if message.get("method") == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("http://127.0.0.1", "data:", "about:")):
                self.complaints.append(f"asks for {url}")

    def call(self, method: str, **params):
        return self._run(self._call(method, **params))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str):
        """The JSON value of an expression, awaited if it is a promise."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression: str, seconds: float = PATIENCE) -> None:
        """Until an expression holds."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            shown = self.evaluate("document.body?.innerText") or ""
            assert time.monotonic() < end, f"{expression} does not come true; the page shows:\n{shown}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        if hasattr(self, "_session"):
            self._run(self._session.close())
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._loop.close()
        self._profile.cleanup()
