"""LoRA adapters in a model's modules, where PEFT puts them: injected before the model is cut, switched, merged.

A stage is made of the model with its adapters in it, so what holds for parameters holds for theirs: those that require
gradients train, all others stay. Nothing else imports PEFT.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from fuse.intrastage.adapted_linear import use_faster_way
from fuse.intrastage.stage import Readout
from fuse.merged_weight import merged_weight
from fuse.micro_batch import MicroBatch

if TYPE_CHECKING:
    from peft import LoraConfig as LoraConfig
    from peft import PeftModel as PeftModel

_INSIDE = re.compile(r"\.(?:lora_[AB]\.|original_module\.)")
"""Of names of what a model without adapters lacks, or has replaced."""
_REPLACING = re.compile(r"\.modules_to_save\.([^.]+)")


@dataclass(frozen=True, slots=True)
class Adapters:
    """Those of a model, and which of them computes; false where it has none.

    configs: PEFT's, by name, as they were injected. active: the one that computes; None for the model without any.
    """

    configs: Mapping[str, Any] = field(default_factory=dict)
    active: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Adapters:
        """Raises: ValueError for several that compute at once, or one of a kind that stages do not compute."""
        configs = dict(getattr(model, "peft_config", None) or {})
        if not configs:
            return cls()
        for config in configs.values():
            check_config(config)
        layers = _layers(model)
        for layer in layers:
            base = getattr(layer, "base_layer", None)
            if base is not None and type(base) is not nn.Linear:
                raise ValueError(
                    f"an adapter is on a {type(base).__name__}: name linear layers alone in target_modules, such as "
                    f"q_proj and v_proj"
                )
        active = {tuple(layer.active_adapters) for layer in layers if hasattr(layer, "base_layer")}
        if len(active) != 1 or len(names := active.pop()) != 1:
            raise ValueError("several adapters are active at once, and one can train: call set_adapter with its name")
        return cls(configs, names[0])

    def __bool__(self) -> bool:
        return bool(self.configs)

    @property
    def digest(self) -> str:
        """The same for adapters of the same shapes and places."""
        told = {name: config.to_dict() for name, config in self.configs.items()}
        return json.dumps(told, sort_keys=True, default=lambda one: sorted(one) if isinstance(one, set) else str(one))

    def inject(self, model: PreTrainedModel) -> None:
        """Put them into a model without them; their weights are yet to be loaded, as its own are."""
        if not self.configs:
            return
        from peft import inject_adapter_in_model

        on_meta = model.device.type == "meta"
        with unset_fake_temporarily():  # of a probe without memory: PEFT moves what it makes, as fake tensors cannot be
            for name, config in self.configs.items():
                inject_adapter_in_model(copy.deepcopy(config), model, adapter_name=name, low_cpu_mem_usage=on_meta)
        for layer in _layers(model):
            layer._active_adapter = [self.active or next(iter(self.configs))]
            if isinstance(getattr(layer, "base_layer", None), nn.Linear):
                use_faster_way(layer)

    @contextmanager
    def activated(self, model: nn.Module) -> Iterator[None]:
        """In the body a model that has these computes by the active one alone, or by none.

        PEFT's own switches also say what requires gradients, which is not to change between a forward and its backward.
        """
        if not self.configs:
            yield
            return
        layers = _layers(model)
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = self.active is None
                layer._active_adapter = layer._active_adapter if self.active is None else [self.active]
            yield
        finally:
            for layer, (are_disabled, active) in zip(layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = are_disabled, active

    def merged(self, model: nn.Module) -> Iterator[tuple[str, torch.Size, Callable[[], Tensor]]]:
        """Name and shape of every parameter of the model without adapters that computes the same, and what gives it.

        See `merged_weight`. Pre: the active adapter is the model's.
        """
        for name, parameter in model.named_parameters():
            plain = plain_name(name, self.active)
            if plain is not None:
                adapted = name.rpartition(".base_layer.weight")[0]
                layer = model.get_submodule(adapted) if adapted else None
                yield plain, parameter.shape, parameter.detach if layer is None else partial(merged_weight, layer)

    def without(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights by which a model with adapters computes as without, to the bit: each adds zero."""
        return {name: _without(name, tensor, state_dict) for name, tensor in state_dict.items()}


def plain_name(name: str, active: str | None) -> str | None:
    """What a parameter is called in the model without adapters; None where it has no such parameter.

    active: the adapter whose replacements of whole modules count.
    """
    if _INSIDE.search(name):
        return None
    if (replacing := _REPLACING.search(name)) is not None:
        return name.replace(replacing[0], "") if replacing[1] == active else None
    return name.replace(".base_layer.", ".")


def _without(name: str, tensor: Tensor, state_dict: Mapping[str, Tensor]) -> Tensor:
    if ".lora_B." in name:
        return torch.zeros_like(tensor)
    replacing = _REPLACING.search(name)
    return tensor if replacing is None else state_dict[name.replace(replacing[0], ".original_module")]


def _layers(model: nn.Module) -> list[Any]:
    """PEFT's modules around others."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [one for one in model.modules() if isinstance(one, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


NO_ADAPTERS = Adapters()


class SwitchedStage:
    """A `ForwardStage` over the weights of a `TransformersStage` that trains: what it computes takes none of its own.

    adapters: the stage's, and the one that computes.
    """

    def __init__(self, stage: Any, adapters: Adapters) -> None:
        self._stage, self._adapters = stage, adapters

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        boundary: Tensor = self._stage.boundary(micro_batch)
        return boundary

    def infer(self, micro_batch: MicroBatch, stage_input: Tensor | None, read: Readout) -> Tensor:
        with self._adapters.activated(self._stage.model):
            output: Tensor = self._stage.infer(micro_batch, stage_input, read)
        return output


# What users give


def is_adapted(model: object) -> bool:
    """Whether it is PEFT's model around another."""
    return type(model).__module__.startswith("peft.")


def base_of(model: Any) -> Any:
    """The model inside, with its adapters; a model without PEFT's around it is its own."""
    return model.get_base_model() if is_adapted(model) else model


def with_adapter(model: Any, config: Any, argument: str, *, replacing: tuple[str, ...] = ()) -> Any:
    """PEFT's model around `model`, into which an adapter is injected; or `model`, where there is no configuration.

    argument: what the trainer calls the configuration. replacing: modules that train whole beside the adapter.

    Raises: ValueError for adapters that cannot be trained, or without PEFT.
    """
    if config is None:
        return model
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise _without_peft(argument) from error
    if not isinstance(config, PeftConfig):
        raise ValueError(f"{argument} is {config!r}: pass a peft.LoraConfig")
    if is_adapted(model):
        raise ValueError(
            f"{argument} was given with a model that has adapters: train those and leave {argument} out, or pass "
            f"model.merge_and_unload()"
        )
    check_config(config)
    config = copy.deepcopy(config)
    untyped: Any = config
    untyped.modules_to_save = [*dict.fromkeys([*(untyped.modules_to_save or ()), *replacing])] or None
    return get_peft_model(model, untyped)


def lora(r: int, alpha: float, target_modules: Sequence[str] | None) -> LoraConfig:
    """Adapters of this rank; by default on all linear layers but the head.

    Raises: ValueError without PEFT.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise _without_peft("--lora-r") from error
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=list(target_modules or ()) or "all-linear")


def _without_peft(option: str) -> ValueError:
    return ValueError(f"{option} needs PEFT, which is not installed: pip install 'fuse-rlhf[peft]'")


def train_adapter(model: Any, name: str | None) -> None:
    """Have this adapter of a model that comes with some be the one that computes and trains; None leaves it as it is.

    Raises: ValueError when it has no such adapter.
    """
    if name is None:
        return
    if not is_adapted(model) or name not in model.peft_config:
        others = ", ".join(getattr(model, "peft_config", ())) or "none"
        raise ValueError(
            f"model_adapter_name={name!r} is no adapter of the policy (it has: {others}): name one, or none"
        )
    model.set_adapter(name)


_FREE = frozenset(
    (
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "use_rslora",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "task_type",
        "inference_mode",
        "peft_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "runtime_config",
        "init_lora_weights",
    )
)
"""Of a LoraConfig's fields, those that may be set."""


def check_config(config: Any) -> None:
    """Raises: ValueError for adapters of other kinds than plain LoRA."""
    kind = type(config).__name__
    if kind != "LoraConfig":
        raise ValueError(f"adapters by {kind} are not supported: use peft.LoraConfig")
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout={config.lora_dropout}: models are trained without dropout, so that fusion changes no "
            f"number; set it to 0.0"
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the weights that are to stay frozen: set it to "
            f"True or 'gaussian'"
        )
    plain = type(config)()
    for one in fields(config):
        value, default = getattr(config, one.name), getattr(plain, one.name)
        if one.name not in (*_FREE, "lora_dropout") and value != default:
            raise ValueError(f"{one.name}={value!r} of LoraConfig is not supported: leave it at {default!r}")
