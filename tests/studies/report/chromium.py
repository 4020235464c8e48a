"""Opens a page in headless Chromium and tells what went wrong there."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
# Put behind the page's own content in a copy: tells the frame around it what the loaded page looks like.
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement
  parent.postMessage(JSON.stringify({
    images: [...document.images].map(image => image.naturalWidth),
    overflow: root.scrollWidth - root.clientWidth, width: root.clientWidth,
    fetched: performance.getEntriesByType("resource").map(one => one.name)
      .filter(name => !name.startsWith("data:")),
  }), "*")
})</script>"""
# A window of Chromium is never narrower than 500 pixels; a frame is as narrow as a phone.
FRAME = """<!doctype html><link rel="icon" href="data:,">
<script>addEventListener("message", event => { document.documentElement.dataset.seen = event.data })</script>
<iframe src="probed.html" width="{width_px}" height="900" style="border: 0"></iframe>"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Natural widths of the images, pixels that stick out, the page's width, fetched addresses, errors."""

    images: list[int]
    overflow: int
    width: int
    fetched: list[str]
    console: list[str]


def open_page(path: Path, folder: Path, width_px: int) -> Seen:
    """Load a copy of the page; where Chromium is missing, skip, or fail on continuous integration."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        text = "no Chromium: install it (`apt-get install -y --no-install-recommends chromium`)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    copy = folder / "probed.html"
    copy.write_text(path.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("{width_px}", str(width_px)), encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
            "--virtual-time-budget=10000",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, f"the page did not load: {done.stderr[-500:]}"
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(**json.loads(html.unescape(found[1])), console=console)
