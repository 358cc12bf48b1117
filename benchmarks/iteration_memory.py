"""Whether the variants of `fuse bench iteration` fit into memory side by side."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from fuse.benchmarks.iteration_workload import Models, Workload

# In multiples of a model's weights: weights, gradients and AdamW's two moments.
_TRAINED = 4
_FP32_BYTES = 4
_PROCESS_BYTES = 500_000_000
"""Of a worker without a model: Python, torch and what they have loaded."""


def fuse_bytes(models: Models, num_devices: int) -> int:
    """What this project's trainer takes beside the models that it is given, on CPUs: an estimate, of weights alone.

    Stages that are trained, and once for all devices the weights of whatever computes: those in use, and of trained
    models those that replace them.
    """
    trained = model_bytes(models.policy) + model_bytes(models.critic)
    computing = 2 * trained + model_bytes(models.reference) + model_bytes(models.reward)
    return 2 * num_devices * _PROCESS_BYTES + _TRAINED * trained + computing


def trl_bytes(workload: Workload) -> int:
    """What TRL's trainer takes: a copy of all models to read from, two that are trained, and the logits of a batch.

    These are kept for each token that is generated, and computed once more for prompts and responses.
    """
    models = workload.models
    trained = model_bytes(models.policy) + model_bytes(models.critic)
    read = trained + model_bytes(models.reference) + model_bytes(models.reward)
    prompt_tokens = max(map(len, workload.prompts))
    vocabulary: int = models.policy.config.get_text_config().vocab_size
    logits = workload.batch * (prompt_tokens + 2 * workload.max_new_tokens) * vocabulary * _FP32_BYTES
    return _PROCESS_BYTES + _TRAINED * trained + read + logits


def model_bytes(model: PreTrainedModel) -> int:
    """Of its parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def available_bytes() -> int:
    """Memory of this machine that processes can still take."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])
