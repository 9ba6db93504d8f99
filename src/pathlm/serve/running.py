"""The server as a process: where it listens, who may ask it, and how it ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from rich.console import Console

from pathlm.serve import app
from pathlm.serve.limits import Limits

KEY_VARIABLE = "PATHLM_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Server(uvicorn.Server):
    """Uvicorn, which lets answers that run be finished within a time and then ends them with a word."""

    def __init__(self, application: Any, *, host: str, port: int, limits: Limits, console: Console | None = None):
        # What has not ended by itself is ended by us, and told so, before connections are cut.
        wait = int(limits.grace) + 5
        super().__init__(uvicorn.Config(application, host=host, port=port, log_level="warning", timeout_graceful_shutdown=wait))
        self._service, self._grace, self._console = application.state.service, limits.grace, console

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop: no new requests, and a time limit for those that run."""
        if not self._service.stopping:
            self._service.stopping = True
            if self._console is not None:
                said = f"stopping: answers that run have {self._grace:g} s, another Ctrl-C ends them at once"
                self._console.print(said, highlight=False, markup=False, soft_wrap=True)
            timer = threading.Timer(self._grace, self._service.worker.fail, args=["the server is stopping, and its time is up"])
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)


def run(
    folders: Sequence[Path | str],
    *,
    host: str,
    port: int,
    api_key_file: Path | str | None,
    limits: Limits,
    device: str | None,
    mmap: bool,
    console: Console | None,
) -> None:
    """Open the models, listen, and return when the server has stopped."""
    key = read_key(api_key_file)
    alone = is_loopback(host)
    if not alone and key is None:
        rule = f"others can reach it there, so it needs a key: --api-key-file FILE, or the environment variable {KEY_VARIABLE}"
        raise ValueError(f"host={host!r}: {rule}")
    _check_port(host, port)
    application = app(
        folders, limits=limits, api_key=key, hosts=(*LOOPBACK, host, f"[{host}]") if alone else None, device=device, mmap=mmap
    )
    if console is not None:
        shown = f"[{host}]" if ":" in host else host
        console.print(
            f"{', '.join(application.state.service.models)}: http://{shown}:{port}", highlight=False, markup=False, soft_wrap=True
        )
    Server(application, host=host, port=port, limits=limits, console=console).run()


def read_key(file: Path | str | None) -> str | None:
    """Return the key in the first line of a file, else that of the environment, else None. Its value is never part of a message."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        return key.strip() or None if key else None
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"api_key_file={str(file)!r}: its first line must be the key, and is empty")
    return lines[0].strip()


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach a server there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    """Raise `ValueError` where nobody can listen, before models are opened."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"port={port}: cannot listen on {host}: {error}") from error
