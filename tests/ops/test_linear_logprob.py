"""Log-probabilities in chunks: against log_softmax of all logits, whatever the chunks, dtypes, layouts and ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fuse.ops import describe, linear_logprob, logit_chunk
from fuse.ops.linear_logprob import VocabularyShard, linear_logprob_reference
from fuse.ops.logprob import token_logprobs

TEMPERATURE = 0.7
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}
SMALL, LARGE = ((0, 5), (1, 1), (13, 11)), ((1, 3000), (33, 2065))  # tokens and vocabulary
CHUNKS = (None, (16, 1024), (1, 1000))


def example(
    num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float32, *, bias: bool = True, width: int = 32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((num_tokens, width), (vocab_size, width), (vocab_size,))
    )
    return hidden, weight, offset if bias else None, torch.randint(0, vocab_size, (num_tokens,), generator=generator)


def results_and_gradients(function: Callable[[], tuple[Tensor, Tensor]], *inputs: Tensor | None) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradients of a sum with other weights for each."""
    logprobs, entropy = function()
    factors = torch.randn(2, len(logprobs), generator=torch.Generator().manual_seed(1))
    loss = (logprobs * factors[0] + entropy * factors[1]).sum()
    gradients = torch.autograd.grad(loss, [one for one in inputs if one is not None])
    return [logprobs.detach(), entropy.detach(), *gradients]


def difference(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, as a share of the largest element of its tensor; of 1e-3, where all that is next to nothing."""
    assert [one.dtype for one in ours] == [one.dtype for one in expected]
    assert [one.shape for one in ours] == [one.shape for one in expected]
    scales = [one.abs().max().clamp(min=1e-3) for one in expected if one.numel()]
    errors = [(one - other).abs().max() for one, other in zip(ours, expected, strict=True) if one.numel()]
    return max((float(error / scale) for error, scale in zip(errors, scales, strict=True)), default=0.0)


@pytest.fixture(params=["native", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two that can reduce a chunk."""
    if request.param == "torch":
        choice = None, "torch reference: as a test asks for"
        monkeypatch.setattr(logit_chunk, "choose", lambda *arguments, **options: choice)
    name: str = request.param
    return name


def test_native_code_serves() -> None:
    assert "native C++ for float32, bfloat16 and float64 on CPU" in describe()["linear_logprob"]
    assert linear_logprob.implementation(torch.zeros(1, dtype=torch.bfloat16)) == "native C++"


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "chunk"),
    [
        *((*shape, chunk) for shape in SMALL for chunk in (*CHUNKS, (7, 5))),
        *((*shape, chunk) for shape in LARGE for chunk in (*CHUNKS, (7, 500))),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_log_softmax_of_all_logits(
    implementation: str, dtype: torch.dtype, num_tokens: int, vocab_size: int, chunk: tuple[int, int] | None, bias: bool
) -> None:
    inputs = example(num_tokens, vocab_size, dtype, bias=bias)
    ours = results_and_gradients(lambda: linear_logprob.linear_logprob(*inputs, TEMPERATURE, chunk=chunk), *inputs[:3])
    reference = results_and_gradients(lambda: linear_logprob_reference(*inputs, TEMPERATURE), *inputs[:3])
    assert difference(ours, reference) <= TOLERANCE[dtype]


@given(
    num_tokens=st.integers(0, 12),
    vocab_size=st.integers(1, 60),
    chunk=st.tuples(st.integers(1, 12), st.integers(1, 60)),
    temperature=st.floats(0.05, 20),
)
def test_equals_the_reference_at_any_chunk_and_temperature(
    num_tokens: int, vocab_size: int, chunk: tuple[int, int], temperature: float
) -> None:
    inputs = example(num_tokens, vocab_size, torch.float64, width=4)
    ours = results_and_gradients(lambda: linear_logprob.linear_logprob(*inputs, temperature, chunk=chunk), *inputs[:3])
    reference = results_and_gradients(lambda: linear_logprob_reference(*inputs, temperature), *inputs[:3])
    assert difference(ours, reference) <= 1e-10


def test_chunks_change_next_to_nothing() -> None:
    inputs = example(40, 5000)
    results = [
        results_and_gradients(lambda chunk=chunk: linear_logprob.linear_logprob(*inputs, 1.0, chunk=chunk), *inputs[:3])
        for chunk in ((40, 5000), (40, 1024), (16, 2048), (8, 1000))
    ]
    for other in results[1:]:
        assert difference(other[:2], results[0][:2]) <= 1e-6
        assert difference(other[2:], results[0][2:]) <= 1e-5


def test_the_same_call_gives_the_same_bits() -> None:
    inputs = example(40, 5000)
    first, second = (
        results_and_gradients(lambda: linear_logprob.linear_logprob(*inputs, 1.0, chunk=(16, 1024)), *inputs[:3])
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_second_backward_through_the_same_graph_gives_the_same() -> None:
    hidden, weight, bias, targets = example(5, 11)
    logprobs, _ = linear_logprob.linear_logprob(hidden, weight, bias, targets, 1.0)  # one chunk, which is kept
    first = torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logprobs.sum(), (hidden, weight)), first, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [None, (2, 3)])
def test_gradients_are_those_of_finite_differences(implementation: str, chunk: tuple[int, int] | None) -> None:
    hidden, weight, bias, targets = example(5, 11, torch.float64, width=4)
    assert torch.autograd.gradcheck(
        lambda *inputs: linear_logprob.linear_logprob(*inputs, targets, 0.9, chunk=chunk), (hidden, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_adds_to_a_parameter_by_itself(dtype: torch.dtype) -> None:
    """What autograd adds up, of a weight's first rows, twice; products in bfloat16 as well."""
    hidden, weight, _, targets = example(40, 5000)
    expected, own = weight.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    for one, adds_to in ((expected, None), (own, own)):
        for _ in range(2):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logprobs, entropy = linear_logprob.linear_logprob(
                    hidden, one[:4900], None, targets % 4900, 0.7, chunk=(16, 1024), adds_to=adds_to
                )
            (logprobs.sum() + entropy.sum()).backward()
    assert expected.grad is not None
    assert own.grad is not None
    assert difference([own.grad], [expected.grad]) <= 1e-6


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    inputs = dict(zip(("hidden", "weight", "bias"), example(5, 11)[:3], strict=True))
    targets = torch.arange(5)
    expected = torch.autograd.grad(
        linear_logprob_reference(*inputs.values(), targets, 1.0)[0].sum(), list(inputs.values())
    )
    inputs[frozen] = inputs[frozen].detach()
    linear_logprob.linear_logprob(**inputs, targets=targets, temperature=1.0)[0].sum().backward()
    for (name, tensor), gradient in zip(inputs.items(), expected, strict=True):
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-6)


def test_strided_inputs_give_what_their_copies_give() -> None:
    hidden, weight, bias, targets = example(9, 2100)
    views = (hidden.t().contiguous().t(), weight.t().contiguous().t(), bias, torch.stack([targets, targets], 1)[:, 0])
    ours = results_and_gradients(
        lambda: linear_logprob.linear_logprob(*views, TEMPERATURE, chunk=(4, 1024)), *views[:3]
    )
    copies = results_and_gradients(lambda: linear_logprob_reference(hidden, weight, bias, targets, TEMPERATURE),
                                   hidden, weight, bias)  # fmt: skip
    assert difference(ours, copies) <= 1e-5


def test_logits_of_any_size_and_tokens_that_are_ruled_out(implementation: str) -> None:
    """Logits around +-1e4, of which a bias of -inf takes a whole chunk away; the reference's entropy is NaN there."""
    hidden, weight, bias, targets = example(6, 12)
    with torch.no_grad():
        weight.mul_(300)
        assert bias is not None
        bias[:4] = float("-inf")
    targets = targets.clamp(min=4)
    logprobs, entropy = linear_logprob.linear_logprob(hidden, weight, bias, targets, TEMPERATURE, chunk=(3, 2))
    expected = linear_logprob_reference(hidden, weight[4:], bias[4:], targets - 4, TEMPERATURE)
    torch.testing.assert_close(logprobs, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert gradient.isfinite().all()


def test_nan_shows(implementation: str) -> None:
    hidden, weight, bias, targets = example(3, 40)
    with torch.no_grad():
        hidden[1, 0] = float("nan")
    logprobs, entropy = linear_logprob.linear_logprob(hidden, weight, bias, targets, 1.0)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_autocast_computes_products_in_its_type() -> None:
    inputs = example(9, 2100)
    with torch.autocast("cpu", torch.bfloat16):
        ours, reference = (
            results_and_gradients(lambda function=function: function(*inputs, TEMPERATURE), *inputs[:3])
            for function in (linear_logprob.linear_logprob, linear_logprob_reference)
        )
        assert ours[3].dtype == torch.float32, "weights are float32 parameters, so are their gradients"
    assert difference(ours, reference) <= 1e-2
    exact = results_and_gradients(lambda: linear_logprob_reference(*inputs, TEMPERATURE), *inputs[:3])
    assert difference(ours, exact) > 1e-4, "products were in float32"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chunk", [None, (16, 1024), (7, 5), (1, 1000)])
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(0, 5), (1, 1), (13, 11), (33, 2065), (5, 40_001)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gpus_compute_what_cpus_do(
    dtype: torch.dtype, num_tokens: int, vocab_size: int, chunk: tuple[int, int] | None
) -> None:
    hidden, weight, bias, targets = example(num_tokens, vocab_size, dtype)
    reference = results_and_gradients(
        lambda: linear_logprob_reference(hidden, weight, bias, targets, TEMPERATURE), hidden, weight, bias
    )
    inputs = [one.detach().cuda().requires_grad_() for one in (hidden, weight, bias) if one is not None]

    def on_gpu() -> tuple[Tensor, Tensor]:
        logprobs, entropy = linear_logprob.linear_logprob(*inputs, targets.cuda(), TEMPERATURE, chunk=chunk)
        return logprobs.cpu(), entropy.cpu()

    ours = [one.cpu() for one in results_and_gradients(on_gpu, *inputs)]
    assert difference(ours, reference) <= TOLERANCE[dtype]


class Ranks:
    """Collectives between threads."""

    def __init__(self, num_ranks: int) -> None:
        self.tensors: list[Tensor] = [torch.empty(0)] * num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=60)

    def shard(self, rank: int, first_token: int) -> VocabularyShard:
        def combine(tensor: Tensor, reduction: Callable[[Tensor], Tensor]) -> None:
            self.tensors[rank] = tensor.clone()
            self.barrier.wait()
            tensor.copy_(reduction(torch.stack(self.tensors)))
            self.barrier.wait()

        return VocabularyShard(
            first_token=first_token,
            take_maximum=lambda tensor: combine(tensor, lambda parts: parts.amax(0)),
            take_sum=lambda tensor: combine(tensor, lambda parts: parts.sum(0)),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_that_share_a_vocabulary_get_what_one_gets(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = example(17, 90, dtype)
    expected = results_and_gradients(lambda: linear_logprob_reference(hidden, weight, bias, targets, 0.8),
                                     hidden, weight, bias)  # fmt: skip
    ranks, bounds = Ranks(3), (0, 40, 41, 90)

    def run(rank: int) -> list[Tensor]:
        part = slice(bounds[rank], bounds[rank + 1])
        assert bias is not None
        mine = [one.detach().requires_grad_() for one in (hidden, weight[part], bias[part])]
        shard = ranks.shard(rank, bounds[rank])
        return results_and_gradients(
            lambda: linear_logprob.linear_logprob(*mine, targets, 0.8, shard=shard, chunk=(8, 16)), *mine
        )

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    weight_grad, bias_grad = (torch.cat([one[index] for one in found]) for index in (3, 4))
    for one in found:
        assert difference([*one[:3], weight_grad, bias_grad], expected) <= TOLERANCE[dtype]


def test_token_logprobs_never_calls_a_plain_head_and_heeds_others(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, _, _, targets = example(4, 7)
    head = nn.Linear(32, 7)
    expected = linear_logprob_reference(hidden, head.weight, head.bias, targets, 1.0)
    calls: list[str] = []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, rows: calls.append("called") or rows @ self.weight.t())
    torch.testing.assert_close(token_logprobs(hidden, head, targets, 1.0), expected, rtol=1e-5, atol=1e-6)
    assert not calls
    hook = head.register_forward_hook(lambda module, arguments, output: calls.append("hook"))
    token_logprobs(hidden, head, targets, 1.0)
    assert calls == ["called", "hook"]
    hook.remove()
    head._hf_hook = SimpleNamespace()  # as accelerate marks a module whose weights it loads on demand
    token_logprobs(hidden, head, targets, 1.0)
    assert calls == ["called", "hook", "called"]


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((HIDDEN[0], WEIGHT, None, TARGETS, 1.0), r"hidden is \[3\]"),
        ((HIDDEN, WEIGHT[:, :2], None, TARGETS, 1.0), r"weight \[5, 2\]"),
        ((HIDDEN, WEIGHT, torch.zeros(4), TARGETS, 1.0), r"bias is \[4\]"),
        ((HIDDEN, WEIGHT, None, TARGETS[:1], 1.0), r"targets is \[1\]"),
        ((HIDDEN, WEIGHT, None, TARGETS.int(), 1.0), "int32"),
        ((HIDDEN, WEIGHT, None, TARGETS, 0.0), "temperature is 0"),
        ((HIDDEN, WEIGHT, None, TARGETS, float("nan")), "temperature is nan"),
        ((HIDDEN, WEIGHT, None, TARGETS + 1, 1.0), r"targets run from 1 to 5: .* \[0, 5\)"),
        ((HIDDEN, WEIGHT, None, TARGETS - 1, 1.0), "targets run from -1 to 3"),
    ],
)
def test_says_which_rule_the_input_breaks(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprob.linear_logprob(*arguments)
