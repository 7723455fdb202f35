"""Headless Chromium for the tests of pages, over its pipe: nothing to download."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LIMIT_S = 120
KEYS = {"PageDown": 34, "PageUp": 33, "End": 35, "Home": 36, "Tab": 9, "Enter": 13}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One tab, driven by the DevTools protocol.

    Attributes
    ----------
    errors : what the page's scripts threw, and what the log calls an error.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._rest, self._number, self._session = b"", 0, ""
        self.errors: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")

    def open(self, path: Path) -> None:
        """Load a file; returns when its scripts have run."""
        self._send("Page.navigate", url=path.as_uri())
        until = time.monotonic() + LIMIT_S
        ready = f"location.href === {path.as_uri()!r} && document.readyState"
        while self.value(ready) != "complete":
            assert time.monotonic() < until, "the page did not load"
            time.sleep(0.05)

    def value(self, script: str) -> Any:
        """What an expression gives; promises are waited for."""
        answer = self._send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key that has a name."""
        what = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        if key == "Enter":
            what["text"] = "\r"
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, **what)

    def prefer(self, scheme: str) -> None:
        """Light or dark, as the system's setting."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._send("Emulation.setEmulatedMedia", features=[feature])

    def _send(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method}
        message["params"] = params
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._receive()
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return told["result"]
            self._note(told)

    def _receive(self) -> Any:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 16)
            assert part, "Chromium ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: Any) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        entry = params.get("entry", {})
        if entry.get("level") == "error":
            self.errors.append(entry["text"])


@contextlib.contextmanager
def running(profile: Path) -> Iterator[Browser]:
    """A Chromium of its own, ended at the end; skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    to_browser, from_browser = os.pipe(), os.pipe()
    fds = (to_browser[0], from_browser[1])
    # It reads from descriptor 3 and writes to 4.
    line = f'exec "$@" 3<&{fds[0]} 4>&{fds[1]}'
    command = ["bash", "-c", line, "-", CHROMIUM, "--headless", "--no-sandbox"]
    command += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
    command += ["--disable-gpu", "--window-size=1200,900"]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(
        command, pass_fds=fds, stdout=silent, stderr=silent, start_new_session=True
    )
    for fd in fds:
        os.close(fd)
    try:
        yield Browser(to_browser[1], from_browser[0])
    finally:
        os.close(to_browser[1])
        os.close(from_browser[0])
        process.terminate()
        process.wait()
