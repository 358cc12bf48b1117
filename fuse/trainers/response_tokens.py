"""The tokens of a response that was not sampled here, as if it had been."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fuse.trainers.data import TOKENS, prompt_rows

Text = str | list[dict[str, str]]
"""A string, or chat messages."""


def with_responses(prompt: Text, responses: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a prompt, and of responses to it with their ends.

    Raises: ValueError where there are none, or a chat template that does not continue a prompt.
    """
    try:
        [row] = prompt_rows([{"prompt": prompt}], tokenizer, prompt_column="prompt", response_length=1)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("dataset row 0 has ")) from error
    prompt_ids: list[int] = row[TOKENS]
    return [prompt_ids, *(_response_ids(prompt, one, prompt_ids, tokenizer) for one in responses)]


def _response_ids(prompt: Text, response: Text, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Up to and with the end of sequence, where generation would stop. prompt_ids: of the prompt.

    Raises: ValueError where there are none, or a chat template does not continue the prompt.
    """
    if isinstance(response, str) or isinstance(prompt, str):
        ids = list(tokenizer(response, add_special_tokens=False)[TOKENS])
    else:
        whole = list(tokenizer.apply_chat_template([*prompt, *response], tokenize=True, return_dict=False))
        if whole[: len(prompt_ids)] != prompt_ids:
            raise ValueError("the chat template renders the prompt otherwise where a response follows")
        ids = whole[len(prompt_ids) :]
    end = tokenizer.eos_token_id
    ids = ids[: ids.index(end)] if end in ids else ids
    if not ids:
        raise ValueError("a response has no tokens")
    return [*ids, end]
