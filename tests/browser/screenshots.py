"""Takes the pictures of the README: python tests/browser/screenshots.py ROUTED_RUN SIGNAL_RUN [--out docs]."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from chromium import browser
from pathlm.report import report

LARGEST = 250_000
"""Bytes of a picture at most."""


def part(page: Any, file: Path, first: str, last: str) -> None:
    """Write the part of a page from the top of one element to the bottom of another, with a margin."""
    boxes = [page.locator(selector).bounding_box() for selector in (first, last)]
    left, top = min(box["x"] for box in boxes) - 24, boxes[0]["y"] - 24
    right, bottom = (max(box["x"] + box["width"] for box in boxes) + 24, boxes[1]["y"] + boxes[1]["height"] + 8)
    area = {"x": max(left, 0), "y": max(top, 0), "width": right - max(left, 0), "height": bottom - max(top, 0)}
    page.screenshot(path=str(file), clip=area, full_page=True)
    if (size := file.stat().st_size) > LARGEST:
        raise ValueError(f"{file}: has {size:,} bytes, must be at most {LARGEST:,}; show less")
    print(f"{file}: {size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("routed", type=Path, help="a routed run, evaluated with --routes and traced with --keep")
    parser.add_argument("signal", type=Path, help="a signal graph's run, traced with --keep")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    with browser() as chromium, tempfile.TemporaryDirectory() as scratch:
        page = chromium.new_page(viewport={"width": 800, "height": 900}, color_scheme="light")
        page.goto(report(given.routed, out=Path(scratch) / "routed.html").file.as_uri())
        part(page, given.out / "report-pool.png", "#r1-pool figure >> nth=0", "#r1-pool figure >> nth=0")
        part(page, given.out / "report-sentences.png", "#r1-sentences h2", "#r1-sentences .passages")
        page.goto(report(given.signal, out=Path(scratch) / "signal.html").file.as_uri())
        part(page, given.out / "report-signal.png", "#r1-signal figure >> nth=0", "#r1-signal figure >> nth=1")


if __name__ == "__main__":
    main()
