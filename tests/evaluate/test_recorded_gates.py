"""Gates judged by recorded numbers: each can pass, fail and be missing, and damaged folders are one clear error."""

import json
import subprocess
import sys

import pytest
from folders import COSTS, GRAPH, PLAIN, ROUTED, evaluated, make_run, verdict
from rich.console import Console
from typer.testing import CliRunner

from pathlm.cli import app
from pathlm.evaluate import gates
from pathlm.evaluate.gates import THIRD

IMITATION = "validation/route/imitation"


def judged(*folders):
    """The rows of the first folder by stage and metric."""
    result = gates.run(folders)[str(folders[0].resolve())]
    return {(row["stage"], row["metric"]): row for row in result["rows"]}


AT_TWO = [{"budget": 0.6, "loss": 3.1}, {"budget": 1.0, "loss": 1.0}]


def routes(**more):
    routed = {"loss": 3.0, "budget": None, "tokens": 90, "block_evaluations": 4.0, "histogram": [0.0, 0.2, 0.3, 0.2, 0.3]}
    return {
        "test": {"split": "test", "checkpoint": "here", "settings": {"context": 64, "stride": 32}, "routed": routed, "budgets": [], **more}
    }


def test_a_verdict_of_training_is_told_with_the_threshold_that_it_had_there(tmp_path):
    given = [verdict("wrapped", IMITATION, 0.97, bound=0.123, passed=False), verdict("wrapped", IMITATION, 0.99, bound=0.123, step=40)]
    run = make_run(tmp_path, "routed", ROUTED, gates=given)
    row = judged(run)["stage 1", IMITATION]
    assert (row["value"], row["bound"], row["passed"], row["source"]) == (0.99, 0.123, True, "gates.jsonl")


def test_every_gate_of_the_curricula_is_in_the_table_with_its_reason():
    from pathlm import preset
    from pathlm.models.brian.curriculum import CURRICULA, curriculum

    told = {
        (end, row.metric): row.reason
        for row in gates.TABLE
        if isinstance(row, gates.Told) and row.stage.startswith("stage")
        for end in row.ends
    }
    config = preset("brian-tiny", memory="local+canonical", local_window=8, route_beams=2)
    for name in CURRICULA:
        for stage in curriculum(name, 1000, config=config).stages:
            for gate in stage.gates:
                assert told[stage.name, gate.metric] == gate.reason


def test_a_verdict_is_looked_for_in_the_runs_that_the_weights_come_from(tmp_path):
    earlier = make_run(tmp_path, "one", ROUTED, gates=[verdict("wrapped", IMITATION, 0.99)])
    origin = {"checkpoint": "/moved/one/checkpoints/step-00000020", "sha256": "x"}
    later = make_run(tmp_path, "two", ROUTED, record={"init": origin})
    assert judged(later)["stage 1", IMITATION]["passed"] is None
    assert judged(later, earlier)["stage 1", IMITATION]["passed"] is True


def left(first, last):
    return {"routed": {"histogram": [0.0, first, 0.0, 0.0, last]}}


def at_half(share):
    return {"budgets": [{"budget": 0.5, "steps_share": share}]}


def correlated(low):
    return {"difficulty": {"partial_spearman": {"low": low}}}


@pytest.mark.parametrize(
    ("stage", "metric", "good", "bad"),
    [
        ("stage 4", "routes/stay", left(0.5, 0.5), left(0.01, 0.99)),
        ("R125 → R350", "routes/leave_first", left(0.5, 0.5), left(0.99, 0.01)),
        ("R125 → R350", "routes/budget_error", at_half(0.55), at_half(0.9)),
        ("R125 → R350", "routes/load_max", {"map": {"load": [0.3, 0.4, 0.3]}}, {"map": {"load": [0.2, 0.7, 0.1]}}),
        ("R350 → R1B", "routes/difficulty_low", correlated(0.2), correlated(0.01)),
        (
            "R350 → R1B", "routes/easy_blocks",
            {"slices": {"difficulty": [{"block_evaluations": 3.0}]}, "routed": {"block_evaluations": 4.0}},
            {"slices": {"difficulty": [{"block_evaluations": 4.1}]}, "routed": {"block_evaluations": 4.0}},
        ),
        ("R1B succeeds", "routes/load_entropy", {"map": {"load_entropy": 0.9}}, {"map": {"load_entropy": 0.1}}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_gate_on_routes_passes_fails_and_is_missing(tmp_path, stage, metric, good, bad):
    for name, found, expected in (("good", good, True), ("bad", bad, False), ("none", {"routed": {"loss": 1.0}}, None)):
        run = make_run(tmp_path, name, ROUTED, routes={"test": {"split": "test", **found}})
        row = judged(run)[stage, metric]
        assert row["passed"] is expected, name
        assert (row["value"] is None) == (expected is None)
        assert "pathlm eval RUN --suite routing" in row["command"]


def test_the_test_split_comes_before_the_validation_split(tmp_path):
    both = {"validation": {"map": {"load_entropy": 0.1}}, "test": {"map": {"load_entropy": 0.9}}}
    assert judged(make_run(tmp_path, "run", ROUTED, routes=both))["R1B succeeds", "routes/load_entropy"]["value"] == 0.9


def test_an_evaluation_that_differs_from_itself_fails(tmp_path):
    for name, loss, expected in (("same", 3.0, True), ("other", 3.1, False)):
        run = make_run(tmp_path, name, ROUTED, eval={"test": evaluated(loss)}, routes=routes())
        assert judged(run)["stage 0", "eval/difference"]["passed"] is expected
    other = routes()
    other["test"]["settings"]["context"] = 32
    assert (
        judged(make_run(tmp_path, "window", ROUTED, eval={"test": evaluated(3.1)}, routes=other))["stage 0", "eval/difference"]["passed"]
        is None
    )
    asked = make_run(
        tmp_path, "asked", ROUTED, eval={"test": evaluated(3.1)}, routes=routes(routed={"loss": 3.0, "tokens": 90, "budget": 0.5})
    )
    assert judged(asked)["stage 0", "eval/difference"]["passed"] is None
    fewer = make_run(tmp_path, "fewer", ROUTED, eval={"test": evaluated(3.1)}, routes=routes(routed={"loss": 3.0, "tokens": 50}))
    assert judged(fewer)["stage 0", "eval/difference"]["passed"] is None
    twice = make_run(tmp_path, "twice", ROUTED, routes=routes(routed={"loss": 3.0, "budget": 0.6}, budgets=AT_TWO))
    assert judged(twice)["stage 0", "eval/difference"]["value"] == pytest.approx(0.1)


def test_a_plain_model_measured_again_beside_a_routed_one_must_agree(tmp_path):
    plain = make_run(tmp_path, "plain", eval={"test": evaluated(2.5, checkpoint="there")})
    routed = make_run(tmp_path, "routed", ROUTED, routes=routes(plain={"checkpoint": "there", "loss": 2.6}))
    assert judged(plain, routed)["stage 0", "eval/difference"]["value"] == pytest.approx(0.1)
    assert judged(plain)["stage 0", "eval/difference"]["passed"] is None


def test_a_resumed_log_must_not_tell_a_step_twice(tmp_path):
    for name, lines, expected in (("good", 0, True), ("bad", 1, False)):
        run = make_run(tmp_path, name, record={"resumed": [{"step": 20, "at": "now"}]})
        log = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(log + log.splitlines(keepends=True)[1] * lines)
        assert judged(run)["stage 0", "log/out_of_order"]["passed"] is expected
    assert judged(make_run(tmp_path, "never"))["stage 0", "log/out_of_order"]["passed"] is None


def test_a_plain_run_and_a_graph_have_stage_0_only_and_must_beat_frequencies(tmp_path):
    for name, model, loss, expected in (("plain", PLAIN, 3.0, True), ("graph", GRAPH, 4.5, False)):
        found = judged(make_run(tmp_path, name, model, eval={"test": evaluated(loss)}))
        assert (("stage 0", "eval/difference") in found) == (name == "plain"), "nothing measures a graph twice"
        assert {stage for stage, _ in found} == {"stage 0"}
        assert found["stage 0", "eval/above_unigram"]["passed"] is expected


def test_a_fixed_route_is_compared_with_the_plain_baseline_of_as_many_blocks(tmp_path):
    run = make_run(tmp_path, "routed", ROUTED)
    plain = make_run(tmp_path, "plain", loss=2.0)
    shallow = make_run(tmp_path, "shallow", PLAIN | {"pre_blocks": 1}, loss=1.0)
    for name, loss, expected in (("near", 2.05, True), ("far", 2.07, False)):
        fixed = make_run(tmp_path, name, ROUTED, loss=loss, config={"curriculum": "fixed"})
        row = judged(run, shallow, plain, fixed)["R125 → R350", "fixed/excess"]
        assert row["value"] == pytest.approx(loss / 2.0 - 1) and row["passed"] is expected


def test_runs_on_other_text_or_in_other_windows_are_no_baselines(tmp_path):
    run = make_run(tmp_path, "routed", ROUTED, eval={"test": evaluated(3.0, visits=6.0)})
    key = ("R350 → R1B", "equal_blocks/excess")
    for name, more in (("text", {"seen": "other"}), ("window", {"eval": {"test": evaluated(3.0, context=16)}, "config": {"eval_rows": 9}})):
        assert judged(run, make_run(tmp_path, name, **more))[key]["passed"] is None
    assert judged(run, make_run(tmp_path, "same", eval={"test": evaluated(2.9)}))[key]["passed"] is False


def test_equal_blocks_are_those_that_ran(tmp_path):
    run = make_run(tmp_path, "routed", ROUTED, eval={"test": evaluated(3.0, visits=4.1)})
    six, four = (
        make_run(tmp_path, "six", eval={"test": evaluated(1.0)}),
        make_run(tmp_path, "four", PLAIN | {"pre_blocks": 3}, eval={"test": evaluated(3.2)}),
    )
    assert judged(run, six)["R350 → R1B", "equal_blocks/excess"]["passed"] is None
    assert judged(run, six, four)["R350 → R1B", "equal_blocks/excess"]["value"] == pytest.approx(-0.2)


def test_equal_training_is_counted_in_recorded_operations(tmp_path):
    costs = COSTS | {"flops_per_token": 700.0, "flops_per_visit": 100.0}
    run = make_run(tmp_path, "routed", ROUTED, costs=costs, visits=5.0, eval={"test": evaluated(3.0, bits=1.0)})
    plain = make_run(tmp_path, "plain", eval={"test": evaluated(3.0, bits=1.1)})  # 600 = 700 − (6 − 5) · 100
    key = ("R1B succeeds", "equal_flops/excess")
    assert judged(run, plain)[key]["value"] == pytest.approx(-0.1) and judged(run, plain)[key]["passed"] is True
    longer = make_run(tmp_path, "longer", steps=40, eval={"test": evaluated(3.0, bits=1.1)})
    old = make_run(tmp_path, "old", costs=None, eval={"test": evaluated(3.0, bits=1.1)})
    assert judged(run, longer, old)[key]["passed"] is None


def test_positions_matter_where_a_run_without_them_differs(tmp_path):
    run = make_run(tmp_path, "routed", ROUTED)
    for name, loss, expected in (("near", 3.001, False), ("far", 2.9, True)):
        other = make_run(tmp_path, name, ROUTED | {"block_position": "none"}, loss=loss)
        assert judged(run, other)["R125 → R350", "position/difference"]["passed"] is expected


def answers(**accuracies):
    rows = [{"task": task, "k": k, "accuracy": value} for task, values in accuracies.items() for k, value in enumerate(values, start=1)]
    return {"validation": {"split": "validation", "rows": rows}}


def test_several_steps_are_compared_on_the_questions_that_both_were_asked(tmp_path):
    run = make_run(tmp_path, "routed", ROUTED, synthetic=answers(copy=[0.0, 0.9, 0.7], reverse=[1.0, 1.0]))
    plain = make_run(tmp_path, "plain", synthetic=answers(copy=[1.0, 0.5, 0.5]))
    row = judged(run, plain)["R350 → R1B", "synthetic/gain"]
    assert row["value"] == pytest.approx(0.3) and row["passed"] is True
    one_step = make_run(tmp_path, "short", synthetic=answers(copy=[1.0]))
    assert judged(run, one_step)["R350 → R1B", "synthetic/gain"]["passed"] is None


def test_a_length_whose_cache_is_too_large_counts_as_wrong(tmp_path):
    def asked(*rows):
        return {"validation": {"by_cache": [{"length": n, "exact": {"value": a}, "cache_bytes": held} for n, a, held in rows]}}

    run = make_run(tmp_path, "codes", ROUTED | {"memory": "canonical"}, long_context=asked((64, 0.9, 100), (256, 0.5, 400)))
    plain = make_run(tmp_path, "plain", long_context=asked((64, 1.0, 300), (256, 1.0, 1200)))
    row = judged(run, plain)["R350 → R1B", "cache/accuracy_gain"]
    assert row["value"] == pytest.approx(((0.9 - 1.0) + (0.5 - 0.0)) / 2)
    rows = make_run(tmp_path, "rows", ROUTED, long_context=asked((64, 0.9, 100)))
    assert judged(rows, plain)["R350 → R1B", "cache/accuracy_gain"]["passed"] is None


def test_caches_and_speeds_are_compared_with_the_plain_baseline(tmp_path):
    run = make_run(tmp_path, "codes", ROUTED | {"memory": "canonical"}, costs=COSTS | {"cache_bytes_per_token": 24})
    plain = make_run(tmp_path, "plain")
    found = judged(run, plain)
    assert found["stage 5", "cache/ratio"]["value"] == 0.25 and found["R1B succeeds", "cache/ratio"]["passed"] is True
    assert found["R1B succeeds", "time/ratio"]["value"] == 1.0
    rows = make_run(tmp_path, "rows", ROUTED)
    assert judged(rows, plain)["stage 5", "cache/ratio"]["passed"] is None, "rows are no codes"
    elsewhere = make_run(tmp_path, "other text", seen="other")
    assert judged(run, elsewhere)["R1B succeeds", "cache/ratio"]["passed"] is None
    other_machine = make_run(tmp_path, "elsewhere", record={"threads": 8})
    assert judged(run, other_machine)["R1B succeeds", "time/ratio"]["passed"] is None


def test_wrapping_is_judged_by_a_folder_that_was_wrapped_and_evaluated(tmp_path):
    run = make_run(tmp_path, "routed", ROUTED)
    plain = make_run(tmp_path, "plain", eval={"test": evaluated(2.5)})
    for name, loss, expected in (("same", 2.5, True), ("moved", 2.6, False)):
        wrapped = tmp_path / name
        wrapped.mkdir()
        (wrapped / "config.json").write_text(json.dumps(ROUTED))
        (wrapped / "eval.json").write_text(json.dumps({"test": evaluated(loss)}))
        assert judged(run, plain, wrapped)["stage 1", "eval/wrapping"]["passed"] is expected
        assert not (wrapped / "gates.json").exists()
    with pytest.raises(ValueError, match="wrapped and not trained"):
        gates.run([wrapped])


def rows_of(**passed):
    """Gates of the last decision: `needed…` ones, `either…` of which one must hold, `maybe…` that need not be measured."""
    return [
        {"stage": THIRD, "passed": value, "one_of": name.startswith("either"), "optional": name.startswith("maybe")}
        for name, value in passed.items()
    ]


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        ({"needed": True, "either1": True, "either2": False}, True),
        ({"needed": True, "either1": None, "either2": False}, None),
        ({"needed": True, "either1": False, "either2": False}, False),
        ({"needed": False, "either1": True}, False),
        ({"needed": None, "either1": True}, None),
        ({"needed": True, "maybe": None}, True),
        ({"needed": True, "maybe": False}, False),
    ],
)
def test_a_decision_needs_all_gates_and_one_of_those_of_which_one_is_enough(passed, expected):
    assert gates.decide(rows_of(**passed)) == {THIRD: expected}


@pytest.mark.parametrize("damaged", [None, 3, "text", [], {}, [None], {"difficulty": {}, "load": 3, "histogram": "x", "orders": []}])
def test_parts_of_an_evaluation_that_have_another_form_are_not_measured(tmp_path, damaged):
    whole = {
        "map": damaged,
        "slices": damaged,
        "routed": damaged,
        "budgets": damaged,
        "difficulty": damaged,
        "plain": damaged,
        "settings": damaged,
    }
    text = {"split": "test", "model": damaged, "ngrams": damaged, "routes": damaged, "corpus": damaged}
    others = {"synthetic": {"test": {"rows": damaged}}, "long_context": {"test": {"by_cache": damaged}}}
    codes = ROUTED | {"memory": "canonical"}
    run = make_run(tmp_path, "run", codes, costs=None, eval={"test": text}, routes={"test": whole}, **others)
    plain = make_run(tmp_path, "plain", costs=None, eval={"test": text}, **others)
    wrong = {"step": 20, "stage": "wrapped", "metric": IMITATION, "passed": "yes", "value": "high", "comparison": 3}
    (run / "gates.jsonl").write_text(json.dumps(wrong) + "\n")
    result = gates.run([run, plain], console=Console(quiet=True))[str(run)]
    assert {row["passed"] for row in result["rows"] if row["source"] != "metrics.jsonl"} == {None}


@pytest.mark.parametrize("value", ["NaN", "null", "Infinity", '"high"', "true"])
def test_what_is_no_number_was_not_measured(tmp_path, value):
    run = make_run(tmp_path, "run", ROUTED, routes=routes(map={"load_entropy": 0.123}))
    (run / "routes.json").write_text((run / "routes.json").read_text().replace("0.123", value))
    row = judged(run)["R1B succeeds", "routes/load_entropy"]
    assert row["value"] is None and row["passed"] is None
    json.loads((run / "gates.json").read_text(), parse_constant=pytest.fail)


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path):
    run = make_run(tmp_path, "run", ROUTED, gates=[verdict("wrapped", IMITATION, 0.99)])
    for name in ("gates.jsonl", "metrics.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 40, "stage": "wrapped", "metr')
    assert judged(run)["stage 1", IMITATION]["value"] == 0.99


def damage(run, kind):
    if kind == "no log":
        (run / "metrics.jsonl").unlink()
    elif kind == "empty log":
        (run / "metrics.jsonl").write_text("")
    elif kind == "empty":
        for file in run.iterdir():
            file.unlink()
    elif kind == "torn record":
        (run / "run.json").write_text('{"format": 1, "config"')
    elif kind == "other record":
        (run / "run.json").write_text('{"format": 1}')
    elif kind == "torn evaluation":
        (run / "eval.json").write_text('{"test": {"spl')
    elif kind == "brackets without end":
        (run / "eval.json").write_text("[" * 100_000)
    elif kind == "empty entry":
        (run / "routes.json").write_text('{"test": null}')
    elif kind == "rotten line":
        (run / "metrics.jsonl").write_text('{"step": 1, "tokens"\n{"step": 2}\n')
    elif kind == "line without a step":
        (run / "gates.jsonl").write_text('{"stage": "wrapped"}\n')


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no log", "holds nothing measured"),
        ("empty log", "holds nothing measured"),
        ("empty", "holds no run"),
        ("torn record", "run.json is damaged"),
        ("other record", "run.json is not the record of a run"),
        ("torn evaluation", "eval.json is damaged"),
        ("brackets without end", "eval.json is damaged"),
        ("empty entry", "its entry 'test' holds nothing"),
        ("rotten line", "metrics.jsonl, line 1: is damaged"),
        ("line without a step", "gates.jsonl, line 1: is damaged: it is no row with a step"),
    ],
)
def test_damaged_and_empty_folders_are_one_line_that_names_the_file(tmp_path, kind, message):
    good, run = make_run(tmp_path, "good"), make_run(tmp_path, "run", ROUTED)
    damage(run, kind)
    done = CliRunner().invoke(app, ["gates", str(good), str(run)])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (good / "gates.json").exists(), "nothing is written before all folders are read"


def test_missing_and_doubled_folders_are_named(tmp_path):
    run = make_run(tmp_path, "run")
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist"):
        gates.run(["nowhere"])
    with pytest.raises(FileNotFoundError, match=r"run\.json' is a file"):
        gates.run([run / "run.json"])
    with pytest.raises(ValueError, match="is named twice"):
        gates.run([run, tmp_path / "run" / ".." / "run"])
    with pytest.raises(ValueError, match="at least one"):
        gates.run([])
    with pytest.raises(ValueError, match="is a folder, must be the name of a file"):
        gates.run([run], json_file=tmp_path)
    assert not (run / "gates.json").exists() and not list(tmp_path.parent.glob("*.part"))


def test_the_command_says_pass_fail_and_what_measures_the_rest(tmp_path):
    given = [verdict("wrapped", IMITATION, 0.99), verdict("pseudo-routes", IMITATION, 0.5, bound=0.95, passed=False)]
    run = make_run(tmp_path, "routed [x]", ROUTED, gates=given)
    done = CliRunner().invoke(app, ["gates", str(run), "--json", str(tmp_path / "all.json")])
    assert done.exit_code == 0, done.stderr
    for part in ("routed [x]", "pass", "FAIL", "0.5 ≥ 0.95", "not measured", "pathlm eval RUN --suite routing", "R125 → R350"):
        assert part in done.stdout
    written = json.loads((run / "gates.json").read_text())
    assert json.loads((tmp_path / "all.json").read_text()) == {str(run): written}
    assert {"stage", "metric", "value", "comparison", "bound", "passed", "reason", "source"} <= written["rows"][0].keys()
    assert written["decisions"]["R125 → R350"] is False


def test_a_folder_that_cannot_be_written_to_is_judged_all_the_same(tmp_path, monkeypatch):
    run = make_run(tmp_path, "run")

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(gates, "replace", refuse)
    with pytest.warns(UserWarning, match=r"gates.json could not be written"):
        assert gates.run([run], console=Console(quiet=True))


def test_judging_needs_no_torch(tmp_path):
    run = make_run(tmp_path, "run", ROUTED)
    program = f"import sys; from pathlm.evaluate import gates; gates.run([{str(run)!r}]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
