"""The tokens of preferences, as a run of reinforcement learning sees prompts and responses."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fuse.recipe.preferences import Preference
from fuse.trainers.response_tokens import with_responses


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedPreference:
    """Token ids of a prompt and of the two responses, each of which ends with the end of sequence."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def tokenised(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> TokenisedPreference:
    """Raises: ValueError where there are no tokens, or a chat template that does not continue a prompt."""
    prompt_ids, chosen_ids, rejected_ids = with_responses(
        preference.prompt, (preference.chosen, preference.rejected), tokenizer
    )
    return TokenisedPreference(prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids)
