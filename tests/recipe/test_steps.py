"""Steps run once, need what they read, and go on where they were ended."""

import json
import os
import sys

import pytest

from fuse.recipe.steps import Step, StepError, locked, run_step

WRITE = "import json, sys; print('half', 'way'); json.dump({'n': 1}, open(sys.argv[1], 'w'))"


@pytest.fixture
def lock(tmp_path):
    with locked(tmp_path) as descriptor:
        yield descriptor


def step(directory, program=WRITE, name="one", **changes):
    options = {"inputs": {}, "settings": {"seed": 1}, "resume": list} | changes
    return Step(
        name=name,
        output_dir=directory,
        command=[sys.executable, "-c", program, str(directory / f"{name}.results.json")],
        **options,
    )


@pytest.mark.processes
def test_a_complete_step_is_not_repeated(tmp_path, lock):
    told = []
    record = run_step(step(tmp_path), "make", told.append, lock)
    assert record["metrics"] == {"n": 1}
    assert record == json.loads((tmp_path / "one.json").read_text())
    assert told == ["one: starting", "one: half way"]
    assert "half way" in (tmp_path / "one.log").read_text()
    assert not (tmp_path / "one.results.json").exists()
    again = step(tmp_path, "raise SystemExit('not again')")
    assert run_step(again, "make", told.append, lock) == record
    assert told[-1] == f"one: complete ({tmp_path / 'one.json'})"


@pytest.mark.processes
def test_other_settings_or_another_input_are_refused(tmp_path, lock):
    def dependent():
        return step(tmp_path, name="two", inputs={"one": tmp_path / "one.log"})

    run_step(step(tmp_path), "make", str, lock)
    run_step(dependent(), "make", str, lock)
    with pytest.raises(ValueError, match=r"step one was completed with other seed: remove .*one.json"):
        run_step(step(tmp_path, settings={"seed": 2}), "make", str, lock)
    (tmp_path / "one.json").unlink()
    run_step(step(tmp_path), "make", str, lock)
    with pytest.raises(ValueError, match="step two was completed with other inputs"):
        run_step(dependent(), "make", str, lock)


def test_a_missing_input_says_what_makes_it(tmp_path, lock):
    needy = step(tmp_path, inputs={"sft": tmp_path / "sft"})
    with pytest.raises(
        ValueError, match=r"step one needs .*sft, which is not complete: make it by `fuse recipe` --steps sft"
    ):
        run_step(needy, "`fuse recipe` --steps", str, lock)
    (tmp_path / "sft").mkdir()  # half of it
    with pytest.raises(ValueError, match="which is not complete"):
        run_step(needy, "`fuse recipe` --steps", str, lock)


@pytest.mark.processes
def test_what_a_step_refuses_is_told_in_its_words(tmp_path, lock):
    with pytest.raises(ValueError, match=r"^step one: no such option$"):
        run_step(step(tmp_path, "print('one: no such option'); raise SystemExit(2)"), "make", str, lock)
    assert not (tmp_path / "one.json").exists()


@pytest.mark.processes
def test_a_failed_step_goes_on_when_it_is_run_again(tmp_path, lock):
    with pytest.raises(StepError, match=r"failed with status 3: out of luck \(see .*one.log\); the same command again"):
        run_step(step(tmp_path, "print('out of luck'); raise SystemExit(3)"), "make", str, lock)
    program = "import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
    record = run_step(step(tmp_path, program, resume=lambda: ["--resume"]), "make", str, lock)
    assert record["metrics"] == ["--resume"]


@pytest.mark.processes
def test_a_directory_is_one_recipes_also_while_a_step_of_a_dead_one_runs(tmp_path):
    with locked(tmp_path) as descriptor:
        with pytest.raises(ValueError, match="another recipe, or a step that it left, is at work"), locked(tmp_path):
            pass
        kept = os.dup(descriptor)  # as a step has it
    with pytest.raises(ValueError, match="another recipe"), locked(tmp_path):
        pass
    os.close(kept)
    with locked(tmp_path):
        pass


@pytest.mark.processes
def test_checkpoints_go_once_a_step_is_complete(tmp_path, lock):
    trained = tmp_path / "sft"
    names = ["checkpoint-20", "checkpoint-best", "model"]

    def checkpointed(program=WRITE):
        for name in names:
            (trained / name).mkdir(parents=True, exist_ok=True)
        return step(tmp_path, program, checkpoints=trained)

    with pytest.raises(StepError):
        run_step(checkpointed("raise SystemExit(3)"), "make", str, lock)
    assert sorted(path.name for path in trained.iterdir()) == names
    for _ in range(2):  # as it ends, and what a kill at that moment has left
        run_step(checkpointed(), "make", str, lock)
        assert sorted(path.name for path in trained.iterdir()) == names[1:]
