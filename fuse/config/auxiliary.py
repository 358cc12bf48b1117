"""The options of text that a policy trains on beside its samples."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fuse.config.option import option
from fuse.intrastage.cost_profile import Shape


@dataclass
class AuxiliaryOptions:
    """A part of `RunConfig`.

    What the weight of the loss should be is not confirmed: DeepSpeed-Chat's 27.8 is called unstable there, ChatGLM-RLHF
    and selective rehearsal have none that could be read.
    """

    auxiliary_dataset: str | None = option(
        None,
        "Text that the policy goes on learning as a language model, in each of its optimizer steps: a file, directory "
        "or name, as of prompts. Rows have a prompt and a completion, response or chosen, of which the tokens are "
        "learnt; messages, of which the last one is; text; or input_ids, with labels if not all are to be learnt. "
        "Default: none.",
    )
    auxiliary_coef: float = option(
        0.1, "Weight of that loss, a mean over the learnt tokens of an optimizer step, beside the policy's."
    )
    auxiliary_batch_size: int | None = option(
        None, "Rows of auxiliary_dataset in an optimizer step. Default: as many as samples."
    )
    auxiliary_max_length: int | None = option(
        None,
        "Most tokens of such a row: of longer ones the end is cut off, and text is cut into several rows. Default: "
        "those of the longest prompt and response.",
    )
    auxiliary_micro_batch_tokens: int | None = option(
        None,
        "Most tokens of such a micro-batch, padding included. Default: those of per_device_train_batch_size of the "
        "longest prompts and responses, or of one row, if that is more.",
    )
    auxiliary_text_column: str = option("text", "Column of auxiliary_dataset that holds text, where rows are text.")

    def check_auxiliary(self) -> None:
        """Raises: ValueError for options out of range, or without the dataset that they are for."""
        if self.auxiliary_dataset is None:
            for one in fields(AuxiliaryOptions):
                if (value := getattr(self, one.name)) != one.default:
                    raise ValueError(
                        f"{one.name}={value!r} without auxiliary_dataset, which it is for: name one, or leave it out"
                    )
            return
        if not self.auxiliary_coef > 0:
            raise ValueError(f"auxiliary_coef={self.auxiliary_coef} must be positive; for none leave out the dataset")
        for name, least in (
            ("auxiliary_batch_size", 1),
            ("auxiliary_max_length", 2),
            ("auxiliary_micro_batch_tokens", 2),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")


def largest_text(
    *, max_length: int | None, most_tokens: int | None, micro_batch_size: int, longest_sample: int
) -> Shape:
    """The largest micro-batch of text there may be, by the options; None for their defaults.

    micro_batch_size: samples of a micro-batch, of at most so many tokens each.

    Raises:
        ValueError: there is no room for one row.
    """
    length = max_length or longest_sample
    tokens = most_tokens or max(length, micro_batch_size * longest_sample)
    if tokens < length:
        raise ValueError(
            f"auxiliary_micro_batch_tokens={tokens} has no room for a row of {length} tokens: raise it, or set a lower "
            f"auxiliary_max_length"
        )
    return Shape(tokens // length, length)
