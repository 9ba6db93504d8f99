"""Takes the pictures of the README: python tests/browser/screenshots.py ROUTED_RUN SIGNAL_RUN [--out docs]."""

import argparse
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from chromium import browser
from pathlm.report import report
from pathlm.serve import app
from playing import ask, choose_model, start, token, wait_until_written

LARGEST = 250_000
"""Bytes of a picture at most."""


def part(page: Any, file: Path, first: str, last: str) -> None:
    """Write the part of a page from the top of one element to the bottom of another, with a margin."""
    boxes = [page.locator(selector).bounding_box() for selector in (first, last)]
    left, top = min(box["x"] for box in boxes) - 24, boxes[0]["y"] - 24
    right, bottom = (max(box["x"] + box["width"] for box in boxes) + 24, boxes[1]["y"] + boxes[1]["height"] + 8)
    area = {"x": max(left, 0), "y": max(top, 0), "width": right - max(left, 0), "height": bottom - max(top, 0)}
    page.screenshot(path=str(file), clip=area, full_page=True)
    check(file)


def check(file: Path) -> None:
    """Raise `ValueError` for a picture that is too large."""
    if (size := file.stat().st_size) > LARGEST:
        raise ValueError(f"{file}: has {size:,} bytes, must be at most {LARGEST:,}; show less")
    print(f"{file}: {size:,} bytes")


@contextmanager
def serving(*runs: Path) -> Iterator[str]:
    """Serve the models of some runs on a free port; yields the address of the page."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app(runs), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield "http://{}:{}".format(*listening.getsockname())
        server.should_exit = True
        thread.join()


def playground(page: Any, file: Path, routed: Path, signal: Path) -> None:
    """Let both models continue a text beside each other, and show a token's path in each."""
    with serving(routed, signal) as address:
        start(page, address)
        page.get_by_label("Compare two").check()
        choose_model(page, signal.name, 2)
        ask(page, "My fellow citizens, the people of the United States", tokens=36, seed=3)
        wait_until_written(page)
        for number in (1, 2):
            token(page, 24, number).click()
        page.screenshot(path=str(file), full_page=True)
    check(file)


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
        page.set_viewport_size({"width": 1100, "height": 700})
        playground(page, given.out / "playground.png", given.routed, given.signal)


if __name__ == "__main__":
    main()
