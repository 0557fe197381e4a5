"""A page in headless Chromium, driven over its debugging pipe: nothing to install beside the browser itself."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)
PATIENCE = 60.0  # seconds for one answer


def find_browser() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of a fresh browser.

    Attributes:
        events: all that the browser reported, as (method, parameters).
    """

    def __init__(self, browser: str, profile: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        commands, self._write = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in os.pipe())
        self._read, answers = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in os.pipe())
        self._process = subprocess.Popen(
            [browser, *ARGUMENTS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(commands, 3), os.dup2(answers, 4)),  # where the browser looks for its pipe
            pass_fds=(3, 4),
        )
        os.close(commands), os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[tuple[str, dict]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._write), os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict:
        """Result of a command of the DevTools protocol."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self._read, 1 << 16)
            assert more, "the browser ended"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, place: Path | str) -> None:
        """Load a local file or an address and wait until it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression; a promise is waited for."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def type(self, selector: str, text: str) -> None:
        """Replace what stands in a field, as someone who types."""
        self.run(f"(() => {{ const f = document.querySelector({json.dumps(selector)}); f.focus(); f.select(); }})()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key="Delete", code="Delete", windowsVirtualKeyCode=46)

    def press(self, key: str) -> None:
        """One key, as from the keyboard: a letter, or Enter."""
        text = "\r" if key == "Enter" else key
        code = 13 if key == "Enter" else ord(key.upper())
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            said = self.run("document.body.innerText")
            assert time.monotonic() < end, f"never true: {condition}; the page says {said!r}"
            time.sleep(0.02)

    def click(self, selector: str, kind: str = "click") -> None:
        """A click (or kind="move": the pointer only) on the middle of an element."""
        # Two frames later the picture has been drawn as scrolled: before, a busy machine's click hits what was there.
        box = self.run(
            f"new Promise(done => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); "
            "requestAnimationFrame(() => requestAnimationFrame(() => { const b = e.getBoundingClientRect(); "
            "done([b.x + b.width / 2, b.y + b.height / 2]); })); })"
        )
        place = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        for event in ("mouseMoved",) if kind == "move" else ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, **place)

    def choose(self, selector: str, value: str) -> None:
        """Pick an option of a <select>."""
        self.run(
            f"(() => {{ const s = document.querySelector({json.dumps(selector)}); s.value = {json.dumps(value)}; "
            "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def screenshot(self, path: Path, whole: bool = False) -> bytes:
        """Write a PNG of what is visible, or of the whole page; returns its bytes."""
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        path.write_bytes(data)
        return data

    def errors(self) -> list[str]:
        """What the console showed: uncaught exceptions, errors and warnings, refused requests."""
        found = [str(p["exceptionDetails"]) for method, p in self.events if method == "Runtime.exceptionThrown"]
        found += [str(p["entry"]) for method, p in self.events if method == "Log.entryAdded"]
        return found + [str(p["args"]) for method, p in self.events if method == "Runtime.consoleAPICalled"]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself included."""
        return [p["request"]["url"] for method, p in self.events if method == "Network.requestWillBeSent"]
