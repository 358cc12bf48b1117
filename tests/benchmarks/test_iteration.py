"""`fuse bench iteration`: a real run through the command line, the tokens it compares, and what it refuses."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from fuse import cli
from fuse.benchmarks import iteration, iteration_trl, iteration_workload
from fuse.benchmarks.iteration_fuse import idle_shares, outside_share
from fuse.benchmarks.iteration_rows import check_same_tokens, markdown, row_of, tables
from fuse.benchmarks.iteration_turns import Response, Stopped, TrainingThread, Turn, Turnstile, loader
from fuse.trace import Span

FIELDS = {"variant", "samples_per_s", "tokens_per_s", "ratio_to_serial", "ratio_to_trl", "phases", "idle_share"} | {
    "peak_bytes", "outside_share", "bubbles"
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], Path]:
    """Results of a real run with TRL beside it, and where its traces are."""
    directory = tmp_path_factory.mktemp("iteration")
    path, traces = directory / "out.json", directory / "traces"
    argv = ["bench", "iteration", "--smoke", "--peer", "trl", "--json", str(path), "--traces", str(traces)]
    assert cli.main(argv) == 0
    return json.loads(path.read_text()), traces


@pytest.mark.slow
def test_rows_hold_what_they_promise(smoke: tuple[Mapping[str, Any], Path]) -> None:
    results, _ = smoke
    assert results["machine"]["num_cores"] >= 2
    assert results["options"]["devices"] == 2
    off, both, trl = results["rows"]
    assert (off["variant"], both["variant"], trl["variant"]) == ("off", "both", "trl")
    for row in (off, both, trl):
        assert row.keys() >= FIELDS
        assert row["samples_per_s"] == pytest.approx(8 / row["seconds"])
        assert row["ratio_to_serial"] == pytest.approx(off["seconds"] / row["seconds"])
        assert row["ratio_to_trl"] == pytest.approx(trl["seconds"] / row["seconds"])
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"], rel=0.01)
        assert all(size > 50e6 for size in row["peak_bytes"].values())
    for row in (off, both):
        assert row["idle_share"].keys() == {"device0", "device1"}
        assert all(0 < share < 1 for share in row["idle_share"].values())
        assert 0 < row["outside_share"] < 1
        assert row["peak_bytes"].keys() == {"generation", "model", "driver"}
    assert {"generation", "inference", "training", "weights"} <= off["phases"].keys()
    assert {"rollout", "training", "weights"} <= both["phases"].keys()
    assert trl["phases"].keys() == {"generation", "inference", "training"}
    assert off["bubbles"] == trl["bubbles"] == {}
    assert both["bubbles"].keys() == {"planned", "executed", "serial"}


@pytest.mark.slow
def test_all_variants_compute_the_same(smoke: tuple[Mapping[str, Any], Path]) -> None:
    off, both, trl = smoke[0]["rows"]
    for name, value in off["metrics"].items():
        assert both["metrics"][name] == pytest.approx(value, rel=1e-5)
        assert trl["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_responses_end_where_the_model_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(iteration._SMOKE, "variants", ["off"])
    path = tmp_path / "out.json"
    options = ["--smoke", "--lengths", "natural", "--peer", "trl", "--json", str(path)]
    assert cli.main(["bench", "iteration", *options]) == 0
    tokens = [int(number) for number in re.findall(r"off: (\d+) tokens", capsys.readouterr().err)]
    assert len(tokens) == 2
    assert min(tokens) < 8 * 16, "no response has ended before the longest possible"
    results = json.loads(path.read_text())
    assert results["options"]["lengths"] == "natural"
    off, trl = results["rows"]
    assert trl["metrics"] == pytest.approx(off["metrics"], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_traces_of_every_iteration_stay(smoke: tuple[Mapping[str, Any], Path]) -> None:
    for variant in ("off", "both"):
        for step in (1, 2):
            trace = json.loads((smoke[1] / variant / "traces" / f"iteration-{step:05d}.json").read_text())
            assert {"generate", "infer", "train", "optimizer"} <= {event.get("cat") for event in trace["traceEvents"]}


@pytest.mark.slow
def test_earlier_results_are_printed(
    smoke: tuple[Mapping[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(smoke[0]))
    assert cli.main(["bench", "iteration", "--from-json", str(path), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| variant | samples/s | tokens/s | x off | x TRL |"
    assert lines[2].startswith("| off | ")
    assert smoke[0]["date"] in lines[-1]
    assert smoke[0]["machine"]["cpu"] in lines[-1]
    assert cli.main(["bench", "iteration", "--from-json", str(path)]) == 0
    output = capsys.readouterr().out
    assert "PPO iterations" in output
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "1"], "nothing to fuse"),
        (["--devices", "512"], "this machine has"),
        (["--batch", "0"], "--batch is 0: it must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--batch", "6", "--micro-batch", "4"], "so that their product divides it"),
        (["--batch", "8", "--micro-batch", "4", "--mini-batches", "4"], "4 mini-batches of micro-batches of 4 do not"),
        (["--prompts", "prompts.jsonl"], "add --model PATH"),
        (["--pad-token", "x"], "add --model PATH"),
        (["--prompt-column", "question"], "add --prompts"),
        (["--model", "/no/such/model"], "no model at /no/such/model"),
        (["--lengths", "/no/such/file.csv"], "No such file"),
        (["--json", "/no/such/directory/out.json"], "does not exist: create it first"),
        (["--from-json", "/no/such/out.json"], "No such file"),
        (["--variants", "all"], "invalid choice: 'all'"),
        (["--peer", "verl"], "invalid choice: 'verl'"),
    ],
)
def test_unusable_arguments_are_one_line_and_exit_2(
    options: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["bench", "iteration", *options])
    except SystemExit as error:
        status = int(error.code or 0)
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_another_json_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (("{", "is not JSON"), ('{"rows": []}', "holds no results of this benchmark")):
        path = tmp_path / "wrong.json"
        path.write_text(text)
        assert cli.main(["bench", "iteration", "--from-json", str(path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("found", ["1.13.0", None])
def test_without_the_right_trl_there_is_no_peer(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(iteration_trl, "version", version)
    with pytest.raises(ValueError, match=r"pip install trl==1\.12\.0"):
        iteration_trl.require_trl()


# The same tokens

ONE = Response((1, 2), (3, 4, 5))


def test_other_tokens_are_noticed() -> None:
    check_same_tokens("both", [ONE, ONE], [ONE, ONE])
    with pytest.raises(AssertionError, match=r"both generated .* than off: response 1 of a round, from position 2 "):
        check_same_tokens("both", [ONE, replace(ONE, response_ids=(3, 4, 6))], [ONE, ONE])
    with pytest.raises(AssertionError, match=r"from position 2 \(2 tokens, 3 there\)"):
        check_same_tokens("both", [replace(ONE, response_ids=(3, 4))], [ONE])
    with pytest.raises(AssertionError):
        check_same_tokens("both", [replace(ONE, prompt_ids=(1,))], [ONE])


class Fixed:
    """A variant that generates the same all the time."""

    def __init__(self, *responses: Response) -> None:
        self._responses = responses

    def turn(self, same: tuple[Response, ...] | None) -> Turn:
        return made_turn(1.0, self._responses)


def made_turn(seconds: float, responses: Sequence[Response], **options: Any) -> Turn:
    figures: dict[str, Any] = {
        "metrics": {"objective/entropy": 1.0, "objective/scores": 2.0},
        "phases": {"training": seconds},
        "idle_share": {"device0": 0.5},
        "outside_share": 0.1,
        "bubbles": {},
        "peak_bytes": {"driver": 7},
    }
    return Turn(seconds=seconds, responses=tuple(responses), **(figures | options))


def made_workload(**options: Any) -> iteration_workload.Workload:
    figures: dict[str, Any] = {"prompts": ((1, 2),) * 3, "lengths": (3, 3, 3), "batch": 1, "micro_batch": 1}
    figures["mini_batches"] = 1
    return iteration_workload.Workload(models=None, epochs=1, max_new_tokens=3, **(figures | options))  # type: ignore[arg-type]


def test_a_run_ends_at_the_first_other_token() -> None:
    rounds = iteration._Rounds(made_workload(), num_warmup=1)
    for name in ("off", "both"):
        for round_index in range(2):
            rounds.take(name, Fixed(ONE), round_index)
    assert {name: len(turns) for name, turns in rounds.turns.items()} == {"off": 1, "both": 1}
    with pytest.raises(AssertionError, match="trl generated other tokens"):
        rounds.take("trl", Fixed(replace(ONE, response_ids=(3, 4, 6))), 0)
    with pytest.raises(AssertionError, match="trl does not keep to the lengths"):
        rounds.take("trl", Fixed(replace(ONE, response_ids=(3, 4))), 1)


def test_natural_lengths_may_be_any_but_are_the_same_for_all() -> None:
    rounds = iteration._Rounds(made_workload(lengths=None), num_warmup=1)
    rounds.take("off", Fixed(replace(ONE, response_ids=(3,))), 0)
    rounds.take("off", Fixed(ONE), 1)
    with pytest.raises(AssertionError, match="both generated other tokens"):
        rounds.take("both", Fixed(ONE), 0)


# Rows


def test_ratios_are_those_of_turns_in_the_same_repeat() -> None:
    turns = {
        "off": [made_turn(seconds, [ONE]) for seconds in (4.0, 8.0, 6.0)],
        "both": [made_turn(seconds, [ONE], peak_bytes={"driver": 9}) for seconds in (2.0, 2.0, 6.0)],
    }
    row = row_of("both", turns)
    assert (row["ratio_to_serial"], row["ratio_to_serial_range"]) == (2.0, (1.0, 4.0))
    assert (row["ratio_to_trl"], row["ratio_to_trl_range"]) == (None, None)
    assert (row["seconds"], row["samples_per_s"], row["tokens_per_s"]) == (2.0, 0.5, 1.5)
    assert row["repeats"] == [2.0, 2.0, 6.0]
    assert row["peak_bytes"] == {"driver": 9}
    assert len(tables([row_of(name, turns) for name in turns])) == 2


def test_a_table_without_trl_has_no_column_for_it() -> None:
    rows = [row_of("off", {"off": [made_turn(1.0, [ONE])]})]
    options = dict.fromkeys(("devices", "batch", "epochs", "mini_batches", "micro_batch", "repeats"), 1)
    options |= {"model": None, "lengths": "a/mix.csv", "max_new_tokens": 3}
    results = {"rows": rows, "machine": {"cpu": "EPYC", "packages": {}}, "options": options, "date": "2026-01-01"}
    text = markdown(results)
    assert text.splitlines()[0] == "| variant | samples/s | tokens/s | x off |"
    assert "lengths: mix;" in text
    assert text.endswith("idle 50% of the time: filled completely, that would be 2.00 times as fast.")


def test_time_outside_is_where_nobody_computes() -> None:
    tracks = {
        "device0": {"generation": [Span("decode", "generate", 0, 4)], "model": [Span("export", "weights", 4, 6)]},
        "device1": {"generation": [], "model": [Span("reference", "infer", 3, 5), Span("step", "optimizer", 7, 8)]},
    }
    # Somebody computes in [0, 5] and [7, 8] of the 10 seconds; device 0 is at work in [0, 6], device 1 for 3 seconds.
    assert outside_share(tracks, 0, 10) == pytest.approx(0.4)
    assert idle_shares(tracks, 0, 10) == pytest.approx({"device0": 0.4, "device1": 0.7})


# Turns


def test_a_trainer_iterates_once_per_turn() -> None:
    turnstile, seen = Turnstile(), []
    with TrainingThread(turnstile, lambda: seen.extend([]) or consume(loader(turnstile, 5, str), seen)):
        assert seen == []
        turnstile.turn()
        assert seen == ["0"]
        turnstile.turn()
        assert seen == ["0", "1"]
        assert turnstile.start_s <= turnstile.end_s
    assert seen == ["0", "1"]


def consume(batches: Any, seen: list[str]) -> None:
    for batch in batches:
        seen.append(batch)


def test_what_a_trainer_raises_is_raised_by_its_turn() -> None:
    turnstile = Turnstile()

    def train() -> None:
        turnstile.wait()
        raise ValueError("no reward")

    with pytest.raises(ValueError, match="no reward"), TrainingThread(turnstile, train):
        turnstile.turn()


def test_a_trainer_that_cannot_start_is_reported_at_once() -> None:
    def train() -> None:
        raise ValueError("no stages")

    with pytest.raises(ValueError, match="no stages"), TrainingThread(Turnstile(), train):
        pytest.fail("it has not started")


def test_after_the_last_batch_the_loop_is_stopped() -> None:
    turnstile, seen = Turnstile(), []
    with TrainingThread(turnstile, lambda: consume(loader(turnstile, 1, str), seen)):
        turnstile.turn()
    assert seen == ["0"]
    assert not issubclass(Stopped, Exception)


# Options


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ([], None),
        (["--model", "smollm2"], "natural"),
        (["--model", "smollm2", "--lengths", "synthetic"], "synthetic"),
        (["--lengths", "natural"], "natural"),
    ],
)
def test_a_real_model_ends_its_responses_itself(
    options: Sequence[str], lengths: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def measure(arguments: argparse.Namespace) -> Any:
        seen.append(arguments.lengths)
        raise ValueError("nothing is measured")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(iteration, "_measure", measure)
    assert cli.main(["bench", "iteration", *options]) == 2
    assert seen == [lengths]


def test_help_names_every_option() -> None:
    parser = argparse.ArgumentParser()
    iteration.add_arguments(parser)
    for option in ("--model", "--prompts", "--lengths", "--peer", "--smoke", "--json", "--traces", "--from-json"):
        assert option in parser.format_help()
