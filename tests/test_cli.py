"""The command line: what it offers, how fast, and what it says of mistakes."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest

from fuse import cli


def command(run: Callable[..., int]) -> ModuleType:
    """A command module `run` of which takes --num-items N and --json FILE."""
    module = ModuleType("fuse.commands.fake", "Fake.")
    module.run = run  # type: ignore[attr-defined]

    def add_arguments(parser: Any) -> None:
        parser.add_argument("--num-items", type=int, default=1)
        parser.add_argument("--json")

    module.add_arguments = add_arguments  # type: ignore[attr-defined]
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    def install(run: Callable[..., int]) -> None:
        monkeypatch.setattr(cli, "COMMANDS", {"fake": "does nothing"})
        monkeypatch.setattr(cli, "_exists", lambda module: module == "fuse.commands.fake")
        monkeypatch.setattr(cli, "import_module", lambda name: command(run))

    return install


def failing(error: BaseException) -> Callable[..., int]:
    def run(arguments: object) -> int:
        raise error

    return run


def exit_status(argv: Sequence[str]) -> int:
    try:
        return cli.main(argv)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.processes
def test_help_loads_neither_torch_nor_ray() -> None:
    script = (
        "import sys\n"
        "from fuse.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as error:\n    assert error.code == 0\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'numpy') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_help_lists_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--help"]) == 0
    output = capsys.readouterr().out
    for name in ("train", "demo", "bench"):
        assert f"\n  {name} " in output
    assert "iteration" not in output or cli._exists("fuse.benchmarks.iteration")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fuse 0.")


def test_options_take_underscores_and_dashes(fake: Callable[[Callable[..., int]], None]) -> None:
    seen = []
    fake(lambda arguments: seen.append((arguments.num_items, arguments.json)) or 0)
    assert exit_status(["fake", "--num-items", "2", "--json", "a_b"]) == 0
    assert exit_status(["fake", "--num_items=3", "--json=a_b"]) == 0
    assert seen == [(2, "a_b"), (3, "a_b")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command given"),
        (["frob"], "unknown command 'frob'"),
        (["fke"], "did you mean fake?"),
        (["fake", "--num-item", "2"], "unknown option --num-item: did you mean --num-items?"),
        (["fake", "--frobnicate=2"], "unknown option --frobnicate"),
        (["fake", "2"], "unexpected argument '2'"),
        (["fake", "--num-items", "two"], "invalid int value: 'two'"),
        (["--frob"], "unknown option --frob"),
    ],
)
def test_a_mistake_in_the_options_is_one_line_and_exit_2(
    fake: Callable[[Callable[..., int]], None], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    fake(lambda arguments: 0)
    assert exit_status(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("kl_coef=-1 must not\nbe negative"), 2),
        (FileNotFoundError(2, "No such file or directory", "x.jsonl"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_line_and_has_its_status(
    fake: Callable[[Callable[..., int]], None], capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    fake(failing(error))
    assert exit_status(["fake"]) == status
    output = capsys.readouterr()
    assert output.err.startswith("fuse fake: ")
    assert output.err.count("\n") == 1
    assert not output.out


def test_an_error_has_nothing_that_a_terminal_obeys(
    fake: Callable[[Callable[..., int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(failing(ValueError("file \x1b[31m\x07\ud800 holds " + "9" * 5000)))
    assert exit_status(["fake", "--json=\x1b]0;x\x07"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(r"fuse fake: file \x1b[31m\x07\ud800 holds 999")
    assert error.rstrip("\n").isprintable()
    assert len(error) < 2200
    assert exit_status(["fake", "\x1b[31m"]) == 2
    assert r"unexpected argument '\x1b[31m'" in capsys.readouterr().err


def test_a_run_that_fails_ends_with_status_1(
    fake: Callable[[Callable[..., int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    from fuse.checkpoint import SaveError
    from fuse.trainers.rewards import RewardError
    from fuse.workers.errors import WorkerError

    for error, message in (
        (WorkerError(1, "model worker", "its process died"), "model worker on device 1 failed: its process died"),
        (RewardError("reward function f raised for sample 3: KeyError: 'x'"), "reward function f raised"),
        (SaveError("cannot save out/checkpoint-1: No space left on device"), "cannot save out/checkpoint-1"),
    ):
        fake(failing(error))
        assert exit_status(["fake"]) == 1
        output = capsys.readouterr().err
        assert output.startswith(f"fuse fake: {message}")
        assert output.count("\n") == 1


def test_a_traceback_on_request(fake: Callable[[Callable[..., int]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    fake(failing(ValueError("bad")))
    with pytest.raises(ValueError, match="bad"):
        cli.main(["fake"])


def test_our_own_bugs_are_not_dressed_up(fake: Callable[[Callable[..., int]], None]) -> None:
    fake(failing(AssertionError("a bug")))
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(["fake"])
