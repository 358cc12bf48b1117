"""Workers with one model in all roles: what is timed is the same as with different weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from fuse.commands.models import critic_from_policy
from fuse.config.ppo import PPOConfig
from fuse.config.prompt_tokens import PromptTokens
from fuse.config.settings import fleet_settings
from fuse.driver.fleet import Fleet
from fuse.sample import SpecialTokens
from fuse.trainers.ppo import algorithm_of, fill_batch_sizes
from fuse.training.layout import RaggedLayout


def model_fleet(
    model: PreTrainedModel, *, special: SpecialTokens, prompt_tokens: int, engine_batch_size: int, **options: Any
) -> Fleet:
    """On CPU cores. prompt_tokens: of the longest prompt. options: further ones of `PPOConfig`."""
    config = PPOConfig(
        engine_batch_size=engine_batch_size,
        balance_stages=False,
        intra_stage_fusion=False,
        report_to="none",
        use_cpu=True,
        **options,
    )
    classifier = critic_from_policy(model, pad_token_id=0)
    prompts = PromptTokens(prompt_tokens, prompt_tokens)
    length = fill_batch_sizes(config, num_rows=engine_batch_size)
    settings = fleet_settings(
        config, algorithm_of(config, special), length, RaggedLayout(), special, prompts, model.config
    )
    return Fleet(settings, {"actor": model, "critic": classifier, "reference": model, "reward": classifier})
