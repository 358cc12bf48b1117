"""A character tokenizer for arithmetic, made in memory."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+=;#"
PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN = "<pad>", "<eos>", "<unk>"


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of `CHARACTERS`, plus padding, end and unknown; pads on the left, as a sampler needs."""
    tokens = [PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *CHARACTERS]
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
