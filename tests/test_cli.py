"""The command line: instant, frozen, one clear line for a mistake, and nothing that Python cannot do."""

import dataclasses
import inspect
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import pathlm
from pathlm.cli import app
from pathlm.config import RunError
from pathlm.text.synthetic import open_task
from pathlm.text.synthetic.words import task_tokenizer

COMMANDS = typer.main.get_command(app).commands
HELP = """
import sys
from pathlm.cli import app
for command in {commands!r}:
    app([*command, "--help"], prog_name="pathlm", standalone_mode=False)
heavy = {{"torch", "transformers", "accelerate", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""


def pathlm_command(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pathlm", **options)


def options_of(command):
    return {p.name: p for p in COMMANDS[command].params}


def test_every_help_page_is_shown_without_torch():
    program = HELP.format(commands=[(), *((name,) for name in COMMANDS)])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"Usage: pathlm {name}" in done.stdout


def test_help_takes_less_than_half_a_second_of_processor_time():
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "pathlm", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.5


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "pathlm", "--version"], capture_output=True, text=True)
    assert done.stdout == f"pathlm {pathlm.__version__}\n"


def test_commands_and_their_options_stay_as_published():
    published = {
        "demo": "folder overrides",
        "prepare": "sources out tokenizer vocab_size overwrite overrides",
        "train": "recipe overrides resume",
        "experiment": "manifest rows seeds dry_run table_only",
        "eval": "model_folder corpus split context stride max_documents max_tokens order records tasks limit fewshot "
        "routes against budgets plot suite specs questions lengths samples batch budget branches device",
        "gates": "folders json_file",
        "compare": "folders within json_file",
        "generate": "folder prompts files whole max_new_tokens temperature top_k top_p seed batch stop_at_end budget branches mmap device",
        "trace": "folder texts files whole budget branches out keep mmap device",
        "serve": "folders host port api_key_file rows queue max_prompt_tokens max_new_tokens max_seconds grace mmap device",
        "report": "folders out",
        "presets": "",
        "convert": "places to wrap_as tokenizer overrides",
        "bench": "name arguments",
    }
    assert {name: " ".join(options_of(name)) for name in COMMANDS} == published


def twins(command):
    """What the options of a command are in Python: parameters of functions, fields of configurations."""
    from pathlm import bench, config, demo, evaluate, experiment, generate, report, serve, trace, train
    from pathlm.evaluate import choices, gates, harness, lineup, long_context, routing, suites, synthetic
    from pathlm.models import convert
    from pathlm.text import prepare

    homes = {
        "prepare": (prepare.PrepareConfig, prepare.from_arguments),
        "train": (config.load, train.start),
        "experiment": (experiment.run,),
        "eval": (harness.run, routing.run, synthetic.run, choices.run, long_context.run, evaluate.run, suites.run),
        "gates": (gates.run,),
        "compare": (lineup.run,),
        "generate": (generate.run, generate.read_prompts),
        "trace": (trace.run, generate.read_prompts),
        "serve": (serve.serve, serve.Limits),
        "convert": (convert.convert,),
        "bench": (bench.bench,),
        "demo": (demo.demo,),
        "report": (report.report,),
        "presets": (),
    }[command]
    found = {}
    for home in homes:
        if dataclasses.is_dataclass(home):
            found |= {f.name: f.default for f in dataclasses.fields(home)}
        else:
            found |= {name: p.default for name, p in inspect.signature(home).parameters.items()}
    return found


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_a_python_twin_with_the_same_default(command):
    known = twins(command)
    for name, option in options_of(command).items():
        assert name in known, f"pathlm {command}: {name} cannot be given in Python"
        if option.default is not None and known[name] is not inspect.Parameter.empty:
            assert option.default == known[name], f"pathlm {command}: {name}"


def test_a_misspelt_field_is_one_red_line_that_names_it():
    done = pathlm_command("train", "plain-tiny", "--set", "optim.lrr=3")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: OptimConfig has no option optim.lrr; it has betas")
    assert done.stderr.count("\n") == 1


def test_a_recipe_that_does_not_exist_is_answered_with_the_shipped_ones():
    done = pathlm_command("train", "plain-tyni")
    assert done.exit_code == 2
    assert "'plain-tyni'" in done.stderr
    assert "plain-tiny" in done.stderr


@pytest.mark.parametrize(
    "command", [("generate", "nowhere", "hello"), ("trace", "nowhere", "hello"), ("convert", "nowhere", "out", "--to", "llama")]
)
def test_a_folder_that_does_not_exist_is_named(command):
    done = pathlm_command(*command)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "'nowhere'" in done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A plain decoder and a signal graph as folders."""
    home = tmp_path_factory.mktemp("models")
    plain = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    for name, preset, sizes in (("plain", "plain-tiny", plain), ("graph", "brillm-tiny", {"vocab_size": 6, "signal_size": 4, "edges": 9})):
        pathlm.build(pathlm.preset(preset, **sizes)).save_pretrained(home / name)
    return home


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("plain", {"hidden_size": "wide"}, "config.json: Field 'hidden_size' expected int, got str (value: 'wide')"),
        ("plain", {"hidden_size": 0}, "config.json: hidden_size=0: must be at least 1"),
        ("plain", {"eos_token_id": [1, 64]}, "config.json: eos_token_id=[1, 64]: must lie in 0 … vocab_size - 1 = 63"),
        ("plain", {"model_type": "brillm"}, "config.json: property 'hidden_size' of 'BrillmConfig' object has no setter"),
        ("graph", {"signal_size": 5}, "config.json: signal_size=5: must be even and at least 2"),
        ("graph", {"context": 3}, "config.json: Field 'context' expected str, got int (value: 3)"),
        ("graph", {"dtype": "float99"}, "config.json: module 'torch' has no attribute 'float99'"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "FOLDER", "a"),
        ("trace", "FOLDER", "a"),
        ("generate", "FOLDER", "a", "--mmap"),
        ("convert", "FOLDER", "OUT", "--to", "llama"),
        ("convert", "FOLDER", "OUT", "--to", "released"),
        ("convert", "FOLDER", "OUT", "--wrap", "2/2/2"),
        ("eval", "FOLDER", "--lm-eval", "QUESTIONS"),
    ],
    ids=" ".join,
)
def test_a_configuration_of_no_possible_model_is_one_line_that_names_its_file(models, tmp_path, command, family, changed, said):
    shutil.copytree(models / family, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    (tmp_path / "q.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n')
    places = {"FOLDER": tmp_path / "m", "OUT": tmp_path / "out", "QUESTIONS": tmp_path / "q.jsonl"}
    done = pathlm_command(*(places.get(word, word) for word in command))
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'm'}/{said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("plain", {"vocab_size": 65}, "mismatched weights embed_tokens.weight (64, 32), must be (65, 32)"),
        ("plain", {"pre_blocks": 6}, "missing weights blocks.6.attention_norm.weight"),
        ("plain", {"pre_blocks": 4}, "unexpected weights blocks.5.attention_norm.weight"),
        ("graph", {"edges": 8}, "mismatched weights graph.bias (10, 4), must be (9, 4)"),
    ],
    ids=str,
)
def test_weights_that_its_configuration_does_not_ask_for_are_one_line_that_names_them(models, tmp_path, family, changed, said):
    shutil.copytree(models / family, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    for command in (("generate", tmp_path / "m", "a"), ("convert", tmp_path / "m", tmp_path / "out", "--to", "llama")):
        if command[0] == "generate" or family == "plain":
            done = pathlm_command(*command)
            assert done.exit_code == 2
            assert done.stderr.startswith(f"error: folder='{tmp_path / 'm'}': {said}")
            assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("generate", "a"), ("convert", "OUT", "--to", "llama")], ids=" ".join)
def test_damaged_weights_are_named(models, tmp_path, command):
    shutil.copytree(models / "plain", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"x" * 100)
    done = pathlm_command(command[0], tmp_path / "m", *(tmp_path / "out" if word == "OUT" else word for word in command[1:]))
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: the weights in {tmp_path / 'm'} are damaged (")


@pytest.mark.parametrize("content", ["{", "{}"])
@pytest.mark.parametrize("command", [("generate", "a"), ("convert", "OUT", "--to", "llama")], ids=" ".join)
def test_a_damaged_tokenizer_is_named(models, tmp_path, command, content):
    shutil.copytree(models / "plain", tmp_path / "m")
    task_tokenizer([open_task("copy")]).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(content)
    done = pathlm_command(command[0], tmp_path / "m", *(tmp_path / "out" if word == "OUT" else word for word in command[1:]))
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: folder='{tmp_path / 'm'}': its tokenizer cannot be read: ")
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_came_from():
    done = pathlm_command("--debug", "train", "plain-tyni")
    assert isinstance(done.exception, FileNotFoundError)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (RunError("the loss is not finite at step 7"), 1, "error: the loss is not finite at step 7\n"),
        (ValueError("size=3:\n must be even [sic]"), 2, "error: size=3: must be even [sic]\n"),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "error: Permission denied: runs/x\n"),
        (ValueError(), 2, "error: ValueError\n"),
    ],
    ids=["Ctrl-C", "a stopped run", "a bad value", "the system's no", "no message"],
)
def test_errors_end_with_their_code_and_without_a_traceback(monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pathlm.bench.bench", fail)
    done = pathlm_command("bench")
    assert (done.exit_code, done.stderr) == (code, line)


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("ours")

    monkeypatch.setattr("pathlm.bench.bench", fail)
    assert isinstance(pathlm_command("bench").exception, AssertionError)


def test_a_reader_that_leaves_early_is_no_error():
    with subprocess.Popen([sys.executable, "-m", "pathlm", "presets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_presets_lists_every_preset_with_its_exact_size():
    shown = pathlm_command("presets").stdout
    for name, summary in pathlm.presets().items():
        row = next(line for line in shown.splitlines() if line.startswith(name + " "))
        assert f" {summary.parameters:,} " in row
        assert row.rstrip().endswith(f"{summary.cache_bytes_per_token:,}")


def test_presets_tell_how_many_route_steps_a_routed_model_takes_at_most():
    shown = pathlm_command("presets").stdout
    for name, summary in pathlm.presets().items():
        row = next(line for line in shown.splitlines() if line.startswith(name + " "))
        assert f"× {summary.hidden_size} " in row
        assert row.split(f"× {summary.hidden_size} ")[1].split()[0] == (str(summary.max_route_steps) if summary.max_route_steps else "–")


def test_bench_lists_the_benchmarks_and_refuses_unknown_ones():
    assert "cli" in pathlm_command("bench").stdout
    refused = pathlm_command("bench", "nope", "--repeats", "1")
    assert refused.exit_code == 2
    assert "there is no benchmark 'nope'; there are branches, brillm, cli" in refused.stderr


def test_convert_goes_to_llama_and_back(tmp_path):
    torch.manual_seed(0)
    model = pathlm.build(pathlm.preset("plain-tiny", vocab_size=64, hidden_size=32, intermediate_size=48)).eval()
    model.save_pretrained(tmp_path / "ours")
    assert pathlm_command("convert", tmp_path / "ours", tmp_path / "llama", "--to", "llama").exit_code == 0
    done = pathlm_command("convert", tmp_path / "llama", tmp_path / "again", "--to", "brian")
    assert done.stdout == f"wrote {tmp_path / 'again'}\n"
    again = type(model).from_pretrained(tmp_path / "again").eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)

    for folder in ("ours", "llama"):
        done = pathlm_command("convert", tmp_path / folder, tmp_path / f"routed-{folder}", "--wrap", "2/3/1", "--set", "max_route_steps=5")
        assert done.stdout == f"wrote {tmp_path / f'routed-{folder}'}\n"
        routed = type(model).from_pretrained(tmp_path / f"routed-{folder}").eval()
        assert (routed.config.pool_blocks, routed.config.max_route_steps) == (3, 5)
        assert torch.equal(routed(ids).logits, model(ids).logits)
    refused = pathlm_command("convert", tmp_path / "ours", tmp_path / "none", "--wrap", "2/4/1")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "must add up to the 6 blocks of the model" in refused.stderr
