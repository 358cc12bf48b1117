"""Word problems of our own in GSM8K's format: a question, and an answer of worked steps that ends with `#### 18`.

Source: Cobbe et al. 2021 (arXiv 2110.14168) for the format; no problem of theirs is here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ANSWER_MARK = "#### "
NAMES = ("Ada", "Ben", "Carla", "Dev", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam")
THINGS = ("apples", "pencils", "stamps", "marbles", "shells", "stickers", "cookies", "cards", "coins", "tickets")
SMALLEST, LARGEST = 2, 9

Message = dict[str, str]
Problem = tuple[str, str, int]
"""Question, worked steps, result."""


def gather(name: str, things: str, a: int, b: int, c: int) -> Problem:
    question = f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?"
    return question, f"{name} has {a} + {b} = {a + b} {things}.", a + b


def give(name: str, things: str, a: int, b: int, c: int) -> Problem:
    had = a + b
    question = f"{name} has {had} {things} and gives {a} of them to a friend. How many {things} does {name} have left?"
    return question, f"{name} has {had} - {a} = {b} {things} left.", b


def pack(name: str, things: str, a: int, b: int, c: int) -> Problem:
    question = f"A box holds {a} {things}. {name} fills {b} boxes. How many {things} does {name} need?"
    return question, f"{name} needs {a} * {b} = {a * b} {things}.", a * b


def share(name: str, things: str, a: int, b: int, c: int) -> Problem:
    question = f"{name} shares {a * b} {things} equally among {a} children. How many {things} does each child get?"
    return question, f"Each child gets {a * b} / {a} = {b} {things}.", b


def lose(name: str, things: str, a: int, b: int, c: int) -> Problem:
    had = a + c
    question = f"{name} has {had} {things}, loses {c} and then finds {b}. How many {things} does {name} have now?"
    return question, f"{name} has {had} - {c} = {a} {things}, then {a} + {b} = {a + b}.", a + b


def pay(name: str, things: str, a: int, b: int, c: int) -> Problem:
    paid, price = a * b + c, a * b
    question = f"{name} buys {a} {things} for {b} dollars each and pays with {paid} dollars. How much comes back?"
    return question, f"The {things} cost {a} * {b} = {price} dollars. {paid} - {price} = {c} dollars.", c


KINDS: tuple[Callable[[str, str, int, int, int], Problem], ...] = (gather, give, pack, share, lose, pay)


def word_problems(num_problems: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of `question` and `answer`, the kinds in turn; the first of a longer list are those of a shorter one."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(num_problems):
        name, things = NAMES[generator.integers(len(NAMES))], THINGS[generator.integers(len(THINGS))]
        numbers = generator.integers(SMALLEST, LARGEST + 1, size=3).tolist()
        question, steps, result = KINDS[index % len(KINDS)](name, things, *numbers)
        rows.append({"question": question, "answer": f"{steps}\n{ANSWER_MARK}{result}"})
    return rows


def messages(question: str) -> list[Message]:
    """The chat that asks a question, after one that is answered in the form wanted: small models need to see it."""
    return [
        {"role": "system", "content": f"You solve word problems and end with {ANSWER_MARK}and the number."},
        {"role": "user", "content": "Sam has 3 pens and buys 4 more. How many pens does Sam have now?"},
        {"role": "assistant", "content": f"Sam has 3 + 4 = 7 pens.\n{ANSWER_MARK}7"},
        {"role": "user", "content": question},
    ]
