"""`fuse recipe` from data to policy, killed on the way while TRL trains and while `fuse train` does."""

import fcntl
import json
import multiprocessing
import os
import time
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse.cli import main
from fuse.commands.models import load_classifier
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import small_llama
from fuse.recipe import steps
from fuse.recipe.training import check_options
from fuse.training.advantage_model import LABELS

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipe")
    tokenizer = arithmetic_tokenizer()
    small_llama(tokenizer, seed=0, hidden_size=32, num_layers=1).save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": f"#{a + b}" + b % 2 * ";;", "rejected": f"{a}+{b}"}
        for a in range(10)
        for b in range(10)
    ]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def command(toy, *options):
    return [
        *("recipe", f"--model={toy / 'base'}", f"--data={toy / 'data.jsonl'}", f"--output-dir={toy / 'out'}"),
        *options,
    ]


OPTIONS = """
data-split: "3,3,4"
held_out: 0.2
sft: {per_device_train_batch_size: 4, max_steps: 30, save_steps: 20, learning_rate: 1.0e-2, use_cpu: true}
reward: {per_device_train_batch_size: 4, max_steps: 10, learning_rate: 1.0e-2, use_cpu: true, loss: advantage}
rl:
  num_devices: 1
  use-cpu: true
  total-episodes: 32
  per_device_train_batch_size: 4
  gradient-accumulation-steps: 2
  num-ppo-epochs: 1
  response-length: 6
  ema_decay: 0.5
  save-steps: 1
"""


@pytest.fixture(scope="module")
def options(toy):
    file = toy / "options.yaml"
    file.write_text(f"{OPTIONS}  auxiliary_dataset: {toy / 'out' / 'data' / 'sft.jsonl'}\n")
    return f"--config={file}"


HELD = """
import os, runpy, signal, sys

class Held:
    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.stream.write(text)
        if os.environ["HELD_AT"] in text:
            self.stream.flush()
            signal.pause()

    def __getattr__(self, name):
        return getattr(self.stream, name)

sys.stdout, sys.stderr = Held(sys.stdout), Held(sys.stderr)
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs a module, which waits for a signal when it writes HELD_AT."""


def kill_at(line, argv, log):
    """Run the command, and kill it, with nothing that it could do about it, when a step logs this.

    The step goes no further, but for what it does when it is asked to end. The command is forked: what it would import
    first is here.
    """
    printed = log.parent / "printed.txt"
    process = FORK.Process(target=run_apart, args=(argv, printed, line))
    process.start()
    while not (log.exists() and line in log.read_text()):
        assert process.is_alive(), printed.read_text()
        time.sleep(0.02)
    process.kill()
    process.join()
    with open(log.parent / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the step has ended too


def run_apart(argv, printed, line):
    run = steps._run

    def run_held(command, *rest):
        python, option, *module = command
        assert option == "-m"
        run([python, "-c", HELD, *module], *rest)

    steps._run = run_held
    os.environ["HELD_AT"] = line
    with open(printed, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        main(argv)


def steps_logged(log):
    words = (line.split() for line in log.read_text().splitlines())
    return [int(word[2]) for word in words if word[1:2] == ["step"]]


@pytest.mark.processes
@pytest.mark.own_ray
def test_a_recipe_goes_on_after_a_kill(toy, options, capsys):
    """The step of the reward model is trained, and goes on, as `sft` is: recipe/test_reward.py."""
    out = toy / "out"
    argv = command(toy, options)
    out.mkdir()
    for name in ("sft", "reward"):
        check_options(name, ())  # imports what it needs, for those that are forked
    kill_at("step 21 of 30", argv, out / "sft.log")
    assert not (out / "sft.json").exists()
    kill_at("PPO 1/4", argv, out / "rl.log")
    result = toy / "result.json"
    assert main([*argv, f"--json={result}"]) == 0
    logged = steps_logged(out / "sft.log")
    [again] = [index for index, (one, following) in enumerate(pairwise(logged)) if following <= one]
    assert logged[again + 1] % 20 == 1 < logged[again + 1]  # behind the last checkpoint
    assert logged[-1] == 30
    assert steps_logged(out / "reward.log") == [*range(1, 11)]
    assert "--resume-from-checkpoint=true" in (out / "rl.log").read_text()
    written = json.loads(result.read_text())
    assert set(written) == {"sft_score", "policy_score", "p_value", "seconds", "steps"}
    assert 0 < written["p_value"] <= 1
    rewards = written["steps"]["rl"]["metrics"]["log_history"]
    assert [entry["step"] for entry in rewards if "objective/scores" in entry] == [1, 2, 3, 4]
    assert all(entry["auxiliary/loss"] > 0 for entry in rewards if "objective/scores" in entry)
    for name in ("sft", "policy", "policy_ema"):
        AutoModelForCausalLM.from_pretrained(out / name)
        AutoTokenizer.from_pretrained(out / name)
    assert load_classifier(str(out / "reward")).config.id2label == LABELS
    assert not list(out.glob("sft/checkpoint-*")) + list(out.glob("reward/checkpoint-*"))
    lines = [json.loads(line) for line in (out / "comparison.jsonl").read_text().splitlines()]
    assert len(lines) == json.loads((out / "data.json").read_text())["rows"]["rl_held_out"]
    assert written["policy_score"] == pytest.approx(sum(line["after_score"] for line in lines) / len(lines))
    assert main([*argv, "--sft.seed", "3"]) == 2
    assert "step sft was completed with other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--sft.learning_rat", "1"], "options --sft.NAME: there is no learning_rat"),
        (["--steps", "rl"], "step rl needs"),
        (["--data-split", "1,2"], "not three shares such as 2,4,4"),
        (["--held-out", "1.5"], "--held-out is 1.5"),
        (["--rl.kl_coeff", "1"], "unknown option --kl-coeff: did you mean --kl-coef?"),
        (["--model", "./nowhere"], "no model at ./nowhere"),
        (["--demo"], "--demo brings its own model"),
    ],
)
def test_bad_input_is_one_line(toy, tmp_path, capsys, given, line):
    argv = command(toy, *given, f"--output-dir={tmp_path}")
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_bad_rows_are_refused_by_number(toy, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1=", "chosen": "#2", "rejected": "#2"}\n')
    assert main(command(toy, f"--data={bad}", f"--output-dir={tmp_path / 'out'}", "--steps", "reward")) == 2
    assert "1 of 1 rows are no preferences (rows by number, chosen equals rejected: 0)" in capsys.readouterr().err
