"""Limits, keys, clients that leave, and the end: everybody is told what happened, and no row is left behind."""

import io
import signal
import sys
import threading
import time

import httpx
import openai
import pytest
from rich.console import Console
from served import LIMITS, Running, wait_for
from typer.testing import CliRunner

from pathlm.cli import app as commands
from pathlm.serve import Limits, app
from pathlm.serve.running import is_loopback, read_key

LONG = {"model": "graph", "prompt": "a", "max_tokens": 200, "seed": 1}


def limits(**changed):
    return Limits(**{"rows": 2, "queue": 3, "max_new_tokens": 200, "grace": 5} | changed)


def slow(running, seconds=0.02):
    """Let every round of a server take its time."""
    for served in running.service.models.values():
        advance = served.engine.round
        served.engine.round = lambda advance=advance: (time.sleep(seconds), advance())[1]


def post(running, body, **options):
    return httpx.post(f"{running.url}/v1/completions", json=body, timeout=60, **options)


def test_a_client_that_leaves_frees_its_row(start):
    running = start("graph", limits=limits())
    slow(running, 0.1)  # a busy machine must not let the answer end before it is looked at
    with httpx.stream("POST", f"{running.url}/v1/completions", json=LONG | {"stream": True}, timeout=60) as stream:
        assert next(stream.iter_lines()).startswith("data: ")
        assert len(running.rows()) == 1
    wait_for(lambda: not running.rows())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/completions", json=LONG | {"n": 3}, timeout=0.3)
    wait_for(lambda: not running.rows())
    assert 'pathlm_disconnects_total{model="graph"} 2' in httpx.get(f"{running.url}/metrics").text
    assert post(running, LONG | {"max_tokens": 3}).status_code == 200


def test_who_finds_the_queue_full_is_told_to_come_again(start):
    running = start("graph", limits=limits())
    slow(running)
    found = []
    threads = [threading.Thread(target=lambda: found.append(post(running, LONG | {"max_tokens": 60}))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(running.rows()) == 2)
    waiting = threading.Thread(target=lambda: found.append(post(running, LONG | {"max_tokens": 2, "n": 3})))
    waiting.start()
    wait_for(lambda: len(running.rows()) == 5)
    refused = post(running, LONG)
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    for thread in (*threads, waiting):
        thread.join()
    assert [answer.status_code for answer in found] == [200] * 3


def test_an_answer_of_one_client_is_not_kept_waiting_by_many_of_another(start):
    running = start("graph", limits=limits(rows=4, queue=40))
    slow(running)
    found = []
    thread = threading.Thread(target=lambda: found.append(post(running, LONG | {"n": 32, "max_tokens": 60})))
    thread.start()
    wait_for(lambda: len(running.rows()) == 32)
    began = time.monotonic()
    assert post(running, LONG | {"max_tokens": 3}).status_code == 200
    assert time.monotonic() - began < 3 and len(running.rows()) >= 30, "it is written beside the first of them, and not after"
    running.service.worker.fail("enough")
    thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(start, stream):
    running = start("graph", limits=limits(max_seconds=1))
    slow(running)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as ai:
        began = time.monotonic()
        with pytest.raises(openai.APIError, match="not complete after 1 seconds") as caught:
            list(ai.completions.create(**LONG, stream=stream))
    assert time.monotonic() - began < 3, "it is not asked again"
    assert stream or caught.value.status_code == 408
    wait_for(lambda: not running.rows())


def test_a_body_that_is_too_long_is_not_read(running):
    body = b'{"model": "graph", "prompt": "' + b"a" * 60_000 + b'"}'
    pieces = (body[i : i + 1000] for i in range(0, len(body), 1000))
    for content in (body, pieces):
        answer = httpx.post(f"{running.url}/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def test_a_key_is_asked_for_where_there_is_one(start):
    running = start("graph", api_key="sesame")
    for path in ("/v1/models", "/v1/completions", "/metrics"):
        for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "sesame"}, {"authorization": "Bearer sesäme".encode()}):
            answer = httpx.get(running.url + path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
            assert "sesame" not in answer.text
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="sesame") as ai:
        assert [model.id for model in ai.models.list()] == ["graph"]
    assert httpx.get(f"{running.url}/v1/models", headers={"authorization": "bearer sesame"}).status_code == 200
    assert httpx.get(f"{running.url}/health").status_code == httpx.get(running.url).status_code == 200


def test_a_name_that_points_here_is_not_answered(start):
    running = start("graph", hosts=("localhost", "127.0.0.1"))
    assert httpx.get(running.url).status_code == 200
    assert httpx.get(running.url, headers={"host": "LOCALHOST"}).status_code == 200  # names do not depend on case
    assert httpx.get(running.url, headers={"host": "evil.example"}).status_code == 403


def test_a_server_that_is_told_to_stop_finishes_what_runs_and_says_so_to_others(folders):
    console = Console(record=True, width=100, file=io.StringIO())
    running = Running(app([folders["graph"]], limits=limits()), console=console)
    slow(running, 0.05)
    lines, found = [], []

    def listen():
        with httpx.stream("POST", f"{running.url}/v1/completions", json=LONG | {"stream": True, "max_tokens": 60}, timeout=60) as stream:
            lines.extend(stream.iter_lines())

    threads = [threading.Thread(target=listen), threading.Thread(target=lambda: found.append(post(running, LONG | {"max_tokens": 60})))]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(running.rows()) == 2 and lines == [])
    running.server.handle_exit(signal.SIGTERM, None)
    for _ in range(3):
        time.sleep(0.2)
        health, refused = httpx.get(f"{running.url}/health"), post(running, LONG)
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})
        assert refused.status_code == 503 and refused.json()["error"] | {"message": ""} == STOPPING
    assert "stopping: answers that run have 5 s" in console.export_text()
    for thread in (*threads, running.thread):
        thread.join()
    assert lines[-2] == "data: [DONE]" and found[0].json()["choices"][0]["finish_reason"] in ("length", "stop")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


STOPPING = {"message": "", "type": "server_error", "param": None, "code": "stopping"}


@pytest.mark.parametrize("round_", [0.05, 4], ids=["between two tokens", "within a long pass"])
def test_a_second_ctrl_c_ends_what_runs_at_once_and_quietly(folders, capfd, round_):
    console = Console(record=True, width=100, file=io.StringIO())
    running = Running(app([folders["graph"]], limits=limits(grace=60)), console=console)
    slow(running, round_)
    found = []
    thread = threading.Thread(target=lambda: found.append(post(running, LONG)))
    thread.start()
    wait_for(lambda: len(running.rows()) == 1)
    running.server.handle_exit(signal.SIGINT, None)
    time.sleep(0.3)
    began = time.monotonic()
    running.server.handle_exit(signal.SIGINT, None)
    for ends in (running.thread, thread):
        ends.join()
    assert time.monotonic() - began < 3
    assert console.export_text().splitlines()[-1] == "stopped: answers that ran were cut off"
    assert capfd.readouterr().err == ""
    assert found[0].status_code == (503 if round_ < 1 else 500)


def test_what_runs_when_the_grace_is_over_is_told_so(folders):
    allowed = limits(grace=0.5)
    running = Running(app([folders["graph"]], limits=allowed), allowed)
    slow(running, 0.05)
    found = []
    thread = threading.Thread(target=lambda: found.append(post(running, LONG)))
    thread.start()
    wait_for(lambda: len(running.rows()) == 1)
    running.server.handle_exit(signal.SIGTERM, None)
    thread.join()
    running.thread.join()
    assert found[0].status_code == 503 and "time is up" in found[0].json()["error"]["message"]


def test_a_model_that_fails_ends_its_rows_with_an_error_and_goes_on(start, monkeypatch, caplog):
    running = start("graph")
    engine = running.service.models["graph"].engine
    forward, calls = engine.model.forward, []

    def fail_once(*args, **given):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the cable is loose")
        return forward(*args, **given)

    monkeypatch.setattr(engine.model, "forward", fail_once)
    answer = post(running, LONG)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "cable" not in answer.text and "the cable is loose" in caplog.text
    assert post(running, LONG | {"max_tokens": 3}).status_code == 200


def test_any_host_but_loopback_needs_a_key(folders, monkeypatch, tmp_path):
    monkeypatch.delenv("PATHLM_API_KEY", raising=False)
    done = CliRunner().invoke(commands, ["serve", str(folders["graph"]), "--host", "0.0.0.0"])
    assert done.exit_code == 2 and "needs a key" in done.stderr and done.stderr.count("\n") == 1
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.org")] == [True] * 3 + [False] * 3
    file = tmp_path / "key"
    file.write_text("\n")
    with pytest.raises(ValueError, match="its first line must be the key"):
        read_key(file)
    file.write_text(" sesame \nmore\n")
    assert read_key(file) == "sesame"
    monkeypatch.setenv("PATHLM_API_KEY", "open")
    assert (read_key(None), read_key(file)) == ("open", "sesame")


def test_two_models_of_one_name_are_refused_before_any_is_opened(folders, tmp_path):
    other = tmp_path / "graph"
    other.symlink_to(folders["routed"], target_is_directory=True)
    with pytest.raises(ValueError, match="both called 'graph'"):
        app([folders["graph"], other])
    link = tmp_path / "another"
    link.symlink_to(folders["graph"])
    assert list(app([folders["graph"], link]).state.service.models) == ["graph", "another"]
    with pytest.raises(FileNotFoundError):
        app([folders["graph"], tmp_path / "nothing"])
    with pytest.raises(ValueError, match="at least one"):
        app([])


def test_a_missing_extra_is_told_in_a_line(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = CliRunner().invoke(commands, ["serve", str(folders["graph"])])
    assert done.exit_code == 2 and done.stderr.startswith("error: a server needs the extra: pip install 'pathlm[serve]'")
    assert done.stderr.count("\n") == 1


def test_an_answer_tells_only_so_many_paths(running):
    answer = post(running, LONG | {"paths": True, "max_tokens": 26, "n": 4})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "paths"
    answer = httpx.post(f"{running.url}/v1/paths", json={"model": "graph", "input": [[1] * 60, [2] * 60]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"


@pytest.mark.parametrize("changed", [{"rows": 0}, {"queue": 0}, {"max_seconds": 0}, {"max_seconds": float("nan")}, {"grace": -1}], ids=str)
def test_limits_that_let_nothing_through_are_refused(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        Limits(**changed)
    assert LIMITS.rows == 8
