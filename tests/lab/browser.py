"""A real Chromium without a screen, driven over its DevTools protocol on a pair of pipes.

It can reach this machine only, and remembers every address that its pages asked for.
"""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from lab.lifeline import end_with_us

WAIT = 60.0  # seconds for anything; a cold start on a busy machine takes some
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """``with Browser(directory) as browser: browser.open(url)``. One page at a time."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("chromium")
        assert program, "Debian's package chromium is missing: tools/prepare.sh packages test"
        self._numbers = itertools.count(1)
        self._heard = b""
        self._session = ""
        self.requests: list[str] = []
        self.console: list[str] = []  # what pages printed, and what the browser refused them
        reads, self._out = os.pipe()
        self._in, writes = os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (reads, writes)]  # far from the 3 and 4 that it wants
        words = [program, *QUIET, f"--user-data-dir={directory / 'profile'}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{theirs[0]} 4>&{theirs[1]} && exec "$@"', "sh", *words],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(directory / "browser.log").open("wb"),
            env={**os.environ, "HOME": str(directory), "TZ": "UTC"},
        )
        end_with_us(self._process.pid)
        for fd in (reads, writes, *theirs):
            os.close(fd)

    def __enter__(self) -> Self:
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a DevTools method."""
        number = next(self._numbers)
        question: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            question["sessionId"] = self._session
        os.write(self._out, json.dumps(question).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + WAIT
        while b"\0" not in self._heard:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            if not (more := os.read(self._in, 1 << 20)):
                raise EOFError("the browser is gone")
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        match message.get("method"):
            case "Network.requestWillBeSent":
                if not (url := message["params"]["request"]["url"]).startswith("data:"):  # nobody is asked for that
                    self.requests.append(url)
            case "Runtime.consoleAPICalled":
                self.console += [str(a.get("value", a.get("description"))) for a in message["params"]["args"]]
            case "Runtime.exceptionThrown":
                self.console.append(str(message["params"]["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append(message["params"]["entry"]["text"])
        return message

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a piece of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of ``expression`` as soon as it is true."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if value := self.evaluate(f"(() => {{ try {{ return {expression} }} catch (e) {{ return null }} }})()"):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"never true: {expression}; the page says:\n{self.text()}\n{self.console}")

    def text(self, selector: str = "body") -> str:
        """Visible text."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def look(self, *, dark: bool = False, width: int = 1200, height: int = 900) -> None:
        """Media preferences of the user."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        narrow = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": narrow}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setScrollbarsHidden", hidden=True)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **_KEYS.get(key, {}))

    def screenshot(self, *, whole: bool = False) -> bytes:
        """Screenshot of the visible part, or of the whole page, as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def colours(self, png: bytes) -> dict[str, int]:
        """Number of pixels of each colour (``#rrggbb``). The browser itself decodes the picture."""
        found: dict[str, int] = self.evaluate(_COLOURS % base64.b64encode(png).decode())
        return found


_COLOURS = """(async () => {
  const image = new Image(), canvas = document.createElement("canvas"), found = {};
  image.src = "data:image/png;base64,%s";
  await image.decode();
  [canvas.width, canvas.height] = [image.width, image.height];
  const drawing = canvas.getContext("2d");
  drawing.drawImage(image, 0, 0);
  for (const pixel of new Uint32Array(drawing.getImageData(0, 0, image.width, image.height).data.buffer))
    found[pixel] = (found[pixel] || 0) + 1;
  const hex = n => "#" + [n & 255, n >> 8 & 255, n >> 16 & 255].map(b => b.toString(16).padStart(2, "0")).join("");
  return Object.fromEntries(Object.entries(found).map(([pixel, count]) => [hex(Number(pixel)), count]));
})()"""
_KEYS: dict[str, dict[str, Any]] = {
    "Enter": {"windowsVirtualKeyCode": 13, "text": "\r"},
    "Tab": {"windowsVirtualKeyCode": 9},
    "ArrowLeft": {"windowsVirtualKeyCode": 37},
    "ArrowRight": {"windowsVirtualKeyCode": 39},
}
