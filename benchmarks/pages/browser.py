"""A real browser without a window: opens pages, says what is wrong with them, takes pictures of them.

    with Browser.start() as browser:
        with browser.tab(Path("report.html"), width=390, dark=True) as tab:
            tab.said, tab.asked, tab.read("document.title"), tab.picture()

It speaks the DevTools protocol of Chromium through a pair of pipes: messages of JSON, each ended by a NUL.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from bilevel_fast.base.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "apt-get install -y --no-install-recommends chromium"
_PATIENCE = 60.0  # seconds for an answer, or until a page is ready


def find() -> str | None:
    """The browser on this machine, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A running browser; `start` makes one."""

    def __init__(self, process: subprocess.Popen[bytes], send: int, receive: int) -> None:
        self._process, self._send, self._receive = process, send, receive
        self._number, self._rest, self._events = 0, b"", []

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Self]:
        """Start a browser that keeps nothing, and end it afterwards.

        Raises:
            UserError: There is none.
        """
        path = find()
        if path is None:
            raise UserError(f"no browser: none of {', '.join(NAMES)} is on the path; run: {INSTALL}")
        (theirs, send), (receive, back) = os.pipe(), os.pipe()

        def pipes() -> None:  # the protocol wants these two numbers
            low = [os.dup2(fd, number + 20) for number, fd in ((3, theirs), (4, back))]
            for number, fd in zip((3, 4), low, strict=True):
                os.dup2(fd, number)
                os.close(fd)

        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            command = [
                *(path, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
                *("--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"),
                *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
                *("--force-color-profile=srgb", "--font-render-hinting=none", "--in-process-gpu"),
            ]
            silent = subprocess.DEVNULL
            process = subprocess.Popen(
                command, stdin=silent, stdout=silent, stderr=silent, preexec_fn=pipes, close_fds=False
            )
            os.close(theirs)
            os.close(back)
            browser = cls(process, send, receive)
            try:
                yield browser
            finally:
                with contextlib.suppress(OSError, UserError):
                    browser.call("Browser.close")
                os.close(send)
                os.close(receive)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer; events on the way are kept.

        Raises:
            UserError: It says no, has ended, or says nothing for a minute.
        """
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send, data) :]
        while True:
            found = self._next(method)
            if found.get("id") != number:
                self._events.append(found)
            elif "error" in found:
                raise UserError(f"the browser refuses {method}: {found['error'].get('message')}")
            else:
                return found["result"]

    def events(self, session: str) -> list[dict[str, Any]]:
        """What has happened in a tab since the last time."""
        self.call("Browser.getVersion")  # whatever was on its way before this answer is here then
        mine = [event for event in self._events if event.get("sessionId") == session]
        self._events = [event for event in self._events if event.get("sessionId") != session]
        return mine

    def _next(self, method: str) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._receive, 1 << 20) if ready else b""
            if not data:
                raise UserError(f"the browser has {'ended' if ready else 'not answered'} at {method}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    @contextlib.contextmanager
    def tab(self, path: Path, width: int = 1200, height: int = 800, dark: bool = False) -> Iterator["Tab"]:
        """A page at a width, once it is laid out; gone afterwards."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        try:
            tab = Tab(self, session)
            for domain in ("Runtime", "Log", "Network", "Page"):
                self.call(f"{domain}.enable", session)
            tab.look(width, height, dark)
            found = self.call("Page.navigate", session, url=path.resolve().as_uri())
            if "errorText" in found:
                raise UserError(f"{path} cannot be opened: {found['errorText']}")
            tab.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")
            yield tab
        finally:
            self.call("Target.closeTarget", targetId=target)


class Tab:
    """A page that is open.

    Attributes:
        said: What it wrote to the console, and errors that nobody caught; `take` fills it.
        asked: Addresses that it asked for, but for its own file and data within it.
        width: Of its window; a page may take more.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.said: list[str] = []
        self.asked: list[str] = []
        self.width = 0

    def look(self, width: int, height: int = 800, dark: bool = False) -> None:
        """Lay it out anew: at a width in CSS pixels, narrow ones as on a phone, in light or dark."""
        self.width = width
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._browser.call("Emulation.setDeviceMetricsOverride", self._session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._browser.call("Emulation.setEmulatedMedia", self._session, features=[scheme])

    def read(self, expression: str) -> Any:
        """The value of JavaScript, which the page itself could not run.

        Raises:
            UserError: It fails.
        """
        found = self._browser.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise UserError(f"{expression}: {found['exceptionDetails'].get('text')}")
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until an expression is true; a minute at most."""
        end = time.monotonic() + _PATIENCE
        while not self.read(condition):
            if time.monotonic() > end:
                raise UserError(f"the page is not ready: {condition}")
            time.sleep(0.02)

    def take(self) -> None:
        """Take note of what has happened."""
        for event in self._browser.events(self._session):
            what, fields = event.get("method"), event.get("params", {})
            if what == "Runtime.consoleAPICalled":
                self.said.append(" ".join(str(each.get("value", each.get("description"))) for each in fields["args"]))
            elif what == "Runtime.exceptionThrown":
                self.said.append(fields["exceptionDetails"].get("text", "exception"))
            elif what == "Log.entryAdded":
                self.said.append(fields["entry"]["text"])
            elif what == "Network.requestWillBeSent":
                address = fields["request"]["url"]
                if not address.startswith("data:") and address != fields.get("documentURL"):
                    self.asked.append(address)

    def press(self, key: str) -> None:
        """A key, such as Tab."""
        code, text = {"Tab": (9, {}), "Enter": (13, {"text": "\r"})}[key]
        for kind, typed in (("keyDown", text), ("keyUp", {})):
            fields = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, **typed}
            self._browser.call("Input.dispatchKeyEvent", self._session, **fields)

    def picture(self, top: float = 0, height: float | None = None) -> bytes:
        """A PNG of the page, from `top` on and so high, by default to its end."""
        if height is None:
            height = self.read("document.documentElement.scrollHeight") - top
        clip = {"x": 0, "y": top, "width": self.read("innerWidth"), "height": height, "scale": 1}
        found = self._browser.call(
            "Page.captureScreenshot", self._session, format="png", captureBeyondViewport=True, clip=clip
        )
        return base64.b64decode(found["data"])
