import subprocess
import sys

import pytest

from pathlm.config import DataConfig, OptimConfig, RunConfig, RunError, load, with_options

TASKS = {"task_share": 1.0, "tasks": {"copy": 1}}


def write(tmp_path, text):
    (tmp_path / "mine.toml").write_text(text)
    return tmp_path / "mine.toml"


RECIPE = 'preset = "plain-tiny"\nsteps = 100\n[data]\ncorpus = "text"\n[optim]\nlr = 1\n'


def test_a_recipe_is_named_by_its_file_and_whole_numbers_become_floats(tmp_path):
    found = load(write(tmp_path, RECIPE))
    assert (found.name, found.steps, found.data.corpus) == ("mine", 100, "text")
    assert found.optim.lr == 1.0 and isinstance(found.optim.lr, float)
    assert found.folder.as_posix() == "runs/mine"


def test_overrides_win_and_are_read_as_toml_or_else_as_text(tmp_path):
    sets = ["steps=50", "optim.lr=1e-4", "optim.betas=[0.9, 0.99]", "model.pre_blocks=3", "data.corpus=other/text", "compile=true"]
    found = load(write(tmp_path, RECIPE), sets)
    assert (found.steps, found.optim.lr, found.model, found.data.corpus, found.compile) == (50, 1e-4, {"pre_blocks": 3}, "other/text", True)
    assert found.optim.betas == (0.9, 0.99)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("stepz=5", "RunConfig has no option stepz"),
        ("optim.lrr=5", r"OptimConfig has no option optim\.lrr"),
        ("data.corpse=x", r"DataConfig has no option data\.corpse"),
        ("steps=0", "steps=0: must be at least 1"),
        ("steps=1.5", "steps"),
        ("steps=true", "steps"),
        ("precision=fp16", "precision"),
        ("strategy=zero", "strategy"),
        ("optim.schedule=linear", "schedule"),
        ("batch_tokens=1000", r"batch_tokens=1000: must be a multiple of data\.length=256"),
        ("seed=-1", "seed=-1"),
        ("name=a/b", "name='a/b': must be a plain folder name"),
        ("name=.hidden", "name='.hidden'"),
        ("optim.warmup_steps=101", r"optim\.warmup_steps=101: warm-up and decay must fit into steps=100"),
        ("optim.schedule=wsd", r"optim\.decay_steps=0"),
        ("optim.lr=0", r"optim\.lr=0\.0: must be positive"),
        ("optim.betas=[0.9, 1.0]", r"optim\.betas"),
        ("optim.clip=0", r"optim\.clip"),
        ("keep_last=0", "keep_last=0"),
        ("gates=maybe", "gates"),
        ('init=""', "init='': name a folder"),
        ("init=", "--set 'init=': takes back what a recipe says of init, but it says nothing of it"),
        ("optim.lrr=", "--set 'optim.lrr=': takes back what a recipe says of optim.lrr"),
        ("steps.x=", "--set 'steps.x=': takes back"),
        ("knobs=5", "knobs"),
        ("stages.route=-1", r"stages=\{'route': -1\.0\}"),
        ("data.length=1", r"data\.length=1"),
        ("data.task_share=1.5", r"data\.task_share=1\.5"),
        ("data.task_share=0.5", r"data\.tasks="),
        ("optim=5", "optim=5 must be a section"),
        ("optim.lr.x=5", "--set 'optim.lr.x=5': lr is a value"),
        ("steps", "--set 'steps' must have the form name=value"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_value_and_the_rule(tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        load(write(tmp_path, RECIPE), [change])


def test_knobs_and_stages_are_written_in_a_recipe_or_behind_set(tmp_path):
    found = load(write(tmp_path, RECIPE + '[knobs]\nnoise = 0.5\n"hand-over.noise" = 0.25\n[stages]\nexit = 2\n'), ["knobs.exit.gate=1"])
    assert found.knobs == {"noise": 0.5, "hand-over.noise": 0.25, "exit": {"gate": 1}}
    assert found.stages == {"exit": 2.0}


def test_a_name_without_a_value_takes_back_what_the_recipe_says(tmp_path):
    recipe = write(tmp_path, RECIPE + '[knobs]\nnoise = 0.5\n"hand-over.noise" = 0.25\n[stages]\nexit = 2\nroute = 0\n')
    found = load(recipe, ["stages.exit=", "knobs.hand-over.noise=", "optim.lr=", "steps="])
    assert (found.stages, found.knobs) == ({"route": 0.0}, {"noise": 0.5})
    assert (found.optim.lr, found.steps) == (OptimConfig().lr, 1000)
    assert load(recipe, ["stages="]).stages == load(recipe, ["stages={}"]).stages == {}
    assert load(recipe, ["knobs.hand-over.noise=1", "knobs.hand-over.noise="]).knobs == {"noise": 0.5, "hand-over": {}}


def test_a_recipe_that_is_not_toml_and_one_that_is_missing_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="is not valid TOML"):
        load(write(tmp_path, "steps = = 3"))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere.toml")


def test_data_needs_something_to_read():
    with pytest.raises(ValueError, match=r"data\.corpus=None: name a prepared folder"):
        with_options(DataConfig, {})
    assert with_options(DataConfig, TASKS).tasks == {"copy": 1.0}


def test_a_configuration_survives_its_plain_form():
    config = with_options(RunConfig, {"name": "a", "preset": "plain-tiny", "data": TASKS, "optim": {"schedule": "wsd", "decay_steps": 5}})
    assert with_options(RunConfig, config.to_dict()) == config


def test_defaults_are_valid():
    assert OptimConfig().lr > 0
    assert RunConfig(name="a", preset="plain-tiny").steps > 0


def test_a_run_error_is_no_user_error():
    assert not issubclass(RunError, ValueError)


def test_reading_a_recipe_imports_no_torch(tmp_path):
    code = f"import sys; from pathlm.config import load; load({str(write(tmp_path, RECIPE))!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
