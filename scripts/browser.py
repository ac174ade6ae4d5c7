"""A headless Chromium driven through its debugging pipe: no driver, no package, only the browser itself.

Chromium reads JSON messages, each ended by a zero byte, from file descriptor 3 and answers on 4
(--remote-debugging-pipe, Chrome DevTools Protocol). CHROMIUM names the program where it has another name.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.errors import AuroraError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


_PLUMBING = """
import fcntl, os, sys
for place, end in zip((3, 4), [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]):
    os.dup2(end, place)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserError(AuroraError):
    """The browser is missing, does not answer, or a page's script failed."""


def find_browser() -> str | None:
    """Path of a Chromium, None if there is none."""
    for name in (os.environ.get("CHROMIUM"), *NAMES):
        if name and (found := shutil.which(name)):
            return found
    return None


class Browser:
    """One page of a headless Chromium, as a context manager.

    Args:
        size: (width, height) of the window in pixels.
        timeout: seconds to wait for an answer.

    Raises:
        BrowserError: there is no browser, or it does not start.
    """

    def __init__(self, size: tuple[int, int] = (1280, 900), timeout: float = 60) -> None:
        program = find_browser()
        if program is None:
            raise BrowserError(f"no browser found ({', '.join(NAMES)}). Remedy: apt-get install chromium.")
        self.timeout = timeout
        self.errors: list[str] = []
        """What the page's script raised and what its policy refused."""
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._number, self._buffer = 0, b""
        self._start(program)
        target = self._call("Target.createTarget", {"url": "about:blank"}, session=False)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=False)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        self.resize(*size)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for end in (self._to, self._from):
            os.close(end)
        self._profile.cleanup()

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Size of the window in pixels, and whether the user prefers a dark page."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, page: Path, fragment: str = "") -> float:
        """Open a file and wait until it is loaded; returns the seconds that took."""
        self._events.clear()
        self.errors.clear()
        self.requests.clear()
        began = time.monotonic()
        self._call("Page.navigate", {"url": "about:blank"})
        self._wait("Page.loadEventFired")
        self._events.clear()
        began = time.monotonic()
        self._call("Page.navigate", {"url": page.resolve().as_uri() + fragment})
        self._wait("Page.loadEventFired")
        return time.monotonic() - began

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression, which may be a promise.

        Raises:
            BrowserError: the script failed.
        """
        wanted = {"expression": script, "returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self._call("Runtime.evaluate", wanted)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{script[:80]}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def press(self, key: str, code: int = 0, text: str | None = None) -> None:
        """Press and release a key; `text` is what it types."""
        typed = {"text": text} if text else {}
        down = {"type": "keyDown", "key": key, "windowsVirtualKeyCode": code, **typed}
        self._call("Input.dispatchKeyEvent", down)
        self._call("Input.dispatchKeyEvent", {"type": "keyUp", "key": key, "windowsVirtualKeyCode": code})

    def settle(self, seconds: float = 0.4) -> None:
        """Give the page's timers and pictures time."""
        self.run(f"new Promise(done => setTimeout(done, {int(seconds * 1000)}))")

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """PNG of the window, or of the whole page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = {"format": "png", "captureBeyondViewport": whole}
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", wanted)["data"]))
        return path

    def _start(self, program: str) -> None:
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--mute-audio", "--hide-scrollbars", "--disable-background-networking", "--remote-debugging-pipe",
            "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={self._profile.name}",
        ]  # fmt: skip
        # The pipe's ends must be 3 and 4 there, numbers that are taken here: a second process puts them in place.
        plumbing = [sys.executable, "-c", _PLUMBING, str(read), str(write), program, *flags]
        # Chromium writes crash reports and sound and desktop settings beside the profile, below these folders.
        homes = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
        self._process = subprocess.Popen(
            plumbing,
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(homes, self._profile.name)},
        )
        os.close(read)
        os.close(write)

    def _call(self, method: str, parameters: dict[str, Any] | None = None, session: bool = True) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if session:
            message["sessionId"] = self._session
        try:
            os.write(self._to, json.dumps(message).encode() + b"\0")
        except BrokenPipeError as error:
            raise BrowserError("the browser ended. Remedy: run it by hand with --headless to see why.") from error
        deadline = time.monotonic() + self.timeout
        while message["id"] not in self._answers:
            self._read(deadline, method)
        answer = self._answers.pop(message["id"])
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer.get("result", {})

    def _wait(self, event: str) -> None:
        deadline = time.monotonic() + self.timeout
        while not any(found["method"] == event for found in self._events):
            self._read(deadline, event)

    def _read(self, deadline: float, what: str) -> None:
        ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(self._from, 1 << 20) if ready else b""
        if not data:
            raise BrowserError(f"no answer of the browser to {what} within {self.timeout:g} s, or it ended.")
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        found = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event["method"] == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.errors.append(f"{found['entry']['text']} {found['entry'].get('url', '')}".strip())
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
