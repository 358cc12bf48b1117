"""`fuse bench iteration`: a real run through the command line, the tokens it compares, and what it refuses."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fuse import cli
from fuse.benchmarks.iteration import command, rounds

from ...worker_pool import WorkerPool

FIELDS = {"variant", "samples_per_s", "tokens_per_s", "ratio_to_serial", "ratio_to_trl", "phases", "idle_share"} | {
    "peak_bytes", "outside_share", "bubbles", "tokens_per_s_per_device", "phase_rates", "exposed_s", "training_mfu"
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, worker_pool: WorkerPool) -> tuple[Mapping[str, Any], Path]:
    """Results of a run of two variants, side by side, with TRL beside them, and where its traces are."""
    directory = tmp_path_factory.mktemp("iteration")
    path, traces = directory / "out.json", directory / "traces"
    argv = ["bench", "iteration", "--smoke", "--peer", "trl", "--json", str(path), "--traces", str(traces)]
    num_cpus: list[int] = []
    with worker_pool.in_use(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rounds, "local_cluster", lambda number, _: nullcontext(num_cpus.append(number))
        )  # the pool has one
        assert cli.main(argv) == 0
    assert num_cpus == [2 * 3], "of two devices for each"
    return json.loads(path.read_text()), traces


@pytest.mark.slow
def test_rows_hold_what_they_promise(smoke: tuple[Mapping[str, Any], Path]) -> None:
    results, _ = smoke
    assert results["machine"]["num_cores"] >= 2
    assert results["options"]["devices"] == 2
    assert isinstance(results["commit"], str | None)
    assert results["configuration"]["command"]["micro_batch"] == 2
    trainers = results["configuration"]["trainers"]
    assert [trainers[name]["intra_stage_fusion"] for name in ("off", "both")] == [False, True]
    assert trainers["off"]["num_ppo_epochs"] == 1
    off, both, trl = results["rows"]
    assert (off["variant"], both["variant"], trl["variant"]) == ("off", "both", "trl")
    for row in (off, both, trl):
        assert row.keys() >= FIELDS
        assert row["samples_per_s"] == pytest.approx(8 / row["seconds"])
        assert row["ratio_to_serial"] == pytest.approx(off["seconds"] / row["seconds"])
        assert row["ratio_to_trl"] == pytest.approx(trl["seconds"] / row["seconds"])
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"], rel=0.01)
        assert all(size > 50e6 for size in row["peak_bytes"].values())
        assert row["exposed_s"].keys() >= {"generation", "training", "inference"}
        assert sum(row["exposed_s"].values()) <= row["seconds"] * 1.01
        assert 0 < row["training_mfu"] < 1
        assert row["phase_rates"]["training"] > 0
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
def test_groups_of_responses_beside_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooled_workers: None) -> None:
    monkeypatch.setattr(rounds, "local_cluster", lambda *_: nullcontext())  # the pool has one
    path = tmp_path / "out.json"
    options = ["--algorithm", "grpo", "--num-generations", "4", "--smoke", "--peer", "trl", "--json", str(path)]
    assert cli.main(["bench", "iteration", *options]) == 0
    off, both, trl = json.loads(path.read_text())["rows"]
    assert (off["variant"], both["variant"], trl["variant"]) == ("off", "both", "trl")
    assert off["metrics"].keys() == {"entropy", "reward", "kl"}
    for row in (both, trl):
        same = {name: row["metrics"][name] for name in off["metrics"]}
        assert same == pytest.approx(off["metrics"], rel=1e-4, abs=1e-6)
    assert trl["phases"].keys() == {"generation", "inference", "training"}


@pytest.mark.slow
def test_responses_end_where_the_model_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pooled_workers: None
) -> None:
    monkeypatch.setattr(rounds, "local_cluster", lambda *_: nullcontext())
    monkeypatch.setitem(command._SMOKE, "variants", ["off"])
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
    assert "proves nothing about speed" in " ".join(output.split())
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.slow
def test_a_loss_since_an_earlier_run_fails(
    smoke: tuple[Mapping[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now, better = tmp_path / "now.json", tmp_path / "better.json"
    now.write_text(json.dumps(smoke[0]))
    assert cli.main(["bench", "iteration", "--from-json", str(now), "--compare", str(now)]) == 0
    rows = [
        row | {"samples_per_s": 2 * row["samples_per_s"], "samples_per_s_range": [2 * row["samples_per_s"]] * 2}
        for row in smoke[0]["rows"]
    ]
    better.write_text(json.dumps(smoke[0] | {"rows": rows}))
    capsys.readouterr()
    assert cli.main(["bench", "iteration", "--from-json", str(now), "--compare", str(better)]) == 1
    assert "-50% (too much)" in capsys.readouterr().out


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
    monkeypatch.setattr(rounds, "measure", measure)
    assert cli.main(["bench", "iteration", *options]) == 2
    assert seen == [lengths]


def test_help_names_every_option() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for option in (
        "--model",
        "--prompts",
        "--lengths",
        "--peer",
        "--smoke",
        "--json",
        "--traces",
        "--from-json",
        "--sweep",
        "--compare",
    ):
        assert option in parser.format_help()
    assert "it proves nothing about speed" in " ".join(parser.format_help().split())
