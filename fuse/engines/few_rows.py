"""Linear layers of a model that decodes on a CPU core, where few tokens at once are the rule: small batches, drafts."""

from __future__ import annotations

from torch import Tensor, nn

from fuse.ops.skinny_linear import skinny_linear


class FewRowsLinear(nn.Linear):
    """A linear layer through which a few rows pass in little more than the time of one."""

    def forward(self, inputs: Tensor) -> Tensor:
        return skinny_linear(inputs, self.weight, self.bias)


def use_few_rows(model: nn.Module) -> None:
    """Have a model's plain linear layers take a few rows so; their weights are theirs still."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewRowsLinear
