"""Saving and sharing a trained policy as the Hugging Face tools know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fuse.intrastage.adapters import NO_ADAPTERS, base_of, is_adapted
from fuse.state_dict import load_state_dict
from fuse.training.model_spec import ModelSpec

AVERAGE_DIRECTORY = "ema"
"""Of the average of a policy's weights, in the policy's."""


def write_policy(
    directory: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, merges: bool = False
) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Of a policy with adapters PEFT's files, which `PeftModel.from_pretrained` reads, or by `merges` the same again.
    """
    directory.mkdir(parents=True, exist_ok=True)  # save_pretrained returns without a word where a file is in its way
    if is_adapted(policy) and merges:
        without_adapters(policy).save_pretrained(directory)
    elif is_adapted(policy):
        untyped: Any = policy  # PEFT would ask the Hub whether embeddings have other sizes than there
        untyped.save_pretrained(directory, selected_adapters=[untyped.active_adapter], save_embedding_layers=False)
    else:
        policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_policies(
    directory: Path,
    policy: PreTrainedModel,
    average: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    merges: bool = False,
) -> None:
    """`write_policy`, and the average of its weights beside it where there is one."""
    write_policy(directory, policy, tokenizer, merges=merges)
    if average is not None:
        write_policy(directory / AVERAGE_DIRECTORY, average, tokenizer, merges=merges)


def without_adapters(policy: PreTrainedModel) -> PreTrainedModel:
    """Another model, of the same type, that computes as the policy does with its adapters: merged in float32."""
    base = base_of(policy)
    spec = ModelSpec.of(base)
    model = replace(spec, adapters=NO_ADAPTERS).build(base.device, base.dtype)
    load_state_dict(model, {name: weight() for name, _, weight in spec.adapters.merged(base)})
    model.generation_config = base.generation_config
    return model


def push_policy(repository: str, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """Upload policy and tokenizer to a Hub repository; returns the address of the commit."""
    untyped: Any = policy
    tokenizer.push_to_hub(repository, **options)
    return str(untyped.push_to_hub(repository, **options))


def write_model_card(
    directory: Path, name: str, policy: PreTrainedModel, how: str, dataset: str | None, tags: Sequence[str]
) -> None:
    """Write README.md: what was trained, from what, on what. how: by what algorithm, on how many prompts."""
    base = getattr(policy.config, "_name_or_path", "") or "a model built from its configuration"
    listed = "".join(f"- {tag}\n" for tag in ("fuse", *tags))
    prompts = f" of {dataset}" if dataset else ""
    (directory / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags:\n{listed}---\n\n# {name}\n\n"
        f"Trained from {base} with fuse, by {how}{prompts}.\n"
    )
