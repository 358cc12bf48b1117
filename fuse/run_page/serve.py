"""The page of a run over HTTP, to this machine alone: the page, its figures as they grow, details of an update."""

from __future__ import annotations

import json
import re
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fuse.run_page.data import read_details, read_run, run_data, traces_of
from fuse.run_page.page import page

_HOSTS = frozenset({"127.0.0.1", "localhost"})
_DETAILS = re.compile(r"/details/([0-9]{1,12})\.json")
_WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>fuse run</title><link rel="icon" href="data:,"><p>No update has ended yet: this page looks again.</p>"""


def server_of(directory: Path, port: int) -> ThreadingHTTPServer:
    """A server of the run in an output directory; `serve_forever` it. Raises: OSError where the port is taken."""
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory))
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    """Answers requests that name this machine; another name would be a page elsewhere that asks through a browser."""

    def __init__(self, directory: Path, *arguments: Any) -> None:
        self._directory = directory
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in _HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        try:
            kind, text = self._answer(self.path.partition("?")[0])
        except (OSError, ValueError) as error:  # nothing yet, or a trace that has just been deleted
            if self.path == "/":
                self._send("text/html", _WAITING)
            else:
                self.send_error(HTTPStatus.NOT_FOUND, explain=str(error))
            return
        except KeyError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._send(kind, text)

    def _answer(self, path: str) -> tuple[str, str]:
        if match := _DETAILS.fullmatch(path):
            return "application/json", json.dumps(read_details(traces_of(self._directory)[int(match[1])]))
        if path not in ("/", "/run.json"):
            raise KeyError(path)
        records, _ = read_run(self._directory)
        updates = {record.update for record in records} & traces_of(self._directory).keys()
        run = run_data(records, self._directory.resolve().name, updates)
        return ("text/html", page(run, {}, is_served=True)) if path == "/" else ("application/json", json.dumps(run))

    def _send(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are nothing to tell."""
