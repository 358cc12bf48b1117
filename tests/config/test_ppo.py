"""PPOConfig: parsed like any TrainingArguments, refuses what cannot be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser
from trl.experimental.ppo import PPOConfig as OraclePPOConfig

from fuse import PPOConfig
from fuse.algorithms.kl_control import KLControl
from fuse.trainers.ppo import divisions


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


def test_the_output_dir_is_that_of_the_directory_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert PPOConfig(output_dir="out").output_dir == str(tmp_path / "out")


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
        ({"generation_tensor_parallel_size": 0}, "generation_tensor_parallel_size=0 must be at least 1"),
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
        ({"generation_cuda_graphs": True}, "generation_cuda_graphs=True with engine='transformers' on cpu: it is of"),
        (
            {"speculation": "int8", "engine": "vllm"},
            "speculation='int8' with engine='vllm', whose own drafts would change",
        ),
        ({"speculation": "int8", "engine": "replay"}, "engine='replay' is unknown: use 'transformers' or 'vllm'"),
        ({"speculation": "int3"}, "speculation='int3' is unknown: use 'auto', 'off', 'int8', 'int4' or 'ngram'"),
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
        ({"critic_learning_rate": -1e-5}, "critic_learning_rate=-1e-05 must not be negative"),
        ({"critic_ppo_epochs": 0}, "critic_ppo_epochs=0 must be at least 1"),
        ({"critic_num_mini_batches": 0}, "critic_num_mini_batches=0 must be at least 1"),
        ({"critic_warmup_updates": -1}, "critic_warmup_updates=-1 must not be negative"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must lie between 0 and 1, both excluded"),
        ({"ema_decay": 0.0}, "ema_decay=0.0 must lie between 0 and 1, .*at 0 the average is the policy"),
        ({"reward_baseline": "critic"}, "reward_baseline='critic' is unknown: use 'none' or 'reference'"),
        ({"reward_clip_range": (1.0, 1.0)}, "reward_clip_range=1.0 1.0 is empty"),
        ({"reward_clip_range": [1.0]}, "reward_clip_range=1.0 is .* no range: give a smaller and a larger number"),
        ({"cliprange_value": 0.0}, "cliprange_value=0.0 must be positive"),
        ({"loss_normalization": "sequence"}, "loss_normalization='sequence' is unknown: use 'micro_batch' or 'token'"),
        ({"kl_target": 3.0}, "kl_target=3.0 without adaptive_kl, .*: set adaptive_kl=True"),
        ({"kl_horizon": 100}, "kl_horizon=100 without adaptive_kl"),
        ({"adaptive_kl": True, "kl_target": 0.0}, "kl_target=0.0 must be positive"),
        ({"adaptive_kl": True, "kl_coef": 0.0}, "kl_coef=0 with adaptive_kl=True stays 0"),
        (
            {"adaptive_kl": True, "kl_horizon": 1, "per_device_train_batch_size": 5},
            "kl_horizon=1 with updates of 5 samples could turn kl_coef negative: choose more than 1",
        ),
        ({"trl_quirks": True, "critic_ppo_epochs": 2}, "trl_quirks=True with critic_ppo_epochs=2"),
        ({"trl_quirks": True, "critic_num_mini_batches": 2}, "trl_quirks=True with critic_num_mini_batches=2"),
        ({"trl_quirks": True, "critic_warmup_updates": 2}, "trl_quirks=True with critic_warmup_updates=2"),
        ({"trl_quirks": True, "loss_normalization": "token"}, "trl_quirks=True with loss_normalization='token'"),
        ({"trl_quirks": True, "regroup_micro_batches": True}, "trl_quirks=True with regroup_micro_batches=True"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    assert "\n" not in str(refusal.value)


def test_micro_batches_are_regrouped_but_where_trl_is_reproduced(tmp_path: Path) -> None:
    def regroups(**options: Any) -> bool:
        return PPOConfig(output_dir=str(tmp_path), use_cpu=True, **options).regroups

    assert [regroups(), regroups(regroup_micro_batches=True), regroups(regroup_micro_batches=False)] == [
        True,
        True,
        False,
    ]
    assert not regroups(trl_quirks=True)
    assert not regroups(trl_quirks=True, regroup_micro_batches=False)


def test_the_critic_trains_as_the_actor_unless_asked_otherwise(tmp_path: Path) -> None:
    plain = PPOConfig(output_dir=str(tmp_path), use_cpu=True, num_ppo_epochs=3, num_mini_batches=2)
    assert divisions(plain)["critic"] == divisions(plain)["actor"]
    assert (plain.own_learning_rates, plain.kl_control) == ({}, None)
    own: dict[str, Any] = {"critic_ppo_epochs": 5, "critic_num_mini_batches": 4, "critic_learning_rate": 1e-4}
    other = PPOConfig(output_dir=str(tmp_path), use_cpu=True, num_ppo_epochs=3, num_mini_batches=2, **own)
    assert divisions(other)["actor"] == divisions(plain)["actor"]
    assert (divisions(other)["critic"].num_epochs, divisions(other)["critic"].num_mini_batches) == (5, 4)
    assert other.own_learning_rates == {"critic": 1e-4}


def test_the_kls_target_and_horizon_are_those_of_trls_controller(tmp_path: Path) -> None:
    config = PPOConfig(output_dir=str(tmp_path), use_cpu=True, adaptive_kl=True)
    assert config.kl_control == KLControl(target=6.0, horizon=10_000)
