"""The server as a process: where it listens, who may ask it, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
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
PATIENCE = 1
"""Seconds that those whose answers have been ended get to hear of it"""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Server(uvicorn.Server):
    """Uvicorn, which lets answers that run be finished within a time and then ends them with a word.

    Until they have ended it goes on listening, so that `/health` and whoever asks for more hear that it is stopping.
    """

    def __init__(self, application: Any, *, host: str, port: int, limits: Limits, console: Console | None = None):
        super().__init__(uvicorn.Config(application, host=host, port=port, log_level="warning"))
        self._service, self._grace, self._console = application.state.service, limits.grace, console
        self._until = math.inf
        self._cut = False

    async def main_loop(self) -> None:
        """Listen until told to stop, and then until the answers that run have ended."""
        await super().main_loop()
        self._service.stopping = True
        self._until = min(self._until, time.monotonic() + self._grace + PATIENCE)
        while not self._service.worker.idle and time.monotonic() < self._until:
            await asyncio.sleep(0.05)
        left = math.ceil(self._until - time.monotonic())
        self.config.timeout_graceful_shutdown = max(left, PATIENCE)  # for what is written, and still on its way to a client
        self.force_exit = self._cut and not self._service.worker.idle

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop: no new requests, and a time limit for those that run. Another Ctrl-C ends them at once."""
        if not self.should_exit:
            self._service.stopping = True
            self._say(f"stopping: answers that run have {self._grace:g} s, another Ctrl-C ends them at once")
            timer = threading.Timer(self._grace, self._service.worker.fail, args=["the server is stopping, and its time is up"])
            timer.daemon = True
            timer.start()
            super().handle_exit(sig, frame)
        elif sig == signal.SIGINT and not self._cut:
            self._cut = True
            self._say("stopped: answers that ran were cut off")
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off now is no mistake to be traced
            self._service.worker.fail("the server has been stopped")
            self._until = time.monotonic() + PATIENCE

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


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
