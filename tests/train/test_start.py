"""The real family through the public door, on synthetic tasks and on a prepared corpus."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from reading import metrics
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pathlm.config import RunConfig, with_options
from pathlm.models.stages import Stage
from pathlm.text.prepare import prepare, prepare_config
from pathlm.train import record, sinks, start
from pathlm.train.run import readable
from pathlm.train.state import State

TINY = {"hidden_size": 16, "intermediate_size": 32, "pre_blocks": 1, "post_blocks": 1, "num_attention_heads": 2}


def config(tmp_path: Path, **options) -> RunConfig:
    base = {
        "name": "run", "out": str(tmp_path), "preset": "plain-tiny", "steps": 4, "batch_tokens": 256, "micro_rows": 2, "eval_every": 2,
        "eval_rows": 4, "save_every": 2, "log_every": 1, "model": TINY, "optim": {"warmup_steps": 2},
        "data": {"length": 64, "task_share": 1.0, "tasks": {"copy": 1.0}},
    }  # fmt: skip
    return with_options(RunConfig, base | options)


def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [f"Document {i}: the {'quick brown fox jumps over the lazy dog ' * (i % 5 + 1)}" for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare(prepare_config({"out": str(folder / "corpus"), "sources": [str(folder / "text.jsonl")], "tokenizer": "bpe", "vocab_size": 300}))
    return folder / "corpus"


def test_a_run_leaves_the_documented_folder(tmp_path):
    result = start(config(tmp_path), console=quiet())
    assert (result.step, result.tokens, result.exit_code) == (4, 1024, 0)
    assert {p.name for p in result.folder.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints"}
    assert {p.name for p in (result.folder / "checkpoints").iterdir()} == {"step-00000002", "step-00000004", "latest", "best"}
    found = {p.name for p in (result.folder / "checkpoints" / "latest").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "run.json", "tokenizer.json", "training_state.pt"} <= found
    record = json.loads((result.folder / "run.json").read_text())
    assert record["config"]["steps"] == 4 and record["model"]["hidden_size"] == 16
    assert math.isfinite(result.last_validation)


def test_the_record_tells_what_a_token_costs_and_a_finished_run_keeps_it(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "block_position_dim": 8}
    folder = start(config(tmp_path, preset="brian-tiny", curriculum="fixed", model=sizes), console=quiet()).folder
    record = json.loads((folder / "run.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "latest")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["flops_per_token"] == model.flops_per_token(64)
    without = AutoModelForCausalLM.from_config(model.config.__class__(**model.config.to_dict() | {"max_route_steps": 3}))
    router = 2 * (32 + 8) * 5
    assert record["flops_per_token"] - without.flops_per_token(64) == pytest.approx(record["flops_per_visit"] + router)
    ids = torch.ones(1, 40, dtype=torch.long)
    assert record["cache_bytes_per_token"] * 40 == model(ids, use_cache=True).past_key_values.bytes()
    start(config(tmp_path, preset="brian-tiny", curriculum="fixed", model=sizes), resume=True, console=quiet())
    again = json.loads((folder / "run.json").read_text())
    assert again.pop("resumed") and {**again, "resumed": []} == record


def test_transformers_opens_every_checkpoint(tmp_path):
    folder = start(config(tmp_path), console=quiet()).folder / "checkpoints"
    for name in ("latest", "best", "step-00000002"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / name), AutoTokenizer.from_pretrained(folder / name)
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([[1, 2, 3]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 3


def test_a_corpus_trains_and_its_loss_falls(tmp_path, corpus):
    data = {"corpus": str(corpus), "length": 64}
    run = config(tmp_path, steps=40, data=data, optim={"lr": 1e-2, "warmup_steps": 4}, eval_every=20)
    result = start(run, console=quiet())
    losses = [row["loss/lm"] for row in metrics(result.folder) if "loss/lm" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert (
        len(AutoTokenizer.from_pretrained(result.folder / "checkpoints" / "best"))
        == json.loads((result.folder / "run.json").read_text())["model"]["vocab_size"]
    )


def test_a_corpus_that_changed_cannot_be_resumed_on_and_one_that_moved_can(tmp_path, corpus):
    shutil.copytree(corpus, tmp_path / "a")
    data = {"corpus": str(tmp_path / "a"), "length": 64}
    start(config(tmp_path, data=data, optim={"schedule": "constant", "warmup_steps": 2}), console=quiet())
    shutil.move(tmp_path / "a", tmp_path / "b")
    longer = config(tmp_path, steps=6, data=data | {"corpus": str(tmp_path / "b")}, optim={"schedule": "constant", "warmup_steps": 2})
    assert start(longer, resume=True, console=quiet()).step == 6
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))  # other bytes
    with pytest.raises(ValueError, match=r"data\.corpus="):
        start(longer, resume=True, console=quiet())


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1_000, "1.0 k"), (18_349, "18.3 k"), (1_730_176, "1.7 M"), (1_004_373_504, "1,004.4 M")]
)
def test_the_size_of_a_model_is_told_in_the_unit_that_fits_it(number, text):
    assert readable(number) == text


def test_an_empty_validation_split_is_noted_and_skipped(tmp_path):
    (tmp_path / "text.txt").write_text("one single document of text " * 40)
    prepare(
        prepare_config({"out": str(tmp_path / "corpus"), "sources": [str(tmp_path / "text.txt")], "tokenizer": "bpe", "vocab_size": 270})
    )
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest
    said = Console(record=True, width=300, file=(tmp_path / "said").open("w"))
    result = start(config(tmp_path, data={"corpus": str(tmp_path / "corpus"), "length": 64}), console=said)
    said.file.close()
    text = said.export_text()
    assert "note: no validation" in text
    size = sum(tensor.numel() for tensor in weights(result.folder).values())
    assert size < 1e6 and f"run: {size / 1e3:.1f} k parameters, 4 steps of 256 tokens" in text
    assert result.last_validation is None and result.step == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": TINY | {"vocab_size": 5}}, r"model\.vocab_size=5: the tokenizer of the data has \d+ tokens"),
        ({"model": TINY | {"hiden_size": 5}}, "hiden_size"),
        ({"model": TINY | {"hidden_size": 15}}, "hidden_size"),
        ({"model": TINY | {"max_position_embeddings": 32}}, r"data\.length=64: .*max_position_embeddings=32"),
        ({"preset": "plain-huge"}, "preset='plain-huge'"),
        ({"curriculum": "nothing"}, "curriculum='nothing'"),
        ({"knobs": {"no-such-knob": 1.0}}, "no knob 'no-such-knob'"),
        ({"knobs": {"no-such-stage.noise": 1.0}}, "no stage 'no-such-stage'"),
        ({"data": {"corpus": "nowhere", "length": 64}}, "nowhere"),
        ({"data": {"task_share": 1.0, "tasks": {"cooking": 1.0}, "length": 64}}, "cooking"),
    ],
)
def test_what_cannot_be_trained_is_named_before_anything_is_written(tmp_path, options, named):
    with pytest.raises((ValueError, OSError), match=named):
        start(config(tmp_path, **options), console=quiet())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return start(config(tmp_path_factory.mktemp("finished")), console=quiet()).folder


@pytest.fixture
def begun(tmp_path, finished) -> Path:
    """A finished run to begin from, and to harm."""
    return shutil.copytree(finished, tmp_path / "begun", symlinks=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "latest" / "model.safetensors")


def test_a_run_begins_with_the_weights_of_another_and_records_which(tmp_path, begun):
    optim = {"lr": 1e-30, "warmup_steps": 0, "weight_decay": 0.0}  # nothing moves
    folder = start(config(tmp_path, init=str(begun), optim=optim), console=quiet()).folder
    place = (begun / "checkpoints" / "best").resolve()
    torch.testing.assert_close(weights(folder), load_file(place / "model.safetensors"), rtol=0, atol=0)
    digest = hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "run.json").read_text())["init"] == {"checkpoint": str(place), "sha256": digest}
    assert json.loads((begun / "run.json").read_text())["init"] is None


def test_a_plain_run_goes_on_with_a_pool_and_its_stages(tmp_path, begun):
    pool = TINY | {"pre_blocks": 0, "pool_blocks": 2, "post_blocks": 0, "max_route_steps": 2}
    run = config(tmp_path, init=str(begun), model=pool, curriculum="route", steps=8, gates="warn", knobs={"exit.budget": 0.9})
    folder = start(run, console=quiet()).folder
    rows = metrics(folder)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    assert len(stages) == 4 and stages[-1] == "exit"
    judged = [json.loads(line) for line in (folder / "gates.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["stage"] for row in judged)) == stages
    ends = [max(row["step"] for row in rows if row["stage"] == stage) for stage in stages]
    assert list(dict.fromkeys(row["step"] for row in judged)) == ends
    assert all(row["passed"] is not None for row in judged)


def test_a_resumed_run_has_the_same_first_weights_wherever_they_are_now(tmp_path, begun):
    constant = {"schedule": "constant", "warmup_steps": 2}
    start(config(tmp_path, init=str(begun), optim=constant), console=quiet())
    shutil.move(begun, tmp_path / "moved")
    longer = config(tmp_path, init=str(tmp_path / "moved"), steps=6, optim=constant)
    assert start(longer, resume=True, console=quiet()).step == 6
    for init in (str(tmp_path / "moved" / "checkpoints" / "step-00000002"), None):
        with pytest.raises(ValueError, match=r"--resume: init="):
            start(config(tmp_path, init=init, steps=8, optim=constant), resume=True, console=quiet())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init": "nowhere"}, "init='nowhere': model folder 'nowhere' does not exist"),
        ({"init": "."}, r"init='\.': .*holds no model"),
        ({"model": TINY | {"hidden_size": 32}}, r"model\.hidden_size=32: .*has 16"),
        ({"data": {"task_share": 1.0, "tasks": {"pointer": 1.0}, "length": 64}}, "its tokenizer is not that of the data"),
    ],
)
def test_weights_that_cannot_be_begun_from_are_named_before_anything_is_written(tmp_path, begun, options, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        start(config(tmp_path, **{"init": str(begun)} | options), console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_folder_without_weights_is_named(tmp_path, begun):
    for file in (begun / "checkpoints").rglob("model.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"init=.*holds no weights"):
        start(config(tmp_path, init=str(begun)), console=quiet())


def test_weights_in_several_files_have_one_hash_of_all(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"a")
    (tmp_path / "b.safetensors").write_bytes(b"b")
    both = record.weights_digest(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"c")
    assert record.weights_digest(tmp_path) != both
    (tmp_path / "b.safetensors").unlink()
    assert record.weights_digest(tmp_path) == hashlib.sha256(b"a").hexdigest()


def test_a_larger_vocabulary_than_the_tokenizer_is_kept(tmp_path):
    result = start(config(tmp_path, steps=2, model=TINY | {"vocab_size": 128}), console=quiet())
    model = AutoModelForCausalLM.from_pretrained(result.folder / "checkpoints" / "latest")
    assert model.config.vocab_size == 128


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    with (tmp_path / "said").open("w") as file:
        start(config(tmp_path), console=Console(file=file, width=60))
    lines = (tmp_path / "said").read_text().splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 6 and all("\x1b" not in line for line in lines)
    assert "loss" in steps[0] and "tok/s" in steps[0] and "GiB" in steps[0] and "validation" in steps[2]


def test_a_live_bar_with_time_left_on_a_terminal(tmp_path):
    with (tmp_path / "said").open("w") as file:
        start(config(tmp_path), console=Console(file=file, width=160, force_terminal=True))
    said = (tmp_path / "said").read_text()
    for part in ("left", "4/4", "loss", "val", "tok/s", "of peak", "GiB", "best"):
        assert part in said


def test_tensorboard_gets_the_same_numbers(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = start(config(tmp_path, tensorboard=True), console=quiet()).folder
    found = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = [row["loss/lm"] for row in metrics(folder) if "loss/lm" in row]
    assert [event.value for event in found.Scalars("loss/lm")] == pytest.approx(losses)
    assert [event.step for event in found.Scalars("validation/loss")] == [2, 4]


def test_activations_of_the_real_blocks_can_be_recomputed(tmp_path):
    plain = start(config(tmp_path / "a"), console=quiet())
    again = start(config(tmp_path / "b", activation_checkpointing=True), console=quiet())
    assert metrics(plain.folder) == metrics(again.folder)


@pytest.mark.parametrize("width", [80, 120, 160])
def test_a_narrow_terminal_keeps_the_bar_and_the_time_left(tmp_path, width):
    numbers = {"loss/total": 2.7, "optim/lr": 1e-3, "time/tokens_per_s": 13_900.0, "time/flops_utilisation": 0.48, "memory/gib": 0.54}
    with (tmp_path / "screen").open("w+") as file:
        console = Console(file=file, width=width, force_terminal=True, color_system=None)
        with sinks.screen(console, config(tmp_path, steps=2000), start=0) as sink:
            sink(State(step=1234, tokens=5, last_validation=2.93), Stage("plain", None, None), numbers, None)
        file.seek(0)
        line = next(line for line in reversed(file.read().splitlines()) if "1234/2000" in line)
    assert "left" in line and "loss 2.7000" in line and "━" in line
    assert ("GiB" in line) == (width == 160)
