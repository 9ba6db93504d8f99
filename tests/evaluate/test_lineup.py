"""Runs lined up at equal cost: what counts as equal, what is compared, and what is said where nothing can be."""

import json
import subprocess
import sys

import pytest
from folders import COSTS, GRAPH, PLAIN, ROUTED, evaluated, make_run
from typer.testing import CliRunner

from pathlm.cli import app
from pathlm.evaluate import lineup
from pathlm.evaluate.recorded import OF_TRAINING, read

POOL = COSTS | {"parameters": 1040, "flops_per_token": 700.0, "flops_per_visit": 100.0}


def pair(level, *folders, **options):
    """What is said of the first two runs at one level."""
    found = lineup.run(folders, **options)["pairs"]
    return next(it for it in found if it["level"] == level)


@pytest.fixture
def plain(tmp_path):
    return make_run(tmp_path, "plain", eval={"test": evaluated(2.5, bits=1.5)})


def test_costs_within_the_tolerance_are_equal_and_losses_are_subtracted(tmp_path, plain):
    routed = make_run(tmp_path, "routed", ROUTED, loss=3.1, costs=POOL, visits=5.0, eval={"test": evaluated(2.6, bits=1.7, visits=5.0)})
    found = pair("parameters", routed, plain)
    assert found["comparable"] and found["ratio"] == pytest.approx(1.04) and found["why_not"] is None
    assert found["differences"] == [
        {"split": "test", "loss": pytest.approx(0.1), "bits_per_byte": pytest.approx(0.2)},
        {"split": OF_TRAINING, "loss": pytest.approx(0.1), "bits_per_byte": None},
    ]
    back = pair("parameters", plain, routed)
    assert back["comparable"] and back["differences"][0]["loss"] == pytest.approx(-0.1)
    for one, other in ((routed, plain), (plain, routed)):
        narrow = pair("parameters", one, other, within=0.03)
        assert not narrow["comparable"] and narrow["differences"] == [] and "parameters" in narrow["why_not"]


def test_training_counts_the_blocks_that_ran_and_the_tokens_of_earlier_runs(tmp_path, plain):
    first = make_run(tmp_path, "first", steps=40)
    origin = {"checkpoint": str(first / "checkpoints" / "step-00000030"), "sha256": "x"}
    routed = make_run(tmp_path, "routed", ROUTED, costs=POOL, visits=4.0, record={"init": origin})
    told = lineup.describe(read(routed))
    assert told["tokens"] == 2000 + 3000
    assert lineup.describe(read(first))["training_flops"] == 3 * 4000 * 600
    assert told["training_flops"] == 3 * 2000 * (700 - (6 - 4) * 100) + 3 * 3000 * 600


def test_only_the_blocks_that_ran_before_the_checkpoint_count(tmp_path):
    first = make_run(tmp_path, "first", ROUTED, costs=POOL, visits=6.0)
    with (first / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 40, "tokens": 4000, "route/block_evaluations": 3.0}) + "\n")
    origin = {"checkpoint": str(first / "checkpoints" / "step-00000020"), "sha256": "x"}
    later = make_run(tmp_path, "later", record={"init": origin})
    assert lineup.describe(read(later))["training_flops"] == 3 * 2000 * 600 + 3 * 2000 * 700
    assert lineup.describe(read(first))["training_flops"] == 3 * 4000 * (700 - (6 - 5) * 100)


def test_a_second_pass_in_training_counts_where_it_was_logged(tmp_path):
    folder = make_run(tmp_path, "twice", ROUTED, costs=POOL, visits=4.0)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in log:
        row |= {"loss/whole": 3.0} if "route/block_evaluations" in row else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    before = read(folder).model["pre_blocks"]
    assert before
    assert lineup.describe(read(folder))["training_flops"] == 3 * 2000 * (700 - (6 - 4) * 100 + 700 - before * 100)


def test_an_earlier_run_that_cannot_be_found_leaves_its_cost_unknown(tmp_path, plain):
    origin = {"checkpoint": "/gone/first/checkpoints/step-00000030", "sha256": "x"}
    routed = make_run(tmp_path, "routed", ROUTED, costs=POOL, visits=4.0, record={"init": origin})
    told = lineup.describe(read(routed))
    assert told["tokens"] is None and told["training_flops"] is None
    assert pair("training_flops", routed, plain)["why_not"] == "routed: training FLOPs not recorded"
    moved = make_run(tmp_path / "elsewhere", "first", steps=30)
    assert lineup.run([routed, moved])["runs"][0]["tokens"] == 5000


def test_runs_that_begin_with_each_others_weights_do_not_go_round_for_ever(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, other in (folders, folders[::-1]):
        make_run(tmp_path, folder.name, record={"init": {"checkpoint": str(other / "checkpoints" / "step-00000020"), "sha256": "x"}})
    assert lineup.describe(read(folders[0]))["tokens"] is None


@pytest.mark.parametrize(
    ("more", "blocks"),
    [
        ({"eval": {"test": evaluated(2.0, visits=4.5), "validation": evaluated(2.0, split="validation", visits=3.0)}}, 4.5),
        ({"eval": {"test, budget 0.4": evaluated(2.0, visits=3.5)}, "routes": {"test": {"routed": {"block_evaluations": 4.25}}}}, 4.25),
        ({"visits": 5.5}, 5.5),
        ({}, None),
    ],
)
def test_active_blocks_are_those_of_the_evaluation_before_those_of_the_log(tmp_path, more, blocks):
    assert lineup.describe(read(make_run(tmp_path, "run", ROUTED, **more)))["active_blocks"] == blocks


def test_a_plain_decoder_runs_all_its_blocks_and_a_graph_has_none(tmp_path, plain):
    graph = make_run(tmp_path, "graph", GRAPH, eval={"test": evaluated(2.4, bits=1.4)})
    assert lineup.describe(read(plain))["active_blocks"] == 6.0
    assert pair("active_blocks", graph, plain)["why_not"] == "graph: has no blocks"
    assert pair("parameters", graph, plain)["differences"][0]["bits_per_byte"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"seen": "other", "eval": {"test": evaluated(2.5)}}, "trained on different text"),
        ({"eval": {"test": evaluated(2.5, documents=2)}, "config": {"eval_rows": 9}}, "the same documents in the same windows"),
        ({"eval": {"test": evaluated(2.5, context=32)}, "config": {"eval_rows": 9}}, "the same documents in the same windows"),
        ({"eval": {"test": evaluated(None, bits=1.0)}, "config": {"eval_rows": 9}}, "the same documents in the same windows"),
        ({"costs": None}, "parameters not recorded"),
        ({"costs": COSTS | {"parameters": float("nan")}}, "parameters not recorded"),
        ({"costs": COSTS | {"parameters": 400}}, "0.4 times as many parameters"),
        ({"costs": COSTS | {"parameters": 900}}, "10.0% fewer parameters"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_said_plainly(tmp_path, plain, more, why):
    found = pair("parameters", make_run(tmp_path, "other", **{"costs": COSTS} | more), plain)
    assert not found["comparable"] and found["differences"] == [] and why in found["why_not"]


def test_tasks_without_a_corpus_have_no_loss_of_text(tmp_path, plain):
    tasks = make_run(tmp_path, "tasks", config={"data": {"task_share": 1.0, "length": 64}})
    assert lineup.describe(read(tasks))["losses"] == {}


@pytest.mark.parametrize("within", [-0.1, 1.0, float("nan")])
def test_a_tolerance_is_a_share(tmp_path, plain, within):
    with pytest.raises(ValueError, match="within="):
        lineup.run([plain, plain], within=within)


def test_a_folder_cannot_be_written_into_as_a_file(tmp_path, plain):
    with pytest.raises(ValueError, match="is a folder, must be the name of a file"):
        lineup.run([plain, make_run(tmp_path, "other", ROUTED)], json_file=tmp_path)
    assert not list(tmp_path.parent.glob("*.part"))


def test_one_run_is_not_enough(plain):
    done = CliRunner().invoke(app, ["compare", str(plain)])
    assert done.exit_code == 2 and "name at least two runs" in done.stderr


def test_the_command_shows_costs_losses_and_levels(tmp_path, plain):
    routed = make_run(tmp_path, "routed", ROUTED, costs=POOL, visits=5.0, eval={"test": evaluated(2.6, bits=1.7, visits=5.0)})
    graph = make_run(tmp_path, "graph", GRAPH, costs=None, record={"threads": 8})
    file = tmp_path / "all.json"
    done = CliRunner().invoke(app, ["compare", *map(str, (routed, plain, graph)), "--json", str(file)])
    assert done.exit_code == 0, done.stderr
    for part in (
        "routed − plain: +0.1000 nats, +0.2000 bits/byte (test); +0.0000 nats (validation rows)", "1.04 k", "graph: has no blocks",
        "graph: parameters not recorded", "equal training FLOPs (within 5%)", "different machines", "16.7% fewer active blocks", "3.6 M",
    ):  # fmt: skip
        assert part in done.stdout
    assert done.stdout.count("graph: parameters not recorded") == 1
    result = json.loads(file.read_text())
    assert [one["name"] for one in result["runs"]] == ["routed", "plain", "graph"] and len(result["pairs"]) == 9


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0, "0"), (950, "950"), (1040, "1.04 k"), (3.6e6, "3.6 M"), (2.5e16, "25 P")])
def test_counts_are_written_for_people(value, text):
    assert lineup.readable(value) == text


def test_comparing_needs_no_torch(tmp_path, plain):
    other = make_run(tmp_path, "other", PLAIN)
    program = (
        f"import sys; from pathlm.evaluate import lineup; lineup.run([{str(plain)!r}, {str(other)!r}]); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
