"""Paths on a terminal and in files, and budgets: what a user asks of a routed model."""

import io
import re

import pytest
import torch
from cases import scatter
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

import pathlm
from pathlm import trace
from pathlm.cli import app
from pathlm.generate import generate, run, stream
from pathlm.path import Path, Step, read_neighbours, read_paths
from pathlm.words import spelled
from test_generate import make_gpt2, make_llama, make_tokenizer

TEXTS = ["The people of the Union.", "春眠不觉晓 😀"]


def routed(**options):
    """A small model whose tokens take different routes and leave at different steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "vocab_size": 300}
    model = pathlm.build(pathlm.preset("brian-tiny", **{"bos_token_id": 0, "eos_token_id": 0} | sizes | options)).eval()
    if model.config.pool_blocks:
        scatter(model)
    return model


PLAIN = {"pool_blocks": 0, "max_route_steps": 0, "pre_blocks": 6}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A run folder, as `pathlm train` leaves it, with one checkpoint."""
    run_folder = tmp_path_factory.mktemp("run")
    place = run_folder / "checkpoints" / "best"
    routed().save_pretrained(place)
    tokenizer.save_pretrained(place)
    (run_folder / "run.json").write_text('{"config": {"data": {}}}')
    return run_folder


def command(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pathlm", **options)


def printed(found, width=100, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    trace.show(found, console)
    return console.file.getvalue()


@pytest.mark.parametrize("place", ["", "checkpoints/best"], ids=["run", "checkpoint"])
def test_the_command_prints_a_line_per_token_and_writes_the_paths(folder, tokenizer, tmp_path, place):
    out = tmp_path / "paths.jsonl"
    done = command("trace", folder / place, *TEXTS, "--budget", "0.6", "--out", out)
    assert done.exit_code == 0, done.stderr
    expected = trace.trace(routed(), tokenizer, TEXTS, budget=0.6)
    written = list(read_paths(out))
    for mine, path in zip(written, (path for paths in expected for path in paths), strict=True):
        assert (mine.text, trace.route(mine)) == (path.text, trace.route(path))
        assert [step.score for step in mine.steps] == pytest.approx([step.score for step in path.steps], abs=1e-5)
    assert any(step.rivals for path in written for step in path.steps)
    lengths = [1 + len(tokenizer.encode(text)) for text in TEXTS]
    assert [len(paths) for paths in expected] == lengths
    assert len(re.findall(r"→ OUT → B\d +\d\.\d\d\d", done.stdout)) == sum(lengths)
    assert f"{sum(lengths)} paths written to" in " ".join(done.stdout.split())
    assert "[2/2]" in done.stdout


def test_a_text_is_traced_as_if_it_were_alone(tokenizer):
    model = routed()
    assert trace.trace(model, tokenizer, TEXTS) == [trace.trace(model, tokenizer, [text])[0] for text in TEXTS]


def test_a_smaller_budget_takes_fewer_steps_and_none_is_the_trained_one(tokenizer):
    model = routed()

    def mean(budget):
        counts = [trace.steps(path) for paths in trace.trace(model, tokenizer, TEXTS, budget=budget) for path in paths]
        return sum(counts) / len(counts)

    assert mean(0.25) < mean(0.6) < mean(1.0) == 4 == model.config.max_route_steps
    assert mean(None) == mean(model.pool.budget_default.item())


def test_a_plain_decoder_has_paths_too_all_alike(tokenizer):
    (paths,) = trace.trace(routed(**PLAIN), tokenizer, ["The Union"])
    assert {trace.route(path) for path in paths} == {"B1 … B7"}
    assert {(trace.steps(path), path.evaluations) for path in paths} == {(0, 7)}
    assert "7.00 blocks run per token: 7.00 that nobody chooses, 0.00 on routes" in printed([paths])


@pytest.mark.parametrize("top_k", [1, 2])
def test_route_steps_are_those_a_budget_counts_and_stand_before_out(tokenizer, top_k):
    model = routed(route_top_k=top_k, pre_blocks=2, post_blocks=3)
    row = [0, *tokenizer.encode("The people of the Union")]
    (paths,) = trace.trace(model, tokenizer, ["The people of the Union"])
    seen = model(torch.tensor([row]), trace=True, labels=torch.tensor([row]))
    assert len({trace.steps(path) for path in paths}) > 1
    for place, path in enumerate(paths):
        nodes = [step.node for step in path.steps]
        count = trace.steps(path)
        assert nodes[:2] == ["block:1", "block:2"] and nodes[2 + count :] == ["exit", "block:7", "block:8", "block:9"]
        assert [step.node for step in path.route] == nodes[2 : 2 + count] and path.first == 2
        assert count == int((seen.trace.block_BTS[0, place, 2 : 2 + model.config.max_route_steps] > 0).sum())
        assert path.evaluations == 5 + top_k * count
    assert sum(map(trace.steps, paths)) / len(paths) == pytest.approx(seen.metrics["route/steps_mean"].item())
    assert sum(path.evaluations for path in paths) / len(paths) == pytest.approx(seen.metrics["route/block_evaluations"].item())
    shown = printed([paths])
    assert f"{seen.metrics['route/steps_mean']:.2f} on average" in shown
    assert f"{seen.metrics['route/block_evaluations']:.2f} blocks run per token: 5.00 that nobody chooses" in shown


def test_texts_come_from_files_and_standard_input(folder, tmp_path):
    (tmp_path / "letter.txt").write_text("The people\n\nof the Union\n")
    assert "[2/2]" in command("trace", folder, "--file", tmp_path / "letter.txt").stdout
    whole = command("trace", folder, "--file", tmp_path / "letter.txt", "--whole").stdout
    assert "⏎" in whole and "[1/" not in whole
    assert command("trace", folder, input="The people\n").stdout == command("trace", folder, "The people").stdout


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["block:1", "block:3", "block:3", "exit"], "B1 → B3 → B3 → OUT"),
        (["block:1", "block:2", "block:3", "block:4", "block:2", "exit"], "B1 … B4 → B2 → OUT"),
        (["block:9", "block:2+block:3", "block:10", "exit"], "B9 → B2+B3 → B10 → OUT"),
        (["block:2", "exit", "block:3"], "B2 → OUT → B3"),
        (["cat", "sat\n"], "cat → sat⏎"),
        (["exit"], "OUT"),
        ([], ""),
    ],
    ids=str,
)
def test_a_route_is_written_in_short(steps, expected):
    assert trace.route(Path("brian", "x", tuple(Step(name, 0.5) for name in steps))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", "plain text"),
        ("a\nb\r\tc", "a⏎b␍⇥c"),
        ("\x1b[31mred\x07", "␛[31mred\\u{7}"),
        ("\u202eabc\u200d\u2028\ud800", "\\u{202e}abc\\u{200d}\\u{2028}\\u{d800}"),
        ("\ufffd", "\ufffd"),
        ("\u0301e", "◌\u0301e"),
        ("שלום", "שלום\u200e"),
        ("مرحبا 7", "مرحبا 7\u200e"),
        ("", ""),
    ],
)
def test_text_that_would_disturb_a_terminal_is_shown_as_signs(text, expected):
    assert trace.readable(text) == expected


@pytest.mark.parametrize(
    ("names", "expected", "text"),
    [
        (["a", "\\xe6", "\\x98", "\\xa5", "b"], ["a", "春 1/3", "春 2/3", "春 3/3", "b"], "a◌◌春b"),
        ([" \\xc3", "\\xa9t"], [" é 1/2", "é 2/2t"], " ◌ét"),
        (["\\xf0\\x9f\\x98", "\\x80\\xe6", "\\x98\\xa5"], ["😀 1/2", "😀 2/2春 1/2", "春 2/2"], "◌😀◌春"),
        (["\\xe6", "\\x98", "b"], ["\\xe6", "\\x98", "b"], "\\xe6\\x98b"),
        (["\\xe6", "\\xc3", "\\xa9"], ["\\xe6", "é 1/2", "é 2/2"], "\\xe6◌é"),
        (["\\x98", "\\xe6"], ["\\x98", "\\xe6"], "\\x98\\xe6"),
        (["\\x41", "\ud800", "\ufffd"], ["\\x41", "\ud800", "\ufffd"], "\\x41\ud800\ufffd"),
        ([], [], ""),
    ],
)
def test_tokens_that_share_a_character_say_so_and_the_last_one_spells_it(names, expected, text):
    found = spelled(names)
    assert [it.name for it in found] == expected
    assert "".join(it.text for it in found) == text


def test_neighbours_are_joined_within_the_route_and_around_it_but_not_across():
    nodes = [*(f"block:{i}" for i in range(1, 11)), "exit", *(f"block:{i}" for i in range(11, 16))]
    path = Path("brian", "x", tuple(Step(name, 1.0) for name in nodes), first=4)
    assert trace.route(path) == "B1 … B4 → B5 … B10 → OUT → B11 … B15"
    assert (trace.steps(path), path.evaluations) == (6, 15)
    dim = printed([[path]], force_terminal=True, color_system="truecolor")
    assert "\x1b[2mB1 … B4\x1b[0m → B5 … B10 → OUT → \x1b[2mB11 … B15" in dim


def test_paths_keep_where_their_route_begins_as_json_lines(tmp_path):
    path = Path("brian", "x", (Step("block:1", 1.0), Step("block:3+block:2", 0.5, (("exit", 0.5),)), Step("exit", 1.0)), first=1)
    assert Path.from_json(path.to_json()) == path
    old = path.to_json().replace(', "first": 1', "")
    assert old != path.to_json() and Path.from_json(old).first == 0
    with pytest.raises(ValueError, match="not a path record"):
        Path.from_json(path.to_json().replace('"first": 1', '"first": 7'))


def one(text, steps=2):
    return Path("brian", text, (*(Step(f"block:{i}", 0.9, (("block:7", 0.1),)) for i in range(1, steps + 1)), Step("exit", 0.5)))


@pytest.mark.parametrize("text", ["\n", "\x1b[2J", "x" * 500, "春" * 60, "\ufffd\ufffd", " " * 40, "שלום", "[red]not markup[/]"])
def test_every_token_stays_in_one_line_of_the_table(text):
    lines = printed([[one("before"), one(text, 3), one("after")]], width=80).splitlines()
    rows = [line for line in lines if "→ OUT" in line]
    assert len(rows) == 3
    assert all(cell_len(line) <= 80 for line in rows)
    assert "\x1b" not in "".join(lines)


def test_the_sentence_is_coloured_by_steps_and_numbered_where_there_are_no_colours():
    found = [[one("Short", 2), one(" [b]long", 5), one("\n", 2)]]
    plain = printed(found)
    assert "Short² [b]long⁵⏎²" in plain
    assert "2  67%" in plain and "5  33%" in plain and "3.00 on average over 3 tokens" in plain
    coloured = printed(found, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;26;26;26;48;2;142;202;230mShort" in coloured
    assert "\x1b[38;2;26;26;26;48;2;255;138;128m [b]long" in coloured
    assert "\x1b[38" not in printed(found, force_terminal=True, color_system="truecolor", no_color=True)
    assert trace.sentence(found[0]).plain == "Short [b]long⏎\n"


def test_the_likeliest_thing_that_did_not_happen_is_named():
    path = Path("brian", "x", (Step("block:1", 0.5, (("block:2", 0.3), ("exit", 0.2))), Step("exit", 0.4, (("block:3", 0.6),))))
    assert re.search(r"B1 → OUT +0\.200 +B3 0\.60", printed([[path]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ["word " * 90]}, r"text 1 has \d+ tokens: the model reads at most max_position_embeddings=64"),
        ({"texts": ["\udcff"]}, "is not UTF-8"),
        ({"budget": 0.1}, "budget=0.1: must lie between 0.25 and 1, the budgets this model was trained for"),
        ({"budget": 1.5}, "budget=1.5: must lie above 0 and at most at 1"),
        ({"budget": 0.0}, "budget=0.0: must lie above 0"),
        ({"budget": float("nan")}, "budget=nan: must lie above 0"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(folder, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trace.run(folder, **{"texts": ["The"], "out": tmp_path / "paths.jsonl"} | options)
    assert not (tmp_path / "paths.jsonl").exists()


def test_a_model_that_tells_no_paths_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="model_type='gpt2': known families are brian"):
        trace.trace(make_gpt2(), tokenizer, ["The"])
    with pytest.raises(ValueError, match="pathlm convert FOLDER OUT"):
        trace.trace(make_llama(), tokenizer, ["The"])


def test_a_file_in_a_folder_that_does_not_exist_is_refused_before_any_work(tmp_path):
    done = command("trace", "nowhere", "text", "--out", tmp_path / "no" / "paths.jsonl")
    assert done.exit_code == 2
    assert "the folder" in done.stderr and "does not exist" in done.stderr


@pytest.mark.parametrize("budget", [0.25, 0.6, 1.0])
def test_writing_with_a_budget_is_decoding_with_it(budget, tokenizer):
    model, prompt = routed(), [5, 6, 7]
    row = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            row.append(int(model(torch.tensor([row]), budget=budget).logits[0, -1].argmax()))
    options = {"max_new_tokens": 12, "temperature": 0, "budget": budget}
    assert generate(model, [prompt], **options) == [row[3:]]
    assert generate(model, [prompt, [9]], **options)[0] == row[3:]
    pieces = stream(model, tokenizer, ["The"], **options)
    text = tokenizer.decode(generate(model, [[0, *tokenizer.encode("The")]], eos_token_id=0, **options)[0], skip_special_tokens=True)
    assert "".join(piece.text for piece in pieces) == text


def test_budgets_change_what_is_written():
    model = routed()
    written = {tuple(generate(model, [[5, 6, 7]], max_new_tokens=12, temperature=0, budget=budget)[0]) for budget in (0.25, 0.6, 1.0)}
    assert len(written) == 3


@pytest.mark.parametrize(
    ("model", "budget", "message"),
    [
        (routed(), 0.2, "budget=0.2: must lie between 0.25 and 1"),
        (routed(**PLAIN), 0.6, "budget=0.6: a plain decoder has no pool to leave early"),
        (make_llama(), 0.6, "budget=0.6: a LlamaForCausalLM has no pool to leave early"),
    ],
    ids=["outside the trained range", "plain", "llama"],
)
def test_a_budget_that_means_nothing_is_refused_before_the_first_token(model, budget, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        generate(model, [[5]], max_new_tokens=1, budget=budget)
    with pytest.raises(ValueError, match=message):
        stream(model, tokenizer, ["The"], max_new_tokens=1, budget=budget)


def test_a_model_never_trained_to_leave_has_no_budget(tokenizer):
    model = pathlm.wrap(routed(**PLAIN), pre_blocks=1, pool_blocks=5, post_blocks=1)
    with pytest.raises(ValueError, match=r"budget=0\.5: this model has not been trained to leave the pool early"):
        generate(model, [[5]], max_new_tokens=1, budget=0.5)


def test_the_generate_command_takes_a_budget(folder):
    shown = command("generate", folder, "The", "--budget", "0.3", "--temperature", "0", "--max-new-tokens", "12")
    assert shown.exit_code == 0
    assert shown.stdout == "The" + run(folder, ["The"], budget=0.3, temperature=0, max_new_tokens=12)[0] + "\n"
    assert "budget=0.2: must lie between 0.25 and 1" in command("generate", folder, "The", "--budget", "0.2").stderr
    assert "budget=7.0: must lie above 0" in command("generate", "nowhere", "The", "--budget", "7").stderr


def test_a_routed_model_cannot_be_traced_from_disk(folder):
    assert "only a signal graph (brillm) can stay on disk" in command("trace", folder, "The", "--mmap").stderr


def test_characters_of_several_tokens_are_whole_on_the_terminal_and_explained():
    halves = ["\\xe6", "\\x98", "\\xa5"]
    shown = printed([[one("a", 2), *(one(half, 3) for half in halves), one("b", 2)]])
    assert [" ".join(line.split()[:2]) for line in shown.splitlines()[2:5]] == ["春 1/3", "春 2/3", "春 3/3"]
    assert "a²◌³◌³春³b²" in shown
    assert "春 1/3 is the first of the 3 tokens that spell 春; in the text ◌ stands for it" in shown
    nodes = [Step("a", 0.0), *(Step(half, 1.0, (("\\x95", 0.5),), (("step:1", 1.0),)) for half in halves)]
    signal = printed([[Path("brillm", "a春", tuple(nodes))]], width=140)
    assert "春 1/3(1) 100%" in signal and "a◌◌春" in signal and "in the text ◌ stands for it" in signal
    assert "\\x95 is a byte, no whole character" in signal, "a rival cannot be joined with anything"
    assert "is a byte" not in shown and "is a byte" in printed([[one("\\xe6")]]) and "◌" not in printed([[one("é")]])


def signal_path():
    """A sentence of three nodes: the second is where most energy arrived, the third is not."""
    second = Step(
        "the", 2.0, (("a", 1.5), ("7 nodes without an edge of their own", 0.25)), (("signal", 1.5), ("bias", 0.7), ("position", -0.2))
    )
    parts = (("step:1", 0.2), ("bias", 0.5), ("position", 0.2), ("earlier", 0.1))
    return Path("brillm", "we the\npeople", (Step("we ", 0.0), second, Step("\npeople", 1.0, (("cat", 3.0),), parts)))


def test_a_signal_is_shown_a_line_per_node_with_what_its_energy_is_made_of():
    shown = printed([[signal_path()]], width=140)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[1] == "0 we· – the initial signal starts here"
    assert lines[2] == "1 the ██████ 2.000 +0.500 we·(0) 75% bias 35% position -10% a 1.500 7 nodes without an edge of their own 0.250"
    assert lines[3] == "2 ⏎people ███ 1.000 -2.000 bias 50% the(1) 20% position 20% 1 other 10% cat 3.000"
    assert "we the[⏎people]" in shown
    assert lines[-1].startswith("1 most energy 1 others had more of 2 steps; margin -0.750 on average")
    assert all(cell_len(line) <= 60 for line in printed([[signal_path()]] * 2, width=60).splitlines())


def test_the_command_shows_the_signals_of_a_graph_and_writes_their_parts(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = pathlm.build(pathlm.preset("brillm-tiny", vocab_size=300, edges=3_000, bos_token_id=0))
    model.save_pretrained(tmp_path / "graph")
    tokenizer.save_pretrained(tmp_path / "graph")
    done = command("trace", tmp_path / "graph", *TEXTS, "--out", tmp_path / "paths.jsonl")
    assert done.exit_code == 0 and "the initial signal starts here" in " ".join(done.stdout.split()) and "[2/2]" in done.stdout
    mapped = command("trace", tmp_path / "graph", *TEXTS, "--mmap", "--out", tmp_path / "mapped.jsonl")
    assert mapped.exit_code == 0 and (tmp_path / "mapped.jsonl").read_text() == (tmp_path / "paths.jsonl").read_text()
    for text, path in zip(TEXTS, read_paths(tmp_path / "paths.jsonl"), strict=True):
        assert path.text.endswith(text) and len(path.steps) == 1 + len(tokenizer.encode(text))
        for step in path.steps[1:]:
            assert sum(number for _, number in step.parts) == pytest.approx(step.score, abs=1e-5)
            for (_, energy), numbers in zip(step.rivals, step.rival_parts, strict=True):
                assert sum(numbers) == pytest.approx(energy, abs=1e-5)


def test_kept_paths_lie_in_the_runs_folder_and_say_which_text_they_are_of(folder, tokenizer):
    done = command("trace", folder / "checkpoints" / "best", *TEXTS, "--keep")
    assert done.exit_code == 0 and "paths.jsonl" in done.stdout
    written = list(read_paths(folder / "paths.jsonl"))
    assert [path.document for path in written] == [i for i, text in enumerate(TEXTS) for _ in range(1 + len(tokenizer.encode(text)))]
    assert not (folder / "neighbours.jsonl").exists()


def test_a_signal_graph_keeps_the_neighbours_of_its_texts_nodes_too(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = pathlm.build(pathlm.preset("brillm-tiny", vocab_size=300, edges=3_000, bos_token_id=0))
    model.save_pretrained(tmp_path / "graph")
    tokenizer.save_pretrained(tmp_path / "graph")
    assert command("trace", tmp_path / "graph", TEXTS[0], "--keep").exit_code == 0
    nodes = dict.fromkeys([0, *tokenizer.encode(TEXTS[0])])
    assert [record.node for record in read_neighbours(tmp_path / "graph" / "neighbours.jsonl")] == [tokenizer.decode([n]) for n in nodes]


def test_paths_say_which_text_they_are_of_and_older_ones_need_not():
    path = Path("brian", "x", (Step("block:1", 1.0),), document=3)
    assert Path.from_json(path.to_json()) == path
    older = path.to_json().replace(', "document": 3', "")
    assert older != path.to_json() and Path.from_json(older).document is None
    assert "document" not in Path.from_json(older).to_json()


@pytest.mark.parametrize(
    "line",
    ['{"family": "brian"}', "[1]", "{", '{"family": "x", "text": "y", "steps": [], "first": 1e999}', '"\xff"', "[" * 100_000],
    ids=["a field is missing", "no object", "no JSON", "no number", "not UTF-8", "nested without end"],
)
def test_a_line_that_is_no_path_is_named_with_its_file(line, tmp_path):
    file = tmp_path / "paths.jsonl"
    file.write_bytes(one("x").to_json().encode() + b"\n\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"paths\.jsonl, line 3: "):
        list(read_paths(file))
