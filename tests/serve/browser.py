"""A real headless browser, driven over its DevTools protocol."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page:
    """A page that is open."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._ids = connection, itertools.count(1)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._connection.recv(timeout=20))
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> None:
        """Waits until an expression is true."""
        give_up = time.monotonic() + 20
        while not self.run(script):
            assert time.monotonic() < give_up, f"never true: {script}"
            time.sleep(0.05)


@contextlib.contextmanager
def browsing(url: str, profile: Path) -> Iterator[Page]:
    """Opens a page; skips the test where no browser is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser on PATH, looked for {', '.join(NAMES)}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [program, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            said = next(line for line in process.stderr if line.startswith("DevTools listening"))
            found = re.search(r"ws://([^/]+)/", said)
            assert found
            opened = urllib.request.Request(f"http://{found[1]}/json/new?{url}", method="PUT")
            with urllib.request.urlopen(opened, timeout=20) as response:
                target = json.load(response)["webSocketDebuggerUrl"]
            with connect(target, compression=None, max_size=None) as connection:
                yield Page(connection)
        finally:
            process.kill()
