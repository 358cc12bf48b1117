"""The commands of the documents that are about a run, run as they are written, in the tutorial's order.

Only shorter: a run ends after as few updates as the next command needs. Elsewhere are `fuse recipe` and `fuse chat`
(test_recipe), `fuse watch` (run_page/test_serve) and `fuse bench` (benchmarks).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuse import cli
from fuse.commands import show
from fuse.demo.tokenizer import arithmetic_tokenizer

from ..documents import PAGES, ROOT, TUTORIAL, blocks, command_lines
from ..tiny_models import build, classifier
from ..worker_pool import WorkerPool

ELSEWHERE = {"recipe", "chat", "watch", "bench"}
SHORTER = {"train": ["--total-episodes", "192", "--num-ppo-epochs", "2"], "solve": ["--time-limit", "1"]}
ONE_UPDATE = ["--max-steps", "1", "--use-cpu", "--report-to", "none"]
REWARDS = """
def exact(prompts, responses, **columns):
    return [float(len(text)) for text in responses]

def right(completions, **columns):
    return [float(len(text)) for text in completions]

short = right
"""


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory, worker_pool: WorkerPool) -> Iterator[Path]:
    """The directory in which the tutorial's commands have been run, all of them."""
    directory = tmp_path_factory.mktemp("tutorial")
    (directory / "docs").symlink_to(ROOT / "docs")
    with pytest.MonkeyPatch.context() as patch, worker_pool.in_use():
        patch.chdir(directory)
        patch.setattr(sys, "path", [str(directory), *sys.path])
        exec(compile(blocks(TUTORIAL, "python")[1], "inputs.py", "exec"), {})
        patch.setattr(show, "_PLAYGROUND_S", 0.05)
        for argv in command_lines(TUTORIAL):
            if argv[0] not in ELSEWHERE:
                assert cli.main([*argv, *SHORTER.get(argv[0], [])]) == 0, argv
        yield directory
    sys.modules.pop("rewards", None)


def test_the_tutorial_leaves_what_it_says(tutorial: Path) -> None:
    assert len((tutorial / "prompts.jsonl").read_text().splitlines()) == 64
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tutorial / "ppo_run").iterdir()}
    for page in ("run.html", "demo.html", "playground.html", "fused.html"):
        assert "</html>" in (tutorial / page).read_text(encoding="utf-8")
    assert json.loads((tutorial / "fused.json").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("tutorial")
def test_commands_about_a_run_do_what_they_are_written_for(page: Path) -> None:
    """In the tutorial's directory, whose run they are about; what is in the tutorial itself is not run again."""
    known = [*command_lines(TUTORIAL)]
    for argv in command_lines(page):
        if argv not in known and argv[0] in ("show", "plan", "simulate", "solve"):
            assert cli.main([word.replace("OUTPUT_DIR", "ppo_run") for word in argv]) == 0, argv


def test_readmes_runs_train(tutorial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tutorial / "readme"
    directory.mkdir()
    rows = [{"prompt": f"{index}+1=", "question": f"{index}+1="} for index in range(64)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "rewards.py").write_text(REWARDS)
    scorer = build(classifier(vocab_size=17, hidden_size=32, max_position_embeddings=256, pad_token_id=0))
    scorer.save_pretrained(directory / "scorer")
    arithmetic_tokenizer().save_pretrained(directory / "scorer")
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "path", [str(directory), *sys.path])
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    commands = [argv for argv in command_lines(ROOT / "README.md") if argv[0] == "train"]
    assert len(commands) >= 4
    for number, argv in enumerate(commands):
        paths = {"--model": "../base", "--reward-model": "scorer"}
        argv = [paths[before] if word == "PATH" else word for before, word in zip(["", *argv], argv, strict=False)]
        longest = "--max-completion-length" if "--algorithm" in argv else "--response-length"
        assert cli.main([*argv, *ONE_UPDATE, longest, "8", "--output-dir", f"out{number}"]) == 0, argv
        assert (directory / f"out{number}" / "model.safetensors").exists()
