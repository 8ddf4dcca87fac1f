"""Open pages that the product writes in headless Chromium."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Seen:
    """The page after its scripts have run, and the lines that they wrote to the console."""

    dom: str
    console: list[str]

    @property
    def title(self) -> str:
        return self.dom.partition("<title>")[2].partition("</title>")[0]


def browse(path: Path, script: str = "", size: str = "1200,800") -> Seen:
    """Open a page, run one more script in it, and return what became of it."""
    copy = path.with_suffix(".tested.html")
    copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return browse_url(copy.as_uri(), path.parent, size)


def browse_url(url: str, folder: Path, size: str = "1200,800", *options: str) -> Seen:
    """Open an address. `folder`: for the files of the browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
            f"--user-data-dir={folder / 'browser'}", "--enable-logging=stderr", "--dump-dom",
            "--virtual-time-budget=2000",  # so that promises end before the page is dumped
            *options, url,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return Seen(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def require_narrow(path: Path) -> None:
    """Check that a page needs no scrolling sideways where 500 pixels are all there is."""
    script = """const whole = document.documentElement;
      document.title = `${whole.scrollWidth - whole.clientWidth} too wide`;"""
    assert browse(path, script, "500,800").title == "0 too wide"
