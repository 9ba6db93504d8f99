"""The demo on a small text of our own: it goes the whole way, and continues wherever it was stopped."""

import re
import signal

import pytest
import torch
from rich.console import Console

from pathlm import demo as module
from pathlm.train import loop

SMALL = [
    "steps=4", "batch_tokens=256", "micro_rows=4", "eval_rows=2", "eval_every=2", "save_every=2", "data.length=32", "optim.warmup_steps=1",
    "model.hidden_size=32", "model.intermediate_size=48", "model.vocab_size=300", "model.max_position_embeddings=160",
]  # fmt: skip
PHASES = ["text", "training", "evaluation", "sample", "routing", "routes", "graph", "signal", "codes", "memory", "report"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the demo with a text from this folder in place of the one that is fetched; return its result and what it printed."""
    (tmp_path / "speeches").mkdir()
    for number in range(80):
        text = " ".join(f"my fellow citizens number {number + place}, we are {place % 7} friends." for place in range(12))
        (tmp_path / "speeches" / f"{number}.txt").write_text(text, encoding="utf-8")
    recipe = f'sources = ["{tmp_path}/speeches/*.txt"]\nvalidation = 0.2\ntest = 0.2\n'
    (tmp_path / "speeches.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.setattr(module, "TEXT", str(tmp_path / "speeches.toml"))
    monkeypatch.chdir(tmp_path)

    def call(*more):
        console = Console(record=True, width=100, file=open("screen.txt", "w", encoding="utf-8"))  # noqa: SIM115
        with console.file:
            result = module.demo("runs/demo", [*SMALL, "data.corpus=data/speeches", *more], console=console)
            return result, console.export_text()

    return call


def test_it_goes_from_text_to_a_sample_and_repeats_in_no_time(run):
    result, shown = run()
    assert result["exit_code"] == 0
    assert list(result["seconds"]) == PHASES
    assert (result["training"].step, result["training"].finished_before) == (4, False)
    assert set(result["evaluation"]["ngrams"]["orders"]) == {"1", "2", "3", "4", "5"}
    assert result["sample"]
    page = result["report"].read_text(encoding="utf-8")
    assert result["report"].name == "report.html"
    assert all(name in page for name in ("demo-routed", "demo-graph", "demo-codes", "Sentences", "The signal"))
    assert (result["routing"].step, result["routing"].folder.name) == (4, "demo-routed")
    assert "the 3-gram's" in shown
    assert "pathlm generate runs/demo" in shown
    assert "pathlm trace runs/demo-routed" in shown
    routes = result["routes"]
    assert routes["plain"]["block_evaluations"] == 6
    assert 3 <= routes["routed"]["block_evaluations"] <= 6
    assert f"{routes['routed']['block_evaluations']:.2f} of 6 blocks run per token" in " ".join(shown.split())
    # Whole documents of both models, token by token the same; the largest budget uses every step.
    assert {one["tokens"] for one in (routes["plain"], routes["routed"], *routes["budgets"])} == {routes["plain"]["tokens"]}
    assert [one["budget"] for one in routes["budgets"]] == sorted(one["budget"] for one in routes["budgets"])
    assert routes["budgets"][-1]["block_evaluations"] == 6
    assert len(result["paths"]) == 2
    assert shown.count("→ OUT") >= 6
    assert (result["graph"].step, result["graph"].folder.name) == (4, "demo-graph")
    scores = result["evaluation"]["ngrams"]["orders"], result["evaluation"]["model"], result["energies"]["model"]
    table = shown[shown.index("test: the same") :]
    assert [f"{number['bits_per_byte']:.4f}" in table for number in (scores[0]["2"], scores[0]["3"], *scores[1:])] == [True] * 4
    assert scores[2]["tokens"] == scores[1]["tokens"]
    assert result["signal"].text.endswith(module.SIGNAL) and "made of" in table
    assert len(re.findall(r"^ +\d+ ", table, flags=re.MULTILINE)) >= len(result["signal"].steps), "a line per node"
    for step in result["signal"].steps[1:]:
        assert sum(number for _, number in step.parts) == pytest.approx(step.score, abs=1e-5)
    assert "pathlm trace runs/demo-graph" in shown
    assert (result["codes"].step, result["codes"].folder.name) == (4, "demo-codes")
    held = result["memory"]["bytes"]
    assert held["codes"] < held["routed"] <= held["plain"]
    assert f"{held['codes'] / held['plain']:.0%} of the plain decoder's" in " ".join(shown.split())
    assert result["memory"]["codes"]["tokens"] == routes["routed"]["tokens"]

    again, shown = run()
    assert again["training"].finished_before
    assert again["evaluation"] == result["evaluation"]
    assert again["sample"] == result["sample"]
    assert again["routing"].finished_before
    assert again["routes"] == result["routes"]
    assert again["paths"] == result["paths"]
    assert again["graph"].finished_before
    assert (again["energies"], again["signal"]) == (result["energies"], result["signal"])
    assert again["codes"].finished_before
    assert again["memory"] == result["memory"]
    assert "already prepared" in shown
    assert shown.count("already measured") == 4


def test_overrides_concern_all_recipes_or_one(run):
    result, _ = run("routed.steps=5", "plain.steps=2", "graph.steps=3", "graph.model.signal_size=4", "codes.steps=2")
    assert [result[name].step for name in ("training", "routing", "graph", "codes")] == [2, 5, 3, 2]


def interrupt_step(monkeypatch, number):
    """Press Ctrl-C in training step `number` of all steps from now on; return the list that grows with each step."""
    plain = loop.step
    calls = []

    def step(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return plain(*arguments, **options)

    monkeypatch.setattr(loop, "step", step)
    return calls


def test_stopped_by_ctrl_c_in_training_it_continues_there(run, monkeypatch):
    calls = interrupt_step(monkeypatch, 2)
    result, shown = run()
    assert result["exit_code"] == 130
    assert "repeat the command that began it" in shown
    assert "evaluation" not in result
    stopped = result["training"].step

    result, _ = run()
    assert result["exit_code"] == 0
    assert len(calls) == 4 + (2 - stopped) + 4 + 4 + 4
    assert "evaluation" in result


def test_stopped_by_ctrl_c_in_routing_it_continues_there(run, monkeypatch):
    interrupt_step(monkeypatch, 6)
    result, shown = run()
    assert result["exit_code"] == 130
    assert "repeat the command that began it" in shown
    assert "routes" not in result
    assert result["routing"].step < 4
    result, _ = run()
    assert (result["exit_code"], result["training"].finished_before, result["routing"].step) == (0, True, 4)
    assert "routes" in result


def test_stopped_by_ctrl_c_in_the_graphs_training_it_continues_there(run, monkeypatch):
    interrupt_step(monkeypatch, 10)
    result, shown = run()
    assert result["exit_code"] == 130
    assert "repeat the command that began it" in shown
    assert "routes" in result and "signal" not in result
    result, _ = run()
    assert (result["exit_code"], result["routing"].finished_before, result["graph"].step) == (0, True, 4)
    assert "signal" in result


@pytest.mark.parametrize(
    "phase",
    [
        *("_prepare", "_train", "_measure_routes", "_measure_memory"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("_evaluate", "_sample", "_show_paths", "_compare_graph", "_show_signal")),
    ],
)
def test_stopped_at_the_start_of_any_phase_it_continues(run, monkeypatch, phase):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, phase, stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    torch.manual_seed(1)  # what happened before does not matter
    result, shown = run()
    assert list(result["seconds"]) == PHASES
    assert ("already prepared" in shown) == (phase != "_prepare")
    assert result["training"].finished_before == (phase not in ("_prepare", "_train"))
    last = ("_compare_graph", "_show_signal", "_measure_memory")
    assert result["routing"].finished_before == (phase in ("_measure_routes", "_show_paths", *last))
    assert result["graph"].finished_before == (phase in last)
    known = {"_sample": 1, "_measure_routes": 1, "_show_paths": 2, "_compare_graph": 2, "_show_signal": 3, "_measure_memory": 3}
    assert shown.count("already measured") == known.get(phase, 0)
