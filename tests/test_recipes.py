"""Every shipped recipe loads, resolves to a model or a preparation, and, where it is small, trains."""

import math
import shutil
from collections import Counter
from itertools import pairwise

import pytest
import torch
from rich.console import Console

import pathlm
from pathlm.config import find_recipe, load, shipped_recipes
from pathlm.models import family
from pathlm.models.brian.entering import MEMORY_FIELDS
from pathlm.text.corpus import Corpus
from pathlm.text.prepare import from_arguments, prepare, prepare_config
from pathlm.train import start
from pathlm.train.run import resolve

SHIPPED = shipped_recipes()
TRAINED = sorted(name for name in SHIPPED if not name.startswith("data-"))
PREPARED = sorted(name for name in SHIPPED if name.startswith("data-"))
SMALL = [name for name in TRAINED if load(name).preset.endswith("-tiny")]
WORDS = ("the", "state", "of", "our", "union", "is", "strong", "and", "we", "will", "work", "together", "for", "peace")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        text = " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(300))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    table = {"sources": [str(folder / "*.txt")], "out": str(folder / "prepared"), "vocab_size": 300, "validation": 0.2}
    return str(prepare(prepare_config(table)).folder)


def test_recipes_are_found_by_name_and_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("plain-tiny") == SHIPPED["plain-tiny"]
    (tmp_path / "mine.toml").write_text('preset = "plain-tiny"\nsteps = 30\n')
    assert load("mine.toml").name == "mine"


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_resolves_to_a_model_and_a_curriculum(name):
    config = load(name)
    assert config.name == name.rsplit("/")[-1], "a run is named as its recipe"
    model = pathlm.preset(config.preset, **config.model)
    if model.model_type == "brillm":  # it reads texts of any length, but must not be left with numbers that no row trains
        assert "pooled" not in model.contexts or model.trained_positions <= config.data.length - 2
    else:
        assert config.data.length <= model.max_position_embeddings
    options = {"knobs": config.knobs, "stages": config.stages, "config": model}
    curriculum = family(model.model_type).curriculum(config.curriculum, config.steps, **options)
    assert curriculum.at(config.steps - 1)


@pytest.mark.parametrize("name", [name for name in TRAINED if load(name).init])
def test_a_recipe_that_starts_from_a_run_names_the_run_of_another_recipe_with_the_same_data(name):
    config = load(name)
    home, run = config.init.split("/")
    earlier = load(run)
    assert (home, run) == (earlier.out, earlier.name)
    more = {name: value for name, value in config.model.items() if name not in MEMORY_FIELDS}  # what is remembered may change
    assert (config.data, more) == (earlier.data, earlier.model)
    mine, its = (pathlm.preset(c.preset, **c.model) for c in (config, earlier))
    assert (mine.num_hidden_layers, mine.hidden_size) == (its.num_hidden_layers, its.hidden_size)


def start_of(config, corpus, folder):
    """Return a folder with the weights that the run would start from, as far as they matter: right in form, untrained."""
    earlier = load(config.init.rpartition("/")[2])
    pathlm.build(pathlm.preset(earlier.preset, **earlier.model)).save_pretrained(folder)
    Corpus.open(corpus).tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_trains(name, corpus, tmp_path):
    config = load(name)
    routed = config.preset.startswith("brian")
    stages = {"default": 5, "route": 4, "joint": 3}.get(config.curriculum, 2) if routed else 2
    stages += 2 * (config.model.get("memory") == "local+canonical") + (config.model.get("route_beams", 1) > 1)
    short = [
        f'out="{tmp_path}"', f"steps={stages}", "batch_tokens=512", "micro_rows=4", "eval_rows=2", "eval_every=2", "save_every=2",
        "log_every=1",        "data.length=64", "optim.warmup_steps=0", "optim.decay_steps=0", 'optim.schedule="cosine"',
    ]  # fmt: skip
    if config.init is not None:
        short.append(f'init="{start_of(config, corpus, tmp_path / "earlier")}"')
    short.append('gates="warn"')
    if config.data.corpus is not None:
        short.append(f'data.corpus="{corpus}"')
    result = start(load(name, short))
    assert result.step == stages
    assert result.best_validation is not None
    assert math.isfinite(result.best_validation)
    model, tokenizer = pathlm.load(result.folder / "checkpoints" / "latest")
    assert len(tokenizer) <= model.config.vocab_size


@pytest.mark.parametrize(("name", "least"), [("brillm-tiny", 1), ("brillm-en", 2), ("brillm-zh", 3)])
def test_a_signal_graph_counts_its_edges_in_the_training_split_and_goes_on_as_if_never_stopped(name, least, corpus, tmp_path):
    said = Console(record=True, width=200)
    short = [
        f'data.corpus="{corpus}"', f'out="{tmp_path}"', "steps=4", "batch_tokens=256", "micro_rows=4", "eval_rows=2", "eval_every=4",
        "save_every=2", "model.signal_size=4", f"model.min_count={least}", "optim.warmup_steps=1",
    ]  # fmt: skip
    config = load(name, short)
    whole = start(config, console=said)
    opened = Corpus.open(corpus)
    seen = Counter(pair for i in range(len(opened.documents("train"))) for pair in pairwise(opened.document_tokens("train", i).tolist()))
    edges = sum(times >= least for times in seen.values())
    model, _ = pathlm.load(whole.folder / "checkpoints" / "latest")
    assert model.config.edges == edges
    share = f"{(edges + 1) / model.config.vocab_size**2:.1%}"
    assert f"have an edge: {share} of a full graph's parameters (published: English 5.7%, Chinese 13.0%)" in said.export_text()
    shutil.rmtree(whole.folder / "checkpoints" / "step-00000004")
    again = start(config, resume=True)
    resumed, _ = pathlm.load(again.folder / "checkpoints" / "latest")
    mine, theirs = resumed.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert again.best_validation == whole.best_validation


def test_the_vocabulary_of_a_published_graph_may_be_smaller_where_edges_are_counted_and_is_refused_where_they_are_not(corpus):
    job = resolve(load("brillm-en", [f'data.corpus="{corpus}"', "model.vocab_size=320"]))
    assert (job.model_config.vocab_size, job.model_config.edges) == (320, 0)
    with pytest.raises(ValueError, match=r"edges=906997: must lie in 0 … vocab_size² = 102400; set both"):
        pathlm.preset("brillm-en", vocab_size=320)
    assert pathlm.preset("brillm-en", vocab_size=320, edges=5_000).edges == 5_000


@pytest.mark.parametrize("name", PREPARED)
def test_a_data_recipe_says_what_to_prepare_and_where(name):
    config = from_arguments([name])
    assert config.sources
    assert config.out == f"data/{name.removeprefix('data-')}"
