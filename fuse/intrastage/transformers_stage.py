"""A stage of any Hugging Face causal language model or sequence classifier that declares its pipeline plan.

The model is built without memory, layers [a:b] and the modules its plan gives to this stage are kept, and the rest
becomes the identity; the model's own forward then runs the stage. So there is no per-architecture code.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fuse.intrastage.adapters import NO_ADAPTERS, Adapters
from fuse.intrastage.fused_layers import use_fused_layers
from fuse.intrastage.gradient_checkpointing import recompute_in_backward
from fuse.intrastage.in_flight import InFlight
from fuse.intrastage.layer_range import checked_layer_range, global_name
from fuse.intrastage.packing import Packing, is_packed, last_hidden_state, selected, token_ids, use_packing
from fuse.intrastage.pipeline_plan import PipelinePlan, pipeline_plan
from fuse.intrastage.split_backward import SplitBackward
from fuse.intrastage.stage import Exported, Readout
from fuse.intrastage.vocabulary_ends import add_gradients_of, embed
from fuse.micro_batch import Loss, Metrics, MicroBatch
from fuse.state_dict import check_state_dict


def head_of(model: PreTrainedModel) -> nn.Module:
    """The module that maps hidden states to logits or scores.

    Raises: ValueError when the model has none, or its logits are not this head of its last hidden state.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    for attribute in _SCALINGS:
        value = getattr(config, attribute, None)
        if value not in (None, False, 1.0):
            raise ValueError(
                f"{name} scales embeddings or logits outside its modules ({attribute}={value}), which stages would "
                f"leave out or repeat: use an architecture without it, such as Llama, Qwen2, Qwen3 or GPT-NeoX"
            )
    untyped: Any = model
    head = untyped.get_output_embeddings() or getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{name} has neither output embeddings nor a `score` head: "
            f"use a causal language model or a sequence classifier of the same architecture"
        )
    return head


def without_memory(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device. Nothing is drawn for its weights, which takes longer there than all the rest."""
    with torch.device("meta"), no_init_weights():  # which leaves weights untied as well
        model: Any = model_class(config)
    model.tie_weights()
    built: PreTrainedModel = model
    return built


def check_stages(model: PreTrainedModel) -> None:
    """Raises: ValueError when stages of `model` would not compute what it does, or it cannot be cut into any."""
    head_of(model)
    pipeline_plan(model)


_SCALINGS = (
    "embedding_multiplier",
    "scale_emb",
    "mup_enabled",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_mup_width_multiplier",
    "lm_head_multiplier",
)
"""Configuration attributes by which a model's forward changes embeddings or logits outside its modules."""


class TransformersStage:
    """Stage `stage` of `num_stages` of a Hugging Face model; see `fuse.intrastage.stage.TrainedStage`.

    model_class, config: e.g. type(model) and model.config; the configuration is copied, never changed.
    loss: used by the last stage; one that is not last never calls it.
    layer_range: the [start, stop) of the layers kept; even by default. All stages' ranges must tile the layers.
    autocast: run forward and backward, and send hidden states, in this type (bfloat16); parameters stay float32.
    split_backward: linear layers can defer their weight gradients, for `backward_input` and `backward_weight`; this
        costs some tens of microseconds per linear layer and micro-batch, and changes no bit of a whole backward.
    dtype: of parameters; another than float32 is for stages that do not train.
    adapters: in the model. frozen, frozen_dtype: what stays may be held in another type, as far as it is matrices.

    Parameters are uninitialised until `load_state_dict`. Modules stay in evaluation mode: dropout would make a
    step depend on the schedule.

    Raises: ValueError for a model without a pipeline plan or head, or a layer range outside the model.
    """

    def __init__(
        self,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        *,
        stage: int,
        num_stages: int,
        loss: Loss,
        layer_range: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        split_backward: bool = False,
        dtype: torch.dtype = torch.float32,
        adapters: Adapters = NO_ADAPTERS,
        frozen: Collection[str] = (),
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        self.stage, self.num_stages = stage, num_stages
        self._loss = loss
        self.metrics: dict[int, Metrics] = {}
        self._device = torch.device(device)
        self._autocast = autocast

        config = copy.deepcopy(config)
        config.dtype = torch.float32  # sequence classifiers would build their base in the checkpoint's type
        self.model = without_memory(model_class, config).train(False)
        self.adapters = adapters
        adapters.inject(self.model)
        self._base: Any = self.model.base_model
        self._head = head_of(self.model)
        plan = pipeline_plan(self.model)
        self.model_shapes: Mapping[str, torch.Size] = {name: p.shape for name, p in self.model.named_parameters()}

        num_layers = len(getattr(self._base, plan.layers))
        self.layer_range = checked_layer_range(
            model_class.__name__, num_layers, layer_range, stage=stage, num_stages=num_stages
        )
        self._layers_prefix = f"{self.model.base_model_prefix}.{plan.layers}."
        self._head_name = _name_in(self.model, self._head)
        self._tied_source = _tied_source(self.model, self._head)
        use_packing(self.model, self._device.type)  # by all layers: stages without any do as the others
        self._prune(plan)
        for name, parameter in self.named_parameters():  # buffers keep the type that they are computed in
            is_narrow = frozen_dtype is not None and parameter.dim() > 1 and name in frozen
            wanted = frozen_dtype if is_narrow else dtype
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)
        self._materialise()
        if self.is_last:
            add_gradients_of(self._head)
        split = SplitBackward(self.model) if split_backward else None
        use_fused_layers(self.model, split)
        self._in_flight = InFlight(split)
        if gradient_checkpointing:
            recompute_in_backward(getattr(self._base, plan.layers))

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def can_split_backward(self) -> bool:
        return self._in_flight.split is not None

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        hidden_size = self.model.config.get_text_config().hidden_size
        shape = micro_batch.input_ids.shape
        if micro_batch.lengths is not None and is_packed(micro_batch, self.model):
            shape = torch.Size((1, sum(micro_batch.lengths)))
        return torch.empty(*shape, hidden_size, dtype=self._autocast or torch.float32, device=self._device)

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        assert (stage_input is None) == self.is_first
        packing = Packing.of(micro_batch, self.model)
        with self._precision():
            output = self._run(micro_batch, packing, None if stage_input is None else stage_input.requires_grad_(True))
            if self.is_last:
                hidden = selected(output, micro_batch, packing)
                output, self.metrics[index] = self._loss(hidden, self._head, micro_batch)
        self._in_flight.add(index, stage_input, output)
        return None if self.is_last else output.detach()

    def infer(self, micro_batch: MicroBatch, stage_input: Tensor | None, read: Readout) -> Tensor:
        assert (stage_input is None) == self.is_first
        packing = Packing.of(micro_batch, self.model)
        with torch.inference_mode(), self._precision():
            output = self._run(micro_batch, packing, stage_input)
            return read(selected(output, micro_batch, packing), self._head, micro_batch) if self.is_last else output

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        assert (output_grad is None) == self.is_last
        return self._in_flight.backward(index, output_grad)

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        assert (output_grad is None) == self.is_last
        return self._in_flight.backward_input(index, output_grad)

    def backward_weight(self, index: int) -> None:
        self._in_flight.backward_weight(index)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            yield self._global_name(name), parameter

    def freeze(self, names: Collection[str]) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in names)

    @property
    def tied_names(self) -> frozenset[str]:
        alone = self.num_stages == 1 or not (self.is_first or self.is_last)
        return frozenset() if self._tied_source is None or alone else frozenset({self._tied_source})

    @property
    def undecayed_names(self) -> frozenset[str]:
        """Biases and normalisations, as transformers.Trainer.get_decay_parameter_names leaves them out."""
        return frozenset(
            self._global_name(f"{path}.{name}" if path else name)
            for path, module in self.model.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if isinstance(module, nn.LayerNorm) or _NO_DECAY.search(f"{path}.{name}".lower())
        )

    @property
    def sharded_names(self) -> frozenset[str]:
        return frozenset()

    @property
    def stage_shapes(self) -> Mapping[str, torch.Size]:
        return {name: self.model_shapes[name] for name, _ in self.named_parameters()}

    def to_hugging_face(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def from_hugging_face(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensors[name]) for name, _ in self.named_parameters() if name in tensors)

    def export_weights(
        self, dtype: torch.dtype = torch.float32, part: Exported = "whole"
    ) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight().to(dtype)) for name, _, weight in self._exported(part))

    def exported_shapes(self, part: Exported = "whole") -> Mapping[str, torch.Size]:
        return {name: shape for name, shape, _ in self._exported(part)}

    def _exported(self, part: Exported) -> Iterator[tuple[str, torch.Size, Callable[[], Tensor]]]:
        """Name, shape, and what gives the weight."""
        left_out = frozenset[str]() if self.is_first else self.tied_names
        if part == "merged":
            named = (
                (self._global_name(name), shape, weight) for name, shape, weight in self.adapters.merged(self.model)
            )
        else:
            named = (
                (name, parameter.shape, parameter.detach)
                for name, parameter in self.named_parameters()
                if part == "whole" or parameter.requires_grad
            )
        return (one for one in named if one[0] not in left_out)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *, kept: Collection[str] = ()) -> None:
        """Copy this stage's parameters and buffers from a state dict of the whole model, or of a part that has them.

        kept: names of those that it has already, which are not written.

        Raises: ValueError when one is missing or has another shape; then nothing was copied.
        """
        own = {self._global_name(name): tensor for name, tensor in self.model.state_dict(keep_vars=True).items()}
        shapes = {name: tensor.shape for name, tensor in own.items()}
        what = f"stage {self.stage} of {type(self.model).__name__}"
        check_state_dict(state_dict, shapes, what, optional=kept, may_have_more=True)
        with torch.no_grad():
            for name, tensor in own.items():
                if name not in kept:
                    tensor.copy_(state_dict[name])

    def _run(self, micro_batch: MicroBatch, packing: Packing | None, stage_input: Tensor | None) -> Tensor:
        """The layers kept here: [batch, tokens, hidden], or [1, packed, hidden]."""
        hidden = stage_input
        if hidden is None:
            embedded = embed(self.model.get_input_embeddings(), token_ids(micro_batch, packing))
            # The residual stream is in one type from the start, so a cut between stages never rounds it.
            hidden = embedded.to(self._autocast or embedded.dtype)
        return last_hidden_state(self._base, hidden, micro_batch, packing)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)

    def _prune(self, plan: PipelinePlan) -> None:
        """Keep what this stage owns; the identity stands in for the rest, so the model's own forward still runs."""
        dropped = (() if self.is_first else plan.before) + (() if self.is_last else plan.after)
        for name in dropped:
            setattr(self._base, name, nn.Identity())
        if not self.is_last:
            self.model.set_submodule(self._head_name, nn.Identity())
        start, stop = self.layer_range
        setattr(self._base, plan.layers, getattr(self._base, plan.layers)[start:stop])
        config = self._base.config
        config.num_hidden_layers = stop - start
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[start:stop]

    def _materialise(self) -> None:
        """Give the modules kept memory, and the buffers that no state dict holds (rotary frequencies) their values."""
        self.model.to_empty(device=self._device)
        if self._tied_source is not None and self.num_stages == 1:
            self._head.weight = self.model.get_input_embeddings().weight
        untyped: Any = self.model
        for module in self.model.modules():
            if any(True for _ in module.buffers(recurse=False)):
                untyped._init_weights(module)

    def _global_name(self, name: str) -> str:
        """The whole model's name of a parameter of this stage."""
        if self._tied_source is not None and name == f"{self._head_name}.weight":
            return self._tied_source
        return global_name(name, self._layers_prefix, self.layer_range[0])


_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _name_in(model: nn.Module, wanted: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]


def _tied_source(model: PreTrainedModel, head: nn.Module) -> str | None:
    """The name of the input embedding's weight when the head shares it."""
    embedding: nn.Module = model.get_input_embeddings()
    if getattr(head, "weight", None) is not embedding.weight:
        return None
    return f"{_name_in(model, embedding)}.weight"
