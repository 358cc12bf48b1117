"""Whether the variants of `fuse bench iteration` fit into memory side by side."""

from __future__ import annotations

from transformers import PreTrainedModel

from fuse.benchmarks.iteration.workload import Workload
from fuse.benchmarks.measure import proc_bytes

# In multiples of a model's weights: weights, gradients and AdamW's two moments.
_TRAINED = 4
_FP32_BYTES = 4
_PROCESS_BYTES = 400_000_000
"""Of a worker without a model, beyond what processes share: Python, torch and what they have loaded."""
_LAYER_VECTORS = 24
"""What a gated layer keeps of a token for its backward pass, in vectors of the hidden size; others keep less."""
_LOGITS_COPIES = 6
"""Of a micro-batch's logits and what a loss makes of them, where they are computed whole."""


def fuse_bytes(workload: Workload, num_devices: int) -> int:
    """What this project's trainer takes beside the models that it is given, on CPUs: an estimate.

    Stages that are trained, and what they keep of the micro-batches under way. Once for all devices the weights of
    whatever computes: those in use, and of trained models those that replace them.
    """
    models = workload.models
    trained = model_bytes(models.policy) + model_bytes(models.critic)
    computing = 2 * trained + model_bytes(models.reference) + model_bytes(models.reward)
    # Of each model, stage k of n keeps n - k micro-batches: (n + 1) / 2 of them whole.
    activations = (num_devices + 1) * _activation_bytes(workload)
    return 2 * num_devices * _PROCESS_BYTES + _TRAINED * trained + computing + activations


def trl_bytes(workload: Workload) -> int:
    """What TRL's trainer takes beside the models that it is given: two that are trained, one micro-batch, and logits.

    Logits are kept for each token that a batch generates, and computed once more for its prompts and responses.
    """
    models = workload.models
    trained = model_bytes(models.policy) + model_bytes(models.critic)
    longest = _longest(workload)
    tokens = workload.batch * (longest + workload.max_new_tokens) + _LOGITS_COPIES * workload.micro_batch * longest
    vocabulary: int = models.policy.config.get_text_config().vocab_size
    logits = tokens * vocabulary * _FP32_BYTES
    return _PROCESS_BYTES + _TRAINED * trained + 2 * _activation_bytes(workload) + logits


def _activation_bytes(workload: Workload) -> int:
    """Of a whole policy on one micro-batch."""
    config = workload.models.policy.config.get_text_config()
    vectors = workload.micro_batch * _longest(workload) * config.num_hidden_layers * _LAYER_VECTORS
    return int(vectors * config.hidden_size * _FP32_BYTES)


def _longest(workload: Workload) -> int:
    """Tokens of the longest prompt and response together."""
    return max(map(len, workload.prompts)) + workload.max_new_tokens


def model_bytes(model: PreTrainedModel) -> int:
    """Of its parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def available_bytes() -> int:
    """Memory of this machine that processes can still take."""
    return proc_bytes("meminfo", "MemAvailable")
