"""Native kernels against their torch references, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fuse.algorithms.batch import Segments
from fuse.benchmarks.gpu.setup import Row, Setup
from fuse.benchmarks.measure import interleave, median_ms
from fuse.ops import gae, kv_blocks, linear_logprob, quantized_linear, sampling, shaped_gae

_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """difference: of the results of `kernel` and `reference`, in numbers that are comparable to `bound`."""

    name: str
    implementation: str
    kernel: Callable[[], Any]
    reference: Callable[[], Any]
    difference: Callable[[Any, Any], float]
    bound: float


def check(setup: Setup) -> Iterator[Row]:
    """A row for each kernel; only native code passes, for a reference equals itself."""
    for case in cases(torch.device(setup.device), small=setup.small):
        difference = case.difference(case.kernel(), case.reference())
        functions = {"kernel": case.kernel, "reference": case.reference}
        ms = {name: median_ms(seconds) for name, seconds in interleave(functions, _REPEATS).items()}
        yield Row(
            name=f"kernel {case.name}",
            measured=f"off by {difference:.2g}",
            bound=f"{case.bound:.2g}",
            ok=difference <= case.bound and case.implementation.startswith("native"),
            detail=f"{case.implementation}: {ms['kernel']:.3f} ms, reference {ms['reference']:.3f} ms",
        )


def run_small(device: str) -> None:
    """Each kernel once on few numbers: what a sanitizer watches."""
    for case in cases(torch.device(device), small=True):
        assert case.implementation.startswith("native"), f"{case.name}: {case.implementation}"
        difference = case.difference(case.kernel(), case.reference())
        assert difference <= case.bound, f"{case.name} is off by {difference}"


def cases(device: torch.device, *, small: bool) -> Iterator[Case]:
    """All kernels, each on tensors of its own."""
    yield from _sampling_cases(device, *((3, 301) if small else (64, 151_936)))
    yield from _gae_cases(device, *((5, 70) if small else (512, 2048)))
    yield from _logprob_cases(device, *((9, 8, 3001) if small else (1024, 1536, 151_936)))
    yield from _quantized_cases(device, *((9, 13, 48) if small else (8, 8960, 1536)))
    yield from _kv_cases(device, *((2, 17) if small else (28, 1024)))


def _sampling_cases(device: torch.device, rows: int, vocab_size: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(rows, vocab_size, generator=_generator(device), device=device)).to(dtype)
        temperatures = torch.linspace(0.0, 2.0, rows, device=device)
        ids = torch.arange(rows, device=device)
        arguments = (logits, temperatures, ids, 3 * ids, ids)

        def difference(
            ours: Sequence[Tensor], theirs: Sequence[Tensor], arguments: tuple[Tensor, ...] = arguments
        ) -> float:
            """By how much tokens fall short of the best with noise, and log-probabilities of the same tokens differ."""
            logits, temperatures, seeds, sample_ids, positions = arguments
            greedy = (temperatures == 0)[:, None]
            scaled = logits.float() / torch.where(greedy, 1.0, temperatures[:, None])
            noise = sampling.gumbel_noise(seeds, sample_ids, positions, logits.shape[1])
            noisy = scaled + noise.masked_fill_(greedy, 0.0)
            (tokens, logprobs), (best, _) = ours, theirs
            gap = noisy.gather(1, best[:, None]) - noisy.gather(1, tokens[:, None])
            expected = scaled.log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
            return max(float(gap.abs().max()), float((logprobs - expected).abs().max()))

        yield Case(
            name=f"sample_tokens, {_name(dtype)}",
            implementation=sampling.implementation(logits),
            kernel=lambda arguments=arguments: sampling.sample_tokens(*arguments),  # type: ignore[misc]
            reference=lambda arguments=arguments: sampling.sample_tokens_reference(*arguments),  # type: ignore[misc]
            difference=difference,
            bound=1e-4,
        )


def _gae_cases(device: torch.device, num_samples: int, max_tokens: int) -> Iterator[Case]:
    lengths = torch.randint(1, max_tokens + 1, (num_samples,), generator=torch.Generator().manual_seed(0))
    segments = Segments.from_lengths(lengths.tolist(), max_tokens)
    offsets, value_offsets = segments.token_offsets.to(device), segments.value_offsets.to(device)
    generator = _generator(device)
    logprobs, other = torch.randn(2, int(offsets[-1]), generator=generator, device=device)
    values = torch.randn(int(value_offsets[-1]), generator=generator, device=device)
    scores = torch.randn(num_samples, generator=generator, device=device)
    yield Case(
        name="gae",
        implementation=gae.implementation(logprobs),
        kernel=lambda: gae.gae(logprobs, other, offsets, 0.99, 0.95),
        reference=lambda: gae.gae_reference(logprobs, other, offsets, 0.99, 0.95),
        difference=_relative,
        bound=1e-6,
    )
    shaped = (logprobs, other, scores, values, offsets, value_offsets)
    options: dict[str, Any] = {"kl_coef": 0.05, "estimator": "k3", "whiten_rewards": True, "gamma": 0.99, "lam": 0.95}
    yield Case(
        name="shaped_gae",
        implementation=shaped_gae.implementation(logprobs),
        kernel=lambda: shaped_gae.shaped_gae(*shaped, **options),
        reference=lambda: shaped_gae.shaped_gae_reference(*shaped, **options),
        difference=_relative,
        bound=1e-4,
    )


def _logprob_cases(device: torch.device, num_tokens: int, hidden_size: int, vocab_size: int) -> Iterator[Case]:
    """Log-probabilities, entropies, and the gradients of both, against float32 all the way."""
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        generator = _generator(device)
        hidden = torch.randn(num_tokens, hidden_size, generator=generator, device=device).to(dtype).requires_grad_()
        weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device) * hidden_size**-0.5
        weight = weight.to(dtype).requires_grad_()
        targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator, device=device)

        def kernel(inputs: tuple[Tensor, Tensor] = (hidden, weight), targets: Tensor = targets) -> tuple[Tensor, ...]:
            logprobs, entropies = linear_logprob.linear_logprob(*inputs, None, targets, 0.7)
            grads = torch.autograd.grad(logprobs.sum() - 0.1 * entropies.sum(), inputs)
            return logprobs, entropies, *grads

        def reference(
            inputs: tuple[Tensor, Tensor] = (hidden, weight), targets: Tensor = targets
        ) -> tuple[Tensor, ...]:
            hidden, weight = (one.detach().float().requires_grad_() for one in inputs)
            logprobs, entropies = linear_logprob.linear_logprob_reference(hidden, weight, None, targets, 0.7)
            grads = torch.autograd.grad(logprobs.sum() - 0.1 * entropies.sum(), (hidden, weight))
            return logprobs, entropies, *grads

        yield Case(
            name=f"linear_logprob, {_name(dtype)}",
            implementation=linear_logprob.implementation(hidden),
            kernel=kernel,
            reference=reference,
            difference=_relative,
            bound=bound,
        )


def _quantized_cases(device: torch.device, rows: int, outs: int, width: int) -> Iterator[Case]:
    """Linear layers of drafts; their reference rounds the weights that it makes to the inputs' type."""
    generator = _generator(device)
    weight = torch.randn(outs, width, generator=generator, device=device) * width**-0.5
    inputs = torch.randn(rows, width, generator=generator, device=device)
    kinds = (
        ("int8_linear", quantized_linear.INT8, quantized_linear.int8_linear_reference),
        ("int4_linear", quantized_linear.INT4, quantized_linear.int4_linear_reference),
    )
    for (name, kind, reference), dtype in product(kinds, quantized_linear.NATIVE_DTYPES[device.type]):
        arguments = (inputs.to(dtype), *kind.quantize(weight))
        yield Case(
            name=f"{name}, {_name(dtype)}",
            implementation=quantized_linear.implementation(arguments[0]),
            kernel=lambda linear=kind.linear, arguments=arguments: [linear(*arguments)],  # type: ignore[misc]
            reference=lambda reference=reference, arguments=arguments: [reference(*arguments)],  # type: ignore[misc]
            difference=_relative,
            bound=1e-3 if dtype is torch.float32 else 0.02,
        )


def _kv_cases(device: torch.device, num_layers: int, num_tokens: int) -> Iterator[Case]:
    shape = (4, 2, num_tokens + 3, 128)
    buffers = [
        torch.randn(shape, generator=_generator(device), device=device).bfloat16() for _ in range(2 * num_layers)
    ]
    yield Case(
        name="kv_gather",
        implementation=kv_blocks.implementation(buffers[0]),
        kernel=lambda: kv_blocks.gather(buffers, 2, num_tokens),
        reference=lambda: kv_blocks.gather_reference(buffers, 2, num_tokens),
        difference=_relative,
        bound=0.0,
    )
    blocks = [buffer[1, :, :num_tokens].contiguous() for buffer in buffers]

    def scattered(scatter: Callable[..., None]) -> list[Tensor]:
        copies = [buffer.clone() for buffer in buffers]
        scatter(blocks, copies, 3)
        return copies

    yield Case(
        name="kv_scatter",
        implementation=kv_blocks.implementation(buffers[0]),
        kernel=lambda: scattered(kv_blocks.scatter),
        reference=lambda: scattered(kv_blocks.scatter_reference),
        difference=_relative,
        bound=0.0,
    )


def _relative(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of any, in parts of the largest number of its tensor."""
    return max(
        float((one.detach().float() - other.detach().float()).abs().max() / other.detach().float().abs().max())
        for one, other in zip(ours, theirs, strict=True)
    )


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
