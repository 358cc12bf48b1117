"""The loss of a language model on text that nobody sampled: what pretraining and supervised fine-tuning minimise.

Sources: the pretraining mixture of InstructGPT, Ouyang et al. 2022 (arXiv 2203.02155), equation 2, and of
DeepSpeed-Chat (`--unsup_coef`); the next-token regulariser of ChatGLM-RLHF, Hou et al. 2024 (arXiv 2404.00934); the
replay of selective rehearsal, Peng et al. 2023 (arXiv 2309.10202). They differ in the text. What the latter two losses
are means of has not been confirmed; here all learnt tokens of an optimizer step count the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fuse.micro_batch import Metric, Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs

AUXILIARY_TOKENS = Metric("auxiliary/tokens", "sum")
AUXILIARY_LOSS = Metric("auxiliary/loss", "sum", per=AUXILIARY_TOKENS.name)


@dataclass(frozen=True, slots=True)
class TextTargets:
    """What the loss compares with. token_ids: [positions] int64, the next token at each."""

    token_ids: Tensor


def language_model_loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    """The weighted sum of the tokens' negative log-probabilities, at temperature 1 and over the whole vocabulary.

    hidden: [positions, hidden].
    """
    targets = micro_batch.targets
    assert isinstance(targets, TextTargets)
    logprobs, _ = token_logprobs(hidden, head, targets.token_ids, 1.0)
    loss = -logprobs.sum()
    num_tokens = torch.tensor(float(len(logprobs)), device=loss.device)
    return loss * micro_batch.weight, {AUXILIARY_LOSS: loss.detach(), AUXILIARY_TOKENS: num_tokens}
