"""The `pathlm` command: thin doors. Each command parses, imports late and calls one function, so `--help` is instant and needs no torch."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup


class Doors(TyperGroup):
    """Commands whose user errors are one clear line and exit code 2; `--debug` shows where they came from."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Ctrl-C (exit code 130) and a closed pipe are left to typer, which ends quietly."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError) as error:
            if ctx.params["debug"]:
                raise
            Console(stderr=True).print(f"[bold red]error:[/] [red]{escape(_one_line(error))}[/]", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None


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
