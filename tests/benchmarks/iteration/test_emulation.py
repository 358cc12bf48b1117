"""`fuse bench iteration --emulate`: whole iterations on emulated devices, through the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from fuse import cli
from fuse.benchmarks.emulated.cluster import EmulatedCluster
from fuse.benchmarks.emulated.h100 import costs_named
from fuse.benchmarks.iteration import emulation
from fuse.benchmarks.iteration.emulated_rows import emulated_sweep_table
from fuse.interstage.speculation import DRAFTS

from .test_command import FIELDS

_OPTIONS = ["--batch", "16", "--mini-batches", "1", "--micro-batch", "2", "--max-new-tokens", "12"]


def starts_ray(test: Any) -> Any:
    """Before others do: the cluster that tests share is born with torch."""
    return pytest.mark.own_ray(pytest.mark.processes(test))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Results of the second point of a sweep, three variants on four devices, a hundredth as long.

    Beside them those of both points, what was printed, and what processes had loaded.
    """
    directory = tmp_path_factory.mktemp("emulation")
    loaded = []

    class Watched(EmulatedCluster):
        def __exit__(self, *exception: object) -> None:
            process_ids = ray.get([started for _, started in self._processes.values()])
            loaded.extend(Path(f"/proc/{process_id}/maps").read_text() for process_id in process_ids)
            super().__exit__(*exception)

    costs, path, lengths = directory / "costs.json", directory / "out.json", directory / "mix.csv"
    lengths.write_text("output_tokens\n" + "\n".join(str(1 + index % 7 * 9) for index in range(64)))
    costs.write_text(json.dumps(asdict(costs_named("h100-33b"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulation, "EmulatedCluster", Watched)
        argv = [*_OPTIONS, "--emulate", "4", "--costs", str(costs), "--variants", "both", "--tail-training"]
        argv += ["--sweep", "speculation=off,int8", f"lengths={lengths}", "time-scale=0.2"]
        assert cli.main(["bench", "iteration", *argv, "--warmup", "2", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    return {**results, **results["points"][1], "loaded": loaded}


@starts_ray
def test_rows_say_that_they_are_emulated(emulated: Mapping[str, Any]) -> None:
    off, both, tail = emulated["rows"]
    assert (off["variant"], both["variant"], tail["variant"]) == ("off", "both", "tail")
    for row in (off, both, tail):
        assert row.keys() >= FIELDS | {"simulated_seconds", "simulated_ratio", "gain_share"}
        assert row["emulated"] is True
        assert 0 < row["simulated_seconds"] < row["seconds"], "the driver takes no time"
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"], rel=0.01)
        assert row["idle_share"].keys() == {f"device{index}" for index in range(4)}
    assert both["simulated_ratio"] == off["simulated_seconds"] / both["simulated_seconds"] > 1
    assert both["bubbles"]["planned"] < both["bubbles"]["serial"]
    assert tail["metrics"]["tail/first_step_share"] >= 0
    assert "tail/first_step_share" not in both["metrics"]
    assert emulated["options"]["emulate"] == 4
    assert emulated["options"]["time_scale"] == 0.2
    assert emulated["costs"] == asdict(replace(costs_named("h100-33b"), speculation=DRAFTS["int8"]))


@starts_ray
def test_points_of_a_sweep_say_what_they_are_and_drafts_make_them_shorter(emulated: Mapping[str, Any]) -> None:
    plain, drafted = emulated["points"]
    assert [point["settings"]["speculation"] for point in (plain, drafted)] == ["off", "int8"]
    assert plain["costs"] == asdict(costs_named("h100-33b"))
    assert plain["rows"][0]["simulated_phases"]["rollout"] > drafted["rows"][0]["simulated_phases"]["rollout"]
    cells = [list(map(str, column.cells)) for column in emulated_sweep_table(emulated["points"]).columns]
    assert cells[:4] == [["off", "off", "int8", "int8"], ["mix"] * 4, ["0.2"] * 4, ["both", "tail"] * 2]


@starts_ray
def test_processes_of_emulated_devices_have_not_loaded_torch(emulated: Mapping[str, Any]) -> None:
    assert len(emulated["loaded"]) == 2 * 4
    for maps in emulated["loaded"]:
        assert "libtorch" not in maps
        assert "_raylet" in maps


@starts_ray
def test_results_are_printed_again(
    emulated: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps({name: value for name, value in emulated.items() if name != "loaded"}))
    assert cli.main(["bench", "iteration", "--from-json", str(path)]) == 0
    assert "Emulated iterations" in capsys.readouterr().out
    assert cli.main(["bench", "iteration", "--from-json", str(path), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| variant | emulated s | simulated s | x off | simulated | of its gain |"
    assert lines[-1].startswith("Emulated, ")
    assert "4 devices" in lines[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--costs", "h100-33b"], "--costs is of emulated devices: add --emulate N"),
        (["--time-scale", "1"], "--time-scale is of emulated devices: add --emulate N"),
        (["--speculation", "int8"], "--speculation is of emulated devices: add --emulate N"),
        (["--emulate", "8", "--acceptance", "0.9"], "--acceptance says what drafts are like: give --speculation"),
        (["--tail-training"], "--tail-training is of emulated devices: add --emulate N"),
        (["--emulate", "8", "--tail-training"], "--tail-training with --mini-batches 8"),
        (["--emulate", "1"], "--emulate is 1: give 2 to 64 devices"),
        (["--emulate", "8", "--costs", "h100-7b"], "--costs h100-7b is neither a file nor one of h100-33b"),
        (["--emulate", "8", "--time-scale", "0"], "--time-scale is 0.0: give a number above 0"),
        (["--emulate", "8", "--lengths", "natural"], "emulated devices know no tokens"),
        (["--emulate", "8", "--peer", "trl"], "--peer means nothing to emulated devices"),
        (["--emulate", "8", "--devices", "2"], "--devices means nothing to emulated devices"),
        (["--emulate", "8", "--algorithm", "grpo"], "--algorithm means nothing to emulated devices"),
        (["--emulate", "8", "--batch", "500"], "so that their product divides it"),
        (["--emulate", "8", "--micro-batch", "64"], "a mini-batch of 1 micro-batch fills no pipeline"),
        (["--emulate", "8", "--lengths", "/no/such/file.csv"], "No such file"),
    ],
)
def test_unusable_arguments_are_one_line_and_exit_2(
    options: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "iteration", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
