"""The playground as a person uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def start(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector(".pane")


def pane(page: Page, number: int = 1) -> Locator:
    return page.locator(".pane").nth(number - 1)


def choose_model(page: Page, name: str, number: int = 1) -> None:
    pane(page, number).get_by_label("Model").select_option(name)


def ask(page: Page, prompt: str, *, tokens: int, seed: int = 0, temperature: float = 0.8) -> None:
    """Fill in the form and press Write."""
    page.get_by_label("Text", exact=True).fill(prompt)
    page.get_by_label("New tokens").fill(str(tokens))
    page.get_by_label("Temperature").fill(str(temperature))
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Write").click()


def wait_until_written(page: Page) -> None:
    page.locator("#write:enabled").wait_for()


def token(page: Page, place: int, number: int = 1) -> Locator:
    return pane(page, number).locator(".token").nth(place)
