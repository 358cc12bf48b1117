"""Log-probabilities from hidden states: against log_softmax, in chunks, and their gradients."""

import pytest
import torch
from torch import nn

from fuse.ops.logprob import token_logprobs


@pytest.fixture(params=["plain", "other"])
def example(request):
    """A plain head, whose logits are never side by side, and one of another kind, whose logits are, or in chunks."""
    return lambda *arguments: build_example(request.param == "plain", *arguments)


def build_example(is_plain, num_tokens, dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=False, dtype=dtype)
    if not is_plain:
        head = nn.Sequential(head)
    hidden = torch.randn(num_tokens, 6, dtype=dtype)
    return hidden, head, torch.randint(0, 11, (num_tokens,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 100])
def test_equals_the_categorical_distribution(example, dtype, num_tokens, chunk_tokens):
    hidden, head, targets = example(num_tokens, dtype)
    logprobs, entropy = token_logprobs(hidden, head, targets, 0.7, chunk_tokens)
    expected = torch.distributions.Categorical(logits=head(hidden).float() / 0.7, validate_args=False)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected.log_prob(targets))
    torch.testing.assert_close(entropy, expected.entropy())


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_padding_of_the_vocabulary_has_no_probability_and_no_gradient(example, chunk_tokens):
    hidden, head, targets = example(13)
    targets %= 7
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, head, targets, 0.7, chunk_tokens, num_tokens=7)
    expected = torch.distributions.Categorical(logits=head(hidden)[:, :7] / 0.7)
    torch.testing.assert_close(logprobs, expected.log_prob(targets))
    torch.testing.assert_close(entropy, expected.entropy())
    (expected_grad,) = torch.autograd.grad(expected.log_prob(targets).sum(), hidden)
    logprobs.sum().backward()
    torch.testing.assert_close(hidden.grad, expected_grad)
    (weight,) = head.parameters()
    assert weight.grad[:7].abs().min() > 0
    assert weight.grad[7:].abs().max() == 0


def test_chunks_change_no_gradient(example):
    gradients = []
    for chunk_tokens in (None, 4):
        hidden, head, targets = example(13)
        hidden.requires_grad_()
        logprobs, entropy = token_logprobs(hidden, head, targets, 1.3, chunk_tokens)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        gradients.append((hidden.grad, *(parameter.grad for parameter in head.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_gradients_are_those_of_finite_differences(example, chunk_tokens):
    hidden, head, targets = example(5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda rows: token_logprobs(rows, head, targets, 0.9, chunk_tokens), (hidden.requires_grad_(),)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets \[3\]"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_says_which_rule_the_input_breaks(example, change, message):
    hidden, head, targets = example(4)
    arguments = {"hidden": hidden, "head": head, "targets": targets, "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{**arguments, **change})
