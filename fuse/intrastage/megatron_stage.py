"""A stage of megatron-core layers with the weights of a Hugging Face Llama, Qwen2 or Qwen3, tensor-parallel if asked.

Its parameters are megatron-core's, under megatron-core's names with layers numbered in the whole model: an optimizer
must see the tensors that autograd does, and query, key and value are one matrix here. So a training state saved from
these stages is loaded into these stages (with as many tensor-parallel ranks), on whatever pipeline. Weights come from
and go to Hugging Face names at the edges, by `load_state_dict` and `export_state_dict`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from fuse.intrastage import communication
from fuse.intrastage.megatron_head import VocabularyHead
from fuse.intrastage.megatron_model import RotaryAngles, attention_mask, build_model, check_supported, lone_group
from fuse.intrastage.megatron_weights import EMBEDDING, HEAD, LAYERS_PREFIX, FusedWeight, fused_weights
from fuse.intrastage.stage import Loss, MicroBatch
from fuse.intrastage.transformers_stage import even_layer_range, head_of


@dataclass(frozen=True, slots=True)
class _Live:
    stage_input: Tensor | None
    output: Tensor


class MegatronStage:
    """Stage `stage` of `num_stages` of a Hugging Face model; see `fuse.intrastage.stage.Stage`.

    model_class, config: a causal language model's or sequence classifier's; the configuration is never changed.
    loss: used by the last stage. Its head gives whole logits, or is a `VocabularyHead` to take shards from.
    layer_range: the [start, stop) of the layers kept; even by default. All stages' ranges must tile the layers.
    autocast: run forward and backward, and send hidden states, in this type (bfloat16); parameters stay float32.
    tensor_group: the ranks that share this stage's matrices; they do the same calls in the same order, and each gets
        all of the hidden states. None: this rank alone. `ModelOptimizer` and the training state know of pipelines
        and replicas only: with more than one rank here, clipping and saving are the caller's.

    Parameters are uninitialised until `load_state_dict`. Hidden states between stages are those of
    `TransformersStage`, so a pipeline may mix both. torch.distributed must be initialised before the first forward,
    be it for a world of one: megatron-core asks it.

    Raises: ValueError for a model that a GPTModel is not, or that does not divide among the ranks.
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
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 <= stage < num_stages:
            raise ValueError(f"stage {stage} of {num_stages}: stages count from 0 to num_stages - 1")
        check_supported(config)
        self.stage, self.num_stages = stage, num_stages
        self._loss = loss
        self._device = torch.device(device)
        self._autocast = autocast
        self._group = lone_group() if tensor_group is None else tensor_group
        self._live: dict[int, _Live] = {}

        with torch.device("meta"):
            blueprint = model_class(copy.deepcopy(config))
        source: Any = blueprint.config
        num_layers: int = source.num_hidden_layers
        self.layer_range = layer_range or even_layer_range(num_layers, stage, num_stages)
        start, stop = self.layer_range
        if not 0 <= start < stop <= num_layers:
            raise ValueError(
                f"layer range {self.layer_range} of {model_class.__name__}: must be 0 <= start < stop <= {num_layers}, "
                f"its number of layers; a megatron stage has at least one"
            )
        self._hidden_size: int = source.hidden_size
        self._rotary = RotaryAngles(blueprint, self._device)
        self._name = model_class.__name__
        self._weights: Mapping[str, FusedWeight] = fused_weights(
            {name: parameter.shape for name, parameter in blueprint.named_parameters()},
            num_query_groups=source.num_key_value_heads,
            num_shards=self._group.size(),
        )
        self.model_shapes: Mapping[str, torch.Size] = {name: one.shard_shape for name, one in self._weights.items()}
        self._is_tied = HEAD not in self._weights
        is_classifier = head_of(blueprint) is getattr(blueprint, "score", None)
        self.model = build_model(
            source,
            num_layers=stop - start,
            has_embedding=self.is_first,
            has_head=self.is_last,
            num_labels=source.num_labels if is_classifier else None,
            is_tied=self._is_tied and num_stages == 1,
            tensor_group=self._group,
            device=self._device,
        )
        if self.is_last:
            tied = self.model.embedding.word_embeddings if self._is_tied and num_stages == 1 else None
            self._head: nn.Module = (
                self.model.output_layer if is_classifier else VocabularyHead(self.model.output_layer, tied, self._group)
            )
        if gradient_checkpointing:
            for layer in self.model.decoder.layers:
                layer.forward = functools.partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )
        if self._group.size() > 1:
            self._share_head_norms()

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        dtype = self._autocast or torch.float32
        return torch.empty(*micro_batch.input_ids.shape, self._hidden_size, dtype=dtype, device=self._device)

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        assert index not in self._live, f"micro-batch {index} was not finished"
        assert (stage_input is None) == self.is_first
        decoder = self.model.decoder
        with self._precision():
            hidden = None  # [tokens, batch, hidden] inside megatron-core
            if stage_input is None:
                hidden = self.model.embedding(micro_batch.input_ids, None)
                # The residual stream is in one type from the start, so a cut between stages never rounds it.
                hidden = hidden.to(self._autocast or hidden.dtype)
            else:
                decoder.set_input_tensor(stage_input.requires_grad_(True).transpose(0, 1))
            output = decoder(
                hidden_states=hidden,
                attention_mask=attention_mask(micro_batch.attention_mask),
                rotary_pos_emb=self._rotary(micro_batch.input_ids.size(1), micro_batch.position_ids),
            ).transpose(0, 1)
            decoder.set_input_tensor(None)
            if self.is_last:
                selected = output.flatten(0, 1).index_select(0, micro_batch.head_index)
                output = self._loss(selected, self._head, micro_batch)
        self._live[index] = _Live(stage_input, output)
        return None if self.is_last else output.detach()

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        assert (output_grad is None) == self.is_last
        live = self._live.pop(index)
        # megatron-core's linears multiply in their backward, and remember autocast on CUDA only.
        with self._precision():
            torch.autograd.backward(live.output, output_grad)
        return None if live.stage_input is None else live.stage_input.grad

    @property
    def can_split_backward(self) -> bool:
        return False

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        raise AssertionError("megatron stages run whole backwards: see can_split_backward")

    def backward_weight(self, index: int) -> None:
        raise AssertionError("megatron stages run whole backwards: see can_split_backward")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters (tensor-parallel: this rank's shards) under megatron-core's names in the whole model."""
        for name, parameter in self.model.named_parameters():
            yield self._global_name(name), parameter

    @property
    def tied_names(self) -> frozenset[str]:
        alone = self.num_stages == 1 or not (self.is_first or self.is_last)
        return frozenset({EMBEDDING}) if self._is_tied and not alone else frozenset()

    @property
    def undecayed_names(self) -> frozenset[str]:
        """Biases and normalisations, as `TransformersStage` has them."""
        return frozenset(name for name, _ in self.named_parameters() if "layernorm" in name or name.endswith(".bias"))

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy this stage's weights from a Hugging Face state dict of the whole model, or of a part that has them.

        Raises: ValueError when one is missing or has another shape; then nothing was copied.
        """
        own = dict(self.named_parameters())
        problems = [
            f"{name} is missing"
            if name not in state_dict
            else f"{name} is {list(state_dict[name].shape)}, the model has {list(shape)}"
            for weight in (self._weights[name] for name in own)
            for name, shape in zip(weight.sources, weight.shapes, strict=True)
            if name not in state_dict or state_dict[name].shape != shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(
                f"state dict does not fit stage {self.stage} of {self._name}: {'; '.join(problems[:3])}{more}: "
                f"load weights of the same architecture and configuration"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(self._weights[name].fuse(state_dict, self._group.rank()))

    def export_state_dict(self) -> dict[str, Tensor]:
        """This stage's weights under Hugging Face names; a tied copy carries its source's. See `to_hugging_face`."""
        return self.to_hugging_face({name: parameter.detach() for name, parameter in self.named_parameters()})

    def to_hugging_face(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What goes with parameters of this stage, such as their gradients, under Hugging Face names and shapes.

        Whole on every tensor-parallel rank; all of them call this at once. Views of the tensors where that can be.
        """
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            weight = self._weights[name]
            shards = [tensor]
            if weight.shard_dim is not None and self._group.size() > 1:
                shards = [torch.empty_like(tensor) for _ in range(self._group.size())]
                with communication.naming(f"rank {dist.get_rank()}: gathering the shards of {name}"):
                    dist.all_gather(shards, tensor.contiguous(), group=self._group)
            whole |= weight.split(shards)
        return whole

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)

    def _share_head_norms(self) -> None:
        """Add up over ranks the gradients of the norms within heads: each rank sees its own heads only."""

        def summed(gradient: Tensor) -> Tensor:
            total = gradient.clone()
            communication.all_reduce_sum(total, self._group, "gradients of query and key norms")
            return total

        for name, parameter in self.named_parameters():
            if "q_layernorm" in name or "k_layernorm" in name:
                parameter.register_hook(summed)

    def _global_name(self, name: str) -> str:
        """The whole model's name of a parameter of this stage."""
        if self._is_tied and name == HEAD:
            return EMBEDDING
        if not name.startswith(LAYERS_PREFIX):
            return name
        layer, _, rest = name.removeprefix(LAYERS_PREFIX).partition(".")
        return f"{LAYERS_PREFIX}{int(layer) + self.layer_range[0]}.{rest}"
