"""Runs that train adapters over a frozen base, which is the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM

from fuse import GRPOTrainer, OnlineDPOTrainer, PPOTrainer, ReinforcePlusPlusTrainer, RLOOTrainer
from fuse.merged_weight import merged_weight

from . import tiny, tiny_group

pytestmark = pytest.mark.usefixtures("pooled_workers")

LORA = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])


def trainer(
    output_dir: Path, *, ref_model: Any = None, reward: Any = tiny.count_a, models: Any = (), **options: Any
) -> PPOTrainer:
    torch.manual_seed(0)  # PEFT draws A
    policy, value = tiny.policy(**dict(models)), tiny.scorer(1)
    value.model.load_state_dict(policy.model.state_dict())
    return PPOTrainer(
        args=tiny.config(output_dir, **options),
        processing_class=tiny.tokenizer(),
        model=policy,
        ref_model=ref_model,
        reward_model=reward,
        train_dataset=tiny.rows(),
        value_model=value,
        peft_config=LORA,
        value_peft_config=LORA,
    )


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}


def test_adapters_are_what_trains_however_it_is_scheduled(tmp_path: Path) -> None:
    made = trainer(tmp_path / "one", num_devices=1)
    start = copy.deepcopy(made.model.state_dict())
    made.train()
    moved = {name for name, one in made.model.state_dict().items() if not torch.equal(one, start[name])}
    assert moved == set(trained(made.model))
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in trained(made.policy_model)}
    runs = {
        "fused": {},
        "serial": {"scoring": "sharded", "intra_stage_fusion": False, "inter_stage_fusion": False},
    }
    for name, options in runs.items():
        other = trainer(tmp_path / name, num_devices=2, **options)
        assert {one.role for one in other._settings.origins["critic"].values()} == {"actor", "critic"}  # its old head
        other.train()
        for row, expected in zip(other.state.log_history, made.state.log_history, strict=True):
            assert row["val/sampler_logprob_diff"] < 1e-5
            assert row["objective/kl"] == pytest.approx(expected["objective/kl"], abs=1e-5)
        assert tiny.difference(other.model, made.model) < tiny.ROUNDING, name
    given = trainer(tmp_path / "given", ref_model=tiny.policy())
    given.train()
    assert given.state.log_history[-1]["objective/kl"] == pytest.approx(
        made.state.log_history[-1]["objective/kl"], abs=1e-6
    )
    assert abs(given.state.log_history[-1]["objective/kl"]) > 1e-2


def test_adapters_are_saved_as_peft_reads_them_and_resumed_on_other_devices(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "models": {"tie_word_embeddings": True}}
    whole = trainer(tmp_path / "whole", total_episodes=24, **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", total_episodes=24, num_devices=2, merge_adapters=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert tiny.difference(resumed.model, whole.model) < tiny.ROUNDING

    directory = tmp_path / "whole" / "checkpoint-2"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in directory.iterdir()}
    assert not (directory / "model.safetensors").exists()
    base = tiny.policy(tie_word_embeddings=True)
    read, ids = PeftModel.from_pretrained(base, tmp_path / "whole" / "checkpoint-1"), torch.tensor([[2, 5, 3]])
    assert {name for name, one in read.named_parameters() if one.abs().max() > 0} >= set(trained(whole.policy_model))
    resumed.save_model(str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, resumed.policy_model.eval()(ids).logits, atol=1e-5, rtol=0)
    assert tiny.difference(merged, tiny.policy(tie_word_embeddings=True)) > 1e-3


def test_a_reward_model_with_adapters_is_over_the_same_base(tmp_path: Path) -> None:
    """It gives the rewards of its merged self."""
    scorer = tiny.scorer(1)
    scorer.model.load_state_dict(tiny.policy().model.state_dict())
    adapted = get_peft_model(scorer, LoraConfig(r=2, lora_alpha=32, task_type="SEQ_CLS", target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    whole = copy.deepcopy(adapted).merge_and_unload()
    scores = {}
    for name, reward in {"adapted": adapted, "whole": whole, "base": scorer_of_zero(adapted)}.items():
        made = trainer(tmp_path / name, reward=reward, total_episodes=8, scoring="sharded", num_devices=2)
        lenders = {origin.role for origin in made._settings.origins["reward"].values()}
        assert "actor" in lenders
        made.train()
        scores[name] = made.state.log_history[-1]["objective/scores"]
    assert scores["adapted"] == pytest.approx(scores["whole"], abs=1e-5)
    assert scores["adapted"] != pytest.approx(scores["base"], abs=1e-4)


def scorer_of_zero(adapted: Any) -> Any:
    """The same without what its adapters add."""
    made = copy.deepcopy(adapted)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    return made


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (RLOOTrainer, {"beta": 0.1}),
        (ReinforcePlusPlusTrainer, {"beta": 0.1}),
        (OnlineDPOTrainer, {"num_generations": 2}),
        (GRPOTrainer, {"old_logprobs": "trainer"}),
    ],
)
def test_every_algorithm_trains_adapters_alone(algorithm: Any, options: Any, tmp_path: Path) -> None:
    """Measured from the policy without them, which it is before the first step."""
    made = tiny_group.trainer(tmp_path, algorithm=algorithm, peft_config=LORA, **options)
    start = copy.deepcopy(made.model.state_dict())
    made.train()
    moved = {name for name, one in made.model.state_dict().items() if not torch.equal(one, start[name])}
    assert moved == set(trained(made.model))
    assert made.state.log_history[0]["val/sampler_logprob_diff"] < 1e-5
    assert made.state.log_history[1]["val/sampler_logprob_diff"] < 1e-5


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_modules_that_are_saved_train_whole(saved: str, tmp_path: Path) -> None:
    runs = []
    for num_devices in (1, 2):
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
        torch.manual_seed(0)
        options: Any = {"num_devices": num_devices, "beta": 0.1, "actor_stages": num_devices}
        made = tiny_group.trainer(tmp_path / str(num_devices), peft_config=lora, **options)
        start = copy.deepcopy(made.model.state_dict())
        made.train()
        moved = {name for name, one in made.model.state_dict().items() if not torch.equal(one, start[name])}
        assert moved == set(trained(made.model))
        assert any(f"{saved}.modules_to_save" in name for name in moved)
        assert made.state.log_history[1]["val/sampler_logprob_diff"] < 1e-5
        runs.append(made.model)
    assert tiny.difference(*runs) < tiny.ROUNDING
    base = PeftModel.from_pretrained(tiny.policy(), _saved(runs[0], tmp_path / "saved"))
    assert tiny.difference(base.get_base_model(), runs[0].get_base_model()) == 0.0


def _saved(model: Any, directory: Path) -> str:
    model.save_pretrained(directory)
    return str(directory)


def test_updates_survive_a_merge_that_a_narrow_type_would_lose() -> None:
    linear = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.constant_(linear.weight, 256.0)
    layer = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["0"]), nn.Sequential(linear))[0]
    for weights in (layer.lora_A, layer.lora_B):
        nn.init.constant_(weights["default"].weight, 0.25)
    for _ in range(3):  # from W0 every time
        assert float(merged_weight(layer)[0, 0]) == 256.125
    assert float(linear.weight[0, 0]) == 256.0
