"""What no routed run can be is refused by name, before any work: nothing is written."""

import json
import math

import pytest
import torch
from rich.console import Console

import pathlm
from pathlm.config import RunConfig, load, with_options
from pathlm.text.mixture import open_rows
from pathlm.train import start

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
POOL = SIZES | {"pre_blocks": 1, "pool_blocks": 2, "post_blocks": 1, "max_route_steps": 3}
PLAIN = SIZES | {"pre_blocks": 3, "post_blocks": 1}
GRAPH = {"signal_size": 4, "context": "chain"}


def config(tmp_path, **options) -> RunConfig:
    base = {
        "name": "run", "out": str(tmp_path), "preset": "brian-tiny", "steps": 5, "batch_tokens": 128, "micro_rows": 2, "eval_every": 5,
        "eval_rows": 2, "save_every": 5, "log_every": 1, "model": POOL, "gates": "warn",
        "optim": {"warmup_steps": 0, "schedule": "constant"},
        "data": {"length": 64, "task_share": 1.0, "tasks": {"copy": 1.0}},
    }  # fmt: skip
    return with_options(RunConfig, base | options)


def go(run, **options):
    return start(run, console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A plain decoder, a routed model and a signal graph as folders, with the tokenizer of the data."""
    home = tmp_path_factory.mktemp("weights")
    rows = open_rows(config(home).data, "train", seed=0)
    graph = GRAPH | {"edges": 20, "min_count": 2, "initial_energies": "counts"}
    for name, preset, model in (("plain", "plain-tiny", PLAIN), ("routed", "brian-tiny", POOL), ("graph", "brillm-tiny", graph)):
        torch.manual_seed(0)
        pathlm.build(pathlm.preset(preset, **model, vocab_size=rows.vocab_size)).save_pretrained(home / name)
        rows.tokenizer().save_pretrained(home / name)
    return home


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": POOL | {"min_route_steps": 4}}, "min_route_steps=4: must lie in 1 … max_route_steps=3"),
        ({"model": POOL | {"min_route_steps": 0}}, "min_route_steps=0: must lie in 1 … max_route_steps=3"),
        ({"model": POOL | {"route_top_k": 2, "pool_blocks": 1}}, "route_top_k=2: must be 1, or 2 where pool_blocks=1 is at least 2"),
        ({"model": POOL | {"top_k": 2}}, "BrianConfig has no option top_k; it has .*route_top_k"),
        ({"model": POOL | {"max_route_steps": 0}}, "max_route_steps=0: pool_blocks=2 needs at least 1"),
        ({"model": POOL | {"pool_blocks": 0}}, "max_route_steps=3: there are no pool blocks to visit"),
        ({"curriculum": "routes"}, "curriculum='routes': there are default, route, joint, fixed, stage-0, stage-1"),
        ({"preset": "plain-tiny", "model": PLAIN, "curriculum": "route"}, "curriculum='route': a plain decoder has only default"),
        ({"curriculum": "route", "knobs": {"noize": 1.0}}, "there is no knob 'noize'"),
        ({"curriculum": "route", "knobs": {"leave.noise": 1.0}}, "there is no stage 'leave'; this curriculum has wrapped, pseudo-routes"),
        ({"curriculum": "route", "knobs": {"exit.budget": 1.5}}, "knobs: budget=1.5: must lie above 0 and at most at 1"),
        ({"curriculum": "route", "knobs": {"random_share": -0.1}}, "knobs: random_share=-0.1: must lie between 0 and 1"),
        ({"curriculum": "route", "knobs": {"threshold_rate": 2.0}}, "knobs: threshold_rate=2.0: must lie between 0 and 1"),
        ({"curriculum": "route", "knobs": {"difficulty_rate": -1.0}}, "knobs: difficulty_rate=-1.0: must lie between 0 and 1"),
        ({"curriculum": "route", "knobs": {"exit.listen": 3}}, "knobs: listen=3.0: must lie between 0 and 1"),
        ({"curriculum": "route", "knobs": {"noise": -1.0}}, "knobs: noise=-1.0: must be a finite number and not negative"),
        ({"curriculum": "route", "knobs": {"exit.gate": math.nan}}, "knobs: gate=nan: must be a finite number"),
        ({"curriculum": "route", "knobs": {"imitation": math.inf}}, "knobs: imitation=inf: must be a finite number"),
        ({"curriculum": "route", "knobs": {"budget_spread": -0.5}}, "knobs: budget_spread=-0.5: must be a finite number and not negative"),
        ({"curriculum": "stage-5"}, 'curriculum=.stage-5.: needs model.memory="local\\+canonical"'),
        ({"curriculum": "stage-6"}, "curriculum='stage-6': needs model.route_beams above 1"),
        ({"curriculum": "route", "knobs": {"local_window": 4}}, 'knobs.wrapped.local_window=4.0: needs model.memory="local'),
        ({"curriculum": "route", "knobs": {"exit.route_beams": 0}}, "knobs.exit.route_beams=0: must be at least 1"),
        ({"curriculum": "route", "knobs": {"route_beams": 2}}, "knobs.wrapped.route_beams=2: needs router_share=1 and random_depth=0"),
        (
            {"curriculum": "route", "knobs": {"exit.route_beams": 2}, "model": POOL | {"route_top_k": 2}},
            "knobs.exit.route_beams=2: needs route_top_k=1",
        ),
        ({"curriculum": "route", "knobs": {"top_k": 2}}, r"knobs.wrapped.top_k=2: must lie in 1 … model.route_top_k=1"),
        ({"curriculum": "route", "knobs": {"exit.budget": 0.1}}, r"knobs.exit.budget=0.1: no less than min_route_steps / max_route_steps"),
        ({"curriculum": "route", "stages": {"exit": math.inf}}, "stages"),
        (
            {"curriculum": "route", "stages": dict.fromkeys(("wrapped", "pseudo-routes", "hand-over", "exit"), 0.0)},
            "stages: every part of the curriculum is 0, so there is nothing to train",
        ),
        ({"model": POOL | {"location_bias": math.nan}}, "location_bias=nan: must be a finite number"),
        ({"curriculum": "route", "knobs": {"top_k": "two"}}, "knobs: top_k='two' must be of type int"),
        ({"curriculum": "route", "stages": {"leave": 0.5}}, "stages.leave=0.5: stages are baseline, wrapped, pseudo-routes"),
        ({"curriculum": "route", "stages": {"exit": -0.5}}, "stages"),
        ({"curriculum": "route", "steps": 3}, "steps=3: 4 stages need a step each"),
        ({"curriculum": "stage-3", "stages": {"exit": 0.5}}, "stages.exit=0.5: curriculum='stage-3' is one stage; default, route, joint"),
        ({"curriculum": "fixed", "stages": {"exit": 0.5}}, "stages.exit=0.5: curriculum='fixed' is one stage"),
        ({"preset": "plain-tiny", "model": PLAIN, "stages": {"exit": 0.5}}, "stages.exit=0.5: curriculum='default' is one stage"),
        ({"preset": "brillm-tiny", "model": GRAPH | {"edges": 5}}, "model.edges=5: follows from the data that a run reads; leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        go(config(tmp_path, **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("plain", {"pre_blocks": 2}, "model: pre_blocks=2, pool_blocks=2, post_blocks=1 must add up to the 4 blocks of init="),
        ("routed", {"pool_blocks": 3}, "pre_blocks=1, pool_blocks=3, post_blocks=1 must add up to the 4 blocks of init="),
        ("routed", {"pool_blocks": 1, "pre_blocks": 2}, r"model.pre_blocks=2: init=.* has 1, and its weights fit no other"),
        ("routed", {"block_position": "circle"}, r"model.block_position='circle': init=.* has 'arc'"),
        ("routed", {"router_hidden": 8}, r"model.router_hidden=8: init=.* has 0"),
        ("plain", {"pre_blocks": 0, "pool_blocks": 3, "max_route_steps": 2}, "model.max_route_steps=2: must be at least pool_blocks=3"),
        ("plain", {"hidden_size": 32}, r"model.hidden_size=32: init=.* has 16, and its weights fit no other"),
    ],
)
def test_weights_of_another_architecture_are_named(tmp_path, weights, source, model, message):
    with pytest.raises(ValueError, match=message):
        go(config(tmp_path, curriculum="route", init=str(weights / source), model=POOL | model))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("graph", {"model": GRAPH | {"initializer_range": 0.25}}, r"model.initializer_range=0.25: says how fresh"),
        ("graph", {"model": GRAPH | {"initial_energies": "even"}}, r"model.initial_energies='even': says how fresh"),
        ("graph", {"model": GRAPH | {"min_count": 1}}, r"model.min_count=1: says how fresh"),
        ("routed", {"preset": "brillm-tiny", "model": GRAPH}, r"init=.*: holds a brian model; BriLLM starts from a BriLLM"),
        ("graph", {"model": POOL}, r"init=.*: holds a brillm model; BRIAN starts from a BRIAN or a Llama model"),
    ],
)
def test_what_weights_of_an_earlier_run_leave_no_place_for_is_named(tmp_path, weights, source, options, message):
    preset = "brillm-tiny" if source == "graph" and options["model"] != POOL else "brian-tiny"
    with pytest.raises(ValueError, match=message):
        go(config(tmp_path, **{"preset": preset, "init": str(weights / source)} | options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "said", [{}, {"min_count": 2, "initial_energies": "counts", "initializer_range": 0.5}], ids=["nothing", "the same"]
)
def test_a_run_that_begins_with_other_weights_records_how_these_were_made(tmp_path, weights, said):
    folder = go(config(tmp_path, preset="brillm-tiny", model=GRAPH | said, init=str(weights / "graph"))).folder
    for place in (folder / "run.json", folder / "checkpoints" / "latest" / "config.json"):
        found = json.loads(place.read_text())
        found = found.get("model", found)
        assert (found["min_count"], found["initial_energies"], found["initializer_range"]) == (2, "counts", 0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": POOL | {"max_route_steps": 4}}, r"model\.max_route_steps=4 .the run has 3"),
        ({"model": POOL | {"route_top_k": 2}}, r"model\.route_top_k=2 .the run has 1"),
        ({"model": POOL | {"pre_blocks": 2, "post_blocks": 0}}, r"model\.post_blocks=0 .the run has 1.; model\.pre_blocks=2"),
        ({"preset": "plain-tiny", "model": PLAIN, "curriculum": "default"}, r"model\.pool_blocks=0 .the run has 2"),
        ({"curriculum": "stage-4"}, r"curriculum='stage-4' .the run has 'route'"),
        ({"knobs": {"noise": 0.1}}, r"knobs=\{'noise': 0\.1\} .the run has \{\}"),
        ({"stages": {"exit": 0.3}}, r"stages=\{'exit': 0\.3\} .the run has \{\}"),
    ],
)
def test_a_run_is_not_resumed_as_another(tmp_path, changed, message):
    home = tmp_path / "runs"
    base = config(home, curriculum="route")
    go(base)
    before = {file: file.stat().st_mtime_ns for file in home.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=f"--resume: .*{message}"):
        go(config(home, **{"curriculum": "route"} | changed), resume=True)
    assert {file: file.stat().st_mtime_ns for file in home.rglob("*") if file.is_file()} == before


def test_the_command_line_says_the_same_in_one_line():
    with pytest.raises(ValueError, match=r"OptimConfig has no option optim\.lrr"):
        load("brian-tiny-route", ["optim.lrr=1"])
    with pytest.raises(ValueError, match="RunConfig has no option knob;"):
        load("brian-tiny-route", ["knob.noise=1"])
