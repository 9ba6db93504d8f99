"""Small models in folders of their own, and servers of them on free ports."""

import httpx
import pytest
from served import LIMITS, Running, make_graph, make_llama, make_routed, make_tokenizer

from pathlm.serve import app


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a routed model, a signal graph and a Llama, by name."""
    home, tokenizer, found = tmp_path_factory.mktemp("models"), make_tokenizer(), {}
    for name, make in {"routed": make_routed, "graph": make_graph, "llama": make_llama}.items():
        make().save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        found[name] = home / name
    return found


@pytest.fixture(scope="session")
def running(folders):
    """A server of all three models."""
    found = Running(app(list(folders.values()), limits=LIMITS))
    yield found
    found.stop()


@pytest.fixture
def start(folders):
    """Start servers of some models with limits and keys of their own; they are stopped after the test."""
    started = []

    def begin(*names, limits=LIMITS, **options):
        started.append(Running(app([folders[name] for name in names], limits=limits, **options), limits))
        return started[-1]

    yield begin
    for one in started:
        one.stop()


@pytest.fixture
def client(running):
    with httpx.Client(base_url=running.url, timeout=60) as found:
        yield found
