"""`pathlm demo`: the whole way on real text, from nothing to a writing model, a routed one and a signal graph; repeated, it continues."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pathlm.config import RunConfig, load

TEXT = "data-sotu"
RECIPE = "plain-tiny"
ROUTED = "brian-tiny-route"
GRAPH = "brillm-tiny"
CODES = "brian-tiny-codes"
PROMPT = "My fellow citizens,"
SPLIT = "test"
"""The checkpoint was chosen on the validation split, so it is judged on another one."""
SENTENCES = (
    "The Constitution provides that the Congress shall assemble at least once in every year.",
    "We have made great progress, and America is strong because our people are free.",
)
SIGNAL = "The people of the United States have a right to work."
"""What the signal graph reads aloud, node by node."""
ROUTE_TOKENS = 40_000
"""Of the first whole documents of the split: routes are measured on fewer tokens than losses."""
READ, CHUNK = 512, 32
"""Tokens of a text whose memory is weighed, and how many of them are read at a time."""


def demo(folder: Path | str = Path("runs/demo"), overrides: Sequence[str] = (), *, console: Console | None = None) -> dict[str, Any]:
    """Prepare the State of the Union addresses, train the recipe `plain-tiny` into `folder`, measure it beside n-grams, let it write.

    Then wrap it: the recipe `brian-tiny-route` puts its blocks into a pool, trains a router, and writes the run `folder` + `-routed`; what
    it saves and which way tokens take is printed. The recipe `brillm-tiny` trains a signal graph on the same tokens into `folder` +
    `-graph`; it is measured on the same documents, and its signal is shown on its way along a sentence. Last, the recipe `brian-tiny-codes`
    lets the routed model remember codes in the place of rows, into `folder` + `-codes`; what that costs and saves is printed. All four
    runs are shown on one page, `report.html` in `folder`. Every phase is skipped or continued where an earlier call, finished or stopped,
    has left something.

    `overrides` change fields of all recipes, for example `data.length=128`; `plain.steps=50`, `routed.steps=50`, `graph.steps=50` and
    `codes.steps=50` of one. Those of `model` are for the decoders, the vocabulary's size for all.

    Returns the run's `folder`, the `corpus`, how the `training` ended, the `evaluation`, the `sample`, how the `routing` ended, the
    `routes`, the `paths` of two sentences, how the training of the `graph` ended, its `energies` (what `evaluation` is of the decoder),
    the path of its `signal`, how the training with `codes` ended, its `memory` beside the others', where the `report` is, the `seconds` of
    each phase, and `exit_code`: 0, or 128 + the signal that stopped a training
    (what follows it is then missing). Raises `ValueError` where `folder` or the corpus folder hold something that other settings made.
    """
    console = console or Console()
    folder = Path(folder)
    config = load(RECIPE, [*_of(overrides, "plain"), *_place(folder)])
    routed_folder = folder.with_name(folder.name + "-routed")
    routed = load(ROUTED, [*_of(overrides, "routed"), *_place(routed_folder), f"init={json.dumps(str(folder))}", "gates=warn"])
    graph_folder = folder.with_name(folder.name + "-graph")
    graph = load(GRAPH, [*_of(_for_graphs(overrides), "graph"), *_place(graph_folder)])
    codes_folder = folder.with_name(folder.name + "-codes")
    codes = load(CODES, [*_of(overrides, "codes"), *_place(codes_folder), f"init={json.dumps(str(routed_folder))}", "gates=warn"])
    corpus = Path(str(config.data.corpus))
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {"folder": folder, "corpus": corpus, "seconds": seconds, "exit_code": 0}
    with _phase(console, seconds, "1/11 text", f"fetch the State of the Union addresses, train a tokenizer, pack tokens into {corpus}"):
        _prepare(config, corpus, console)
    with _phase(console, seconds, "2/11 training", f"the recipe {RECIPE!r} into {folder}"):
        result["training"] = _train(config, console)
    if result["training"].interrupted:
        return result | _stopped(result["training"], console)
    with _phase(console, seconds, "3/11 evaluation", f"on the {SPLIT} split, beside n-grams counted on the same training text"):
        result["evaluation"] = _evaluate(folder, console)
    with _phase(console, seconds, "4/11 sample", "what the model writes"):
        result["sample"] = _sample(folder, console)
    with _phase(console, seconds, "5/11 routing", f"wrap it, and teach tokens their way: the recipe {ROUTED!r} into {routed_folder}"):
        result["routing"] = _train(routed, console)
    if result["routing"].interrupted:
        return result | _stopped(result["routing"], console)
    with _phase(console, seconds, "6/11 routes", "which blocks tokens visit, and what that saves"):
        result["routes"] = _measure_routes(folder, routed, console)
        result["paths"] = _show_paths(routed_folder, console)
    with _phase(console, seconds, "7/11 graph", f"another kind of model, a graph of tokens: the recipe {GRAPH!r} into {graph_folder}"):
        result["graph"] = _train(graph, console)
    if result["graph"].interrupted:
        return result | _stopped(result["graph"], console)
    with _phase(console, seconds, "8/11 signal", "what it predicts beside the others, and its signal on its way along a sentence"):
        result["energies"] = _compare_graph(graph_folder, result["evaluation"], console)
        result["signal"] = _show_signal(graph_folder, console)
    with _phase(console, seconds, "9/11 codes", f"codes in the place of rows: the recipe {CODES!r} into {codes_folder}"):
        result["codes"] = _train(codes, console)
    if result["codes"].interrupted:
        return result | _stopped(result["codes"], console)
    with _phase(console, seconds, "10/11 memory", "what the three decoders remember of a text, and what the smallest memory costs"):
        result["memory"] = _measure_memory(folder, routed_folder, codes, console)
    with _phase(console, seconds, "11/11 report", "all of it on one page"):
        result["report"] = _report([folder, routed_folder, graph_folder, codes_folder], console)
    _farewell(folder, corpus, result, console)
    return result


def _of(overrides: Sequence[str], recipe: str) -> list[str]:
    """Return the overrides that concern a recipe: those of all, then its own."""
    of_all = [text for text in overrides if not text.startswith(("plain.", "routed.", "graph.", "codes."))]
    return of_all + [text.removeprefix(f"{recipe}.") for text in overrides if text.startswith(f"{recipe}.")]


def _for_graphs(overrides: Sequence[str]) -> list[str]:
    """Leave out what is said of the decoders' blocks, which a graph has none of."""
    return [text for text in overrides if not text.startswith("model.") or text.startswith("model.vocab_size")]


def _place(folder: Path) -> list[str]:
    return [f"out={json.dumps(str(folder.parent))}", f"name={json.dumps(folder.name)}"]


def _stopped(training: Any, console: Console) -> dict[str, Any]:
    console.print("Stopped. The demo needs no --resume: repeat the command that began it.", style="yellow")
    return {"exit_code": training.exit_code}


@contextmanager
def _phase(console: Console, seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Print a heading, and afterwards how long the phase took."""
    console.print(f"\n[bold cyan]{name}[/]  {what}", highlight=False, soft_wrap=True)
    start = time.perf_counter()
    yield
    seconds[name.split()[1]] = time.perf_counter() - start
    console.print(f"{seconds[name.split()[1]]:.1f} s", style="dim", highlight=False)


def _prepare(config: RunConfig, corpus: Path, console: Console) -> None:
    from pathlm.models.library import preset
    from pathlm.text.prepare import from_arguments, prepare
    from pathlm.text.progress import bar, summary

    vocab_size = preset(config.preset, **config.model).vocab_size
    job = from_arguments([TEXT], out=str(corpus), vocab_size=vocab_size)
    if (corpus / "manifest.json").exists():
        console.print("already prepared", style="dim")
        manifest = prepare(job)
    else:
        with bar(console) as progress:
            manifest = prepare(job, progress=progress)
    console.print(summary(manifest))


def _train(config: RunConfig, console: Console) -> Any:
    from pathlm.train import start

    return start(config, resume=(config.folder / "run.json").is_file(), console=console)


def _evaluate(folder: Path, console: Console) -> dict[str, Any]:
    """Measure, unless this very checkpoint has been measured; print the table either way."""
    from pathlm.evaluate import run
    from pathlm.evaluate.compare import table

    known = _measured(folder)
    if not known:
        return run(folder, split=SPLIT, console=console)
    console.print("already measured", style="dim")
    console.print(table(known, name=folder.name))
    return known


def _measured(folder: Path) -> dict[str, Any]:
    """Return what an earlier call found of this very checkpoint; empty where there was none."""
    from pathlm.evaluate.checkpoint import find_checkpoint

    file = folder / "eval.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get(SPLIT, {}) if file.is_file() else {}
    return known if known.get("checkpoint") == str(find_checkpoint(folder)) else {}


def _sample(folder: Path, console: Console) -> str:
    from pathlm.generate import run

    return run(folder, [PROMPT], max_new_tokens=120, temperature=0.8, top_p=0.95, console=console)[0]


def _measure_routes(folder: Path, routed: RunConfig, console: Console) -> dict[str, Any]:
    """Measure both models on the same documents, the routed one at three budgets, unless it was done; print what routing saves."""
    from pathlm.evaluate.checkpoint import find_checkpoint

    file = routed.folder / "demo.json"
    identity = [str(find_checkpoint(folder)), str(find_checkpoint(routed.folder)), ROUTE_TOKENS]
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("of") == identity:
        console.print("already measured", style="dim")
    else:
        found = {"of": identity} | _routes(folder, routed)
        file.write_text(json.dumps(found), encoding="utf-8")
    plain, free = found["plain"], found["routed"]
    everything, ran = plain["block_evaluations"], free["block_evaluations"]
    more = routed.steps * routed.batch_tokens / 1e6
    console.print(
        f"[bold]{ran:.2f} of {everything:g} blocks run per token, {1 - ran / everything:.0%} saved[/]; "
        f"{free['bits_per_byte']:.4f} bits per byte against {plain['bits_per_byte']:.4f} with all blocks "
        f"({free['loss'] - plain['loss']:+.4f} nats per token; the routed model read {more:.2f} M more tokens)",
        highlight=False,
    )
    curve = " · ".join(
        f"{one['budget']:.2f}: {one['bits_per_byte']:.4f} at {one['block_evaluations']:.2f} blocks" for one in found["budgets"]
    )
    console.print(f"bits per byte by budget  {curve}", highlight=False)
    console.print(f"{SPLIT} split, {free['documents']} documents, {free['tokens']:,} tokens", style="dim", highlight=False)
    return found


def _routes(folder: Path, routed: RunConfig) -> dict[str, Any]:
    from pathlm.evaluate.checkpoint import open_model
    from pathlm.evaluate.routes import route_table
    from pathlm.text.corpus import Corpus

    corpus = Corpus.open(Path(str(routed.data.corpus)), verify=False)
    how: dict[str, Any] = {"max_tokens": ROUTE_TOKENS, "context": routed.data.length, "stride": routed.data.length}
    plain, model = (open_model(place)[0] for place in (folder, routed.folder))
    low, high = model.pool.budgets_trained.tolist()
    curve = [] if low > high else [low, (low + 1) / 2, 1.0]
    return {
        "plain": asdict(route_table(plain, corpus, SPLIT, **how).score()),
        "routed": asdict(route_table(model, corpus, SPLIT, **how).score()),
        "budgets": [asdict(route_table(model, corpus, SPLIT, budget=budget, **how).score()) for budget in curve],
    }


def _show_paths(folder: Path, console: Console) -> Any:
    """Print two sentences in the colours of their tokens' steps, and the paths of a few tokens."""
    from pathlm.trace import Scale, run, sentence, steps, table

    found = run(folder, SENTENCES, keep=True)
    scale = Scale([steps(path) for paths in found for path in paths[1:]])
    coloured = console.color_system is not None and not console.no_color
    console.print("\nthe steps each token took:", highlight=False)
    for paths in found:
        console.print(sentence(paths[1:], scale, coloured=coloured))
    console.print(scale.legend())
    console.print("\nthe first words' paths (pathlm trace shows them all):", highlight=False)
    console.print(table(found[0][1:7], scale))
    return found


def _compare_graph(folder: Path, plain: dict[str, Any], console: Console) -> dict[str, Any]:
    """Measure the signal graph on the documents that the decoder was measured on; print it between n-grams and the decoder."""
    from rich.table import Table

    from pathlm.evaluate import run

    known = _measured(folder)
    if known:
        console.print("already measured", style="dim")
    else:
        with console.status("measuring the signal graph"):
            known = run(folder, split=SPLIT)
    orders = plain["ngrams"]["orders"]
    rows = {
        "2-gram": orders["2"],
        "3-gram": orders["3"],
        f"{RECIPE}, a decoder": plain["model"],
        f"{GRAPH}, a signal graph": known["model"],
    }
    table = Table(title=f"{SPLIT}: the same {plain['model']['documents']:,} documents", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("bits/byte", justify="right")
    for name, found in sorted(rows.items(), key=lambda row: -row[1]["bits_per_byte"]):
        table.add_row(name, f"{found['bits_per_byte']:.4f}", style="bold" if name.startswith(GRAPH) else None)
    console.print(table)
    return known


def _show_signal(folder: Path, console: Console) -> Any:
    """Print one sentence as the signal walks it: how strongly it arrived at each node, out of what, and which rivals were ahead."""
    from pathlm.trace import run, signals

    found = run(folder, [SIGNAL], keep=True)
    console.print(
        "\nthe signal on its way along a sentence: the energy with which it arrived at each token, which earlier steps that energy is made "
        "of, and where else it would have arrived how strongly (pathlm trace shows any text):\n",
        highlight=False,
    )
    signals.show(found, console)
    return found[0][0]


def _measure_memory(folder: Path, routed: Path, codes: RunConfig, console: Console) -> dict[str, Any]:
    """Weigh what each decoder remembers of a text, and measure the one with codes on the documents of the routes; print both."""
    from pathlm.evaluate.checkpoint import find_checkpoint

    file = codes.folder / "demo.json"
    identity = [*(str(find_checkpoint(place)) for place in (folder, routed, codes.folder)), ROUTE_TOKENS, READ, CHUNK]
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("of") == identity:
        console.print("already measured", style="dim")
    else:
        found = {"of": identity} | _memories(folder, routed, codes)
        file.write_text(json.dumps(found), encoding="utf-8")
    held, one = found["bytes"], found["routed"]
    console.print(
        f"[bold]{held['codes'] / 1e3:,.0f} kB kept of {READ} tokens, {held['codes'] / held['plain']:.0%} of the plain decoder's[/] "
        f"{held['plain'] / 1e3:,.0f} kB (routed, with rows: {held['routed'] / 1e3:,.0f} kB); "
        f"{found['codes']['bits_per_byte']:.4f} bits per byte against {one['bits_per_byte']:.4f} with rows "
        f"({found['codes']['loss'] - one['loss']:+.4f} nats per token, {codes.steps * codes.batch_tokens / 1e6:.2f} M more tokens read)",
        highlight=False,
    )
    return found


def _memories(folder: Path, routed: Path, codes: RunConfig) -> dict[str, Any]:
    import torch

    from pathlm.evaluate.checkpoint import open_model
    from pathlm.evaluate.routes import route_table
    from pathlm.text.corpus import Corpus

    corpus = Corpus.open(Path(str(codes.data.corpus)), verify=False)
    how: dict[str, Any] = {"max_tokens": ROUTE_TOKENS, "context": codes.data.length, "stride": codes.data.length}
    models = {name: open_model(place)[0] for name, place in (("plain", folder), ("routed", routed), ("codes", codes.folder))}
    held = {}
    for name, model in models.items():
        memory: Any = None
        for ids in torch.zeros(1, READ, dtype=torch.long, device=model.device).split(CHUNK, dim=1):
            with torch.no_grad():
                memory = model(ids, past_key_values=memory, use_cache=True, logits_to_keep=1).past_key_values
        held[name] = memory.bytes()
    scores = {name: asdict(route_table(models[name], corpus, SPLIT, **how).score()) for name in ("routed", "codes")}
    return {"bytes": held} | scores


def _report(folders: Sequence[Path], console: Console) -> Path:
    """Write the page of all runs into the first one's folder."""
    from pathlm.report import report

    written = report(folders, out=folders[0] / "report.html")
    for note in written.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{written.bytes / 1e6:.2f} MB, for any browser, no network needed", style="dim", highlight=False)
    return written.file


def _farewell(folder: Path, corpus: Path, result: dict[str, Any], console: Console) -> None:
    """Print the verdict, where everything is, and what to type next."""
    measured = result["evaluation"]
    ours, theirs = measured["model"]["bits_per_byte"], measured["ngrams"]["orders"]["3"]["bits_per_byte"]
    verdict = "better than" if ours < theirs else "not better than"
    console.print(f"\n[bold]{ours:.4f} bits per byte, {verdict} the 3-gram's {theirs:.4f}[/] ({ours - theirs:+.4f})", highlight=False)
    routed, graph, codes = (folder.with_name(folder.name + end) for end in ("-routed", "-graph", "-codes"))
    places = {
        "run": folder,
        "routed": routed,
        "graph": graph,
        "codes": codes,
        "weights": folder / "checkpoints" / "best",
        "log": folder / "metrics.jsonl",
        "text": corpus,
        "report": result["report"],
    }
    for name, place in places.items():
        console.print(f"  {name:<8} {place}", highlight=False, soft_wrap=True)
    console.print("\nWhat to type next (after [bold]source .venv/bin/activate[/], or with .venv/bin/ in front):", highlight=False)
    for command in (
        f'pathlm generate {folder} "The state of the Union is"',
        f'pathlm trace {routed} "The state of the Union is strong."',
        f'pathlm trace {graph} "The state of the Union is strong."',
        f"pathlm serve {folder} {routed} {graph}",
        f"pathlm eval {folder} --split shift",
        f"pathlm train {RECIPE} --set name=wider --set model.hidden_size=192 --set model.intermediate_size=512",
        "pathlm presets",
    ):
        console.print(f"  {command}", style="bold", highlight=False, soft_wrap=True)
