"""The `pathlm` command: thin doors. Each command parses, imports late and calls one function, so `--help` is instant and needs no torch."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup


class Doors(TyperGroup):
    """Commands whose errors are one clear line: exit code 2 for the user's, 1 for a run that had to stop. `--debug` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Ctrl-C (exit code 130) and a closed pipe are left to typer, which ends quietly."""
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # commands show their own progress
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            from pathlm.config import RunError  # not needed for a help page

            stopped = isinstance(error, RunError)
            if ctx.params["debug"] or (isinstance(error, RuntimeError) and not stopped):
                raise
            Console(stderr=True).print(f"[bold red]error:[/] [red]{escape(_one_line(error))}[/]", highlight=False, soft_wrap=True)
            raise typer.Exit(1 if stopped else 2) from None


app = typer.Typer(
    cls=Doors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Override a field, e.g. optim.lr=1e-3; NAME= takes a recipe's value back."),
]
Budget = Annotated[float | None, typer.Option(help="Share of its route steps that a routed model may take on average.")]
Branches = Annotated[int | None, typer.Option(help="Ways through the pool that a token may take at once.")]
Mmap = Annotated[bool, typer.Option("--mmap", help="Leave the weights of a signal graph on disk; read those of each step.")]
Device = Annotated[str | None, typer.Option(help="For instance cpu or cuda:1; by default a GPU where there is one.")]


def _print_version(wanted: bool) -> bool:
    if wanted:
        from pathlm import __version__

        typer.echo(f"pathlm {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def pathlm(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train, measure and look inside language models whose computation is a path you can read."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """From nothing to a trained, measured, writing model in minutes; repeated, it continues."""
    from pathlm.demo import demo as body

    raise typer.Exit(body(folder, overrides or (), console=Console())["exit_code"])


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="A recipe, or sources: sotu, books/*.txt=0.7, hub:owner/name …")],
    out: Annotated[str | None, typer.Option(help="Folder of the prepared corpus.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bpe, characters, or a Hugging Face tokenizer.  \\[default: bpe]")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Of a tokenizer trained here.  \\[default: 8192]")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace what other settings wrote.")] = None,
    overrides: Overrides = None,
) -> None:
    """Turn text into a folder of tokens; killed and repeated, it continues."""
    from pathlm.text import prepare as body
    from pathlm.text.progress import bar, summary

    console = Console()
    given = {"out": out, "tokenizer": tokenizer, "vocab_size": vocab_size, "overwrite": overwrite}
    config = body.from_arguments(sources, overrides or (), **given)
    with bar(console) as progress:
        manifest = body.prepare(config, progress=progress)
    console.print(summary(manifest))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
) -> None:
    """Train, or continue, the run that RECIPE describes."""
    from pathlm.config import load

    config = load(recipe, overrides or ())  # a mistake is told before torch is imported
    from pathlm.train import start

    raise typer.Exit(start(config, resume=resume, console=Console()).exit_code)


@app.command()
def experiment(
    manifest: Annotated[Path, typer.Argument(metavar="FILE", help="A manifest: a recipe, rows of overrides, seeds.")],
    rows: Annotated[str | None, typer.Option(metavar="NAME,…", help="Only these rows, and those they begin from.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,…", help="Only these seeds.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show what would be trained.")] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="Make the table of what is there; train nothing.")] = False,
) -> None:
    """Train and measure a table of runs, row after row; killed and repeated, it continues."""
    from pathlm.experiment import run

    given = _seeds(seeds)
    names = None if rows is None else [name.strip() for name in rows.split(",")]
    raise typer.Exit(run(manifest, rows=names, seeds=given, dry_run=dry_run, table_only=table_only, console=Console()).exit_code)


@app.command("eval")
def eval_(
    model_folder: Annotated[Path, typer.Argument(help="A run, a checkpoint, or any Hugging Face folder.")],
    corpus: Annotated[Path | None, typer.Option(help="A prepared corpus; by default the one the run was trained on.")] = None,
    split: Annotated[str, typer.Option(help="Which part of the corpus.")] = "validation",
    context: Annotated[int | None, typer.Option(help="Tokens the model sees at most.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that a window moves on in longer documents.")] = None,
    max_documents: Annotated[int | None, typer.Option(help="Measure the first so many documents.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Measure the first documents that hold so many tokens.")] = None,
    order: Annotated[int, typer.Option(help="Highest n-gram order to compare with; 0 for none.")] = 5,
    records: Annotated[Path | None, typer.Option(help="Write the loss of every token to this file.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--lm-eval", metavar="TASK", help="Measure this lm-eval task or .jsonl file of questions instead.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --lm-eval: the first so many questions.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="With --lm-eval: solved examples before each question.")] = None,
    routes: Annotated[
        bool, typer.Option("--routes", help="Measure the routes of a routed model instead: budgets, controls, depth.")
    ] = False,
    against: Annotated[str | None, typer.Option(metavar="FOLDER", help="With --routes: a plain model, or its --records.")] = None,
    budgets: Annotated[str | None, typer.Option(metavar="B,B,…", help="With --routes: budgets of the curve, e.g. 0.4,0.7,1.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="With --routes: draw loss and computation by budget.")] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="What to measure: lm, routing, synthetic, choices, long-context.  \\[default: lm]")
    ] = None,
    specs: Annotated[
        list[str] | None, typer.Option("--task", metavar="TASK", help="With synthetic or long-context: a task, such as needle:keys=8.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="With choices: questions, instead of made ones.")] = None,
    lengths: Annotated[str | None, typer.Option(metavar="N,N,…", help="With long-context: lengths to ask at, e.g. 256,1024.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="With synthetic, choices, long-context: samples or questions of each kind.  \\[default: 200, 200, 100]"),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="With the same: sequences that run at once.  \\[default: 64, 16, 8]")] = None,
    budget: Budget = None,
    branches: Branches = None,
    device: Device = None,
) -> None:
    """Measure a model on whole documents, beside n-grams; or its routes, synthetic tasks, choices, long contexts; or on lm-eval tasks."""
    from pathlm.evaluate import suites

    suites.run(
        model_folder, corpus, suite=suite, routes=routes, tasks=tasks, split=split, context=context, stride=stride,
        max_documents=max_documents, max_tokens=max_tokens, order=order, records=records, limit=limit, fewshot=fewshot, against=against,
        budgets=budgets, plot=plot, specs=specs, questions=questions, lengths=lengths, samples=samples, batch=batch, budget=budget,
        branches=branches, device=device, console=Console(),
    )  # fmt: skip


@app.command()
def gates(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders: those to judge, and a plain baseline.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the verdicts to this file, too.")] = None,
) -> None:
    """Judge runs, stage by stage and for the step to a larger model, by what they recorded: pass, FAIL, not measured."""
    from pathlm.evaluate.gates import run

    run(folders, json_file=json_file, console=Console())


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Two or more run folders, of any family.")],
    within: Annotated[float, typer.Option(help="Share by which costs may differ and be called equal.")] = 0.05,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything to this file, too.")] = None,
) -> None:
    """Line runs up at equal parameters, equal training and equal blocks per token, by what they recorded."""
    from pathlm.evaluate.lineup import run

    run(folders, within=within, json_file=json_file, console=Console())


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A run, a checkpoint, or any Hugging Face folder.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to continue; standard input, a line each, where there are none.")
    ] = None,
    files: Annotated[list[Path] | None, typer.Option("--file", help="File with a prompt per line; - is standard input.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Take each file as one prompt.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that hold this much probability.")] = None,
    seed: int = 0,
    batch: Annotated[int, typer.Option(help="Prompts continued at once.")] = 8,
    stop_at_end: Annotated[bool, typer.Option(help="Stop where the model ends its text.")] = True,
    budget: Budget = None,
    branches: Branches = None,
    mmap: Mmap = False,
    device: Device = None,
) -> None:
    """Continue texts, streaming them as they are written."""
    from pathlm.generate import read_prompts, run

    run(
        folder, read_prompts(prompts or (), files or (), whole=whole), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed, batch=batch, stop_at_end=stop_at_end, budget=budget, branches=branches, mmap=mmap, device=device,
        console=Console(),
    )  # fmt: skip


@app.command()
def trace(
    folder: Annotated[Path, typer.Argument(help="A run or a checkpoint.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to read; standard input, a line each, where there are none.")] = None,
    files: Annotated[list[Path] | None, typer.Option("--file", help="File with a text per line; - is standard input.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Take each file as one text.")] = False,
    budget: Budget = None,
    branches: Branches = None,
    out: Annotated[Path | None, typer.Option(help="Write the paths to this file, too, as JSON lines.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Write them into the run's folder, too, for `pathlm report`.")] = False,
    mmap: Mmap = False,
    device: Device = None,
) -> None:
    """Show the path of every token, through blocks or over nodes, and what almost happened."""
    from pathlm.generate import read_prompts
    from pathlm.trace import run

    given = read_prompts(texts or (), files or (), whole=whole)
    run(folder, given, budget=budget, branches=branches, out=out, keep=keep, device=device, mmap=mmap, console=Console())


@app.command()
def serve(
    folders: Annotated[list[Path], typer.Argument(help="Runs, checkpoints or Hugging Face folders; a model is called as its folder.")],
    host: Annotated[str, typer.Option(help="Where to listen; any place but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key that requests must bring (or $PATHLM_API_KEY).")] = None,
    rows: Annotated[int, typer.Option(help="Answers that one model writes at once, at most half of them of one request.")] = 32,
    queue: Annotated[int, typer.Option(help="Answers that may wait for that.")] = 128,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 4096,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
    max_seconds: Annotated[float, typer.Option(help="Until an answer must be complete.")] = 120.0,
    grace: Annotated[float, typer.Option(help="Seconds that running answers have left when the server is told to stop.")] = 30.0,
    mmap: Mmap = False,
    device: Device = None,
) -> None:
    """Serve models over HTTP: a page, OpenAI's completions, and the path of every token."""
    from pathlm.serve import Limits
    from pathlm.serve import serve as body

    limits = Limits(
        rows=rows, queue=queue, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, max_seconds=max_seconds, grace=grace
    )
    body(folders, host=host, port=port, api_key_file=api_key_file, limits=limits, device=device, mmap=mmap, console=Console())


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The page.  \\[default: report.html in the run's folder; of several runs, here]")] = None,
) -> None:
    """Make one page of what runs wrote: training, routes or signals, and sentences to click through. It needs no network."""
    from pathlm.report import report as body

    console = Console()
    found = body(folders, out=out)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {found.file} ({found.bytes / 1e6:.2f} MB)", markup=False, highlight=False, soft_wrap=True)


@app.command("presets")
def presets_() -> None:
    """List the named model sizes with exact parameters, operations and cache per token."""
    from rich.table import Table

    from pathlm.models.library import presets

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("preset", no_wrap=True)
    for name in ("parameters", "blocks\n× width", "route\nsteps", "vocab", "context", "MFLOPs\n/token", "cache\nB/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, it in presets().items():
        size = f"{it.blocks} × {it.hidden_size}"
        steps = str(it.max_route_steps or "–")
        context = "∞" if it.context is None else f"{it.context:,}"
        numbers = (f"{it.parameters:,}", size, steps, f"{it.vocab_size:,}", context, f"{it.flops_per_token / 1e6:,.1f}")
        table.add_row(name, *numbers, f"{it.cache_bytes_per_token:,}")
    Console().print(table)


@app.command()
def convert(
    places: Annotated[list[Path], typer.Argument(metavar="FOLDER OUT | brillm WEIGHTS VOCAB FREQUENCY OUT", show_default=False)],
    to: Annotated[Literal["brian", "llama", "released"], typer.Option("--to", help="What the model becomes.")] = "brian",
    wrap_as: Annotated[
        str | None, typer.Option("--wrap", metavar="PRE/POOL/POST", help="Route it: so many blocks before, in and after the pool.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="FILE", help="With brillm: the JSON file of the vocabulary's BPE.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="With --wrap: a field of the pool, e.g. max_route_steps=12.")
    ] = None,
) -> None:
    """Turn a Llama checkpoint into a plain or routed decoder of ours, or the files of a released BriLLM into a signal graph; and back."""
    from pathlm.evaluate.checkpoint import no_progress_bars
    from pathlm.models.convert import convert as body

    with no_progress_bars():
        written = body(places, to=to, wrap_as=wrap_as, tokenizer=tokenizer, overrides=overrides or ())
    Console().print(f"wrote {written}", markup=False, highlight=False, soft_wrap=True)


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    name: Annotated[str | None, typer.Argument(help="Which benchmark; without a name, list them.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own options, e.g. --repeats 3 --json FILE.")] = None,
) -> None:
    """Run one of the benchmarks of a checkout, or list them."""
    from pathlm.bench import bench as body

    body(name, arguments or [], console=Console())


def _seeds(text: str | None) -> list[int] | None:
    """Read whole numbers with commas between."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds={text!r}: must be numbers with commas between, such as 0,1,2") from None


def _one_line(error: BaseException) -> str:
    """Return the message of an error in one line; its kind where it has no message."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(message.split()) or type(error).__name__
