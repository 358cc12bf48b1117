"""A model without its weights, and how to build it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fuse.intrastage.adapters import NO_ADAPTERS, Adapters, base_of, with_adapter
from fuse.intrastage.fused_layers import use_fused_layers
from fuse.intrastage.transformers_stage import without_memory

if TYPE_CHECKING:
    from fuse.intrastage.adapters import LoraConfig


class Origin(NamedTuple):
    """Whose tensor one is that does not change: the first model of the run that has an equal one, by its role."""

    role: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """How to build a model without its weights, and with the original's ties.

    config: `tie_word_embeddings` says whether embedding and head are one tensor, for copies of every kind follow it.
    dtype: of the original's parameters.
    frozen: names of parameters that training leaves as they are, because they did not require gradients.
    adapters: in the model, whose parameters are among its own.
    variant_of: the role that trains this very model, of which this is what other adapters compute, or none.
    origins: by name, of parameters that nobody changes; see `fuse.driver.one_base`.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    dtype: torch.dtype
    frozen: frozenset[str] = frozenset()
    adapters: Adapters = NO_ADAPTERS
    variant_of: str | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSpec:
        """How to build `model` again.

        Raises:
            ValueError: it shares other tensors than those of embedding and head, which copies would not; or it has
                adapters that copies would not compute.
        """
        config = copy.deepcopy(model.config)
        head: nn.Module | None = model.get_output_embeddings()
        if head is not None:
            config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
            if config.tie_word_embeddings and hasattr(head, "base_layer"):
                raise ValueError(
                    f"an adapter is on the head of a {type(model).__name__}, whose weight is the embedding's: leave it "
                    f"out of target_modules"
                )
            _check_whole_ends(model, head)
        _check_ties(model, head)
        frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
        return cls(
            model_class=type(model), config=config, dtype=model.dtype, frozen=frozen, adapters=Adapters.of(model)
        )

    def adapted(self, config: LoraConfig, *, replacing: tuple[str, ...] = ()) -> ModelSpec:
        """The same with an adapter injected, which alone trains; see `with_adapter`."""
        model = with_adapter(without_memory(self.model_class, self.config), config, "adapter", replacing=replacing)
        return replace(ModelSpec.of(base_of(model)), dtype=self.dtype)

    @property
    def num_layers(self) -> int:
        num_layers: int = self.config.get_text_config().num_hidden_layers
        return num_layers

    def stage_options(self, autocast: torch.dtype | None) -> dict[str, Any]:
        """Of a `TransformersStage` that trains. autocast: the type that it computes in.

        Frozen matrices of that very type are held in it: a product casts them to it in any case.
        """
        narrow = self.dtype if self.dtype == autocast else None
        return {"adapters": self.adapters, "frozen": self.frozen, "frozen_dtype": narrow}

    def origin(self, role: str, name: str) -> Origin:
        """Of a parameter, where this is the model of that role."""
        return self.origins.get(name, Origin(role, name))

    def computing(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Weights by which the model that trains computes as this one does, but for frozen ones that both have.

        model: it, or this one's own.
        """
        if self.variant_of is None:
            return model.state_dict()
        weights = model.state_dict() if self.adapters.active else self.adapters.without(model.state_dict())
        return {name: tensor for name, tensor in weights.items() if name not in self.frozen}

    def build(self, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model in evaluation mode, its parameters yet to be loaded, of this type whatever the original's.

        Buffers keep the type that they are computed in: rotary frequencies rounded to bfloat16 are off by more than a
        radian a thousand tokens on.
        """
        with no_init_weights():  # which leaves weights untied as well
            model: Any = self.model_class(copy.deepcopy(self.config))
        model.tie_weights()
        self.adapters.inject(model)
        for parameter in model.parameters():
            parameter.data = torch.empty_like(parameter.data, dtype=dtype, device=device)
        built: PreTrainedModel = model.to(device=device).eval().requires_grad_(False)
        use_fused_layers(built)
        return built


def _check_whole_ends(model: PreTrainedModel, head: nn.Module) -> None:
    """Raises: ValueError where one of two ends that are one tensor would train apart from the other."""
    ends: list[Any] = [model.get_input_embeddings(), head]
    first, second = (getattr(end, "original_module", end) for end in ends)
    if [first, second] != ends and first.weight is second.weight:
        raise ValueError(
            f"modules_to_save has the embedding or the head of a {type(model).__name__}, whose weights are one: leave "
            f"it out, or load the model with tie_word_embeddings=False"
        )


def _check_ties(model: PreTrainedModel, head: nn.Module | None) -> None:
    shared = [] if head is None else [head.weight, model.get_input_embeddings().weight]
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(parameter, name)
        if known != name and not any(parameter is one for one in shared):
            raise ValueError(
                f"{type(model).__name__} shares one tensor between {known} and {name}, and only embedding and head may "
                f"share theirs: give one of them a copy"
            )
