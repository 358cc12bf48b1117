"""What the server of a run answers, and to whom."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest

from fuse import cli
from fuse.run_page.serve import server_of


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def port(directory: Path) -> Iterator[int]:
    with server_of(directory, 0) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    told = answer.status, answer.read().decode()
    connection.close()
    return told


def test_before_the_first_update_it_waits(port: int) -> None:
    status, text = ask(port, "/")
    assert (status, "No update has ended yet" in text) == (200, True)
    assert ask(port, "/run.json")[0] == 404


@pytest.mark.parametrize(
    "path", ["/../etc/passwd", "/updates.jsonl", "/details/1.json", "/details/x.json", "/favicon.ico"]
)
def test_there_is_nothing_else(port: int, path: str) -> None:
    assert ask(port, path)[0] == 404


def test_pages_of_other_names_are_refused(port: int) -> None:
    assert ask(port, "/", host=f"evil.example:{port}")[0] == 403
    assert ask(port, "/", host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is no directory: give the output directory of a run"),
        ([".", "--port", "70000"], "'70000' is no port: give a number from 0 to 65535"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["watch", *arguments])
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(tmp_path), "--port", str(port)]) == 2
    assert f"cannot serve on port {port}" in capsys.readouterr().err
