"""Long contexts: what counts as right, what the cache takes, one answer whatever the batch, and going on after an interruption."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from pathlm.cli import app
from pathlm.evaluate import long_context
from pathlm.evaluate.cached import allocated_bytes, forced_hits, write_greedily
from pathlm.evaluate.long_context import answers, beside, by_cache, long_tasks, scores
from pathlm.models import family
from pathlm.models.library import build, preset
from pathlm.text.synthetic import LONG_TASKS, samples
from pathlm.text.synthetic.words import SampleEncoder, task_tokenizer

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "pre_blocks": 1, "post_blocks": 1, "initializer_range": 0.3}


def plain(vocabulary, **options):
    torch.manual_seed(0)
    return build(preset("plain-tiny", vocab_size=vocabulary, **TINY | options)).double().eval()


def routed(vocabulary, **options):
    torch.manual_seed(0)
    return build(preset("brian-tiny", vocab_size=vocabulary, **TINY | {"pool_blocks": 2, "max_route_steps": 3} | options)).double().eval()


def graph(vocabulary, **options):
    torch.manual_seed(0)
    made = family("brillm").Config(vocab_size=vocabulary, signal_size=8, edges=200, trained_positions=16, pad_token_id=0, **options)
    return build(made).double().eval()


def windowed(vocabulary, **options):
    """A pool that reads codes where rows have left the window, and windows everywhere: memory that stays the same size."""
    windows = {"local_window": 4, "code_window": 8, "code_sinks": 2, "attention_window": 6}
    return routed(vocabulary, memory="local+canonical", **windows | options)


MODELS = [plain, routed, windowed, graph]


class Knowing(nn.Module):
    """A model that knows every sample by heart, through its cache, except the tokens that `wrong` names by their place."""

    def __init__(self, texts, size, wrong=()):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.texts, self.size, self.wrong = texts, size, set(wrong)
        self.config = SimpleNamespace(vocab_size=size)

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        read = input_ids if past_key_values is None else torch.cat([past_key_values.ids, input_ids], dim=1)
        following = torch.zeros_like(read)
        for row, ids in enumerate(read.tolist()):
            text = next((text for text in self.texts if text[: len(ids)] == ids), [0] * (len(ids) + 1))
            following[row] = torch.tensor([0 if place in self.wrong else text[place] for place in range(1, len(ids) + 1)])
        logits = F.one_hot(following, self.size).float()[:, -input_ids.shape[1] :]
        return SimpleNamespace(logits=logits, past_key_values=SimpleNamespace(ids=read))


def asked(spec, count=6, split="validation", seed=0):
    """A task, its tokenizer, and the tokens of its first samples."""
    (task,) = long_tasks([spec])
    tokenizer = task_tokenizer([task])
    encode = SampleEncoder(tokenizer, [task])
    return task, tokenizer, [encode(samples(spec, split, seed=seed).sample(index)) for index in range(count)]


def answered(model, task, tokenizer, **options):
    options = {"samples": 6, "batch": 4} | options
    return [answer for some in answers(model, [task], tokenizer, **options) for answer in some]


@pytest.mark.parametrize("name", LONG_TASKS)
def test_a_model_that_knows_every_answer_is_right_everywhere(name):
    task, tokenizer, encoded = asked(f"{name}:length=128")
    (row,) = scores(answered(Knowing([sample.ids for sample in encoded], len(tokenizer)), task, tokenizer))
    assert row["exact"] == row["forced"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (row["samples"], row["answers"], row["length"], row["task"]) == (6, 6, 128, task.spec)


def test_one_wrong_token_costs_the_answer_and_a_share_of_what_is_teacher_forced():
    task, tokenizer, encoded = asked("needle:length=40,digits=4,keys=2")
    start = encoded[0].start
    found = answered(Knowing([sample.ids for sample in encoded], len(tokenizer), wrong=[start + 1]), task, tokenizer)
    assert all(not answer.exact and answer.forced == 0.75 for answer in found)
    assert all(answer.written.split()[0] == answer.expected.split()[0] for answer in found)
    assert all(answer.written.split()[2:] != answer.expected.split()[2:] for answer in found), "decoding goes on from what was written"


def test_a_model_that_always_says_the_same_is_right_as_often_as_that_is_the_answer():
    task, tokenizer, encoded = asked("needle:length=40,digits=1,keys=2", count=40)
    seven = tokenizer.convert_tokens_to_ids("7")

    class Constant(Knowing):
        def forward(self, input_ids, past_key_values=None, use_cache=False):
            return SimpleNamespace(logits=F.one_hot(torch.full_like(input_ids, seven), self.size).float(), past_key_values=None)

    found = answered(Constant([], len(tokenizer)), task, tokenizer, samples=40)
    right = [sample.ids[sample.start] == seven for sample in encoded]
    assert [answer.exact for answer in found] == right and any(right) and not all(right)
    (row,) = scores(found)
    assert row["exact"]["value"] == pytest.approx(sum(right) / 40) and row["exact"]["low"] < row["exact"]["value"] < row["exact"]["high"]


@pytest.mark.parametrize("make", MODELS)
def test_answers_of_one_token_are_the_same_teacher_forced_and_through_the_cache(make):
    task, tokenizer, _ = asked("needle:length=48,digits=1,keys=4,questions=2")
    model = make(len(tokenizer))
    found = answered(model, task, tokenizer, samples=30)
    assert len(found) == 60
    assert all(answer.exact == (answer.forced == 1.0) for answer in found)
    assert len({answer.written for answer in found}) > 1, "a model that always says the same proves little"


@pytest.mark.parametrize("make", MODELS)
def test_an_answer_does_not_depend_on_the_batch_and_is_what_a_forward_pass_writes(make):
    _, tokenizer, encoded = asked("variables:length=60,ask=names,max_k=3")
    model = make(len(tokenizer))
    assert len({sample.stop - sample.start for sample in encoded}) > 1
    prompts, counts = [sample.ids[: sample.start] for sample in encoded], [sample.stop - sample.start for sample in encoded]
    prompts[0] = prompts[0][5:]  # so that there is padding
    with torch.inference_mode():
        together, _ = write_greedily(model, prompts, counts, pad_id=1)
        for prompt, count, written in zip(prompts, counts, together, strict=True):
            alone, _ = write_greedily(model, [prompt], [count], pad_id=1)
            pieces, _ = write_greedily(model, [prompt], [count], pad_id=1, piece=7)
            read = list(prompt)
            for _ in range(count):
                read.append(int(model(input_ids=torch.tensor([read])).logits[0, -1].argmax()))
            assert written == alone[0] == pieces[0] == read[len(prompt) :]
        hits = forced_hits(model, prompts, together, pad_id=1)
    assert all(all(row) for row in hits), "what was written greedily is likeliest after itself"
    assert [len(row) for row in hits] == counts


def test_the_bytes_of_a_cache_are_those_of_its_tensors():
    _, tokenizer, encoded = asked("needle:length=130")
    prompts = [sample.ids[: sample.start] for sample in encoded[:2]]
    for make, each in ((plain, 2 * 16 * 2), (routed, 2 * 16 * (2 + 3))):
        model = make(len(tokenizer))
        with torch.inference_mode():
            _, size = write_greedily(model, prompts, [4, 4])
        width = model.config.num_key_value_heads * model.config.head_dim
        assert width * 2 * (2 if make is plain else 5) == each
        assert size.tokens == len(prompts[0]) + 4 and size.held == 8 * each * size.tokens
        assert size.held < size.allocated <= 2 * size.held, "spare room is allocated, too"


@pytest.mark.parametrize("make", [graph, windowed])
def test_memory_that_does_not_grow_takes_the_same_at_any_length(make):
    took = []
    for length in (600, 1200):
        _, tokenizer, encoded = asked(f"needle:length={length}", count=1)
        with torch.inference_mode():
            took.append(write_greedily(make(len(tokenizer)), [encoded[0].ids[: encoded[0].start]], [4], piece=64)[1])
    small, large = took
    assert large.tokens == small.tokens + 600
    assert large.held == small.held if make is graph else large.held < 1.6 * small.held, "a window forgets many tokens at a time"
    assert large.allocated < 1.6 * small.allocated


def test_the_cache_of_another_makers_model_is_counted_by_its_tensors():
    task, tokenizer, _ = asked("needle:length=40")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, bos_token_id=0,
        eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    (row,) = scores(answered(LlamaForCausalLM(config), task, tokenizer))
    assert row["cache_bytes"] == row["cache_allocated"] == 4 * 2 * 3 * 16 * 39
    assert row["cache_bytes_per_token"] == 4 * 2 * 3 * 16


def test_memory_that_tensors_share_is_counted_once_and_a_model_is_no_part_of_its_cache():
    whole = torch.zeros(10)
    cache = SimpleNamespace(a=[whole[:2], whole[5:]], b={"c": torch.zeros(3, dtype=torch.float64)}, model=nn.Linear(50, 50))
    assert allocated_bytes(cache) == 40 + 24


def test_tasks_are_opened_at_every_length_in_the_place_of_their_own():
    specs = [task.spec for task in long_tasks(["needle:keys=2,length=99", "sum"], [128, 64])]
    assert specs == ["needle:length=64,keys=2", "needle:length=128,keys=2", "sum:length=64", "sum:length=128"]
    assert [task.length for task in long_tasks(LONG_TASKS)] == [256] * 5
    for arguments, message in (
        ((["copy"],), "task 'copy': has no filler and no length; tasks that have are needle, hops, variables, sum, program"),
        ((["needle"], [20]), "length=20: must be at least 33"),
        ((["needle"], []), "lengths=.*: name at least one"),
        (([],), "name at least one task"),
    ):
        with pytest.raises(ValueError, match=message):
            long_tasks(*arguments)


def test_tables_are_by_length_and_by_cache_and_models_stand_beside_each_other():
    tokenizer = task_tokenizer(long_tasks(["needle", "sum"]))
    model, found = plain(len(tokenizer)), []
    for task in long_tasks(["needle:keys=1", "sum:max_k=2"], [40, 60]):
        found += answered(model, task, tokenizer)
    rows, pooled = scores(found), by_cache(found)
    assert [(row["length"], row["answers"]) for row in pooled] == [(40, 12), (60, 12)]
    small, large = (row["cache_bytes"] for row in pooled)
    assert large / small == pytest.approx(59 / 39, rel=0.02)
    result = {"model": "a", "split": "test", "samples": 6, "rows": rows, "by_cache": pooled}
    other = result | {"model": "b", "rows": [row | {"cache_bytes": row["cache_bytes"] / 2} for row in rows]}
    assert [(row["task"], row["model"]) for row in beside([result, other])] == [(row["task"], m) for row in rows for m in "ba"]
    shown = ""
    for width in (80, 100):
        screen = Console(width=width, file=io.StringIO())
        screen.print(*long_context.tables(result))
        shown = screen.file.getvalue()
        assert "…" not in shown, "readable on a narrow terminal"
    assert "needle: keys=1" in shown and "all tasks" in shown and f"{rows[0]['cache_bytes'] / 1024:,.1f}" in shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that was trained on two tasks with filler and one without."""
    place = tmp_path_factory.mktemp("long") / "run"
    tasks = {"needle:length=40,keys=2": 1.0, "copy": 1.0, "sum:length=40,max_k=3": 1.0}
    tokenizer = task_tokenizer(long_tasks(spec for spec in tasks if spec != "copy"))
    plain(len(tokenizer), max_position_embeddings=64).float().save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "run.json").write_text(json.dumps({"config": {"data": {"tasks": tasks}}}))
    return place


def test_a_run_is_asked_what_it_was_trained_on_and_writes_what_it_returns(folder):
    result = long_context.run(folder, samples=4, device="cpu")
    assert [row["task"] for row in result["rows"]] == ["needle:length=40,keys=2", "sum:max_k=3,length=40"]
    assert result == json.loads((folder / "long-context.json").read_text())["validation"]
    assert {"model", "checkpoint", "split", "seed", "budget", "samples", "date", "seconds", "rows", "by_cache"} < set(result)


def test_an_evaluation_that_was_cut_off_goes_on_and_ends_as_if_it_had_not_been(folder, tmp_path, monkeypatch):
    def measured(file, **options):
        result = long_context.run(folder, lengths=[40, 50], records=file, device="cpu", batch=2, **{"samples": 6} | options)
        return result["rows"]

    whole = measured(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 24 and json.loads(lines[1])["task"] == "needle:length=40,keys=2"
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:8]) + lines[8][:20])  # killed while it wrote
    asked_again = []
    real = long_context.write_greedily
    monkeypatch.setattr(
        long_context,
        "write_greedily",
        lambda model, prompts, *rest, **more: asked_again.extend(prompts) or real(model, prompts, *rest, **more),
    )
    assert measured(tmp_path / "part.jsonl") == whole and len(asked_again) == 24 - 7
    assert (tmp_path / "part.jsonl").read_bytes() == b"".join(lines)
    assert measured(tmp_path / "part.jsonl") == whole and len(asked_again) == 24 - 7, "nothing is left to ask"
    few = measured(tmp_path / "part.jsonl", samples=2)
    assert [row["samples"] for row in few] == [2] * 4 and len(asked_again) == 24 - 7
    measured(tmp_path / "part.jsonl", samples=7)
    assert len(asked_again) == 24 - 7 + 4
    with pytest.raises(ValueError, match=r"records=.*part.jsonl.*no records of this evaluation.*name another file"):
        measured(tmp_path / "part.jsonl", seed=1)
    (tmp_path / "text").write_text("no JSON\n")
    with pytest.raises(ValueError, match="no records of this evaluation"):
        measured(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        measured(tmp_path / "nowhere" / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples=1: must be at least 2, for an interval"),
        ({"batch": 0}, "batch=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must not be negative"),
        ({"split": "shift"}, "split='shift': tasks have the splits"),
        ({"lengths": [10]}, "length=10: must be at least"),
        ({"lengths": [67]}, r"length=67: a sample of task 'needle:length=67,keys=2' takes 66 tokens.*max_position_embeddings=64"),
        ({"specs": ["copy"]}, "task 'copy': has no filler"),
        ({"specs": ["program"]}, "the tokenizer cannot write"),
        ({"budget": 0.5}, "budget=0.5"),
        ({"records": "/"}, "records='/': is a folder, must be the name of a file"),
        ({"budget": 2.0}, "budget=2.0: must lie"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name_value_and_rule(folder, options, message):
    with pytest.raises(ValueError, match=message):
        long_context.run(folder, **{"device": "cpu", "samples": 3} | options)


def test_a_length_that_just_fits_the_context_is_measured(folder):
    assert long_context.run(folder, ["needle:keys=2"], lengths=[65], samples=2, device="cpu")["rows"][0]["length"] == 65


def test_the_command_measures_and_prints_what_python_returns(folder, tmp_path):
    def command(*arguments):
        return CliRunner().invoke(app, ["eval", str(folder), *map(str, arguments)], prog_name="pathlm", env={"COLUMNS": "100"})

    long = ("--suite", "long-context", "--device", "cpu")
    done = command(
        *long, "--task", "needle:keys=2", "--lengths", "40,50", "--samples", 3, "--batch", 2, "--split", "test", "--records", tmp_path / "r"
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads((folder / "long-context.json").read_text())["test"]
    assert [row["length"] for row in result["rows"]] == [40, 50] and result["samples"] == 3
    for row in result["rows"]:
        assert f"{row['exact']['value']:.3f}" in done.stdout and f"{row['cache_bytes'] / 1024:,.1f}" in done.stdout
    for arguments, message in (
        (("--lengths", "40"), "--lengths 40: needs --suite long-context"),
        (("--task", "sum", "--routes"), "--task sum: needs --suite synthetic or long-context"),
        ((*long, "--lengths", "40;50"), "lengths='40;50': must be whole numbers with commas between"),
        ((*long, "--budgets", "0.4"), "--budgets 0.4: needs --routes"),
        ((*long, "--routes"), "--suite long-context: does not go with --routes"),
        ((*long, "--lm-eval", "hellaswag"), "--suite long-context: does not go with --lm-eval"),
        (("--suite", "long"), "--suite long: knows lm, routing, synthetic, choices, long-context, not 'long'"),
        (("--suite", "lm,long-context", "--records", "file"), "--records file: is meant for one suite, --suite lm,long-context names 2"),
    ):
        refused = command(*arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split())


@pytest.mark.slow
def test_a_small_decoder_learns_to_find_the_one_needle(tmp_path):
    from pathlm.config import load
    from pathlm.train import start

    run = start(load("synthetic-needle", [f'out="{tmp_path}"']))
    (row,) = long_context.run(run.folder, split="test", device="cpu", batch=50)["rows"]
    assert (row["length"], row["samples"]) == (64, 100) and row["exact"]["value"] > 0.9  # guessing: 0.01
