"""The thread in which all models of a server work, round by round."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from pathlm.serve.engine import Engine, Listener, Request, Row

_LOG = logging.getLogger(__name__)


class Worker:
    """Runs engines while there is something to do, and sleeps where there is not."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = engines
        self._more = threading.Condition()
        self._ends = False
        self._failing = ""
        self._rests = False
        self._thread = threading.Thread(target=self._run, name="pathlm-serve", daemon=True)

    @property
    def idle(self) -> bool:
        """Whether no row is at work, and none waits."""
        with self._more:
            return self._rests and all(engine.idle for engine in self._engines)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, engine: Engine, asked: Sequence[tuple[Request, Listener]]) -> list[Row]:
        """Let the rows of one request wait for their turn in one of the engines."""
        with self._more:
            owner = object()
            rows = [engine.submit(request, listener, owner=owner) for request, listener in asked]
            self._more.notify()
        return rows

    def fail(self, error: str) -> None:
        """End all rows, also those that wait."""
        with self._more:
            self._failing = error
            self._more.notify()

    def stop(self) -> None:
        """End the thread after the round at hand."""
        with self._more:
            self._ends = True
            self._more.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._more:
                self._rests = True
                self._more.wait_for(lambda: self._ends or self._failing or not all(engine.idle for engine in self._engines))
                self._rests = False
                ends, failing, self._failing = self._ends, self._failing, ""
            if failing or ends:
                for engine in self._engines:
                    engine.fail(failing or "the server has stopped")
            if ends:
                return
            for engine in self._engines:
                if not engine.idle:
                    self._round(engine)

    def _round(self, engine: Engine) -> None:
        try:
            engine.round()
        except Exception:  # a mistake of ours: whoever it hits must hear of it, and the others must go on
            _LOG.exception("a round failed; all rows of its model end")
            engine.fail("the server failed")
