"""The HTTP interface: OpenAI's completions and models, paths, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import deque
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

from pathlm.serve.engine import Row
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
    post: Post | None = None
    """To the event loop in which the application runs"""

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


class Post:
    """Carries pieces from the engines' thread to the event loop, many at a time: waking it costs more than carrying them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._bag: deque[tuple[asyncio.Queue[Piece | None], Piece]] = deque()
        self._called = False

    def send(self, to: asyncio.Queue[Piece | None], piece: Piece) -> None:
        """Send a piece, from any thread."""
        self._bag.append((to, piece))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # first, so that what comes meanwhile has another call
        while self._bag:
            to, piece = self._bag.popleft()
            to.put_nowait(piece)


class Answer:
    """A request at work: its rows, and the pieces of their answers as they come."""

    def __init__(self, service: Service, served: Served, request: Request):
        self.service, self.served, self._request = service, served, request
        self._pieces = asyncio.Queue[Piece | None]()
        self._rows: list[Row] = []
        self.completion_tokens = 0
        self._begun = time.monotonic()

    def send(self, piece: Piece) -> None:
        """Take a piece, from any thread."""
        assert self.service.post is not None
        self.service.post.send(self._pieces, piece)

    def begin(self, order: Order) -> None:
        """Let the rows wait for their turn."""
        self.service.check(self.served, order)
        self.service.metrics.add("pathlm_tokens_total", order.prompt_tokens, model=self.served.name, kind="prompt")
        self._rows = self.service.worker.submit(self.served.engine, order.rows)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield what has come, until all rows have ended; then, or where nobody listens any more, they are let go.

        Raises `Refusal` where one fails, and where the client has gone.
        """
        waiting, metrics, name, first, left = len(self._rows), self.service.metrics, self.served.name, True, True
        gone = asyncio.ensure_future(self._gone())
        try:
            while waiting:
                some = [await self._pieces.get()]
                if first:
                    first = False
                    metrics.observe("pathlm_first_token_seconds", time.monotonic() - self._begun, model=name)
                while not self._pieces.empty():
                    some.append(self._pieces.get_nowait())
                pieces = [piece for piece in some if piece is not None]
                if len(pieces) < len(some):
                    raise Refusal(499, "the client has gone")
                if failed := next((piece for piece in pieces if piece.failed), None):
                    left = False
                    raise self._failure(failed)
                self.completion_tokens += sum(piece.tokens for piece in pieces)
                waiting -= sum(piece.finish_reason is not None for piece in pieces)
                left = waiting > 0
                yield pieces
        finally:
            gone.cancel()
            for row in self._rows:
                row.leave()
            if left:
                metrics.add("pathlm_disconnects_total", model=name)
            metrics.add("pathlm_tokens_total", self.completion_tokens, model=name, kind="completion")
            metrics.observe("pathlm_answer_seconds", time.monotonic() - self._begun, model=name)

    async def _gone(self) -> None:
        """Say when the client has gone; its body has been read."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._pieces.put_nowait(None)

    def _failure(self, piece: Piece) -> Refusal:
        if piece.failed == "time":
            text = f"the answer was not complete after {self.service.limits.max_seconds:g} seconds"
            return Refusal(408, text, code="timeout", headers={"x-should-retry": "false"})
        return Refusal(503 if self.service.stopping else 500, piece.error, code="failed")


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
        service.post = Post()
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(title="pathlm", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.service = service
    _add_models(app, service)
    _add_completions(app, service)
    _add_paths(app, service)
    _add_health(app, service)
    page = StaticFiles(directory=PAGE, html=True)
    for path in ("/", *(f"/{file.name}" for file in PAGE.iterdir())):  # one by one: a mount of / would answer for the routes above
        app.add_route(path, page, methods=["GET"], include_in_schema=False)  # type: ignore[arg-type]
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
        async for pieces in answer.pieces():
            for piece in pieces:
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
        async for pieces in answer.pieces():
            for piece in pieces:
                found = await asyncio.to_thread(served.paths, piece.trace)
                about = {"object": "paths", "index": piece.choice, "tokens": list(prompts[piece.choice].tokens)}
                data[piece.choice] = about | {"paths": [path.to_dict() for path in found]}
        return _json({"object": "list", "model": served.name, "data": data, "usage": _usage(answer, order)})


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/health")
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
        more = {"usage": None} if usage else {}
        async for pieces in answer.pieces():
            events = []
            for piece in pieces:
                if piece.text or piece.finish_reason or piece.logprobs or piece.trace is not None:
                    choice = _choice(piece.choice) | await _told(answer, piece)
                    events.append(_event(head | {"choices": [choice]} | more))
            if events:
                yield b"".join(events)
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
    elif isinstance(error, HTTPException) and error.status_code == 405:
        headers = dict(error.headers or {})
        refusal = Refusal(405, f"{request.method} {request.url.path}: use {headers['Allow']}", headers=headers)
    elif isinstance(error, HTTPException):
        refusal = Refusal(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    else:
        refusal = Refusal(500, "the server failed", code="internal")
    return Response(refusal.body, status_code=refusal.status_code, media_type="application/json", headers=refusal.headers)


def _first_complaint(errors: Sequence[Any]) -> Refusal:
    """Return what is wrong with a body, in one line."""
    if errors[0]["type"] in ("json_invalid", "model_attributes_type"):
        rule = "must be a JSON object, sent with the header Content-Type: application/json"
        reason = errors[0].get("ctx", {}).get("error")
        return Refusal(400, f"body: {rule}" + (f" ({reason}, at character {errors[0]['loc'][-1]})" if reason else ""))
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
