"""The report in Chromium: chosen tokens tell their path, nothing is fetched, and it fits a phone in the dark."""

import pytest

from pathlm.report import report
from report_folders import CHINESE, SENTENCE, asked_run, routed_run, signal_run


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    run = routed_run(
        tmp_path_factory.mktemp("runs") / "routed", texts=(SENTENCE, ["<|endoftext|>", "Yes", " <b>we</b>", " שלום", "\u202e"])
    )
    return report(run).file.resolve().as_uri()


@pytest.fixture(scope="module")
def signal(tmp_path_factory):
    return report(signal_run(tmp_path_factory.mktemp("runs") / "signal")).file.resolve().as_uri()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A page of two runs that were asked questions with known answers."""
    home = tmp_path_factory.mktemp("runs")
    runs = [asked_run(home / "asked"), asked_run(home / "other", right=0.75)]
    return report(runs, out=home / "report.html").file.resolve().as_uri()


def rows(panel, table=0):
    return [
        [cell.text_content() for cell in row.locator("th, td").all()] for row in panel.locator("table").nth(table).locator("tbody tr").all()
    ]


def test_a_click_on_a_token_shows_its_path_and_what_almost_happened(page, routed):
    page.goto(routed)
    panel = page.locator(".panel")
    page.locator(".token", has_text="not").click()
    assert panel.locator(".summary").inner_text() == "“·not” 1 route step, 3 blocks run, path probability 0.375"
    assert panel.locator(".way li").all_inner_texts() == ["B1", "B2", "OUT", "B5"]
    assert rows(panel) == [["1", "B2", "0.75", "B2 0.13OUT 0.13"], ["2", "OUT", "0.50", "B3 0.50"]]
    page.locator(".token", has_text="<b>we").click()
    assert panel.locator(".summary").inner_text().startswith("“·<b>we</b>” 3 route steps"), "text of a model is never markup"
    sentence = panel.locator("xpath=preceding-sibling::p[1]")
    assert sentence.inner_text().startswith("<|endoftext|>Yes"), "the panel stands below the sentence"


def test_a_chosen_token_is_there_from_the_start(page, routed):
    page.goto(routed)
    assert page.locator(".panel .summary").inner_text().startswith("“·will” 3 route steps")
    assert page.locator('.token[aria-pressed="true"]').all_inner_texts() == [" will"]


def test_the_keyboard_goes_from_token_to_token(page, routed):
    page.goto(routed)
    summary = page.locator(".panel .summary")
    first = page.locator(".token").first
    tokens = page.locator('.token[tabindex="0"]')
    assert tokens.count() == 1, "one stop for Tab; arrows do the rest"
    page.locator(".contents a").last.focus()
    while not page.evaluate("document.activeElement.classList.contains('token')"):
        page.keyboard.press("Tab")
    page.keyboard.press("Home")
    assert first.evaluate("it => it === document.activeElement") and "endoftext" in summary.inner_text()
    for key, said in (
        ("ArrowRight", "“We”"),
        ("ArrowRight", "“·will”"),
        ("ArrowLeft", "“We”"),
        ("ArrowDown", "“<|endoftext|>”"),
        ("End", "\\u{202e}"),
    ):
        page.keyboard.press(key)
        assert said in summary.inner_text()
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true" and tokens.count() == 1
    page.keyboard.press("ArrowRight")
    assert "\\u{202e}" in summary.inner_text(), "behind the last one there is nothing"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "\\u{202e}, 2 route steps"


def test_a_chosen_node_shows_energies_rivals_and_what_they_are_the_sum_of(page, signal):
    page.goto(signal)
    panel = page.locator(".panel")
    page.locator(".token", has_text="风").click()
    assert panel.locator(".summary").inner_text() == "“风” step 2, energy 2.00, 0.50 ahead of the best rival"
    assert rows(panel) == [["风 (the text)", "2.00"], ["<s>", "1.50"], ["rival", "1.00"]]
    assert rows(panel, 1) == [
        ["春 (1)", "1.00", "50 %", "1.50"],
        ["the edge's own", "1.25", "63 %", "0.00"],
        ["the position", "-0.25", "-13 %", "0.00"],
    ]
    assert page.locator(".sentence").inner_text() == "".join(CHINESE)


@pytest.mark.parametrize("kind", ["routed", "signal", "asked"])
@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_is_fetched_and_nothing_is_wider_than_the_window(new_page, request, kind, width):
    page = new_page(viewport={"width": width, "height": 700})
    asked = []
    page.on("request", lambda it: asked.append(it.url))
    address = request.getfixturevalue(kind)
    page.goto(address)
    for summary in page.locator("summary").all():
        if summary.is_visible():
            summary.click()
    if kind != "asked":
        page.locator(".token").nth(3).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert asked == [address]
    seen = page.evaluate("[...document.querySelectorAll('.picture svg')].map(it => it.getBoundingClientRect().width).filter(it => it > 0)")
    assert len(seen) == page.locator("figure").count() and max(seen) <= width, "one of both widths is shown"
    small = page.evaluate(
        """[...document.querySelectorAll('.picture svg text')].filter(it => it.getBoundingClientRect().width > 0)
           .filter(it => parseFloat(getComputedStyle(it).fontSize) * Math.hypot(it.getCTM().a, it.getCTM().b) < 9).length"""
    )
    assert small == 0, "letters of pictures can be read"


def test_a_hostile_trace_neither_acts_nor_breaks_the_page(new_page, tmp_path):
    hostile = [
        "<script>alert(1)</script>",
        "</script><img src=x onerror=alert(1)>",
        "\u202eback",
        "שלום",
        "\u2028",
        "\x00",
        "x" * 100_000,
        "春" * 5_000,
    ]
    page = new_page(viewport={"width": 360, "height": 700})
    page.on("dialog", lambda it: pytest.fail(it.message))
    page.goto(report(routed_run(tmp_path / "run", texts=(hostile,))).file.resolve().as_uri())
    for place, text in enumerate(hostile):
        page.locator(".token").nth(place).click()
        assert (
            text[:5].replace("\u202e", "\\u{202e}").replace("\u2028", "\\u{2028}").replace("\x00", "␀")[:5]
            in page.locator(".panel .summary").inner_text()
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("img").count() == 0 and page.locator(".sentence").bounding_box()["height"] < 600
    page.goto(report(signal_run(tmp_path / "signal", tokens=hostile)).file.resolve().as_uri())
    page.locator(".token").nth(6).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_page_is_dark_where_the_system_is_and_the_switch_changes_it(new_page, routed):
    page = new_page(color_scheme="dark")
    page.goto(routed)
    switch = page.locator("#theme")

    def ground():
        red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")[:3]
        return red + green + blue

    assert ground() < 150 and switch.get_attribute("aria-pressed") == "true"
    switch.click()
    assert ground() > 700 and switch.get_attribute("aria-pressed") == "false"
    page.emulate_media(color_scheme="light")
    assert ground() > 700
    switch.press("Enter")
    assert ground() < 150 and switch.get_attribute("aria-pressed") == "true"


def test_without_javascript_everything_but_the_panel_is_there(new_page, routed):
    page = new_page(java_script_enabled=False)
    page.goto(routed)
    assert not page.locator("#theme").is_visible() and not page.locator(".panel").is_visible()
    assert page.locator("noscript p").is_visible()
    assert page.locator(".token").count() == 12 and page.locator(".wide svg").first.is_visible()
    page.locator("details.numbers summary", has_text="All tokens").click()
    assert page.locator("td", has_text="B1 → B2 → B3 → OUT → B5").first.is_visible()
