"""The losses of reward models, as changes to TRL's RewardTrainer: what is added to its pairwise loss.

Rows of a batch are chosen responses, then rejected ones, each behind its prompt; of an advantage model prompts follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from fuse.training.advantage_model import EXPECTED_REWARD, LABELS, REWARD


class SquareRegularisedTrainer(RewardTrainer):
    """Adds `square_coefficient` times the mean of r_chosen² + r_rejected², a Gaussian prior around zero (ChatGLM-RLHF,
    arXiv 2404.00934).

    TRL's own `center_rewards_coefficient` weighs (r_chosen + r_rejected)², which leaves the difference free.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        compute: Any = super().compute_loss
        loss, outputs = compute(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        config: Any = self.args
        if config.square_coefficient:
            loss = loss + config.square_coefficient * 2 * outputs.logits.float().square().mean()
        return (loss, outputs) if return_outputs else loss


class AdvantageTrainer(SquareRegularisedTrainer):
    """Trains an advantage model (arXiv 2309.10202) on pairs, whose prompts are a column `prompt_ids`.

    With r and e the outputs, m the margin, c the coefficient, and a(y) = r(x, y) - e(x), the loss of a pair is

        - log s(a(chosen) - a(rejected)) - log s(m - a(chosen)) - log s(m + a(rejected)) + c L_e
        L_e = (e(x) - (r(x, chosen) + r(x, rejected)) / 2)²

    The paper's text was not at hand. That there are a ranking loss, a bound and a second head is known from secondary
    sources; these formulas, m and c are not. What e is to expect of a prompt is the paper's policy's rewards, weighted
    by importance for a policy that has moved on; here it is the mean of the pair, whose policy is not known, so nothing
    is weighted. Gradients of L_e reach e alone, and of the bounds r alone.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        model: Any = self.model
        config: Any = self.args
        _add_expectation(model)
        self.data_collator = _WithPrompts(
            pad_token_id=model.config.pad_token_id, pad_to_multiple_of=config.pad_to_multiple_of
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["prompt_ids", "chosen_ids", "rejected_ids"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        config: Any = self.args
        errors = list[Tensor]()

        def advantages(**inputs: Any) -> SequenceClassifierOutput:
            chosen, rejected, prompts = model(**inputs).logits.float().chunk(3)
            rewards, expected = torch.stack((chosen, rejected))[..., REWARD], prompts[..., EXPECTED_REWARD]
            errors.append((expected - rewards.mean(dim=0).detach()).square().mean())
            return SequenceClassifierOutput(logits=(rewards - expected.detach()).reshape(-1, 1))

        compute: Any = super().compute_loss
        loss, outputs = compute(advantages, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        chosen, rejected = outputs.logits.chunk(2)
        margin = config.advantage_margin
        loss = loss - (logsigmoid(margin - chosen) + logsigmoid(margin + rejected)).mean()
        loss = loss + config.expectation_coefficient * errors[0]
        return (loss, outputs) if return_outputs else loss


def _add_expectation(model: Any) -> None:
    """Give a classifier of one label a second one, which is 0 as yet."""
    one: nn.Linear = model.score
    both = nn.Linear(one.in_features, len(LABELS), bias=False, device=one.weight.device, dtype=one.weight.dtype)
    with torch.no_grad():
        both.weight.zero_()
        both.weight[REWARD] = one.weight[0]
    model.score, model.num_labels = both, len(LABELS)
    model.config.id2label = dict(LABELS)
    model.config.label2id = {label: index for index, label in LABELS.items()}


class _WithPrompts(DataCollatorForPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        ids = batch["input_ids"].new_full((len(examples), batch["input_ids"].shape[1]), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            prompt = torch.tensor(example["prompt_ids"])
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        for name, of_prompts in (("input_ids", ids), ("attention_mask", mask)):
            batch[name] = torch.cat((batch[name], of_prompts))
        return batch
