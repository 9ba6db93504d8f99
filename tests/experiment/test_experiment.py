"""Tables of runs on synthetic tasks and a small corpus: checked as a whole, trained, killed, continued, compared."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import pathlm
from pathlm import experiment, train
from pathlm.cli import app
from pathlm.config import load
from pathlm.experiment import notes, table
from pathlm.experiment.manifest import Experiment, Row, read
from pathlm.models import family
from pathlm.text.prepare import prepare, prepare_config
from pathlm.train import loop

ABLATIONS = Path(__file__).parents[2] / "experiments" / "ablations"
RECIPE = """
preset = "plain-tiny"
steps = 4
batch_tokens = 128
micro_rows = 2
eval_every = 2
eval_rows = 2
save_every = 2
log_every = 1
[model]
hidden_size = 16
intermediate_size = 32
num_attention_heads = 2
pre_blocks = 2
[data]
length = 64
task_share = 1.0
tasks = { copy = 1.0 }
[optim]
warmup_steps = 1
"""
MANIFEST = """
recipe = "small.toml"
out = "runs"
seeds = [0, 1]
baseline = "plain"
metrics = ["validation/loss", "tokens", "parameters"]
[[rows]]
name = "plain"
[[rows]]
name = "routed"
about = "one block may be left out"
from = "plain"
set = ["preset=brian-tiny", "model.pre_blocks=1", "model.pool_blocks=1", "model.max_route_steps=1", "curriculum=fixed", "steps=2"]
"""


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it, so nothing is tidied up."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a manifest and its recipe, where the commands are given."""
    (tmp_path / "small.toml").write_text(RECIPE)
    (tmp_path / "two.toml").write_text(MANIFEST)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewrite(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def run(name="two.toml", **options):
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=300, file=nowhere)
        return experiment.run(name, console=console, **options), console.export_text()


def numbers(found):
    """Every run's numbers."""
    return {(row["name"], one["seed"]): one["metrics"] for row in found.table["rows"] for one in row["runs"]}


def states(found):
    return {(row["name"], one["seed"]): one["state"] for row in found.table["rows"] for one in row["runs"]}


def test_every_row_is_trained_with_every_seed_and_compared_seed_by_seed(here):
    found, said = run()
    assert found.exit_code == 0
    plain, routed = found.table["rows"]
    losses = [[one["metrics"]["validation/loss"] for one in row["runs"]] for row in (plain, routed)]
    summary = routed["metrics"]["validation/loss"]
    assert summary["mean"] == pytest.approx(statistics.mean(losses[1])) and summary["sd"] == pytest.approx(statistics.stdev(losses[1]))
    assert (summary["min"], summary["max"]) == (min(losses[1]), max(losses[1]))
    paired = [b - a for a, b in zip(*losses)]
    assert summary["difference"]["mean"] == pytest.approx(statistics.mean(paired))
    assert summary["difference"]["sd"] == pytest.approx(statistics.stdev(paired)) and summary["difference"]["seeds"] == [0, 1]
    assert plain["metrics"]["validation/loss"]["difference"]["mean"] is None
    logged = [json.loads(line) for line in (here / "runs" / "routed-1" / "metrics.jsonl").read_text().splitlines()]
    assert losses[1][1] == logged[-1]["validation/loss"]
    assert json.loads((here / "runs" / "two.json").read_text()) == found.table
    written = (here / "runs" / "two.md").read_text()
    assert "| routed | one block may be left out | 2 | " in written and "**Minus plain**, seed by seed:" in written
    assert "Not finished" not in written and "4/4  row 'routed', seed 1, from plain: 2 steps of 128 tokens" in said


def test_a_row_begins_with_the_weights_of_another_of_its_seed_and_reads_on_in_another_order(here):
    found, _ = run()
    begun = json.loads((here / "runs" / "routed-1" / "run.json").read_text())
    assert begun["init"]["checkpoint"].startswith(str(here / "runs" / "plain-1" / "checkpoints" / "step-"))
    assert begun["config"]["seed"] == 1001
    read_before = int(begun["init"]["checkpoint"][-8:]) * 128
    assert numbers(found)["routed", 1]["tokens"] == read_before + 256
    assert numbers(found)["routed", 1]["parameters"] > numbers(found)["plain", 1]["parameters"]


def test_a_run_is_the_one_that_pathlm_train_would_have_made(here):
    found, _ = run(rows=["plain"], seeds=[1])
    alone = train.start(load("small.toml", ["seed=1", "out=alone"]), console=Console(quiet=True))
    assert numbers(found)["plain", 1]["validation/loss"] == alone.last_validation


def test_what_is_finished_is_not_trained_again(here, monkeypatch):
    before, _ = run()
    monkeypatch.setattr(train, "start", None)
    again, said = run()
    assert numbers(again) == numbers(before)
    assert "4 of 4 runs are finished already" in said


@pytest.mark.parametrize("at", [1, 4, 5, 11])
def test_killed_at_any_step_and_repeated_the_table_is_the_same(here, monkeypatch, at):
    whole, _ = run()
    (here / "runs").rename(here / "whole")
    count = iter(range(1, 100))
    real = loop._tell

    def deadly(sinks, state, stage, metrics, model):
        real(sinks, state, stage, metrics, model)
        if "loss/total" in metrics and next(count) == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_tell", deadly)
        with pytest.raises(Killed):
            run()
    assert "unfinished" in states(run(table_only=True)[0]).values()
    again, _ = run()
    assert numbers(again) == numbers(whole)


def test_killed_before_it_was_measured_a_run_is_measured_and_not_trained_again(here, monkeypatch):
    whole, _ = run(rows=["plain"], seeds=[0])
    notes.forget(read("two.toml").runs[0])
    assert states(run(table_only=True)[0])["plain", 0] == "not measured"
    monkeypatch.setattr(loop, "step", None)
    again, _ = run(rows=["plain"], seeds=[0])
    assert numbers(again)["plain", 0] == numbers(whole)["plain", 0]


def test_ctrl_c_finishes_the_step_and_leaves_and_the_same_command_goes_on(here, monkeypatch):
    real = loop._tell

    def press(sinks, state, stage, metrics, model):
        real(sinks, state, stage, metrics, model)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_tell", press)
        found, said = run()
    assert (found.interrupted, found.exit_code) == (signal.SIGINT, 130)
    assert "plain, seed 0: unfinished at step 3 of 4" in said
    assert run()[0].exit_code == 0


def test_some_rows_and_seeds_are_trained_with_the_rows_that_they_begin_from(here):
    found, _ = run(rows=["routed"], seeds=[1])
    assert states(found) == {("plain", 0): "not begun", ("plain", 1): "finished", ("routed", 0): "not begun", ("routed", 1): "finished"}
    assert "| plain |  | 1 of 2 |" in (here / "runs" / "two.md").read_text()
    with pytest.raises(ValueError, match=r"rows='rooted': two\.toml has plain, routed"):
        run(rows=["rooted"])
    with pytest.raises(ValueError, match=r"seeds=7: two\.toml has 0, 1"):
        run(seeds=[7])


def test_a_dry_run_tells_steps_and_parameters_and_writes_nothing(here):
    found, said = run(dry_run=True)
    row = next(line.split() for line in said.splitlines() if line.startswith("routed-1"))
    assert row[1:4] == ["plain-1", "2", "128"] and row[5:] == ["not", "begun"]
    assert "4 of 4 to train" in said and f"{2 * 6 * 128:,} in all" in said
    assert not (here / "runs").exists() and found.exit_code == 0
    trained, _ = run()
    assert int(row[4].replace(",", "")) == numbers(trained)["routed", 1]["parameters"]
    with pytest.raises(ValueError, match="dry_run=True"):
        run(dry_run=True, table_only=True)


def test_a_gate_that_stops_a_run_stops_its_row_alone(here):
    # Two steps are too few for the router to learn to follow routes that it is shown.
    stage = '"model.pre_blocks=0", "model.pool_blocks=2", "model.max_route_steps=2", "curriculum=stage-2", "steps=2"'
    rewrite(
        here / "two.toml", '"model.pre_blocks=1", "model.pool_blocks=1", "model.max_route_steps=1", "curriculum=fixed", "steps=2"', stage
    )
    (here / "two.toml").write_text((here / "two.toml").read_text() + '[[rows]]\nname = "last"\nset = ["steps=2"]\n')
    found, said = run()
    assert found.exit_code == 1 and set(found.stopped) == {"row 'routed', seed 0", "row 'routed', seed 1"}
    assert states(found)["last", 1] == "finished" and states(found)["routed", 0] == "stopped"
    written = (here / "runs" / "two.md").read_text()
    assert "- routed, seed 0: stopped at step 2 of 2: a gate failed at step 2." in written and "**Gates that did not hold**" in written
    assert states(run()[0])["routed", 1] == "stopped"  # again, without training
    rewrite(here / "small.toml", "steps = 4", 'steps = 4\ngates = "warn"')
    again, said = run()
    assert again.exit_code == 0 and "1 gates did not hold" in said


def test_a_row_that_begins_from_a_stopped_one_is_not_begun(here, monkeypatch):
    from pathlm.config import RunError

    real = train.start

    def stop(config, **options):
        if config.name == "plain-0":
            raise RunError("the loss is not finite")
        return real(config, **options)

    monkeypatch.setattr(train, "start", stop)
    found, said = run()
    assert states(found) == {("plain", 0): "stopped", ("plain", 1): "finished", ("routed", 0): "not begun", ("routed", 1): "finished"}
    assert "row 'routed', seed 0: not begun, since row 'plain', seed 0 was stopped" in said
    assert "- routed, seed 0: not begun: row plain is stopped" in (here / "runs" / "two.md").read_text()
    assert found.table["rows"][1]["metrics"]["validation/loss"]["difference"]["seeds"] == [1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", r"two.toml: seeds=\[0, 0\]: must differ"),
        ("seeds = [0, 1]", "seeds = [1000]", r"seeds=\[1000\]: must lie in 0 … 999"),
        ("seeds = [0, 1]", "seeds = []", r"seeds=\[\]: there must be at least one"),
        ("seeds = [0, 1]", "sedes = [0]", "a manifest has no option sedes; it has baseline"),
        ('baseline = "plain"', 'baseline = "plane"', "baseline='plane': must be one of the rows plain, routed"),
        ('"tokens", ', '"tokns", ', "metrics='tokns': must be one of loss"),
        ('"tokens", ', '"loss", ', "row 'plain': data.corpus=None: the metric loss is measured on documents"),
        ('name = "routed"', 'name = "plain"', "rows='plain': two rows have this name"),
        ('name = "routed"', 'name = "a/b"', "row 'a/b': name='a/b': must be a plain folder name"),
        ('name = "routed"', "", "row 2: a row needs a name"),
        ('from = "plain"', 'from = "routed"', "row 'routed': from='routed': must name a row above it; there are plain"),
        ('from = "plain"', 'form = "plain"', "row 'routed': a row has no option form; it has about"),
        ('"steps=2"', '"steps=0"', "two.toml: row 'routed': steps=0: must be at least 1"),
        ('"steps=2"', '"optim.lr=-1"', r"two.toml: row 'routed': optim.lr=-1.0: must be positive and finite"),
        ('"steps=2"', '"optim.rate=1"', r"two.toml: row 'routed': OptimConfig has no option optim.rate"),
        ('"steps=2"', '"steps"', "two.toml: row 'routed': --set 'steps' must have the form name=value"),
        ('"steps=2"', "2", "row 'routed'.*set"),
        ('"steps=2"', '"seed=3"', "row 'routed': set='seed=3': the manifest's seeds decide it"),
        ('"steps=2"', '"init=runs/x"', "row 'routed': set='init=runs/x': from = 'plain' decides it"),
        ('"steps=2"', '"model.hiden_size=3"', "two.toml: row 'routed': BrianConfig has no option hiden_size"),
        ('"steps=2"', '"model.hidden_size=32"', "row 'routed': model.hidden_size=32: from='plain' has 16, and its weights fit no other"),
        ('"steps=2"', '"preset=brillm-tiny"', "two.toml: row 'routed': .*"),
        ('"curriculum=fixed"', '"curriculum=fxied"', "two.toml: row 'routed': curriculum='fxied'"),
        ('"steps=2"', '"knobs.noise=-1.0"', "two.toml: row 'routed': knobs: noise=-1.0: must be"),
        ("[[rows]]", "[rows]", "two.toml"),
        ('recipe = "small.toml"', "", "recipe is missing"),
        ('recipe = "small.toml"', 'recipe = "smal.toml"', "two.toml: recipe='smal.toml': there is no recipe file 'smal.toml'"),
        ("seeds = [0, 1]", "evaluation = 3", r"two.toml: evaluation=3: write it as a section \[evaluation\]"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_before_anything_is_trained(here, old, new, message):
    rewrite(here / "two.toml", old, new)
    with pytest.raises(ValueError, match=message):
        run()
    assert not (here / "runs").exists()


def test_a_row_that_changed_since_it_was_trained_is_refused_by_name(here):
    run(seeds=[0])
    rewrite(here / "two.toml", '"steps=2"', '"steps=2", "optim.lr=2e-3"')
    assert states(run(table_only=True)[0])["routed", 0] == "changed"
    assert "the folder holds a run with another optim.lr" in (here / "runs" / "two.md").read_text()
    with pytest.raises(ValueError, match=r"two.toml: row 'routed', seed 0: optim.lr=0.002 \(the run has 0.001\): .*remove runs/routed-0"):
        run()
    assert not (here / "runs" / "plain-1").exists()
    run(rows=["plain"])  # the others may go on
    rewrite(here / "two.toml", '"optim.lr=2e-3"', '"model.intermediate_size=32"')  # says what is so anyway
    assert states(run()[0])["routed", 0] == "finished"


def test_two_manifests_share_the_runs_of_equal_rows(here):
    run(rows=["plain"])
    text = (here / "two.toml").read_text()
    (here / "other.toml").write_text(text.replace('name = "routed"', 'name = "rooted"'))
    assert states(run("other.toml", table_only=True)[0])["plain", 1] == "finished"
    assert {file.name for file in (here / "runs").glob("*.md")} == {"two.md", "other.md"}


def test_a_table_of_text_holds_losses_of_the_split_and_blocks_per_token(here):
    lines = [f"Document {i}: the {'quick brown fox jumps over the lazy dog ' * (i % 5 + 1)}" for i in range(60)]
    (here / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare(prepare_config({"out": "corpus", "sources": ["text.jsonl"], "vocab_size": 280, "validation": 0.1, "test": 0.1}))
    for old, new in (("task_share = 1.0\n", 'corpus = "corpus"\n'), ("tasks = { copy = 1.0 }\n", "")):
        rewrite(here / "small.toml", old, new)
    rewrite(here / "two.toml", 'metrics = ["validation/loss", "tokens", "parameters"]\n', "")
    found, _ = run(seeds=[0])
    assert list(numbers(found)["plain", 0]) == ["loss", "bits_per_byte", "block_evaluations", "tokens_per_s", "parameters"]
    assert numbers(found)["plain", 0]["block_evaluations"] == 3
    assert math.isfinite(numbers(found)["routed", 0]["loss"])
    measured = json.loads((here / "runs" / "plain-0" / "eval.json").read_text())["test"]["model"]
    assert numbers(found)["plain", 0]["bits_per_byte"] == measured["bits_per_byte"]
    (here / "two.toml").write_text((here / "two.toml").read_text() + "[evaluation]\nmax_documents = 1\n")
    assert states(run(table_only=True)[0])["plain", 0] == "not measured"
    again, _ = run(seeds=[0])
    assert states(again)["plain", 0] == "finished" and numbers(again)["plain", 0]["loss"] != numbers(found)["plain", 0]["loss"]
    (here / "two.toml").write_text((here / "two.toml").read_text() + 'split = "tset"\n')
    with pytest.raises(ValueError, match=r"row 'plain': evaluation.split='tset': corpus has train, validation, test"):
        run()


def test_an_experiment_can_be_said_in_python(here):
    rows = [Row(name="a"), Row(name="b", set=["optim.lr=1e-2"])]
    found, _ = run(Experiment(name="rates", recipe="small.toml", rows=rows, baseline="a", set=["steps=2"]))
    assert (here / "runs" / "rates" / "rates.md").is_file()
    assert list(numbers(found)["b", 0]) == ["validation/loss", "tokens_per_s", "parameters"]
    assert found.table["rows"][1]["metrics"]["validation/loss"]["sd"] is None


def test_numbers_of_a_column_have_equally_many_digits():
    shown = [table.number(value) for value in (6.0, 1_271_424, 2.81234, 983.5, 0.00012, -0.0)]
    assert shown == ["6", "1,271,424", "2.8123", "983.5", "0.0001200", "0"]


def test_a_table_alone_and_a_help_page_need_no_torch(here):
    program = (
        "import sys\nfrom pathlm.cli import app\napp(['experiment', 'two.toml', '--table-only'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plain, seed 0: not begun" in done.stdout


def test_the_command_takes_rows_and_seeds_with_commas(here):
    done = CliRunner().invoke(app, ["experiment", "two.toml", "--rows", "plain", "--seeds", "1", "--dry-run"])
    assert done.exit_code == 0 and "1 of 1 to train" in done.stdout
    refused = CliRunner().invoke(app, ["experiment", "two.toml", "--seeds", "one"])
    assert (refused.exit_code, refused.stderr) == (2, "error: seeds='one': must be numbers with commas between, such as 0,1,2\n")


@pytest.mark.parametrize("name", ["route-core", "position"])
def test_the_rows_of_a_shipped_table_have_models_and_curricula_and_fit_the_row_they_begin_from(name):
    models = {}
    found = read(ABLATIONS / f"{name}.toml")
    assert len(found.chosen(seeds=[0])) == len(found.rows) and found.baseline is not None
    for one in found.chosen(seeds=[0]):
        model = models[one.row.name] = pathlm.preset(one.config.preset, **one.config.model)
        package = family(model.model_type)
        assert package.curriculum(
            one.config.curriculum, one.config.steps, knobs=one.config.knobs, stages=one.config.stages, config=model
        ).at(one.config.steps)
        if one.before is not None:
            package.check_start(models[one.before.row.name], model, origin="the row before")
    other = read(ABLATIONS / "route-core.toml")
    assert found.runs[0].config == other.runs[0].config  # both begin with the same runs


def test_the_manifest_of_the_page_is_one(tmp_path):
    page = (ABLATIONS.parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
    (tmp_path / "ablation.toml").write_text(page.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    found = read(tmp_path / "ablation.toml")
    assert [row.name for row in found.rows] == ["start", "plain", "routed", "no-position"] and len(found.runs) == 12
