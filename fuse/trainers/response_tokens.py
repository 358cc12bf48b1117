"""The tokens of a response that was not sampled here, as if it had been."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fuse.trainers.data import TOKENS

Text = str | list[dict[str, str]]
"""A string, or chat messages."""


def response_ids(prompt: Text, response: Text, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
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
