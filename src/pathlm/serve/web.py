"""The HTTP interface: OpenAI's completions and models, paths, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path as Folder
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from pathlm.serve.errors import Refusal
from pathlm.serve.guard import Guard
from pathlm.serve.limits import Limits
from pathlm.serve.metrics import Labels, Metrics
from pathlm.serve.schema import CompletionAsked, PathsAsked
from pathlm.serve.service import Order, Served, completion, reading
from pathlm.serve.worker import Worker
from pathlm.serve.writing import Piece

R = TypeVar("R")
PAGE = Folder(__file__).parent / "page"


@dataclass
class Service:
    """What all requests share."""

    models: dict[str, Served]
    limits: Limits
    worker: Worker
    metrics: Metrics = field(default_factory=Metrics)
    stopping: bool = False

    def __post_init__(self) -> None:
        for name, text in _COUNTED.items():
            self.metrics.describe(name, text)

    def served(self, name: str) -> Served:
        """Return a model by name."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refusal(404, f"model {name[:100]!r}: is not served here; there are {known}", param="model", code="model_not_found")
        return self.models[name]

    def check(self, served: Served, order: Order) -> None:
        """Raise `Refusal` where there is no room for more rows."""
        if self.stopping:
            raise Refusal(503, "the server is stopping", code="stopping")
        if len(served.engine.waiting) + len(order.rows) > self.limits.queue:
            raise Refusal(
                429,
                f"too many requests are waiting (at most {self.limits.queue}); try again",
                code="queue_full",
                headers={"retry-after": "1"},
            )


class Answer:
    """A request at work: its rows, and the pieces of their answers as they come. Leaving the context ends the rows."""

    def __init__(self, service: Service, served: Served, request: Request):
        self.service, self.served, self._request = service, served, request
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        self._rows: list[Any] = []
        self.completion_tokens = 0
        self._begun = time.monotonic()

    def send(self, piece: Piece) -> None:
        """Take a piece, from any thread."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def begin(self, order: Order) -> None:
        """Let the rows wait for their turn."""
        self.service.check(self.served, order)
        self.service.metrics.add("pathlm_tokens_total", order.prompt_tokens, model=self.served.name, kind="prompt")
        self._rows = self.service.worker.submit(self.served.engine, order.rows)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces until all rows have ended. Raises `Refusal` where one fails, and ends where the client has gone."""
        open_rows, first, left = len(self._rows), True, True
        gone = asyncio.ensure_future(_gone(self._request))
        try:
            while open_rows:
                waits = asyncio.ensure_future(self._pieces.get())
                await asyncio.wait((waits, gone), return_when=asyncio.FIRST_COMPLETED)
                if not waits.done():
                    waits.cancel()
                    raise Refusal(499, "the client has gone")
                piece = waits.result()
                left = piece.failed is None and open_rows > (piece.finish_reason is not None)
                if piece.failed == "time":
                    seconds = self.service.limits.max_seconds
                    headers = {"x-should-retry": "false"}
                    raise Refusal(408, f"the answer was not complete after {seconds:g} seconds", code="timeout", headers=headers)
                if piece.failed:
                    raise Refusal(503 if self.service.stopping else 500, piece.error, code="failed")
                if first:
                    first = False
                    self.service.metrics.observe("pathlm_first_token_seconds", time.monotonic() - self._begun, model=self.served.name)
                self.completion_tokens += piece.tokens
                open_rows -= piece.finish_reason is not None
                yield piece
        finally:
            gone.cancel()
            for row in self._rows:
                row.leave()
            metrics, name = self.service.metrics, self.served.name
            if left:
                metrics.add("pathlm_disconnects_total", model=name)
            metrics.add("pathlm_tokens_total", self.completion_tokens, model=name, kind="completion")
            metrics.observe("pathlm_answer_seconds", time.monotonic() - self._begun, model=name)


_COUNTED = {
    "pathlm_requests_total": "Requests by path and status.",
    "pathlm_tokens_total": "Tokens of prompts, and tokens written.",
    "pathlm_disconnects_total": "Clients that left before their answer was complete.",
    "pathlm_first_token_seconds": "Seconds from a request to the first piece of its answer.",
    "pathlm_answer_seconds": "Seconds from a request to the end of its answer.",
    "pathlm_rows": "Rows that are running or waiting now.",
}


def build(models: dict[str, Served], *, limits: Limits, api_key: str | None = None, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """Return the ASGI application that serves some models."""
    service = Service(models, limits, Worker([served.engine for served in models.values()]))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(title="pathlm", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    _add_models(app, service)
    _add_completions(app, service)
    _add_paths(app, service)
    _add_health(app, service)
    app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    for kind in (RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _explain)
    known = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(_Counted, metrics=service.metrics, known=frozenset(known))
    app.add_middleware(Guard, limits=limits, api_key=api_key, hosts=hosts)
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The models that are served, in OpenAI's shape; what is particular about each is under `pathlm`."""
        return {"object": "list", "data": [served.about() for served in service.models.values()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """One model."""
        return service.served(name).about()


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked, request: Request) -> Response:
        """Continue texts, whole or as a stream of server-sent events."""
        served = service.served(asked.model)
        answer = Answer(service, served, request)
        order = await _understood(completion, served, asked, answer.send)
        answer.begin(order)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": served.name,
            "seed": order.seed,
        }  # fmt: skip
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_events(answer, order, head, usage=usage), media_type="text/event-stream", headers=_UNBUFFERED)
        choices: list[dict[str, Any]] = [_choice(number) for number in range(len(order.rows))]
        async for piece in answer.pieces():
            _add(choices[piece.choice], await _told(answer, piece))
        return _json(head | {"choices": choices, "usage": _usage(answer, order)})


def _add_paths(app: FastAPI, service: Service) -> None:
    @app.post("/v1/paths")
    async def paths(asked: PathsAsked, request: Request) -> Response:
        """The path of every token of some texts, the start token's first."""
        served = service.served(asked.model)
        answer = Answer(service, served, request)

        def prepared() -> tuple[Any, Order]:
            prompts = served.prompts("input", asked.input, start=asked.start_token)
            return prompts, reading(served, prompts, asked, answer.send)

        prompts, order = await _understood(prepared)
        answer.begin(order)
        data: list[Any] = [None] * len(prompts)
        async for piece in answer.pieces():
            found = await asyncio.to_thread(served.paths, piece.trace)
            about = {"object": "paths", "index": piece.choice, "tokens": list(prompts[piece.choice].tokens)}
            data[piece.choice] = about | {"paths": [path.to_dict() for path in found]}
        return _json({"object": "list", "model": served.name, "data": data, "usage": _usage(answer, order)})


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    def health() -> Response:
        """Whether requests are answered: 200, or 503 once the server is stopping."""
        return _json({"status": "stopping" if service.stopping else "ok"}, status=503 if service.stopping else 200)

    @app.get("/metrics")
    def metrics() -> Response:
        """Counters, durations and the rows of now, for Prometheus."""
        gauges: list[tuple[str, Labels, float | int]] = []
        for name, served in service.models.items():
            gauges.append(("pathlm_rows", (("model", name), ("state", "running")), len(served.engine.rows)))
            gauges.append(("pathlm_rows", (("model", name), ("state", "waiting")), len(served.engine.waiting)))
        return Response(service.metrics.text(gauges), media_type="text/plain; version=0.0.4")


_UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}


async def _events(answer: Answer, order: Order, head: dict[str, Any], *, usage: bool) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a stream; what goes wrong on the way is its last one."""
    try:
        async for piece in answer.pieces():
            if piece.text or piece.finish_reason or piece.logprobs or piece.trace is not None:
                choice = _choice(piece.choice)
                _add(choice, await _told(answer, piece))
                yield _event(head | {"choices": [choice]} | ({"usage": None} if usage else {}))
        if usage:
            yield _event(head | {"choices": [], "usage": _usage(answer, order)})
        yield b"data: [DONE]\n\n"
    except Refusal as refusal:
        yield b"data: " + refusal.body + b"\n\n"


def _choice(number: int) -> dict[str, Any]:
    return {"text": "", "index": number, "logprobs": None, "finish_reason": None}


async def _told(answer: Answer, piece: Piece) -> dict[str, Any]:
    """Return a piece as fields of a choice."""
    told: dict[str, Any] = {"text": piece.text, "logprobs": piece.logprobs, "finish_reason": piece.finish_reason}
    if piece.trace is not None and piece.tokens:
        found = await asyncio.to_thread(answer.served.paths, piece.trace, piece.tokens)
        told["paths"] = [path.to_dict() for path in found]
    return told


def _add(choice: dict[str, Any], told: dict[str, Any]) -> None:
    """Put more of an answer to what there is of it."""
    choice["text"] += told["text"]
    choice["finish_reason"] = told["finish_reason"]
    if told["logprobs"] is not None:
        before = choice["logprobs"] or {name: [] for name in told["logprobs"]}
        choice["logprobs"] = {name: before[name] + more for name, more in told["logprobs"].items()}
    if "paths" in told:
        choice["paths"] = choice.get("paths", []) + told["paths"]


def _usage(answer: Answer, order: Order) -> dict[str, int]:
    read, written = order.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode("ascii") + b"\n\n"


def _json(content: dict[str, Any], *, status: int = 200) -> Response:
    return Response(json.dumps(content), status_code=status, media_type="application/json")


async def _gone(request: Request) -> None:
    """Wait until the client has gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _understood(read: Callable[..., R], *given: Any) -> R:
    """Work out what a client asked for, beside the event loop. What is wrong with it is the client's mistake."""
    try:
        return await asyncio.to_thread(read, *given)
    except ValueError as error:
        name = str(error).split("=")[0].split(":")[0]
        raise Refusal(400, str(error), param=name if name.isidentifier() else None) from error


async def _explain(request: Request, error: Exception) -> Response:
    """Answer with an error in OpenAI's shape."""
    if isinstance(error, Refusal):
        refusal = error
    elif isinstance(error, RequestValidationError):
        refusal = _first_complaint(error.errors())
    elif isinstance(error, HTTPException):
        refusal = Refusal(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    else:
        refusal = Refusal(500, "the server failed", code="internal")
    return Response(refusal.body, status_code=refusal.status_code, media_type="application/json", headers=refusal.headers)


def _first_complaint(errors: Sequence[Any]) -> Refusal:
    """Return what is wrong with a body, in one line."""
    names = [str(part) for part in errors[0]["loc"] if part != "body"]
    param = names[0] if names else None
    texts = list(dict.fromkeys(error["msg"] for error in errors if [str(p) for p in error["loc"] if p != "body"][:1] == names[:1]))
    return Refusal(400, f"{param or 'body'}: {'; or '.join(texts)}", param=param)


class _Counted:
    """Counts answers by path and status; paths that do not exist are one."""

    def __init__(self, app: Any, *, metrics: Metrics, known: frozenset[str]):
        self._app, self._metrics, self._known = app, metrics, known

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._known else "other"
                self._metrics.add("pathlm_requests_total", path=path, status=str(message["status"]))
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
