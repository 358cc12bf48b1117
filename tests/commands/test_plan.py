"""`fuse plan`: its table and figures, and the one line it answers bad input with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fuse.cli import main
from fuse.driver.memory import RESERVE_SHARE

from ..tiny_models import config

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 4096}
KEYS = {
    *("fits", "spare_bytes", "peak_bytes", "fused_peak_bytes", "serial_peak_bytes"),
    *("max_response_length", "max_micro_batch_size"),
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The path of a configuration, without weights."""
    config("llama", **SMALL, max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def plan(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "plan.json"
    assert main(["plan", "--num-devices", "2", *arguments, "--json", str(out)]) == 0
    figures: dict[str, Any] = json.loads(out.read_text())
    assert set(figures) >= KEYS
    assert set(figures["peak_bytes"]) == {"generation", "inference", "training"}
    return figures


def test_prints_the_fullest_device(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    figures = plan(tmp_path, "--model", model, "--device-memory-gb", "8")
    printed = capsys.readouterr().out
    for row in ("critic: gradients", "reference: scoring copy", "engine: KV cache", "training, serial / fused"):
        assert row in printed
    assert figures["fits"] is True
    assert f"fits: {figures['spare_bytes'] / 1e9:.1f} GB of 8 to spare" in printed
    assert figures["spare_bytes"] == 8 * 10**9 - max(figures["peak_bytes"].values())
    assert f"responses of {figures['max_response_length']} tokens" in printed
    assert f"micro-batches of {figures['max_micro_batch_size']}" in printed


def test_the_largest_that_fit_fit_and_no_larger_ones(tmp_path: Path, model: str) -> None:
    arguments = ("--model", model, "--device-memory-gb", "5", "--no-bf16")
    figures = plan(tmp_path, *arguments)
    most = figures["max_micro_batch_size"]
    assert 1 < most < 1 << 12
    assert plan(tmp_path, *arguments, "--micro-batch-size", str(most))["fits"]
    assert not plan(tmp_path, *arguments, "--micro-batch-size", str(most + 1))["fits"]
    longest = plan(tmp_path, *arguments, "--micro-batch-size", str(most))["max_response_length"]
    longer = ("--micro-batch-size", str(most), "--response-length", str(longest + 1))
    assert 512 <= longest < 4096 - 512
    assert not plan(tmp_path, *arguments, *longer)["fits"]


def test_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    figures = plan(tmp_path, "--model", model, "--device-memory-gb", "1")
    assert figures["fits"] is False
    assert figures["spare_bytes"] < 0
    assert figures["max_response_length"] == figures["max_micro_batch_size"] == 0
    assert "does not fit" in capsys.readouterr().out


def test_roles_are_left_out_and_scoring_is_chosen(tmp_path: Path, model: str) -> None:
    without = ("--critic-model", "none", "--reward-model", "none", "--ref-model", "none")
    figures = plan(tmp_path, "--model", model, "--device-memory-gb", "8", *without)
    assert set(figures["parameters"]) == {"actor"}
    roomy = plan(tmp_path, "--model", "qwen2.5-1.5b", "--device-memory-gb", "80", "--scoring", "auto")
    assert roomy["scoring"] == "whole"
    tight = plan(tmp_path, "--model", "qwen2.5-1.5b", "--device-memory-gb", "40", "--scoring", "auto", "--sleep")
    assert tight["scoring"] == "sharded"
    assert tight["peak_bytes"]["training"] < roomy["peak_bytes"]["training"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "absent/of/no/hub"], "no model at absent/of/no/hub"),
        (["--model", "MODEL", "--num-devices", "0"], "--num-devices is 0: it must be at least 1"),
        (["--model", "MODEL", "--device-memory-gb", "-1"], "--device-memory-gb is -1: give a device's memory"),
        (["--model", "MODEL", "--tensor-parallel-size", "3"], "--tensor-parallel-size=3 does not divide"),
        (["--model", "MODEL", "--actor-stages", "3"], "actor_stages=3 neither divides"),
        (["--model", "MODEL", "--response-length", "4096"], "more than the model's 4096 positions"),
        (["--model", "qwen2.5-7b", "--ref-model", "MODEL"], "vocabulary mismatch"),
        (["--model", "MODEL", "--scoring", "some"], "invalid choice"),
        (["--model", "MODEL", "--generation-tensor-parallel-size", "2"], "whose matrices are whole: add --engine=vllm"),
        (
            ["--model", "MODEL", "--engine", "vllm", "--generation-tensor-parallel-size", "3"],
            "--generation-tensor-parallel-size=3 does not divide --num-devices=4",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], model: str) -> None:
    given = [model if argument == "MODEL" else argument for argument in arguments]
    try:
        status = main(["plan", "--num-devices", "4", "--device-memory-gb", "8", *given])
    except SystemExit as error:
        status = int(error.code or 0)
    error_output = capsys.readouterr().err
    assert status == 2
    assert line in error_output
    assert error_output.count("\n") == 1


def test_devices_that_share_an_engine_have_room(tmp_path: Path, model: str) -> None:
    arguments = ("--model", model, "--device-memory-gb", "8", "--engine", "vllm", "--generation-tensor-parallel-size")
    alone, shared = (plan(tmp_path, *arguments, size)["devices"][0] for size in "12")
    (one,), (other,) = (
        [entry["bytes"]["generation"] for entry in device if (entry["role"], entry["what"]) == ("engine", "weights")]
        for device in (alone, shared)
    )
    assert one == 2 * other


def test_two_opposite_replicas_are_counted_where_they_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    """Without a critic, and unless one pipeline is asked for."""
    arguments = ("--model", model, "--critic-model", "none", "--device-memory-gb")
    both = plan(tmp_path, *arguments, "8")
    assert "two opposite replicas of the policy" in capsys.readouterr().out
    plain = plan(tmp_path, *arguments, "8", "--no-bidirectional")
    assert "two opposite replicas" not in capsys.readouterr().out
    assert (both["bidirectional"], plain["bidirectional"]) == (True, False)
    peaks = [max(one["peak_bytes"].values()) for one in (both, plain)]
    assert peaks[0] > peaks[1]
    between = (sum(peaks) / 2e9 - RESERVE_SHARE * 8) / (1 - RESERVE_SHARE)
    assert not plan(tmp_path, *arguments, str(between))["bidirectional"]
    forced = plan(tmp_path, *arguments, str(between), "--bidirectional")
    assert (forced["bidirectional"], forced["fits"]) == (True, False)


def test_a_critic_leaves_no_place_for_opposite_replicas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert not plan(tmp_path, "--model", model, "--device-memory-gb", "8")["bidirectional"]
    arguments = ["plan", "--num-devices", "2", "--model", model, "--device-memory-gb", "8", "--bidirectional"]
    assert main(arguments) == 2
    assert "--bidirectional needs --critic-model none" in capsys.readouterr().err
    assert main([*arguments, "--critic-model", "none", "--actor-stages", "1"]) == 2


def test_stages_are_cut_by_size_where_even_ones_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With 15 MB less than even ones need."""
    sizes = {"hidden_size": 128, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 1 << 16}
    config("llama", **sizes, max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    arguments = ("--model", str(tmp_path / "model"), "--ref-model", "none", "--reward-model", "none")
    even = plan(tmp_path, *arguments, "--scoring", "whole", "--device-memory-gb", "8")
    assert even["layers"] == {"actor": [4, 4], "critic": [4, 4]}
    assert "by size" not in capsys.readouterr().out
    needed = max(even["peak_bytes"]["inference"], even["serial_peak_bytes"]) - RESERVE_SHARE * 8e9
    most = f"{(needed - 15e6) / (1 - RESERVE_SHARE) / 1e9}"
    figures = plan(tmp_path, *arguments, "--scoring", "whole", "--device-memory-gb", most)
    assert figures["fits"]
    assert figures["layers"] != even["layers"]
    assert f"by size, for even ones do not fit; layers of each: actor {figures['layers']['actor'][0]} " in (
        capsys.readouterr().out
    )


def test_an_average_and_text_beside_samples_are_counted(tmp_path: Path, model: str) -> None:
    def on_first(figures: dict[str, Any], what: str) -> list[int]:
        """Of the policy or of training, by phase."""
        rows = [
            row for row in figures["devices"][0] if (row["role"], row["what"]) in (("actor", what), ("training", what))
        ]
        return [row["bytes"][phase] for row in rows for phase in sorted(row["bytes"])]

    arguments = ("--model", model, "--device-memory-gb", "8")
    plain, averaged = plan(tmp_path, *arguments), plan(tmp_path, *arguments, "--ema")
    assert [2 * one for one in on_first(averaged, "moments")] == [3 * one for one in on_first(plain, "moments")]
    assert averaged["host_bytes"] == plain["host_bytes"] + 2 * plain["parameters"]["actor"], "the driver's, in bfloat16"
    as_long = plan(tmp_path, *arguments, "--auxiliary-max-length", "1024")
    assert as_long == plain, "no longer than the longest sample"
    longer = plan(tmp_path, *arguments, "--auxiliary-max-length", "2048")
    more = plan(tmp_path, *arguments, "--auxiliary-max-length", "256", "--auxiliary-micro-batch-tokens", "2048")
    for text in (longer, more):
        assert on_first(text, "activations") > [1.5 * one for one in on_first(plain, "activations")]
    assert main(["plan", "--num-devices", "2", *arguments, "--auxiliary-micro-batch-tokens", "9"]) == 2
