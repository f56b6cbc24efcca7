"""A local web server with the faults of real ones, and small things that these tests share."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType

from razorlab.data.published import PublishedSpec

REPOSITORY = Path(__file__).parents[2]


def load_script(path: str) -> ModuleType:
    """Import a script of the repository under a name of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_under_test", REPOSITORY / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@dataclass
class FileServer:
    """Serves ``files`` and does what its switches say."""

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    etag: str = '"first"'
    ranges: bool = True  # whether it answers Range
    cut_after: int | None = None  # bytes of a body before the connection is dropped
    status: int | None = None  # the answer to everything
    chunk_pause: float = 0.0  # seconds before each 1,000 bytes
    seen: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range of each request

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.seen.append((request.path, request.headers.get("Range")))
        body = self.files.get(request.path.lstrip("/"))
        if self.status is not None or body is None:
            request.send_error(self.status or 404)
            return
        start, wanted = 0, re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        if self.ranges and wanted and request.headers.get("If-Range", self.etag) == self.etag:
            start = int(wanted[1])
            if start >= len(body):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(body)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.send_header("ETag", self.etag)
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        self._send(request, body[start:][: self.cut_after])

    def _send(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        try:
            for first in range(0, len(body), 1000 if self.chunk_pause else len(body) or 1):
                time.sleep(self.chunk_pause)
                request.wfile.write(body[first : first + (1000 if self.chunk_pause else len(body))])
        except ConnectionError:
            pass  # the client was killed


@dataclass(frozen=True)
class Tiny:
    """One data set in miniature: its spec, the folder with its published files."""

    spec: PublishedSpec
    files: Path

    def place(self, root: Path) -> Path:
        """Place the published files by hand for ``--root root``; return the data set's folder."""
        folder = root / self.spec.name
        folder.mkdir(parents=True, exist_ok=True)
        for archive in self.spec.archives:
            shutil.copy(self.files / archive.name, folder / archive.name)
        return folder


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below ``root``."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(root.rglob("*"))}


def run(setup_main, spec, root, *options):
    return setup_main([spec.name], ["--root", str(root), *options], {spec.name: spec})


def one_error(capsys):
    """The single line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]
