"""A browser page that tests drive as a person would; what goes wrong in it fails the test."""

import pytest

from chromium import browser, find_chromium


@pytest.fixture(scope="session")
def chromium():
    """One Chromium for all tests; they are skipped where playwright or Chromium is missing."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install 'pathlm[dev]'")
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: install one, or name it in PATHLM_CHROMIUM")
    with browser() as started:
        yield started


@pytest.fixture
def new_page(chromium):
    """Makes pages with the given size, colour scheme and so on; an error on a page's console or in its scripts fails the test."""
    contexts, wrong = [], []

    def make(**options):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1100, "height": 800}} | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}") if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        return page

    yield make
    for context in contexts:
        context.close()
    assert not wrong, wrong


@pytest.fixture
def page(new_page):
    """A page of the size of a desktop's window."""
    return new_page()
