"""What documents refer to exists, their figures are pictures, and commands, scripts and options in them are real."""

from __future__ import annotations

import dataclasses
import re
import shlex
import xml.etree.ElementTree as ElementTree
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import transformers
import trl

import fuse
from fuse import cli
from fuse.config.run import RunConfig

from .documents import PAGES, ROOT, TUTORIAL, blocks, command_lines, config_files, mentioned_commands, without_blocks


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8"))
    for name, anchor in targets:
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in _anchors(target), f"{name}#{anchor}"


@pytest.mark.parametrize("name", ["fused_schedule", "rollout"])
def test_figures_are_svg_and_made_by_the_documented_command(name: str) -> None:
    figure = ROOT / "docs" / "figures" / f"{name}.svg"
    assert ElementTree.parse(figure).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert f"--svg docs/figures/{name}.svg" in (ROOT / "Makefile").read_text(encoding="utf-8")


class _Mention(cli.Parser):
    """Takes a command that is spoken of, whose options need not be all that it requires."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        for action in self._actions:
            action.required = False
        return super().parse_known_args(args, namespace)


def test_commands_are_parsed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own parsers; nothing is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "EARLY_CHECKS", MappingProxyType({}))
    for name, content in config_files(page).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    for argv in command_lines(page):
        arguments = _parsed(argv, monkeypatch)
        if argv[0] == "recipe":
            _check_step_options(arguments.step_options, monkeypatch)
    monkeypatch.setattr(cli, "Parser", _Mention)
    for argv in mentioned_commands(page):
        if argv != ["bench"]:
            _parsed(argv, monkeypatch)


def test_import_changes_name_what_there_is(page: Path) -> None:
    for line in re.findall(r"^\+from fuse import (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert [name for name in line.split(", ") if not hasattr(fuse, name)] == []


def test_python_is_python(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


def test_the_tutorials_script_runs_by_either_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for training, which trainers/test_examples.py does: its settings are those of the example."""
    monkeypatch.chdir(tmp_path)
    script = blocks(TUTORIAL, "python")[0]
    [change] = blocks(TUTORIAL, "diff")
    removed, added = (re.findall(rf"^\{sign}(.+)$", change, re.MULTILINE) for sign in "-+")
    assert len(removed) == len(added) == 1
    assert script.count(removed[0]) == 1
    trained = []

    def train(trainer: Any) -> None:
        trained.append(trainer)
        trainer.state.log_history = [{"reward": 0.25}, {"reward": 0.5}]

    monkeypatch.setattr(fuse.GRPOTrainer, "train", train)
    exec(compile(script.replace(removed[0], added[0]), "even.py", "exec"), {"__name__": "__main__"})
    [trainer] = trained
    example = (ROOT / "examples" / "grpo.py").read_text(encoding="utf-8")
    settings = [line.strip() for line in script.partition("GRPOConfig(\n")[2].partition("),\n")[0].splitlines()]
    assert [line for line in settings if line not in example] == ['output_dir="grpo_run",', "use_cpu=True,"]
    names = {line.partition("=")[0] for line in settings if line}
    assert names <= {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert trainer.args.max_steps == 20


def test_options_of_runs_are_in_the_table() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    names = {
        name for cell in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    configs = [getattr(fuse, name) for name in dir(fuse) if name.endswith("Config")]
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    assert names <= known
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    ours = {field.name for field in dataclasses.fields(RunConfig)} - inherited
    assert ours <= names, "docs/options.md has a row for each"


def _check_step_options(options: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from fuse.recipe.training import check_options

    for step in ("sft", "reward"):
        if options[step]:
            check_options(step, options[step])
    _parsed(["train", "--model=BASE", "--dataset=DATA", *options["rl"]], monkeypatch)


def _parsed(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command is given by this line; None where the line asks for help, which the parser itself gives."""
    _, module, _ = cli._select(argv)
    given: list[Any] = []

    def run(arguments: Any) -> int:
        given.append(arguments)
        return 0

    monkeypatch.setattr(import_module(module), "run", run)
    try:
        status: object = cli.main(argv)
    except SystemExit as end:
        status = end.code
    assert status == 0, shlex.join(["fuse", *argv])
    if not given:
        assert any(argument.startswith("--help") for argument in argv)
        return None
    return given[0]


def _anchors(page: Path) -> set[str]:
    """Of headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
