"""PPOConfig: parsed like any TrainingArguments, refuses what cannot be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser
from trl.experimental.ppo import PPOConfig as OraclePPOConfig

from fuse import PPOConfig


def test_the_command_line_of_trl_scripts_parses() -> None:
    arguments = ["--learning_rate", "1e-4", "--stop_token", "eos", "--num_devices", "2", "--kl_estimator", "k3"]
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(arguments)
    assert (config.learning_rate, config.stop_token, config.num_devices) == (1e-4, "eos", 2)


def test_every_option_of_trl_exists_with_its_default(tmp_path: Path) -> None:
    ours, theirs = PPOConfig(output_dir=str(tmp_path)), OraclePPOConfig(output_dir=str(tmp_path), bf16=False)
    different = {
        name
        for name in theirs.__dataclass_fields__
        if not name.startswith("_") and getattr(ours, name) != getattr(theirs, name)
    }
    assert different <= {"gradient_checkpointing", "logging_dir"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to compute in bfloat16 on")
def test_bfloat16_on_a_cpu_needs_no_other_option(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = PPOConfig(output_dir=str(tmp_path), bf16=True)
    assert (config.bf16, config.accelerator) == (True, "cpu")
    slow = not any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    assert any("slower than float32" in message for message in caplog.messages) == slow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ppo_epochs": 0}, "num_ppo_epochs=0 must be at least 1"),
        ({"num_devices": 0}, "num_devices=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0 must not be negative"),
        ({"lam": 1.5}, "lam=1.5 must lie between 0 and 1"),
        ({"stop_token": "eos", "stop_token_id": 3}, "both set"),
        ({"stop_token": "stop"}, "stop_token='stop' is unknown"),
        ({"kl_estimator": "k2"}, "kl_estimator='k2' is unknown"),
        ({"engine": "sglang"}, "engine='sglang' is unknown"),
        ({"kv_transfer": "mooncake"}, "kv_transfer='mooncake' is unknown: use 'object_store' or 'nixl'"),
        ({"engine": "vllm", "generation_cache_bytes": 0}, "generation_cache_bytes=0 must be at least 1"),
        ({"generation_cache_bytes": 1 << 20}, "generation_cache_bytes=1048576 with engine='transformers'"),
        ({"reward_timeout_s": 0.0}, "reward_timeout_s=0.0 must be positive"),
        ({"reward_error_score": float("nan")}, "reward_error_score=nan is not a finite number"),
        ({"reward_workers": "thraed"}, "reward_workers='thraed' is unknown: use 'thread' or 'process'"),
        ({"trace_limit": -1}, "trace_limit=-1 must not be negative"),
        ({"fp16": True}, "fp16=True is not supported"),
        ({"kl_coef": float("nan")}, "kl_coef=nan is not a finite number"),
        ({"worker_timeout_s": float("inf")}, "worker_timeout_s=inf is not a finite number"),
        ({"response_length": 1 << 70}, "response_length has 22 digits: give a number that 64 bits hold"),
        ({"seed": -1}, "seed=-1 must be from 0 to 4294967295"),
        ({"optim": "sgd"}, "optim=.* is not supported: use adamw_torch"),
        ({"model_adapter_name": "adapter"}, "PEFT adapters are not supported"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    assert "\n" not in str(refusal.value)
