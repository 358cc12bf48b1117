"""The arithmetic task: what it asks, how it is answered, what is rewarded."""

from itertools import islice

import numpy as np
import pytest

from fuse.demo.task import SumTask, exact_match, prompt_text, worked_answer


def test_a_worked_answer_adds_one_term_per_step() -> None:
    assert prompt_text((7, 9, 5)) == "7+9+5="
    assert worked_answer((7, 9, 5)) == "7+9=16;16+5=21;#21"


def test_a_slip_carries_on_from_the_wrong_total() -> None:
    assert worked_answer((7, 9, 5), slips=(1, 0)) == "7+9=17;17+5=22;#22"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("7+9=16;16+5=21;#21", 1.0),
        ("#21", 1.0),  # only the answer counts
        ("7+9=16;16+5=21;#22", 0.0),
        ("7+9=16;16+5=21", 0.0),
        ("#21#21", 0.0),
        ("#", 0.0),
        ("#21;", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_exact_sum_after_a_single_mark_is_rewarded(response: str, reward: float) -> None:
    assert exact_match(["7+9+5="], [response]) == [reward]


def test_one_seed_gives_one_sequence_of_problems() -> None:
    first, again, other = (list(islice(SumTask().problems(seed), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_lengths_are_long_tailed_and_bounded() -> None:
    task = SumTask()
    lengths = [len(worked_answer(terms)) + 1 for terms in islice(task.problems(0), 2000)]
    assert max(lengths) >= 3 * np.median(lengths)
    assert max(lengths) <= task.max_response_tokens


def test_the_teacher_slips_as_often_as_asked() -> None:
    careful, careless = (
        [
            response == worked_answer(tuple(int(term) for term in prompt.rstrip("=").split("+")))
            for prompt, response in islice(SumTask().demonstrations(0, probability), 500)
        ]
        for probability in (0.0, 0.4)
    )
    assert all(careful)
    assert 0.3 < np.mean(careless) < 0.45  # sum over k >= 1 steps of 0.4 * 0.6^(k-1) * 0.6^k = 0.375
