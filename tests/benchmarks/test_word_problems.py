"""Word problems: their answers are right, and have GSM8K's form."""

from __future__ import annotations

import operator
import re

from fuse.benchmarks.word_problems import KINDS, messages, word_problems

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def test_answers_follow_from_their_steps() -> None:
    for row in word_problems(20 * len(KINDS)):
        steps, _, result = row["answer"].partition("\n#### ")
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", steps)
        for left, sign, right, value in equations:
            assert OPERATORS[sign](int(left), int(right)) == int(value), row
        assert equations[-1][-1] == result
        assert set(re.findall(r"\d+", row["question"])) <= set(re.findall(r"\d+", steps)), row


def test_a_seed_gives_one_sequence() -> None:
    assert word_problems(5) == word_problems(9)[:5]
    assert word_problems(5, seed=1) != word_problems(5)
    assert len({row["question"] for row in word_problems(64)}) > 60


def test_a_question_is_asked_after_an_example() -> None:
    *_, example, question = messages("How many?")
    assert question == {"role": "user", "content": "How many?"}
    assert re.search(r"\n#### \d+$", example["content"])
