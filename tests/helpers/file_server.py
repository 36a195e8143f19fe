"""Serves the files of a folder on 127.0.0.1."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder until the end of the `with` block, and give its address."""
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(_Handler, directory=folder)) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}'
        server.shutdown()
