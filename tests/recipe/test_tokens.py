"""Tokens of preferences are those that a run of reinforcement learning has."""

import pytest

from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.recipe.preferences import preferences_of
from fuse.recipe.tokens import tokenised
from fuse.trainers.data import prompt_rows

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}={% else %}<eos>;{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    made = arithmetic_tokenizer()
    made.chat_template = TEMPLATE
    return made


def preference(prompt, chosen, rejected):
    [one], _ = preferences_of([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    return one


def test_text_ends_with_the_end_of_sequence(tokenizer):
    tokens = tokenised(preference("1+2=", "#3", "#4<eos>"), tokenizer)
    end = tokenizer.eos_token_id
    assert tokens.prompt_ids == tokenizer("1+2=").input_ids
    assert tokens.chosen_ids == [*tokenizer("#3").input_ids, end]
    assert tokens.rejected_ids == [*tokenizer("#4").input_ids, end]


def test_messages_go_through_the_template_up_to_where_generation_stops(tokenizer):
    prompt = [{"role": "user", "content": "1+2"}]
    tokens = tokenised(preference(prompt, "#3", [{"role": "assistant", "content": "#4"}]), tokenizer)
    [row] = prompt_rows([{"prompt": prompt}], tokenizer, prompt_column="prompt", response_length=1)
    assert tokens.prompt_ids == row["input_ids"]
    assert tokens.chosen_ids == [*tokenizer("#3").input_ids, tokenizer.eos_token_id]
    assert tokens.rejected_ids == [*tokenizer("#4").input_ids, tokenizer.eos_token_id]


def test_a_template_that_changes_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="renders the prompt otherwise"):
        tokenised(preference([{"role": "user", "content": "1"}], "2", "3"), tokenizer)


def test_no_tokens_are_refused_without_a_number(tokenizer):
    with pytest.raises(ValueError, match=r"^a response has no tokens"):
        tokenised(preference("1", "<eos>", "2"), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^chat messages but the tokenizer has no chat template"):
        tokenised(preference([{"role": "user", "content": "1"}], "2", "3"), tokenizer)
