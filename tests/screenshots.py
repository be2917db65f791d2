"""Make the README's picture again: `python tests/screenshots.py` photographs the demo with Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".screenshots"
WIDTH, HEIGHT = 1280, 860
STORY_SECONDS, SPEED = 45, 4  # how much of the demo's story has been told, and how fast


def main() -> None:
    """Photograph the dashboard in both themes, at the same moment of the story."""
    command = [sys.executable, str(ROOT / "monitor.py"), "demo", "--speed", str(SPEED)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = demo.stdout.readline().split()[-1]
        told = time.monotonic() + STORY_SECONDS / SPEED
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            pages = {}
            for scheme in ("light", "dark"):
                size = {"width": WIDTH, "height": HEIGHT}
                pages[scheme] = browser.new_page(viewport=size, color_scheme=scheme, locale="en-GB")
                pages[scheme].goto(address + "/dashboard")
                pages[scheme].locator("#pill[data-state=live]").wait_for()
            time.sleep(max(0.0, told - time.monotonic()))
            for scheme, page in pages.items():
                page.wait_for_timeout(1000)
                page.screenshot(path=FOLDER / f"dashboard-{scheme}.png")
            browser.close()
    finally:
        demo.terminate()
        demo.wait()


if __name__ == "__main__":
    main()
