"""Fixtures of the data set tests: the local server, the tiny data sets, the set-up scripts' entry."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer

import pytest
from dataset_helpers import FileServer, Tiny, load_script
from tiny_archives import MAKERS, make_tiny

import razorlab.download


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(razorlab.download, "PAUSE_SECONDS", 0.0)
    state = FileServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), state.handler())
    http.daemon_threads = True
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    folder = tmp_path_factory.mktemp("published")
    return {name: Tiny(make_tiny(name, folder / name), folder / name) for name in MAKERS}


@pytest.fixture(scope="session")
def setup_main() -> Callable[..., int]:
    """``main`` of the set-up scripts: ``main(names, argv, specs)``."""
    return load_script("dataset_setup_scripts/_common.py").main
