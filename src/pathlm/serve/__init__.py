"""Serve models over HTTP: many rows at once, an interface that OpenAI's clients speak, and the path of every token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathlm.serve.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI
    from rich.console import Console

__all__ = ["Limits", "app", "serve"]


def app(
    folders: Sequence[Path | str],
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = None,
    device: str | None = None,
    mmap: bool = False,
) -> FastAPI:
    """Return the ASGI application that serves the models of some runs, checkpoints or Hugging Face folders, each called as its folder.

    With an `api_key` requests must bring it. `hosts` are the names that requests may call the server by, all by default. `mmap` leaves the
    weights of signal graphs on disk. Raises `ValueError` for folders of the same name, and `ImportError` where the extra is missing.
    """
    _require_extra()
    from pathlm.serve.service import open_all
    from pathlm.serve.web import build

    limits = limits or Limits()
    return build(open_all(folders, limits, device=device, mmap=mmap), limits=limits, api_key=api_key, hosts=hosts)


def serve(
    folders: Sequence[Path | str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | str | None = None,
    limits: Limits | None = None,
    device: str | None = None,
    mmap: bool = False,
    console: Console | None = None,
) -> None:
    """Serve models until the process is told to stop (SIGTERM, Ctrl-C): what runs is then finished, within `limits.grace` seconds.

    A `host` other than loopback needs a key, in the first line of `api_key_file` or in the environment variable `PATHLM_API_KEY`.
    """
    _require_extra()
    from pathlm.serve.running import run

    run(folders, host=host, port=port, api_key_file=api_key_file, limits=limits or Limits(), device=device, mmap=mmap, console=console)


def _require_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a server needs the extra: pip install 'pathlm[serve]' ({error})") from error


def __dir__() -> list[Any]:
    return list(__all__)
