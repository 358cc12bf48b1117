"""A stage of megatron-core layers with the weights of a Hugging Face Llama, Qwen2 or Qwen3, tensor-parallel if asked.

Its parameters are megatron-core's, under megatron-core's names with layers numbered in the whole model: an optimizer
must see the tensors that autograd does, and query, key and value are one matrix here. Weights, and what else goes with
them element by element, come from and go to Hugging Face names at the edges.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fuse.intrastage import communication
from fuse.intrastage.gradient_checkpointing import recompute_in_backward
from fuse.intrastage.in_flight import InFlight
from fuse.intrastage.layer_range import checked_layer_range, global_name
from fuse.intrastage.megatron_head import VocabularyHead
from fuse.intrastage.megatron_model import RotaryAngles, attention_mask, build_model, lone_group
from fuse.intrastage.megatron_parallel import take_over_parallel_layers
from fuse.intrastage.megatron_support import check_frozen, check_supported
from fuse.intrastage.megatron_weights import EMBEDDING, HEAD, LAYERS_PREFIX, FusedWeight, fused_weights
from fuse.intrastage.split_backward import SplitBackward
from fuse.intrastage.stage import Exported, Readout
from fuse.intrastage.transformers_stage import head_of, without_memory
from fuse.micro_batch import Loss, Metrics, MicroBatch
from fuse.state_dict import check_state_dict


class MegatronStage:
    """Stage `stage` of `num_stages` of a Hugging Face model; see `fuse.intrastage.stage.TrainedStage`.

    model_class, config: a causal language model's or sequence classifier's; the configuration is never changed.
    loss: used by the last stage. Its head gives whole logits, or is a `VocabularyHead` to take shards from.
    layer_range: the [start, stop) of the layers kept; even by default. All stages' ranges must tile the layers.
    autocast: run forward and backward, and send hidden states, in this type (bfloat16); parameters stay float32.
    split_backward: backwards may come as `backward_input` and `backward_weight`; a whole one is the same bit for bit.
    tensor_group: the ranks that share this stage's matrices; they do the same calls in the same order, and each gets
        all of the hidden states. None: this rank alone.

    Parameters are uninitialised until `load_state_dict`. Hidden states between stages are those of
    `TransformersStage`, so a pipeline may mix both.

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
        split_backward: bool = False,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_supported(config)
        self.stage, self.num_stages = stage, num_stages
        self._loss = loss
        self.metrics: dict[int, Metrics] = {}
        self._device = torch.device(device)
        self._autocast = autocast
        self._group = lone_group() if tensor_group is None else tensor_group

        blueprint = without_memory(model_class, copy.deepcopy(config))
        source: Any = blueprint.config
        num_layers: int = source.num_hidden_layers
        self._name = model_class.__name__
        self.layer_range = start, stop = checked_layer_range(
            self._name, num_layers, layer_range, stage=stage, num_stages=num_stages, min_layers=1
        )
        self._hidden_size: int = source.hidden_size
        self._rotary = RotaryAngles(blueprint, self._device)
        self._weights: Mapping[str, FusedWeight] = fused_weights(
            {name: parameter.shape for name, parameter in blueprint.named_parameters()},
            num_query_groups=source.num_key_value_heads,
            num_shards=self._group.size(),
        )
        self.model_shapes: Mapping[str, torch.Size] = _source_shapes(self._weights.values())
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
        split = SplitBackward(self.model)
        take_over_parallel_layers(self.model, split, self._group, f"stage {stage} of {self._name}")
        self._in_flight = InFlight(split if split_backward else None)
        if gradient_checkpointing:
            recompute_in_backward(self.model.decoder.layers)
        if self._group.size() > 1:
            self._share_head_norms()

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
        dtype = self._autocast or torch.float32
        return torch.empty(*micro_batch.input_ids.shape, self._hidden_size, dtype=dtype, device=self._device)

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        assert (stage_input is None) == self.is_first
        with self._precision():
            output = self._run(micro_batch, None if stage_input is None else stage_input.requires_grad_(True))
            if self.is_last:
                output, self.metrics[index] = self._loss(micro_batch.selected(output), self._head, micro_batch)
        self._in_flight.add(index, stage_input, output)
        return None if self.is_last else output.detach()

    def infer(self, micro_batch: MicroBatch, stage_input: Tensor | None, read: Readout) -> Tensor:
        assert (stage_input is None) == self.is_first
        with torch.no_grad(), self._precision():
            output = self._run(micro_batch, stage_input)
            return read(micro_batch.selected(output), self._head, micro_batch) if self.is_last else output

    def _run(self, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor:
        """The layers kept here: [batch, tokens, hidden]."""
        decoder = self.model.decoder
        hidden = None  # [tokens, batch, hidden] inside megatron-core
        if stage_input is None:
            hidden = self.model.embedding(micro_batch.input_ids, None)
            # The residual stream is in one type from the start, so a cut between stages never rounds it.
            hidden = hidden.to(self._autocast or hidden.dtype)
        else:
            decoder.set_input_tensor(stage_input.transpose(0, 1))
        output: Tensor = decoder(
            hidden_states=hidden,
            attention_mask=attention_mask(micro_batch.attention_mask),
            rotary_pos_emb=self._rotary(micro_batch.input_ids.size(1), micro_batch.position_ids),
        ).transpose(0, 1)
        decoder.set_input_tensor(None)
        return output

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        assert (output_grad is None) == self.is_last
        return self._in_flight.backward(index, output_grad)

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        assert (output_grad is None) == self.is_last
        return self._in_flight.backward_input(index, output_grad)

    def backward_weight(self, index: int) -> None:
        self._in_flight.backward_weight(index)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters (tensor-parallel: this rank's shards) under megatron-core's names in the whole model."""
        for name, parameter in self.model.named_parameters():
            yield self._global_name(name), parameter

    def freeze(self, names: Collection[str]) -> None:
        for name, parameter in self.named_parameters():
            sources = self._weights[name].sources
            check_frozen(sources, names)
            parameter.requires_grad_(sources[0] not in names)

    @property
    def tied_names(self) -> frozenset[str]:
        alone = self.num_stages == 1 or not (self.is_first or self.is_last)
        return frozenset({EMBEDDING}) if self._is_tied and not alone else frozenset()

    @property
    def undecayed_names(self) -> frozenset[str]:
        """Biases and normalisations, as `TransformersStage` has them."""
        return frozenset(name for name, _ in self.named_parameters() if "layernorm" in name or name.endswith(".bias"))

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *, kept: Collection[str] = ()) -> None:
        """Copy this stage's weights from a Hugging Face state dict of the whole model, or of a part that has them.

        Pre: none is `kept`, for these are made of others.

        Raises: ValueError when one is missing or has another shape; then nothing was copied.
        """
        assert not kept, "weights of another form cannot be adopted"
        check_state_dict(state_dict, self.stage_shapes, f"stage {self.stage} of {self._name}", may_have_more=True)
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, tensor in self.from_hugging_face(state_dict):
                own[name].copy_(tensor)

    def export_weights(
        self, dtype: torch.dtype = torch.float32, part: Exported = "whole"
    ) -> Iterator[tuple[str, Tensor]]:
        """Of models without adapters, so that what is merged is the whole."""
        for name, parameter in self._exported(part):
            yield from self._weights[name].split(self._whole(name, parameter.detach().to(dtype)))

    def exported_shapes(self, part: Exported = "whole") -> Mapping[str, torch.Size]:
        return _source_shapes(self._weights[name] for name, _ in self._exported(part))

    def _exported(self, part: Exported) -> Iterator[tuple[str, nn.Parameter]]:
        left_out = frozenset[str]() if self.is_first else self.tied_names
        own = ((name, one) for name, one in self.named_parameters() if name not in left_out)
        return ((name, one) for name, one in own if part != "trained" or one.requires_grad)

    @property
    def sharded_names(self) -> frozenset[str]:
        if self._group.size() == 1:
            return frozenset()
        return frozenset(name for name, _ in self.named_parameters() if self._weights[name].shard_dim is not None)

    @property
    def stage_shapes(self) -> Mapping[str, torch.Size]:
        return _source_shapes(self._weights[name] for name, _ in self.named_parameters())

    def from_hugging_face(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        shard = self._group.rank()
        return (
            (name, weight.fuse(tensors, shard))
            for name, weight in ((name, self._weights[name]) for name, _ in self.named_parameters())
            if weight.sources[0] in tensors
        )

    def to_hugging_face(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            whole |= self._weights[name].split(self._whole(name, tensor))
        return whole

    def _whole(self, name: str, shard: Tensor) -> Tensor:
        """What goes with a parameter, from this rank's shard of it and the others'."""
        weight = self._weights[name]
        if weight.shard_dim is None or self._group.size() == 1:
            return shard
        size = self._group.size()
        shards = shard.new_empty(size * shard.shape[0], *shard.shape[1:])
        with communication.naming(f"rank {dist.get_rank()}: gathering the shards of {name}"):
            dist.all_gather_into_tensor(shards, shard.contiguous(), group=self._group)
        shape = shard.shape
        del shard  # joining by columns makes a second whole one
        return weight.join(shards.view(size, *shape))

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
        return global_name(name, LAYERS_PREFIX, self.layer_range[0])


def _source_shapes(weights: Iterable[FusedWeight]) -> dict[str, torch.Size]:
    return {name: shape for weight in weights for name, shape in zip(weight.sources, weight.shapes, strict=True)}
