"""The playground in a browser: load, type, stream, see a path, change the budget, compare, stop; nothing on the console but silence."""

import re
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from cases import Case
from served import Running, make_tokenizer, wait_for

import pathlm
from pathlm import trace
from pathlm.serve import Limits, app
from playing import ask, choose_model, pane, start, token, wait_until_written

expect = pytest.importorskip("playwright.sync_api").expect
TEXT = "The people of the Union."
KNOWN = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
LONG = {"max_position_embeddings": 2048}
MODELS = (
    Case("routed", "brian", {"pool_blocks": 4, "max_route_steps": 4, "block_position_dim": 6} | KNOWN | LONG),
    Case("plain", "brian", KNOWN | LONG),
    Case("graph", "brillm", {"edges": 20_000, "context": "decay", "keep_initial": True} | KNOWN),
)
SIZES = {"wide": (1200, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of tiny models; `folders` are theirs by name."""
    folders, tokenizer = {}, make_tokenizer()
    tokenizer.eos_token = None  # texts end where they are told to
    for case in MODELS:
        folders[case.name] = tmp_path_factory.mktemp("served") / case.name
        case.build(torch.float32).save_pretrained(folders[case.name])
        tokenizer.save_pretrained(folders[case.name])
    found = Running(app(list(folders.values())), Limits())
    found.folders = folders
    yield found
    found.stop()


@pytest.fixture
def playground(page, server):
    start(page, server.url)
    return page


@pytest.fixture
def refused(chromium):
    """A page on whose console the browser may note answers that are errors."""
    with chromium.new_context() as context:
        yield context.new_page()


def test_the_tokens_of_a_text_are_shown_with_the_depths_that_a_trace_tells(playground, server):
    playground.get_by_label("Text", exact=True).fill(TEXT)
    playground.get_by_role("button", name="Read").click()
    paths = trace.run(server.folders["routed"], [TEXT])[0]
    expect(pane(playground).locator(".token")).to_have_count(len(paths))
    said = [one.get_attribute("aria-label") for one in pane(playground).locator(".token").all()]
    assert [int(re.search(r"(\d+) route step", one)[1]) for one in said] == [len(path.route) for path in paths]
    assert len({len(path.route) for path in paths}) > 1, "depths should differ here, or the test compares one number"


def test_tokens_appear_one_by_one_and_a_click_or_an_arrow_shows_the_path_of_each(playground, server):
    ask(playground, TEXT, tokens=1000, seed=1)
    # In one look, or a busy machine has written all of them before the second: a token is there, and there is more to come.
    playground.wait_for_function("() => document.querySelector('.begins + .token') && !document.querySelector('#stop').disabled")
    playground.evaluate("() => document.querySelector('#stop').click()")
    wait_until_written(playground)
    paths = trace.run(server.folders["routed"], [TEXT])[0]
    place = next(number for number, path in enumerate(paths) if len(path.route) > 1)
    token(playground, place).click()
    panel = pane(playground).get_by_role("region", name="Path of the chosen token")
    panel.get_by_text("Numbers").click()
    rows = [row.inner_text().split("\t") for row in panel.locator("tbody tr").all()]
    assert [row[1] for row in rows] == [f"B{step.node.removeprefix('block:')}" for step in paths[place].route] + ["OUT"]
    shares = [round(100 * step.score) for step in paths[place].route]
    assert [int(row[2].removesuffix(" %")) for row in rows[: len(shares)]] == pytest.approx(shares, abs=1)
    almost = paths[place].route[0].rivals[0][0].replace("block:", "B").replace("exit", "OUT")
    assert rows[0][3].startswith(f"{almost} ")
    assert panel.get_by_role("img").get_attribute("aria-label").startswith("The router chose B")
    token(playground, place).press("ArrowRight")
    expect(token(playground, place + 1)).to_be_focused()
    expect(token(playground, place + 1)).to_have_attribute("aria-pressed", "true")


def test_a_smaller_budget_makes_routes_shorter(playground):
    means = []
    for budget in ("1", "0.25"):
        pane(playground).get_by_label("Budget").fill(budget)
        ask(playground, TEXT, tokens=20, seed=1)
        wait_until_written(playground)
        means.append(float(re.search(r"([\d.]+) route steps", pane(playground).locator(".told").first.inner_text())[1]))
    assert means[0] == 4.0 > means[1]


def test_the_same_seed_writes_the_same_again(playground):
    texts = []
    for seed in (1, 1, 2):
        ask(playground, TEXT, tokens=12, seed=seed)
        wait_until_written(playground)
        texts.append(pane(playground).locator(".text").inner_text())
    assert texts[0] == texts[1] != texts[2]


def test_two_models_write_beside_each_other_and_a_graph_shows_energies_and_shares(playground, server):
    playground.get_by_label("Compare two").check()
    choose_model(playground, "graph", 2)
    ask(playground, TEXT, tokens=10)
    wait_until_written(playground)
    path = trace.run(server.folders["graph"], [TEXT])[0][0]
    expect(pane(playground, 1).locator(".begins ~ .token")).to_have_count(10)
    expect(pane(playground, 2).locator(".begins ~ .token")).to_have_count(10)
    token(playground, 5, 2).click()
    panel = pane(playground, 2).get_by_role("region", name="Path of the chosen token")
    step = path.steps[5]
    assert f"Energy {step.score:.2f}, {step.margin:+.2f} against".replace("-", "−") in panel.inner_text()
    arrivals = panel.locator(".bars").first.locator("li")
    expect(arrivals).to_have_count(1 + len(step.rivals))
    panel.get_by_text("Numbers").click()
    rows = [row.inner_text().split("\t") for row in panel.locator("tbody tr").all()]
    assert sum(float(row[1].replace("−", "-")) for row in rows) == pytest.approx(step.score, abs=0.01)
    shares = [
        one.evaluate("token => Number(token.style.getPropertyValue('--share'))") for one in pane(playground, 2).locator(".token").all()
    ]
    told = {0 if name == "signal" else int(name.removeprefix("step:")): part / step.score for name, part in step.parts[:-2]}
    assert shares == pytest.approx([told.get(place, 0.0) for place in range(len(shares))], abs=1e-4), "what came before is underlined"


def test_a_graph_may_begin_anywhere_with_a_signal_of_ones_own(playground):
    choose_model(playground, "graph")
    texts = []
    for signal, first in (("", True), ("2.5", True), ("", False)):
        pane(playground).get_by_label("Initial signal").fill(signal)
        pane(playground).get_by_label("Start token first").set_checked(first)
        ask(playground, TEXT, tokens=12, temperature=0)
        wait_until_written(playground)
        texts.append(pane(playground).locator(".text").inner_text())
    assert texts[2].startswith("The") and texts[0].startswith("<|endoftext|>")
    assert texts[0] != texts[1]


def left(server):
    """How many clients have left before their answer was complete."""
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        found = re.findall(r"^pathlm_disconnects_total\{.*\} (\d+)$", answer.read().decode(), flags=re.MULTILINE)
    return sum(map(int, found))


def test_stopping_frees_the_row_on_the_server(playground, server, monkeypatch):
    # Slower than any machine that runs a browser: the server must not have written all of the answer before it is stopped.
    engine, before = server.service.models["routed"].engine, left(server)
    write = engine.round
    monkeypatch.setattr(engine, "round", lambda: (time.sleep(0.05), write()))
    ask(playground, TEXT, tokens=1000)
    playground.locator(".begins + .token").wait_for()
    playground.keyboard.press("Escape")
    wait_until_written(playground)
    assert "stopped" in pane(playground).locator(".told").first.inner_text()
    written = pane(playground).locator(".begins ~ .token").count()
    assert 0 < written < 1000
    expect(playground.locator("#trouble")).to_be_hidden()
    wait_for(lambda: not server.rows() and left(server) > before)


def test_what_the_server_refuses_is_said_in_plain_words(refused, server):
    start(refused, server.url)
    ask(refused, "word " * 9000, tokens=4)
    expect(refused.get_by_role("alert")).to_contain_text("The text has")
    refused.route("**/v1/*", lambda route: route.abort())
    ask(refused, TEXT, tokens=4)
    expect(refused.get_by_role("alert")).to_have_text("The server cannot be reached. Is it still running?")


def test_hostile_text_stays_text(playground):
    playground.get_by_label("Text", exact=True).fill("<img src=x onerror=alert(1)><script>alert(2)</script>\u202e春眠")
    playground.get_by_role("button", name="Read").click()
    pane(playground).locator(".token").nth(20).wait_for()
    assert "<script>" in pane(playground).locator(".text").inner_text().replace("\n", "")
    assert pane(playground).locator(".text img, .text script").count() == 0


@pytest.mark.parametrize("model", ["routed", "graph"])
def test_what_was_typed_is_shown_as_typed_however_its_characters_are_split(playground, model):
    typed = "é is 日本 🙂 and \\xe6\\x97 is none."
    choose_model(playground, model)
    playground.get_by_label("Text", exact=True).fill(typed)
    playground.get_by_role("button", name="Read").click()
    pane(playground).locator("p.told:not(:empty)").wait_for()
    shown = pane(playground).locator(".token:not(:has(small))").evaluate_all("all => all.map((one) => one.textContent).join('')")
    assert shown == typed
    parts = pane(playground).locator(".token small").all_inner_texts()
    assert parts[:2] == ["<|endoftext|>", "\\xc3"], "the first byte of é; its second one shows the whole"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_and_can_be_read(playground, size, dark):
    playground.emulate_media(color_scheme="dark" if dark else "light")
    playground.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
    ask(playground, TEXT, tokens=16)
    wait_until_written(playground)
    assert playground.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    faint = playground.evaluate((Path(__file__).parent / "contrasts.js").read_text())
    assert not faint, f"hard to read: {faint}"


def test_a_reader_of_the_screen_hears_what_is_written(playground):
    ask(playground, TEXT, tokens=12)
    wait_until_written(playground)
    written = "".join(one.inner_text() for one in pane(playground).locator(".begins ~ .token:not(:has(small))").all())
    heard = playground.locator("[aria-live=polite]").text_content()
    assert heard.strip() and written.replace("⏎\n", "\n") == heard.replace("\ufffd", "◌")


def test_everything_can_be_reached_by_keyboard(playground):
    ask(playground, TEXT, tokens=6)
    wait_until_written(playground)
    playground.locator("#prompt").focus()
    reached = set()
    for _ in range(30):
        reached.add(playground.evaluate("document.activeElement.name || document.activeElement.id || document.activeElement.className"))
        playground.keyboard.press("Tab")
    assert {"prompt", "temperature", "tokens", "seed", "compare", "write", "read", "model", "budget", "branches"} <= reached
    assert any(name.startswith("token") for name in reached), "one stop for all tokens; arrows go on from there"


def test_a_key_is_asked_for_where_the_server_wants_one(refused, server):
    def guarded(route):
        given = route.request.headers.get("authorization")
        if given == "Bearer open sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "a key is needed", "type": "authentication_error"}})

    refused.route("**/v1/*", guarded)
    refused.goto(server.url)
    expect(refused.get_by_role("alert")).to_have_text("A key is needed.")
    refused.get_by_label("Key of this server").fill("open sesame")
    refused.get_by_label("Key of this server").press("Tab")
    expect(pane(refused)).to_be_visible()
    expect(refused.get_by_role("alert")).to_be_hidden()


def test_the_page_loads_nothing_but_its_own_files(server):
    with urllib.request.urlopen(server.url) as answer:
        policy, text = answer.headers["content-security-policy"], answer.read().decode()
    assert "script-src 'self'" in policy and "unsafe-inline" not in policy
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=|https?://", text)


def test_report_and_playground_have_the_same_colours():
    home = Path(pathlm.__file__).parent
    palettes = [
        re.search(r":root \{.*?^\}", (home / sheet).read_text(), flags=re.DOTALL | re.MULTILINE)[0]
        for sheet in ("serve/page/style.css", "report/templates/page.css")
    ]
    assert palettes[0] == palettes[1]
