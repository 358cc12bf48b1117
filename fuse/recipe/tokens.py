"""The tokens of preferences, as a run of reinforcement learning sees prompts and responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fuse.recipe.preferences import Preference, Text
from fuse.trainers.data import TOKENS, prompt_rows
from fuse.trainers.response_tokens import response_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedPreference:
    """Token ids of a prompt and of the two responses, each of which ends with the end of sequence."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def tokenised(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> TokenisedPreference:
    """Raises: ValueError where there are no tokens, or a chat template that does not continue a prompt."""
    prompt_ids, chosen_ids, rejected_ids = token_ids(
        preference.prompt, (preference.chosen, preference.rejected), tokenizer
    )
    return TokenisedPreference(prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids)


def token_ids(prompt: Text, responses: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of a prompt, and of responses to it with their ends.

    Raises: ValueError where there are none, or a chat template that does not continue a prompt.
    """
    try:
        [row] = prompt_rows([{"prompt": prompt}], tokenizer, prompt_column="prompt", response_length=1)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("dataset row 0 has ")) from error
    prompt_ids: list[int] = row[TOKENS]
    return [prompt_ids, *(response_ids(prompt, one, prompt_ids, tokenizer) for one in responses)]
