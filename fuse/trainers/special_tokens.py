"""Which tokens end a response."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fuse.config.run import RunConfig
from fuse.sample import SpecialTokens


def special_tokens(
    args: RunConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, samples_padding: bool = False
) -> SpecialTokens:
    """Padding, end of sequence and stop, by their ids; and where the tokenizer's ids end, if the model has more.

    Such a model's vocabulary is padded. samples_padding: whether that may be sampled, as TRL does.

    Raises:
        ValueError: responses are to end at the end of sequence, and no token says that it is one.
    """
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    eos = end_tokens(tokenizer, model) if args.stop_token == "model" else own
    if args.stop_token is not None and not eos:
        raise ValueError(
            f"stop_token={args.stop_token!r} but the tokenizer has no end-of-sequence token: set stop_token_id instead "
            f"or stop_token='none'"
        )
    stop = eos if args.stop_token is not None else () if args.stop_token_id is None else (args.stop_token_id,)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    is_padded = num_tokens < model.config.get_text_config().vocab_size and not samples_padding
    return SpecialTokens(pad=tokenizer.pad_token_id, eos=eos, stop=stop, num_tokens=num_tokens if is_padded else None)


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """What ends a sequence: of the model's generation configuration, and of the tokenizer."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(dict.fromkeys((*_generation_eos(model), *own)))


def _generation_eos(model: PreTrainedModel) -> tuple[int, ...]:
    """Of the model's generation configuration; chat models often have several."""
    config = getattr(model, "generation_config", None)
    ids = None if config is None else config.eos_token_id
    if ids is None:
        return ()
    return (int(ids),) if isinstance(ids, int) else tuple(map(int, ids))
