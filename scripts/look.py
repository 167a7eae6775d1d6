"""Look at a page as a reader would: `python scripts/look.py PAGE.html OUT`.

Opens the page in a headless Chromium (the one on PATH, or $CHROMIUM), light and dark, wide and narrow, writes a picture
of each into OUT, and fails when the page says anything on the console, asks for anything but itself, is wider than the
window, or leaves its curves undrawn. Speaks the browser's own protocol, so it needs the package `websockets` alone.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

WIDTHS = {"wide": 1400, "narrow": 400}
SCHEMES = ("light", "dark")
PATIENCE = 120.0
_MOST_HEIGHT = 16_000  # of a picture; a browser draws no higher ones


class Tab:
    """One page of the browser, and all that it has said."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.numbers = itertools.count(1)
        self.said: list[dict[str, Any]] = []

    def ask(self, method: str, **given: Any) -> dict[str, Any]:
        """Call a method of the protocol, and keep what comes before the answer."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": given}))
        while True:
            message = json.loads(self.socket.recv(timeout=PATIENCE))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])
            self.said.append(message)

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


def look(tab: Tab, address: str, scheme: str, width: int, picture: Path) -> list[str]:
    """Take one picture; return what is wrong."""
    tab.said.clear()
    tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    tab.ask("Page.navigate", url=address)
    end = time.monotonic() + PATIENCE
    while tab.value("document.readyState") != "complete" or (
        tab.value("document.querySelector('.plot') !== null && document.body.dataset.drawn !== 'yes'")
    ):
        if time.monotonic() > end:
            return [f"the curves are not drawn: {tab.value('document.querySelector(`#curves-word`)?.textContent')}"]
        time.sleep(0.2)
    time.sleep(0.5)
    height = min(int(tab.value("document.documentElement.scrollHeight")), _MOST_HEIGHT)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = tab.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    picture.write_bytes(base64.b64decode(shot["data"]))
    wrong = []
    if (reached := tab.value("document.documentElement.scrollWidth")) > width:
        wrong.append(f"the page is {reached} wide in a window of {width}")
    for message in tab.said:
        given = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            asked = given["request"]["url"]
            if asked != address and not asked.startswith(("data:", "blob:")):
                wrong.append(f"asks for {asked[:200]}")
        elif message["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            wrong.append(f"says {json.dumps(given)[:400]}")
    return wrong


def main() -> int:
    """Look four times."""
    page, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.stderr.write("there is no chromium on PATH; name one in $CHROMIUM\n")
        return 2
    wrong = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        command = [browser, *options, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(profile)), max_size=1 << 28) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    tab.ask(f"{domain}.enable")
                for scheme, (name, width) in itertools.product(SCHEMES, WIDTHS.items()):
                    found = look(tab, page.as_uri(), scheme, width, out / f"{page.stem}-{scheme}-{name}.png")
                    sys.stdout.write(f"{scheme}, {name}: {'; '.join(found) or 'well'}\n")
                    wrong += len(found)
        finally:
            process.terminate()
            process.wait(timeout=30)
    return 1 if wrong else 0


def _address(profile: Path) -> str:
    """Where the browser's first page listens."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        port = profile / "DevToolsActivePort"
        if port.is_file() and port.read_text().strip():
            number = port.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{number}/json/list", timeout=PATIENCE) as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.2)
    raise RuntimeError("the browser does not answer")


if __name__ == "__main__":
    sys.exit(main())
