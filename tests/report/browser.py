"""A real headless Chromium, driven over its own debugging pipe: what a page asks for, complains of, and looks like."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


def chromium() -> str | None:
    """Where a Chromium is, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One browser process with one tab; a context manager.

    Args:
        program: as `chromium` found it.
        profile: an empty folder for the browser's own files.
    """

    def __init__(self, program: str, profile: Path) -> None:
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4; a shell puts the pipes there.
        passed = [os.dup(end) for end in (theirs_in, theirs_out)]
        arguments = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{passed[0]} 4>&{passed[1]}', "bash", *arguments],
            pass_fds=passed, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *passed):
            os.close(end)
        self._numbers, self._buffer = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []
        tab = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")
        self.tell("Page.setLifecycleEventsEnabled", enabled=True)
        self.tell("Emulation.setFocusEmulationEnabled", enabled=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._out)
        os.close(self._in)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def call(self, method: str, session: str | None = None, **arguments: Any) -> dict[str, Any]:
        """One command and its answer; events that come in between are kept in ``events``."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def tell(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One command to the tab."""
        return self.call(method, self.session, **arguments)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has gone"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path, width: int, *, dark: bool = False) -> Page:
        """Load a file as a screen of that width shows it, and wait until it is there."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.tell("Emulation.setEmulatedMedia", media="", features=scheme)
        self.events.clear()
        loader = self.tell("Page.navigate", url=path.as_uri())["loaderId"]
        while not any(self._loaded(event, loader) for event in self.events):
            self.events.append(self._read())
        return Page(self)

    @staticmethod
    def _loaded(event: dict[str, Any], loader: str) -> bool:
        about = event.get("params", {})
        return (event.get("method"), about.get("name"), about.get("loaderId")) == (
            "Page.lifecycleEvent",
            "load",
            loader,
        )


class Page:
    """What is seen of an open page."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.browser.tell(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Everything on the console, and every uncaught exception."""
        self.ask("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(e["params"]) for e in self.browser.events if e.get("method") in kinds]

    def requests(self) -> list[str]:
        """Every address that was asked for, in order."""
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path) -> tuple[int, int]:
        """The whole page as a PNG; returns its width and height."""
        size = self.browser.tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.browser.tell("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
        return round(size["width"]), round(size["height"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.browser.tell("Page.printToPDF", printBackground=True)["data"])


def overflowing(page: Page) -> Sequence[str]:
    """Elements that stick out of the page's width, those that may be scrolled sideways left out."""
    found: list[str] = page.ask(
        """[...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, pre") &&
            e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
        ).map(e => e.tagName + "." + (e.getAttribute("class") || "") + ": " + e.textContent.slice(0, 40))"""
    )
    return found
