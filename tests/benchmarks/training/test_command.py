"""`fuse bench training` writes one complete row per setting, emulated or not, and refuses what it cannot measure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fuse.benchmarks.training import command, steps, tables, world
from fuse.intrastage.cost_profile import Profile, profile_from_json
from fuse.intrastage.planned_times import planned_times

from ...worker_pool import WorkerPool

INSTANCE = {
    "name": "tiny",
    "actor_stages": 2,
    "critic_stages": 1,
    "actor_microbatches": 2,
    "critic_microbatches": 2,
    "actor_forward": 2,
    "critic_forward": 1,
}

KEYS = {
    "setting", "actor_layers", "critic_layers", "lengths", "num_micro_batches", "num_trained", "critic_epochs",
    "micro_batch_tokens", "padding", "serial_ms", "fused_ms", "ratio", "predicted_ratio", "gain_share", "bubble_serial",
    "bubble_fused", "bubble_planned", "overhead_share", "why", "serial", "fused",
}  # fmt: skip
SIDE_KEYS = {
    "step_ms", "setup_ms", "executed_ms", "optimizer_ms", "planned_ms", "bubble_planned", "bubble_executed", "slowdown",
    "overhead_share", "transfer_share", "contention_ms", "imbalance_ms", "overhead_ms", "transfer_ms",
}  # fmt: skip
EMULATED_KEYS = {
    "setting", "emulated", "num_ranks", "num_micro_batches", "tick_ms", "makespan_ticks", "makespan_lower_bound_ticks",
    "serial_planned_ms", "planned_ms", "executed_ms", "beyond_plan", "bubble_planned", "bubble_executed", "slowdown",
    "overhead_share", "transfer_share",
}  # fmt: skip


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(options))


def as_all_contend(schedule: Any, together: Profile, alone: Profile, *rest: Any) -> Any:
    """In place of `contended_times`, so that what is planned does not depend on how noisy the two measurements are."""
    assert [(one.pipeline, one.stage, one.shape) for one in alone.stages] == [
        (one.pipeline, one.stage, one.shape) for one in together.stages
    ]
    return planned_times(schedule, together, *rest)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, worker_pool: WorkerPool) -> dict[str, Any]:
    """One run on two devices; its mixed lengths are packed into micro-batches of equal size."""
    directory = tmp_path_factory.mktemp("training")
    lengths, out = directory / "chat.csv", directory / "out.json"
    lengths.write_text("prompt_tokens,output_tokens\n" + "".join(f"7,{length}\n" for length in (10, 2, 4, 8, 100)))
    sizes = ["--sizes", "2:1", "--micro-batches", "2", "--tokens", "16", "--hidden", "16", "--repeats", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "Cluster", worker_pool)
        patch.setattr(steps, "contended_times", as_all_contend)
        sizes += ["--drawn-number", "--solve-seconds", "0.5"]
        assert run(*sizes, "--lengths", str(lengths), "--json", str(out)) == 0
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def test_writes_a_row_per_setting(trained: dict[str, Any]) -> None:
    uniform, mixed = trained["rows"]
    assert (uniform["setting"], mixed["setting"]) == ("2:1 uniform 2", "2:1 mixed 2")
    for row in (uniform, mixed):
        assert row.keys() == KEYS
        assert row["serial"].keys() == row["fused"].keys() == SIDE_KEYS
        assert (row["actor_layers"], row["critic_layers"], row["num_micro_batches"]) == (4, 2, 2)
        assert row["num_trained"] == {"serial": 2, "fused": 2}
        assert row["ratio"] == pytest.approx(row["serial_ms"] / row["fused_ms"])
        assert 0 < row["bubble_planned"] < 1
        assert 0 < row["serial"]["bubble_planned"] < 1
        assert 0 < row["overhead_share"] < 1
        if row["gain_share"] < 0.9:
            assert "ms more than serial steps lose" in row["why"]
    # Equal micro-batches leave bubbles that the other model fills, whatever was measured; unequal ones may not.
    assert uniform["bubble_planned"] < uniform["serial"]["bubble_planned"]
    assert uniform["predicted_ratio"] > 1
    assert uniform["gain_share"] == pytest.approx((uniform["ratio"] - 1) / (uniform["predicted_ratio"] - 1))
    assert uniform["micro_batch_tokens"] == [16, 16]
    # 10, 2 and 4, 8 responses become 7, 1 and 3, 5: the longest are 6 on average, after prompts of 2.
    assert mixed["micro_batch_tokens"] == [12, 12]  # 3 and 9, and 5 and 7
    assert (uniform["padding"], mixed["padding"]) == (1.0, 1.0)


def test_compares_opposite_replicas_with_plain_1f1b(
    tmp_path: Path, worker_pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world, "Cluster", worker_pool)
    out = tmp_path / "out.json"
    sizes = ["--micro-batches", "3", "--tokens", "16", "--hidden", "16", "--repeats", "1", "--solve-seconds", "0.5"]
    assert run("--bidirectional", *sizes, "--json", str(out)) == 0
    results = json.loads(out.read_text())
    uniform, mixed = results["rows"]
    assert (uniform["setting"], mixed["setting"]) == ("both ways uniform 3", "both ways mixed 3")
    for row in (uniform, mixed):
        assert row.keys() == KEYS
        assert (row["actor_layers"], row["critic_layers"], row["num_micro_batches"]) == (4, 0, 3)
        plain, both = row["serial"], row["fused"]
        assert plain.keys() == both.keys() == SIDE_KEYS
        plain_ms, both_ms = (one["planned_ms"] + one["setup_ms"] + one["optimizer_ms"] for one in (plain, both))
        assert row["predicted_ratio"] == pytest.approx(plain_ms / both_ms)
    assert results["options"]["bidirectional"] is True
    of_plain, of_both = (profile_from_json(results["profiles"][name]) for name in ("plain", "both ways"))
    assert {one.pipeline for one in of_plain.stages} == {"actor.0"}
    assert {one.pipeline for one in of_both.stages} == {"actor.0", "actor.1"}
    assert "two opposite replicas (fused)" in capsys.readouterr().out


def test_compares_scoring_within_a_step_with_scoring_first(
    tmp_path: Path, worker_pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world, "Cluster", worker_pool)
    out = tmp_path / "out.json"
    sizes = ["--micro-batches", "3", "--tokens", "16", "--hidden", "16", "--repeats", "1", "--solve-seconds", "0.5"]
    assert run("--forward-only", *sizes, "--json", str(out)) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["setting"] for row in rows] == ["within uniform 3", "within mixed 3"]
    for row in rows:
        assert row.keys() == KEYS
        assert row["serial"].keys() == row["fused"].keys() == SIDE_KEYS
        assert (row["actor_layers"], row["critic_layers"], row["num_micro_batches"]) == (4, 0, 3)
    assert rows[0]["predicted_ratio"] > 1, "scoring first drains its pipelines"
    assert "scoring within (fused)" in capsys.readouterr().out


def test_a_critic_takes_more_steps_than_the_actor_and_both_in_the_planners_micro_batches(
    tmp_path: Path, pooled_workers: None, worker_pool: WorkerPool
) -> None:
    out = tmp_path / "out.json"
    asked: list[Any] = []

    def twice(works: Any, *_: Any, **options: Any) -> float:
        asked.append((len(works(2.0)), options))
        return 2.0

    sizes = ["--sizes", "1:1", "--micro-batches", "4", "--tokens", "16", "--hidden", "16", "--repeats", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "Cluster", worker_pool)
        patch.setattr(steps, "contended_times", as_all_contend)
        patch.setattr(steps, "soonest", twice)
        assert run(*sizes, "--solve-seconds", "0.5", "--critic-epochs", "2", "--json", str(out)) == 0
    results = json.loads(out.read_text())
    uniform, _ = results["rows"]
    assert uniform["num_trained"] == {"serial": 8, "fused": 8}
    assert uniform["micro_batch_tokens"] == [8] * 8
    assert [number for number, _ in asked] == [2] * 4, "rounds of each side, in both settings"
    assert all(options["gap_s"] > 0 and options["least_tokens"] == 3 for _, options in asked)
    assert (uniform["setting"], uniform["critic_epochs"]) == ("1:1 uniform 4 x2", 2)
    assert uniform.keys() == KEYS
    assert uniform["serial"].keys() == uniform["fused"].keys() == SIDE_KEYS
    # Serial steps drain three pipelines one after the other; fused ones fill the critic's with the actor's.
    assert uniform["bubble_planned"] < uniform["serial"]["bubble_planned"]
    assert uniform["predicted_ratio"] > 1
    assert results["options"]["critic_epochs"] == 2


def test_writes_profiles_of_every_shape(trained: dict[str, Any]) -> None:
    profile = profile_from_json(trained["profiles"]["2:1"])
    assert {cost.shape.num_tokens for cost in profile.stages} == {8, 12}
    assert {(cost.pipeline, cost.stage) for cost in profile.stages} == {
        (f"{model}.0", stage) for model in ("actor", "critic") for stage in range(2)
    }
    assert all(cost.input_grad_ticks for cost in profile.stages)
    console = Console(record=True, width=100)
    console.print(tables.profile_table("2:1", profile))
    text = console.export_text()
    assert "actor.0 stage 1" in text
    assert "1 x 12" in text


def test_writes_what_the_figures_depend_on(trained: dict[str, Any]) -> None:
    assert trained["machine"]["num_cores"] >= 2
    assert trained["options"]["tokens"] == 16


@pytest.mark.parametrize("with_file", [True, False])
def test_emulates_schedules_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], with_file: bool) -> None:
    instances, out = tmp_path / "instances.json", tmp_path / "out.json"
    other = {**INSTANCE, "name": "other", "actor_stages": 4}
    instances.write_text(json.dumps({"instances": [INSTANCE, other]}))
    options = ["--instances", str(instances)] if with_file else []
    assert run("--emulate", "2", *options, "--operation-ms", "20", "--solve-seconds", "1", "--json", str(out)) == 0
    results = json.loads(out.read_text())
    assert results["emulated"] is True
    (row,) = results["rows"]
    assert row.keys() == EMULATED_KEYS
    assert row["emulated"] is True
    assert row["setting"] == ("emulated tiny" if with_file else "emulated 2 ranks")
    assert row["planned_ms"] == pytest.approx(row["makespan_ticks"] * row["tick_ms"])
    assert row["planned_ms"] < row["serial_planned_ms"]
    # Waits are shorter by what others were found to be too long: on a busy machine, milliseconds.
    assert row["executed_ms"] > 0.5 * row["planned_ms"]
    assert results["options"]["repeats"] == 1
    assert row["beyond_plan"] == pytest.approx(row["executed_ms"] / row["planned_ms"] - 1)
    assert "emulated" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--devices", "1"], "--devices is 1: fused schedules need at least 2"),
        (["--repeats", "0"], "--repeats is 0: it must be at least 1"),
        (["--micro-batches", "2", "0"], "--micro-batches is 0"),
        (["--tokens", "6"], "--tokens is 6 for 2 sequences"),
        (["--hidden", "20"], "--hidden is 20: choose a multiple of 16"),
        (["--solve-seconds", "0"], "must be positive"),
        (["--instances", "x.json"], "add --emulate N"),
        (["--emulate", "2", "--profile-only"], "choose one of them"),
        (["--emulate", "1"], "--emulate is 1"),
        (["--bidirectional", "--emulate", "2"], "leave out --emulate"),
        (["--bidirectional", "--micro-batches", "1"], "at least 2 --micro-batches"),
        (["--bidirectional", "--sizes", "1:1"], "leave one of them out"),
        (["--forward-only", "--sizes", "1:1"], "--forward-only trains no critic"),
        (["--forward-only", "--bidirectional"], "--forward-only trains one pipeline for real"),
        (["--critic-epochs", "0"], "--critic-epochs is 0"),
        (["--emulate", "2", "--as-drawn"], "--as-drawn is of real training"),
        (["--emulate", "2", "--critic-epochs", "2"], "--critic-epochs is of real training"),
        (["--emulate", "8", "--instances", "{file}"], r"has no instance of 8 ranks: choose --emulate from \[2\]"),
        (["--lengths", "{short}"], "has 1 rows, and 16 responses are needed"),
        (["--lengths", "{file}"], "has no column output_tokens"),
        (
            ["--lengths", "{csv}", "--micro-batches", "1", "--sequences", "2"],
            "line 3: output_tokens is 'long', not a whole number",
        ),
        (["--emulate", "2", "--instances", "{csv}"], "lengths.csv is not JSON"),
        (
            ["--emulate", "2", "--instances", "{other}"],
            "each with name, actor_stages",
        ),
    ],
)
def test_refuses(tmp_path: Path, options: list[str], reason: str) -> None:
    instances, lengths = tmp_path / "instances.json", tmp_path / "lengths.csv"
    instances.write_text(json.dumps({"instances": [INSTANCE]}))
    lengths.write_text("output_tokens\n3\nlong\n")
    short, other = tmp_path / "short.csv", tmp_path / "other.json"
    short.write_text("output_tokens\n3\n")
    other.write_text(json.dumps({"instances": [{"name": "tiny"}]}))
    with pytest.raises(ValueError, match=reason):
        run(*(option.format(file=instances, csv=lengths, short=short, other=other) for option in options))
