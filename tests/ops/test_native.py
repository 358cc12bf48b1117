"""Which implementation serves: by device, type and build, and every operation without any native code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fuse import ops
from fuse.ops import native
from fuse.ops.decode_attention import decode_attention
from fuse.ops.gae import gae
from fuse.ops.kv_blocks import gather, scatter
from fuse.ops.linear_logprob import linear_logprob
from fuse.ops.quantized_linear import int4_linear, int8_linear, quantize_int4, quantize_int8
from fuse.ops.sampling import sample_tokens
from fuse.ops.shaped_gae import shaped_gae

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MISSING = "fuse._native does not load (no such file); build it with `make setup`"


def built(monkeypatch: pytest.MonkeyPatch, *, with_cuda: bool) -> None:
    extension = SimpleNamespace(has_cuda=with_cuda)
    monkeypatch.setattr(native, "extension", lambda: (extension, "fuse._native is built"))


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (native, *(getattr(ops, name) for name in dir(ops))):
        if hasattr(module, "extension"):
            monkeypatch.setattr(module, "extension", lambda: (None, MISSING))


@pytest.mark.parametrize(
    ("device", "dtype", "has_cuda", "with_cuda", "choice"),
    [
        (CPU, torch.float32, False, False, "native C++"),
        (CPU, None, False, False, "native C++"),
        (CPU, torch.float16, False, False, "torch reference: there is no native code for torch.float16 on cpu"),
        (CUDA, torch.float32, True, True, "native CUDA"),
        (CUDA, None, True, True, "native CUDA"),
        (CUDA, torch.float32, True, False, f"torch reference: {native.NOT_BUILT}"),
        (CUDA, torch.float32, False, True, "torch reference: there is no native code for torch.float32 on cuda"),
        (CUDA, torch.float16, True, True, "torch reference: there is no native code for torch.float16 on cuda"),
        (CUDA, None, False, True, "torch reference: there is no native code on cuda"),
    ],
)
def test_chooses_by_device_type_and_build(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    dtype: torch.dtype | None,
    has_cuda: bool,
    with_cuda: bool,
    choice: str,
) -> None:
    built(monkeypatch, with_cuda=with_cuda)
    module, reason = native.choose(device, dtype, (torch.float32,), has_cuda=has_cuda)
    assert reason == choice
    assert (module is None) == choice.startswith("torch reference")


@pytest.mark.parametrize("operation", ["gae", "kv_blocks", "linear_logprob", "quantized_linear", "sampling"])
def test_gpus_that_a_build_leaves_out_are_named(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, with_cuda=False)
    description = getattr(ops, operation).describe()
    assert "on GPUs" in description
    assert native.NOT_BUILT in description


@pytest.mark.parametrize(
    ("device", "dtype", "has_cuda"), [(CUDA, torch.float32, True), (CUDA, torch.float64, False), (CPU, None, True)]
)
def test_logprobs_are_served_by_cuda_code_in_some_types(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype | None, has_cuda: bool
) -> None:
    built(monkeypatch, with_cuda=True)
    example = SimpleNamespace(device=device, dtype=dtype or torch.float64)
    assert ops.linear_logprob.implementation(example).startswith("native") == has_cuda


@pytest.mark.parametrize(
    ("device", "dtype", "choice"),
    [(CUDA, torch.bfloat16, "native CUDA"), (CUDA, torch.float16, "torch"), (CPU, torch.bfloat16, "torch")],
)
def test_products_of_few_bits_are_served_in_other_types_on_gpus(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, choice: str
) -> None:
    built(monkeypatch, with_cuda=True)
    assert ops.quantized_linear.implementation(SimpleNamespace(device=device, dtype=dtype)).startswith(choice)


def test_every_operation_says_why_torch_serves(no_extension: None) -> None:
    for operation, description in ops.describe().items():
        assert MISSING in description, operation


def test_an_implementation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    native.log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "fuse.ops"):
        for _ in range(2):
            gae(torch.ones(2), torch.ones(2), torch.tensor([0, 2]), 1.0, 1.0)
    assert [record.getMessage() for record in caplog.records] == ["gae: native C++"]


def scattered(buffers: list[Tensor]) -> tuple[Tensor, ...]:
    copies = [buffer.clone() for buffer in buffers]
    scatter(gather(buffers, 1, 3), copies, 0)
    return tuple(copies)


def calls() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)
    rows, other, weight = torch.randn(3, 6, 8, generator=generator)
    cache = torch.randn(2, 4, 2, 5, 8, generator=generator)
    offsets, ids = torch.tensor([0, 2, 6]), torch.arange(6)
    return {
        "gae": lambda: gae(rows[:, 0], rows[:, 1], offsets, 0.9, 0.8),
        "shaped_gae": lambda: shaped_gae(
            rows[:, 0], rows[:, 1], rows[:2, 2], rows[:, 3], offsets, offsets,
            kl_coef=0.1, estimator="k3", whiten_rewards=True, gamma=0.9, lam=0.8,
        ),
        "linear_logprob": lambda: linear_logprob(rows, weight, other[:, 0], ids, 0.7),
        "sample_tokens": lambda: sample_tokens(rows, torch.tensor([0.0, 1, 2, 1, 1, 0.5]), ids, ids, ids),
        "decode_attention": lambda: (
            decode_attention(cache[0, :, :, 0], cache[0], cache[1], torch.tensor([1, 5, 3, 2]), 0.3),
        ),
        "int4_linear": lambda: (int4_linear(rows.sign(), *quantize_int4(weight)),),  # whose rounding is exact
        "int8_linear": lambda: (int8_linear(rows.sign(), *quantize_int8(weight)),),
        "kv_gather": lambda: gather(list(cache), 1, 3),
        "kv_scatter": lambda: scattered(list(cache)),
    }  # fmt: skip


@pytest.mark.parametrize("operation", calls())
def test_operations_work_without_native_code(operation: str, request: pytest.FixtureRequest) -> None:
    expected = calls()[operation]()
    request.getfixturevalue("no_extension")
    for ours, native_result in zip(calls()[operation](), expected, strict=True):
        torch.testing.assert_close(ours, native_result, rtol=1e-5, atol=1e-5)


BUFFERS = [torch.zeros(2, 3, 4, 5) for _ in range(2)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather(BUFFERS, 2, 1), "no row 2"),
        (lambda: gather(BUFFERS, 0, 5), "5 tokens do not fit"),
        (lambda: gather([BUFFERS[0], BUFFERS[1].half()], 0, 1), "torch.float16 beside torch.float32"),
        (lambda: scatter(BUFFERS[0][:1], BUFFERS, 0), "1 blocks do not fill 2 buffers"),
        (lambda: scatter([torch.zeros(3, 2, 4)] * 2, BUFFERS, 0), r"\[3, 2, 4\]"),
        (lambda: decode_attention(torch.zeros(2, 4, 8)[..., ::2], *torch.zeros(2, 2, 4, 5, 4), torch.ones(2), 1.0),
         "contiguous"),
        (lambda: decode_attention(torch.zeros(2, 4, 4), *torch.zeros(2, 2, 4, 5, 8), torch.ones(2), 1.0),
         "head sizes differ"),
    ],
)  # fmt: skip
def test_native_code_is_never_given_what_it_cannot_read(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        call()
