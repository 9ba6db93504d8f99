"""Chromium as the browser tests and the screenshots start it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def find_chromium() -> str | None:
    """Return the program that PATHLM_CHROMIUM names, else a Chromium or Chrome of the system."""
    names = (os.environ.get("PATHLM_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium. Raises `ImportError` without playwright, `FileNotFoundError` without Chromium."""
    from playwright.sync_api import sync_playwright

    if (program := find_chromium()) is None:
        raise FileNotFoundError("no Chromium: install one, or name it in PATHLM_CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield started
        finally:
            started.close()
