"""Headless Chromium over the pipe of its DevTools protocol: pages that tests type into, click on and look at."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe", "--window-size=1100,1000")


def find_browser():
    """Where one is, or ``None``."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One page of a browser."""

    def __init__(self, to, back):
        self._to, self._back, self._number, self._session = to, back, 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method, **given):
        self._number += 1
        message = {"id": self._number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        data = b""
        while not data.endswith(b"\0"):
            piece = os.read(self._back, 1)
            assert piece, "the browser has ended"
            data += piece
        return json.loads(data[:-1])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, script):
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script, seconds=20):
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"{script} did not come about: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def screenshot(self):
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browsing(folder):
    """A page of a browser of its own, whose profile is in ``folder``."""
    there, to = os.pipe()
    back, here = os.pipe()
    command = [find_browser(), *FLAGS, f"--user-data-dir={folder}"]
    wired = ["bash", "-c", f'exec "$@" 3<&{there} 4>&{here}', "bash", *command]
    with subprocess.Popen(wired, pass_fds=(there, here), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        os.close(there)
        os.close(here)
        try:
            yield Page(to, back)
        finally:
            process.kill()
            os.close(to)
            os.close(back)
