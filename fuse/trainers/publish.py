"""Saving and sharing a trained policy as the Hugging Face tools know it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

AVERAGE_DIRECTORY = "ema"
"""Of the average of a policy's weights, in the policy's."""


def write_policy(directory: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read."""
    directory.mkdir(parents=True, exist_ok=True)  # save_pretrained returns without a word where a file is in its way
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_policies(
    directory: Path, policy: PreTrainedModel, average: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`write_policy`, and the average of its weights beside it where there is one."""
    write_policy(directory, policy, tokenizer)
    if average is not None:
        write_policy(directory / AVERAGE_DIRECTORY, average, tokenizer)


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
