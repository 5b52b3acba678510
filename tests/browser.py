"""A headless Chromium for tests that look at pages, and the processes that serve them. All ends with its block."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")

FLAGS = [
    "--headless=new",
    "--no-sandbox",  # root has no other way
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-crash-reporter",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # pages reach nothing outside
    # Without a mouse, charts would show their toolbars over the lines.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
]

# On a machine of one's own a missing browser is no failure; in CI nobody would notice that nothing was looked at.
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not IN_CI,
    reason="no chromium or no chromedriver: `make browser` installs both",
)


def require_browser() -> None:
    """Fail where there is none, for CI, at the beginning of what a test prepares for it."""
    if not (CHROMIUM and DRIVER):
        pytest.fail("CI has no chromium or no chromedriver: run `make browser` before the tests")


@contextlib.contextmanager
def chromium(profile: Path, width: int = 1400, height: int = 1600) -> Iterator[Any]:
    """Yield a selenium driver of a browser with an empty profile, its viewport ``width`` x ``height`` pixels."""
    require_browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    service = Service(DRIVER, popen_kw={"start_new_session": True})  # the browser is in the driver's process group
    try:
        driver = webdriver.Chrome(options, service)
        driver.set_page_load_timeout(60)
        resize(driver, width, height)
        yield driver
        driver.quit()
    finally:
        if service.process is not None:
            end(service.process)


@contextlib.contextmanager
def server(command: list[str], url: str, log: Path, seconds: float = 180, **environment: str) -> Iterator[None]:
    """Run a server until the block ends, which begins when ``url`` answers.

    Raises:
        RuntimeError: If it ends, or does not answer within ``seconds``; the message has the end of its log.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **environment}
        )
    try:
        deadline = time.monotonic() + seconds
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not answer at {url}:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield
    finally:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all of its group, with patience first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def resize(driver: Any, width: int, height: int) -> None:
    """Set the size of the viewport; a window of less than 500 pixels Chromium does not make by itself."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )


def wait_for(driver: Any, look: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Return the first true value of ``look``, or fail after ``seconds`` with what the page says instead."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            text = driver.execute_script("return document.body.innerText")
            pytest.fail(f"{driver.current_url} shows no {what} within {seconds:g} s, but:\n{text[:2000]}")
        time.sleep(0.1)
    return found


def save_screenshot(driver: Any, path: Path) -> None:
    """Save what the browser shows as a PNG of 256 colours, a third of the size."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False
