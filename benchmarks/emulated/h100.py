"""Costs of Llamas on 8 H100s, derived from their data sheets: nothing here is measured.

A device is a host of 8 H100 SXM that share every matrix of a model (tensor parallelism of 8, in bf16), with 8 x 400
Gbit/s to other hosts. Of P parameters, L layers and hidden size H:

    decode step     2 P bytes of weights from memory, and 2 L all-reduces
    sample          2 P FLOPs, beside reading the weights
    context token   its keys and values from memory, 4 L H bytes (multi-head attention)
    token           2 P FLOPs forward; as much for the gradients of inputs, and for those of weights
    call, operation all-reduces of all layers: 2 L forward, 2 L for the gradients of inputs
    message         2 H bytes a token over the network
    optimizer step  28 bytes a parameter from and to memory: gradient, weight, master weight and both moments
    new weights     2 P bytes over the network

Attention's own products are left out: at 1,000 tokens of context they are 2 % of a 33B model's. Efficiencies, as shares
of the data sheet, are those at which large kernels usually run.
"""

from __future__ import annotations

from dataclasses import dataclass

from fuse.benchmarks.emulated.costs import Affine, DecodeCosts, EmulatedCosts, TrainingCosts

_GPUS = 8
_FLOPS = _GPUS * 989e12
"""bf16 without sparsity, per second."""
_MEMORY_BYTES = _GPUS * 3.35e12
_NETWORK_BYTES = _GPUS * 50e9
_MEMORY_EFFICIENCY, _NETWORK_EFFICIENCY = 0.6, 0.5
_DECODE_EFFICIENCY, _DENSE_EFFICIENCY = 0.5, 0.4
"""Of FLOPs: in decode steps, which overlap them with reading weights; and in prefill, scoring and training."""
_ALL_REDUCE_S = 16e-6
_MESSAGE_S = 20e-6
"""Until the first byte arrives."""
_OPTIMIZER_BYTES = 28
_VOCABULARY = 32_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """A first-generation Llama: multi-head attention, gated layers, untied embeddings."""

    layers: int
    hidden: int
    gate: int

    @property
    def parameters(self) -> int:
        """Norms left out."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.gate) + 2 * _VOCABULARY * self.hidden

    @property
    def forward(self) -> Affine:
        """A pass over the whole model on one device."""
        return Affine(
            fixed_s=2 * self.layers * _ALL_REDUCE_S,
            token_s=2 * self.parameters / (_FLOPS * _DENSE_EFFICIENCY),
        )

    @property
    def training(self) -> TrainingCosts:
        return TrainingCosts(
            forward=self.forward,
            input_grad=self.forward,
            weight_grad=Affine(fixed_s=0.0, token_s=self.forward.token_s),
            optimizer_s=_OPTIMIZER_BYTES * self.parameters / (_MEMORY_BYTES * _MEMORY_EFFICIENCY),
            forward_flops_per_token=2 * self.parameters,
        )

    @property
    def decode(self) -> DecodeCosts:
        memory = _MEMORY_BYTES * _MEMORY_EFFICIENCY
        return DecodeCosts(
            step_s=2 * self.parameters / memory + 2 * self.layers * _ALL_REDUCE_S,
            sample_s=2 * self.parameters / (_FLOPS * _DECODE_EFFICIENCY),
            context_s=4 * self.layers * self.hidden / memory,
        )


_13B = Llama(layers=40, hidden=5120, gate=13824)
_33B = Llama(layers=60, hidden=6656, gate=17920)
_65B = Llama(layers=80, hidden=8192, gate=22016)

_PAIRS = {
    "h100-33b": (_33B, _33B),
    "h100-13b-33b": (_13B, _33B),
    "h100-33b-13b": (_33B, _13B),
    "h100-65b-33b": (_65B, _33B),
}
"""Actor and reference; critic and reward model."""
NAMES = tuple(_PAIRS)


def costs_named(name: str) -> EmulatedCosts:
    """Of one of `NAMES`."""
    actor, critic = _PAIRS[name]
    network = _NETWORK_BYTES * _NETWORK_EFFICIENCY
    return EmulatedCosts(
        name=name,
        device="8 H100 SXM, from their data sheet",
        device_flops_per_s=_FLOPS,
        decode=actor.decode,
        prefill=actor.forward,
        scoring={"reference": actor.forward, "critic": critic.forward, "reward": critic.forward},
        training={"actor": actor.training, "critic": critic.training},
        message=Affine(fixed_s=_MESSAGE_S, token_s=2 * max(actor.hidden, critic.hidden) / network),
        weights_s=2 * actor.parameters / network,
    )
