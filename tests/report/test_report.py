"""The report page: what it shows of which file, that it acts on nothing it shows, and that it can be read by everybody."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path as File

import pytest
from typer.testing import CliRunner

from page_reading import parsed
from pathlm.cli import app
from pathlm.path import Path, Step, write_paths
from pathlm.report import pool, report
from pathlm.report.charts import Line
from pathlm.report.charts import lines as chart
from pathlm.report.svg import Scale, fit
from report_folders import SENTENCE, asked_run, lines, plain_run, routed_path, routed_run, signal_path, signal_run, write

ROOT = File(__file__).parents[2]
HOSTILE = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\u202eright to left", "שלום", "a\u2028b", "\x00"]
HOSTILE += ["x" * 100_000, "\"&'", "]]>", "<!--", "{{ 7 * 7 }}", "\ud800"]


def page_of(*folders, **options):
    return parsed(report(list(folders), **options).file.read_bytes())


def titles(page):
    return [section.one("h2", id=section.attributes["aria-labelledby"]).text for section in page.one("article").all("section")]


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    return routed_run(tmp_path_factory.mktemp("runs") / "routed")


@pytest.fixture(scope="module")
def signal(tmp_path_factory):
    return signal_run(tmp_path_factory.mktemp("runs") / "signal")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Two runs that were asked the same questions."""
    home = tmp_path_factory.mktemp("runs")
    return asked_run(home / "asked"), asked_run(home / "other", right=0.75)


@pytest.fixture(scope="module")
def pages(routed, signal, asked):
    """A page of each family, one of several runs, and of runs that were asked questions."""
    found = {"routed": page_of(routed), "signal": page_of(signal), "both": page_of(routed, signal, out=routed.parent / "both.html")}
    return found | {"asked": page_of(asked[0]), "both asked": page_of(*asked, out=asked[0].parent / "both.html")}


def test_a_routed_run_is_shown_with_everything_that_was_measured_of_it(pages):
    assert titles(pages["routed"]) == ["Training", "Beside n-grams", "The pool", "Sentences", "What depth is worth"]
    figures = [figure.one("h3").text for figure in pages["routed"].all("figure")]
    assert figures == [
        "Loss", "Depth: route steps per token", "Load and choice", "On the validation text", "Where tokens go", "When tokens leave",
        "How the blocks share the work", "Step by step", "Depth against difficulty", "Depth by difficulty", "Depth by frequency",
        "Depth by kind of token", "Depth by position", "Loss at every budget", "Is it the router's choice?",
    ]  # fmt: skip
    assert not list(pages["routed"].all("aside"))


def test_a_signal_graph_is_shown_with_its_energies_shares_and_neighbours(pages):
    assert titles(pages["signal"]) == ["Training", "Sentences", "The signal, step by step", "Neighbours in the graph"]
    figures = [figure.one("h3").text for figure in pages["signal"].all("figure")]
    assert figures[2:] == ["Sentence 1: energies", "Sentence 1: who sent it", "“<s>”", "“春”", "“风”"]
    assert "pathlm eval" in pages["signal"].one("aside").text


def test_a_plain_run_says_which_commands_would_add_more(tmp_path):
    page = page_of(plain_run(tmp_path / "a plain run"))
    assert titles(page) == ["Training"]
    assert "6, no pool" in page.text
    commands = [code.text for code in page.one("aside").all("code")]
    assert commands == [f"pathlm eval '{tmp_path}/a plain run'", f"pathlm trace '{tmp_path}/a plain run' \"a sentence\" --keep"]


def cells(page, caption):
    """The cells of the table of this caption, row by row."""
    table = next(table for table in page.all("table") if table.one("caption").text.startswith(caption))
    return [[cell.text for cell in row.all() if cell.name in ("th", "td")] for row in table.one("tbody").all("tr")]


def test_questions_with_known_answers_are_shown_with_their_intervals_and_what_the_cache_took(pages):
    assert titles(pages["asked"]) == ["Training", "Long contexts", "Synthetic tasks", "Multiple choice"]
    figures = [figure.one("h3").text for figure in pages["asked"].all("figure")]
    assert figures[1:] == [
        "Right answers by length, test", "Right answers by size of the cache, test", "Right answers by steps, validation",
        "Right answers by steps, test, budget 0.5", "Right choices, validation",
    ]  # fmt: skip
    long = cells(pages["asked"], "Long contexts, test")
    assert long[0] == ["needle: keys=1", "64", "0.500 (0.480–0.520)", "0.250 (0.230–0.270)", "128.0", "2,048", "100"]
    assert [row[:2] for row in long[3:]] == [["hops: keys=1", "64"], ["hops: keys=1", "256"], ["hops: keys=1", "1,024"]]
    assert cells(pages["asked"], "All tasks by size of the cache, test")[2][:3] == ["2,048.0", "1,024", "0.500 (0.480–0.520)"]
    synthetic = cells(pages["asked"], "Synthetic tasks, validation")
    assert synthetic[0] == ["copy", "1", "1.000* (0.950–1.000)", "0.900", "100"], "training may have met this prompt"
    assert synthetic[2][:3] == ["copy", "4", "0.250 (0.200–0.250)"]
    alone = list(pages["asked"].all("figure"))[4]
    assert not list(alone.all("polyline", class_="line")), "a task with one number of steps is no line"
    choices = cells(pages["asked"], "Multiple choice, validation")
    assert choices[1] == ["next sentence", "per byte", "0.300 (0.180–0.450)", "0.250", "40"]
    assert [code.text.split()[-1] for code in pages["asked"].one("aside").all("code")][-1] == "--keep", "nothing of this is missing"


def test_runs_that_were_asked_the_same_are_compared_by_what_their_caches_took(pages):
    beside = pages["both asked"].one("section", id="beside")
    figure = next(figure for figure in beside.all("figure") if figure.one("h2").text == "Long contexts by size of the cache, test")
    rows = [[cell.text for cell in row.all() if cell.name in ("th", "td")] for row in figure.one("tbody").all("tr")]
    assert [row[:3] for row in rows[:4:3]] == [["asked", "64", "128.0"], ["other", "64", "128.0"]]
    assert [row[3] for row in rows[:4:3]] == ["0.500 (0.480–0.520)", "0.750 (0.730–0.770)"]


def test_a_run_of_tasks_or_text_says_how_it_would_be_asked(tmp_path):
    run = asked_run(tmp_path / "run")
    for name in ("long-context", "synthetic", "choices"):
        (run / f"{name}.json").unlink()
    commands = [code.text for code in page_of(run).one("aside").all("code")]
    asks = [f"pathlm eval {run} --suite {name}" for name in ("long-context", "synthetic", "choices")]
    assert [command for command in commands if "--suite" in command] == asks


def test_a_run_of_tasks_alone_names_no_command_that_would_look_for_its_text(tmp_path):
    run = routed_run(tmp_path / "run", whole=False)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    write(run / "run.json", record | {"config": {"data": {"corpus": None, "tasks": {"copy": 1.0}}}})
    commands = [code.text for code in page_of(run).one("aside").all("code")]
    trace = f'pathlm trace {run} "a sentence" --keep'
    assert commands == [f"pathlm eval {run} --suite synthetic", trace, trace]


@pytest.mark.parametrize(
    ("moves", "said"),
    [
        (None, "IN through blocks of the pool, as often as it wants to, to OUT."),
        ("recur", "IN through the blocks of the pool in their order, each as often as it wants to, to OUT."),
        ("skip", "IN through blocks of the pool in their order, each once at most, to OUT."),
    ],
)
def test_ways_are_told_by_the_moves_that_the_router_may_make(tmp_path, moves, said):
    run = routed_run(tmp_path / "run")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    write(run / "run.json", record | {"model": record["model"] | {"route_moves": moves}})
    assert said in page_of(run).text


def test_several_runs_stand_side_by_side_and_one_after_the_other(pages):
    assert [chapter.one("h1").text for chapter in pages["both"].all("article")] == ["routed", "signal"]
    beside = pages["both"].one("section", id="beside")
    ends = next(table for table in beside.all("table") if "ended" in table.one("caption").text)
    assert [[cell.text for cell in row.all("td")][2] for row in ends.one("tbody").all("tr")] == ["2.1750", "3.5000"]


def test_numbers_of_the_tables_are_those_of_the_files(pages):
    table = next(table for table in pages["routed"].all("table") if table.one("caption").text.startswith("Transitions"))
    rows = {row.one("th").text: [cell.text for cell in row.all("td")] for row in table.one("tbody").all("tr")}
    assert rows["IN → B2"] == ["to the next block", "900", "30.8 %"], "blocks are counted over the whole model, as paths count them"
    assert rows["B2 → B2"][0] == "to the same block again, or back" and rows["IN → B3"][0] == "over blocks"
    losses = next(table for table in pages["routed"].all("table") if table.one("caption").text == "Numbers by training step")
    last = list(losses.one("tbody").all("tr"))[-1]
    assert [cell.text for cell in last.all("td")] == ["exit", "2.0750", "2.1750"]
    correlations = next(table for table in pages["routed"].all("table") if table.one("caption").text.startswith("Correlations"))
    assert "Spearman, with the measured gain0.3000.2800.320" in correlations.text
    verdicts = pages["routed"].text.replace("\N{NO-BREAK SPACE}", " ")
    assert "✗ failed" in verdicts and "○ not measured" in verdicts


def test_without_a_map_transitions_are_counted_over_the_traced_sentences_and_it_says_so(tmp_path):
    run = routed_run(tmp_path / "run")
    found = json.loads((run / "routes.json").read_text())
    del found["validation"]["map"]
    write(run / "routes.json", found)
    page = page_of(run)
    figure = next(figure for figure in page.all("figure") if figure.one("h3").text == "Where tokens go")
    assert f"Counted over the {len(SENTENCE)} tokens of the traced sentences only." in figure.one("figcaption").text
    assert "IN → B2to the next block7" in figure.one("table").text


def test_a_sentence_is_coloured_by_depth_and_every_text_is_a_sentence(tmp_path):
    page = page_of(routed_run(tmp_path / "run", texts=(SENTENCE, ["<|endoftext|>", "Yes"])))
    sentences = list(page.all("p", class_="sentence"))
    assert [sentence.text for sentence in sentences] == ["".join(SENTENCE).replace("\n", "⏎"), "<|endoftext|>Yes"]
    kinds = [token.attributes["class"] for token in sentences[0].all("span")]
    assert kinds[:3] == ["token d0", "token d2", "token d5"] and len(list(sentences[0].all("br"))) == 1
    data = json.loads(page.one("script", type="application/json").text)
    assert [len(tokens) for tokens in data] == [7, 2]
    assert data[0][1]["steps"][1] == ["B2", 0.75, [["B2", 0.125], ["OUT", 0.125]]] and data[0][1]["chosen"] == 3


@pytest.mark.parametrize("family", ["routed", "signal"])
def test_characters_of_several_tokens_are_whole(tmp_path, family):
    halves = ["<s>", "\\xe6", "\\x98", "\\xa5", "\\xff"]
    run = routed_run(tmp_path / "run", texts=[halves]) if family == "routed" else signal_run(tmp_path / "run", tokens=halves)
    page = page_of(run)
    tokens = list(page.all("span", class_="token"))
    assert [token.text for token in tokens] == ["<s>", "◌", "◌", "春", "\\xff"], "bytes that are no character stay as they are"
    assert [token.attributes["data-said"].split(",")[0] for token in tokens[1:4]] == ["春 1/3", "春 2/3", "春 3/3"]
    sentences = page.one("section", id="r1-sentences").text
    assert "xe6" not in sentences and "xff" in sentences and "◌ is a part of the character after it." in sentences
    if family == "signal":
        assert "春 1/3" in page.one("section", id="r1-signal").text and "xe6" not in page.one("section", id="r1-signal").text


def test_paths_that_do_not_say_which_text_they_are_of_are_one_sentence(tmp_path):
    run = routed_run(tmp_path / "run", whole=False)
    write_paths(run / "paths.jsonl", [Path("brian", text, routed_path(text, [2]).steps, 1) for text in SENTENCE])
    assert len(list(page_of(run).all("p", class_="sentence"))) == 1


@pytest.mark.parametrize("family", ["brian", "brillm"])
def test_hostile_text_stays_text(tmp_path, family):
    if family == "brian":
        run = routed_run(tmp_path / "run", whole=False)
        written = [routed_path(text, [2]) for text in HOSTILE]
    else:
        run = signal_run(tmp_path / "run")
        written = [signal_path(HOSTILE)]
    rows = [json.loads(path.to_json()) for path in written]
    (run / "paths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = {
        "step": 20,
        "stage": "<b>stage</b>",
        "metric": "</td>",
        "passed": True,
        "comparison": "<=",
        "value": 1,
        "bound": 2,
        "reason": "<i>so</i>",
    }
    lines(run / "gates.jsonl", [gate])
    raw = report(run).file.read_bytes()
    page = parsed(raw)
    assert [script.attributes.get("type") for script in page.all("script")] == ["application/json", None]
    assert not [element for element in page.all() if element.name in ("img", "b", "i", "td") and element.attributes.get("onerror")]
    shown = page.one("p", class_="sentence").text
    for text in (
        "<script>alert(1)</script>",
        "\\u{202e}right to left",
        "שלום",
        "a\\u{2028}b",
        "␀",
        "(100,000 characters)",
        "{{ 7 * 7 }}",
        "\\u{d800}",
    ):
        assert text in shown
    assert "<i>so</i>" in page.text and "\u202e" not in page.text and "\u2028" not in page.text and b"\x00" not in raw
    assert len(raw) < 500_000, "a token of 100 kB is cut everywhere"
    assert len(json.loads(page.one("script", type="application/json").text)[0]) in (1, len(HOSTILE))


def test_names_and_commands_of_folders_are_text_too(tmp_path):
    page = page_of(plain_run(tmp_path / "<script>a&b"))
    assert page.one("h1").text == "<script>a&b"
    assert [script.attributes.get("type") for script in page.all("script")] == [None]


def test_a_page_is_small_and_a_long_trace_is_cut_and_says_so(tmp_path):
    run = routed_run(tmp_path / "run", texts=[SENTENCE] * 1000)
    rows = [{"step": step, "tokens": step, "stage": "x", "loss/lm": 2 + 1 / step} for step in range(1, 20_001)]
    lines(run / "metrics.jsonl", rows)
    written = report(run)
    page = parsed(written.file.read_bytes())
    assert "The first 600 of 7,000 traced tokens are shown." in page.text
    assert "60 of 20,000 rows, evenly spaced." in page.text
    without = routed_run(tmp_path / "without")
    (without / "paths.jsonl").unlink()
    assert written.bytes < 3e6 and report(without).bytes < 300_000


def test_a_very_long_text_is_cut_within(tmp_path):
    run = routed_run(tmp_path / "run", texts=[SENTENCE * 200])
    page = page_of(run)
    assert "The first 600 of 1,400 traced tokens are shown." in page.text
    signal = signal_run(tmp_path / "signal", tokens=["node"] * 1000)
    assert "The first 24 of 999 steps." in page_of(signal).text and report(signal).bytes < 2e6


@pytest.mark.parametrize("page", ["routed", "signal", "both", "asked", "both asked"])
def test_every_picture_has_a_name_a_caption_and_its_numbers(pages, page):
    pictures = list(pages[page].all("svg"))
    assert pictures and all(len(svg.attributes["aria-label"]) > 20 and svg.attributes["role"] == "img" for svg in pictures)
    for figure in pages[page].all("figure"):
        assert len(list(figure.all("svg"))) == 2, "one for screens and one for phones"
        assert len(figure.one("figcaption").text) > 40
        assert list(figure.one("details").one("tbody").all("tr"))


@pytest.mark.parametrize("page", ["routed", "signal", "both", "asked", "both asked"])
def test_tables_have_headings_and_headings_are_in_order(pages, page):
    for table in pages[page].all("table"):
        assert table.one("caption").text and len(list(table.one("thead").all("th", scope="col"))) > 1
        width = len(list(table.one("thead").all("th")))
        for row in table.one("tbody").all("tr"):
            assert len(list(row.all("th", scope="row"))) == 1 and len(list(row.all("th"))) + len(list(row.all("td"))) == width
    levels = [int(element.name[1]) for element in pages[page].all() if re.fullmatch(r"h\d", element.name)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    ids = [element.attributes["id"] for element in pages[page].all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    targets = [a.attributes["href"].removeprefix("#") for a in pages[page].all("a")]
    assert targets and set(targets) <= set(ids)
    assert pages[page].one("html").attributes["lang"] == "en" and pages[page].one("main")


@pytest.mark.parametrize("page", ["routed", "signal", "both", "asked", "both asked"])
def test_the_page_asks_for_nothing_from_anywhere(pages, page):
    for element in pages[page].all():
        for name in ("src", "href", "action", "data", "srcset"):
            assert element.attributes.get(name, "#").startswith("#") or (element.name, element.attributes[name]) == ("link", "data:,")
    style = pages[page].one("style").text
    assert "@import" not in style and "url(" not in style
    assert "default-src 'none'" in pages[page].one("meta", http_equiv="Content-Security-Policy").attributes["content"]


def palette(theme):
    style = (ROOT / "src/pathlm/report/templates/page.css").read_text()
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    return {name: pair[theme == "dark"] for name, *pair in found}


def luminance(colour):
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_can_be_told_from_what_is_behind_them(theme):
    colours = palette(theme)
    for ground in ("paper", "raised"):
        for name in ("ink", "soft", "link"):
            assert contrast(colours[name], colours[ground]) >= 4.5, name
        for name in (f"s{i}" for i in range(6)):
            assert contrast(colours[name], colours[ground]) >= 3.0, name
    for name in ("sure", "close", "beaten", "note"):
        assert contrast(colours["ink"], colours[name]) >= 4.5, name
    for inks, shades in (("d-low-ink", (0, 1, 2)), ("d-mid-ink", (3, 4)), ("d-top-ink", (5,))):
        assert all(contrast(colours[inks], colours[f"d{i}"]) >= 4.5 for i in shades)
    depths = [luminance(colours[f"d{i}"]) for i in range(6)]
    assert depths == sorted(depths, reverse=theme == "light"), "shades differ in lightness, so that they do without colour vision"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", '{"a": 1,\n"b": }', r"run\.json, line 2: not JSON"),
        ("run.json", "[]", r"run\.json, line 1: must be a JSON object, is list"),
        ("run.json", '"\xff"', r"run\.json: not JSON"),
        ("run.json", '{"tokens": ' + "9" * 5000 + "}", r"run\.json: not JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"step": \n', r"metrics\.jsonl, line 2: not JSON"),
        ("metrics.jsonl", "3\n", r"metrics\.jsonl, line 1: must be a JSON object, is int"),
    ],
)
def test_a_damaged_record_is_refused_with_its_file_and_line(tmp_path, name, content, said):
    run = plain_run(tmp_path / "run")
    (run / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "left_out"),
    [
        ("gates.jsonl", "{\n", None),
        ("gates.json", '{"rows": 3}', None),
        ("eval.json", '{"validation": {"model": {"loss": []}}}', "Beside n-grams"),
        ("eval.json", "[", "Beside n-grams"),
        ("routes.json", '{"validation": {"routed": {"histogram": "x"}}}', "The pool"),
        ("routes.json", '{"validation": {"map": {"nodes": ["IN", "OUT"], "transitions": [[1]]}}}', "The pool"),
        ("paths.jsonl", '{"family": "brian", "text": "x", "steps": 3}\n', "Sentences"),
        ("paths.jsonl", "\n\nnot JSON\n", "Sentences"),
        ("neighbours.jsonl", '{"node": "x"}\n', None),
        ("long-context.json", '{"test": {"rows": [null], "by_cache": []}}', "Long contexts"),
        ("synthetic.json", '{"test": {"rows": [{"task": "copy"}]}}', "Synthetic tasks"),
        ("choices.json", '{"test": {"rows": 3}}', "Multiple choice"),
    ],
)
def test_a_damaged_file_that_may_be_absent_is_left_out_with_a_note(tmp_path, name, content, left_out):
    run = routed_run(tmp_path / "run")
    (run / name).write_text(content)
    written = report(run)
    page = parsed(written.file.read_bytes())
    notes = [note.text for note in page.all("p", class_="note")]
    assert notes and all(name in note and "not shown" in note for note in notes) and list(written.notes) == notes
    assert "Training" in titles(page) and left_out not in titles(page)


@pytest.mark.parametrize(
    ("name", "content"),
    [("long-context.json", '{"test": {"rows": [null], "by_cache": []}}'), ("routes.json", '{"validation": {"budgets": [3]}}')],
)
def test_a_damaged_file_of_one_run_leaves_the_other_runs_as_they_are(tmp_path, name, content):
    make = asked_run if name == "long-context.json" else routed_run
    runs = [make(tmp_path / "whole"), make(tmp_path / "damaged")]
    (runs[1] / name).write_text(content)
    written = report(runs, out=tmp_path / "page.html")
    whole, damaged = parsed(written.file.read_bytes()).all("article")
    notes = [note.text for note in damaged.all("p", class_="note")]
    assert notes and all(name in note for note in notes) and not list(whole.all("p", class_="note"))


def test_a_file_that_two_sections_cannot_read_is_told_of_once(tmp_path):
    run = routed_run(tmp_path / "run")
    (run / "routes.json").write_text('{"validation": {"routed": 3, "map": 3}}')
    assert [note.count("routes.json") for note in report(run).notes] == [1]


@pytest.mark.parametrize("name", ["-x", "two words"])
def test_commands_name_folders_so_that_they_can_be_pasted(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    plain_run(File(name))
    said = " ".join(command.text for command in parsed(report(File(name)).file.read_bytes()).all("code"))
    assert ("pathlm eval ./-x" in said) if name == "-x" else ("pathlm eval 'two words'" in said)


def test_a_row_that_is_being_written_is_no_damage(tmp_path):
    run = plain_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss')
    assert report(run).notes == ()


def test_numbers_that_are_none_are_dashes(tmp_path):
    run = routed_run(tmp_path / "run")
    rows = [
        {"step": 1, "loss/lm": None, "stage": 3},
        {"step": "x", "loss/lm": 2},
        {"step": 2, "loss/lm": float("nan")},
        {"step": 3, "loss/lm": 10**400},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 4, "loss/lm": 2.0, "stage": "y"}]))
    found = routed_path("x", [2])
    steps = [Step(step.node, float("nan"), (("block:2", float("inf")),)) for step in found.steps]
    write_paths(run / "paths.jsonl", [Path("brian", "x", tuple(steps), 1, 0)])
    assert report(run).notes == ()
    page = parsed((run / "report.html").read_bytes())
    assert json.loads(page.one("script", type="application/json").text)[0][0]["steps"][1] == ["B2", None, [["B2", None]]]


def test_correlations_that_are_not_defined_are_said_to_be_so(tmp_path):
    run = routed_run(tmp_path / "run")
    found = json.loads((run / "routes.json").read_text())
    nothing = {"value": None, "low": None, "high": None}
    entry = found["validation"] | {"difficulty": None, "slices": {"class": [{"label": "digit", "tokens": 0, "steps_mean": None}]}}
    entry["gain"]["correlations"] = dict.fromkeys(entry["gain"]["correlations"], nothing)
    write(run / "routes.json", {"validation": entry})
    written = report(run)
    figure = next(it for it in parsed(written.file.read_bytes()).all("figure") if it.one("h3").text == "Depth against difficulty")
    assert written.notes == () and "Not defined for these numbers." in figure.text
    assert [cell.text for cell in next(iter(figure.one("tbody").all("tr"))).all("td")] == ["–", "–", "–"]


def test_a_page_is_replaced_and_nothing_else_is(tmp_path):
    run = plain_run(tmp_path / "run")
    first = report(run).file
    assert first == run / "report.html" and report(run).file == first
    assert sorted(file.name for file in run.iterdir()) == ["metrics.jsonl", "report.html", "run.json"]
    (tmp_path / "letter.html").write_text("<p>Dear Ada")
    with pytest.raises(ValueError, match=r"letter\.html'?: exists and was not written by pathlm report"):
        report(run, out=tmp_path / "letter.html")
    assert (tmp_path / "letter.html").read_text() == "<p>Dear Ada"
    with pytest.raises(ValueError, match="is a folder"):
        report(run, out=tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report(run, out=tmp_path / "no" / "page.html")


def test_what_cannot_be_shown_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="run folder 'nowhere' does not exist"):
        report("nowhere", out=tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match=r"^run folder 'nowhere' does not exist"):
        report("nowhere")
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"note\.txt' is a file"):
        report(tmp_path / "note.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds nothing to show: expected one of run\.json, metrics\.jsonl"):
        report(tmp_path / "empty")
    with pytest.raises(ValueError, match="name at least one run"):
        report([])


def test_the_command_writes_the_page_and_tells_what_it_could_not_show(tmp_path, monkeypatch):
    run = routed_run(tmp_path / "run")
    (run / "routes.json").write_text("{")
    done = CliRunner().invoke(app, ["report", str(run)], prog_name="pathlm")
    assert done.exit_code == 0 and "note: " in done.stdout and f"wrote {run / 'report.html'} (0." in done.stdout
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", str(run), str(plain_run(tmp_path / "plain"))], prog_name="pathlm")
    assert "wrote report.html" in done.stdout and (tmp_path / "report.html").is_file()
    assert CliRunner().invoke(app, ["report", "nowhere"], prog_name="pathlm").exit_code == 2


def test_a_report_needs_no_torch(routed):
    program = (
        "import sys; from pathlm.report import report; report(sys.argv[1], out=sys.argv[2]); "
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program, str(routed), str(routed.parent / "page.html")], check=True)


def test_a_transition_is_named_by_where_it_leads():
    places = 5  # IN, three blocks, OUT
    kinds = {(0, 1): "advance", (1, 2): "advance", (0, 2): "skip", (2, 2): "recur", (3, 1): "recur", (0, 4): "leave", (3, 4): "leave"}
    assert {pair: pool.kind(*pair, places) for pair in kinds} == kinds
    with pytest.raises(ValueError, match="must be 3 rows of 3 numbers"):
        pool.graph(["IN", "B1", "OUT"], [[0.0, 1.0, 0.0]], source="nothing")
    with pytest.raises(ValueError, match="nobody went anywhere"):
        pool.graph(["IN", "OUT"], [[0.0, 0.0], [0.0, 0.0]], source="nothing")


def test_the_widest_line_is_the_one_that_is_travelled_most():
    counts = [[0.0, 10.0, 2.0, 0.0], [0.0, 0.0, 6.0, 4.0], [0.0, 0.0, 1.0, 8.0], [0.0, 0.0, 0.0, 0.0]]
    figure = pool.graph(["IN", "B1", "B2", "OUT"], counts, source="a test")
    wide = parsed(str(figure.picture).encode()).one("div", class_="wide")
    width = {edge.one("title").text.split(":")[0]: float(edge.attributes["stroke-width"]) for edge in wide.all(class_="edge")}
    assert width["IN → B1"] == max(width.values()) and width["IN → B1"] / width["B1 → OUT"] == pytest.approx(2.5)
    assert set(width) == {"IN → B1", "IN → B2", "B1 → B2", "B1 → OUT", "B2 → B2", "B2 → OUT"}


def test_scales_have_round_ticks_within_their_limits():
    assert [round(tick, 6) for tick in Scale(0.0, 1.0, 0.0, 100.0).ticks] == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Scale(0.0, 25_000.0, 0.0, 1.0).told(5000.0) == "5,000" and Scale(0.0, 9e6, 0.0, 1.0).told(2e6) == "2M"
    flat = Scale(3.0, 3.0, 0.0, 100.0)
    assert 0 <= flat.at(3.0) <= 100 and Scale(0.0, 1.0, 10.0, 20.0).at(7.0) == 20


def test_names_are_cut_to_their_place_and_wide_letters_count_double():
    assert fit("short", 100.0) == "short" and fit("a very long name", 40.0) == "a ver…" and fit("春风不似旧时人", 40.0) == "春风…"


def test_a_long_line_is_drawn_through_means():
    drawn = parsed(str(chart([Line([(float(x), 1.0 + x % 2) for x in range(10_000)], "s0")], label="x", across="x", up="y")).encode())
    line = next(drawn.one("div", class_="wide").all("polyline", class_="line"))
    points = [tuple(map(float, pair.split(","))) for pair in line.attributes["points"].split()]
    assert len(points) <= 300 and len({y for _, y in points}) == 1, "means of neighbours"
