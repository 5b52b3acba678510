"""The site on a telephone and on a wide screen: no page scrolls sideways, and pictures need no network."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browser import chromium, needs_browser, resize

ROOT = Path(__file__).parent.parent
PAGES = ["", "uplink", "choosing", "api/compression"]  # the widest of each kind
LOOK = """
const inside = (e) => { for (let p = e.parentElement; p; p = p.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX) && p !== document.body) return true; };
return {
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    cut: [...document.querySelectorAll(".md-content p, .md-content table, .md-content pre, .md-content img")].filter(
        (e) => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !inside(e)).length,
    missing: [...document.images].filter((i) => getComputedStyle(i).display !== "none" && !i.naturalWidth).length,
    images: document.images.length,
}
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@needs_browser
@pytest.mark.browser
@pytest.mark.slow
def test_pages_fit_narrow_and_wide_screens(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with chromium(tmp_path / "profile") as driver:
            for page in PAGES:
                driver.get(f"http://127.0.0.1:{server.server_port}/{page}/".replace("//", "/").replace(":/", "://"))
                for width in (400, 1400):
                    resize(driver, width, 900)
                    found = driver.execute_script(LOOK)
                    assert {**found, "images": 0} == {"wide": 0, "cut": 0, "missing": 0, "images": 0}, (page, width)
        server.shutdown()
