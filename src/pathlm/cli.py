"""The `pathlm` command: thin doors. Each command parses, imports late and calls one function, so `--help` is instant and needs no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from pathlm.config import RunError


class Doors(TyperGroup):
    """Commands whose errors are one clear line: exit code 2 for the user's, 1 for a run that had to stop. `--debug` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Ctrl-C (exit code 130) and a closed pipe are left to typer, which ends quietly."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError, RunError) as error:
            if ctx.params["debug"]:
                raise
            Console(stderr=True).print(f"[bold red]error:[/] [red]{escape(_one_line(error))}[/]", highlight=False, soft_wrap=True)
            raise typer.Exit(1 if isinstance(error, RunError) else 2) from None


app = typer.Typer(
    cls=Doors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a field, e.g. optim.lr=1e-3.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from pathlm import __version__

        typer.echo(f"pathlm {__version__}")
        raise typer.Exit


@app.callback()
def pathlm(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train, measure and look inside language models whose computation is a path you can read."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("runs/demo"),
) -> None:
    """From nothing to a trained, measured, writing model in minutes; repeated, it continues."""
    from pathlm.demo import demo as body

    body(folder, console=Console())


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
    device: Annotated[str | None, typer.Option(help="For instance cpu or cuda:1; by default a GPU where there is one.")] = None,
) -> None:
    """Continue texts, streaming them as they are written."""
    from pathlm.generate import read_prompts, run

    run(
        folder, read_prompts(prompts or (), files or (), whole=whole), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed, batch=batch, stop_at_end=stop_at_end, device=device, console=Console(),
    )  # fmt: skip


@app.command("presets")
def presets_() -> None:
    """List the named model sizes with exact parameters, operations and cache per token."""
    from rich.table import Table

    from pathlm.models.library import presets

    table = Table("preset", "family", box=None, padding=(0, 1, 0, 0))
    for name in ("parameters", "blocks\n× width", "vocab", "context", "MFLOPs\n/token", "cache bytes\n/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, it in presets().items():
        size = f"{it.blocks} × {it.hidden_size}"
        numbers = (f"{it.parameters:,}", size, f"{it.vocab_size:,}", f"{it.context:,}", f"{it.flops_per_token / 1e6:,.1f}")
        table.add_row(name, it.family, *numbers, f"{it.cache_bytes_per_token:,}")
    Console().print(table)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="A folder with a saved model.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[Literal["brian", "llama"], typer.Option("--to", help="What the model becomes.")],
) -> None:
    """Turn a Llama checkpoint into a plain decoder, or a plain decoder into a Llama checkpoint."""
    from pathlm.models.brian.convert import convert as body

    Console().print(f"wrote {body(folder, out, to=to)}", markup=False, highlight=False, soft_wrap=True)


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    name: Annotated[str | None, typer.Argument(help="Which benchmark; without a name, list them.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own options, e.g. --repeats 3 --json FILE.")] = None,
) -> None:
    """Run one of the benchmarks of a checkout, or list them."""
    from pathlm.bench import bench as body

    body(name, arguments or [], console=Console())


def _one_line(error: BaseException) -> str:
    """Return the message of an error in one line; its kind where it has no message."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(message.split()) or type(error).__name__
