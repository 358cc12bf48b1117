"""Rows of preferences: read, refused, dealt out, and freed of contradictions."""

import pytest

from fuse.recipe.preferences import BadRow, check_bad_rows, preferences_of, split, without_contradictions


def row(prompt="p", chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def preferences(*pairs, prompt="p"):
    good, bad = preferences_of([row(prompt, chosen, rejected) for chosen, rejected in pairs])
    assert not bad
    return good


def test_rows_are_text_or_messages():
    question = [{"role": "user", "content": "2+2?"}]
    answer = [{"role": "assistant", "content": "4"}]
    good, bad = preferences_of([row(), row(question, "4", "5"), row(question, answer, "5")])
    assert not bad
    assert good[0].as_row() == row()
    assert good[1].chosen == good[2].chosen == answer


@pytest.mark.parametrize(
    ("bad_row", "reason"),
    [
        ({"prompt": "p", "chosen": "good"}, "no rejected"),
        (row(prompt=" "), "no prompt"),
        (row(chosen=""), "no chosen"),
        (row(rejected="good"), "chosen equals rejected"),
        (row(chosen=[{"role": "assistant", "content": "good"}]), "chosen is messages but prompt is text"),
        (row(prompt=[{"role": "user"}]), "prompt is neither text nor chat messages"),
        (row(rejected=3), "rejected is neither text nor chat messages"),
    ],
)
def test_bad_rows_are_named(bad_row, reason):
    good, bad = preferences_of([row(), bad_row, row()])
    assert [one.row for one in good] == [0, 2]
    assert bad == [BadRow(1, reason)]


def test_bad_rows_are_refused_or_skipped_aloud():
    bad = [BadRow(index, "no chosen") for index in range(12)] + [BadRow(20, "no prompt")]
    text = (
        "13 of 30 rows are no preferences "
        "(rows by number, no chosen: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more; no prompt: 20)"
    )
    with pytest.raises(ValueError, match="--skip-bad-rows") as error:
        check_bad_rows(bad, 30, skips=False, tell=lambda text: None)
    assert text in str(error.value)
    told = []
    check_bad_rows(bad, 30, skips=True, tell=told.append)
    assert told == [f"data: {text}, left out"]
    check_bad_rows([], 30, skips=False, tell=told.append)
    assert len(told) == 1


def test_every_row_goes_to_one_part_with_all_of_its_prompt():
    rows = [row(prompt=str(index % 40)) for index in range(100)]
    all_of_them, _ = preferences_of(rows)
    parts = split(all_of_them, (2, 4, 4), seed=3)
    assert sorted(one.row for part in parts for one in part) == list(range(100))
    prompts = [{one.prompt for one in part} for part in parts]
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    assert [len(part) for part in parts] == pytest.approx([20, 40, 40], abs=3)
    assert parts == split(all_of_them, (2, 4, 4), seed=3)
    assert parts != split(all_of_them, (2, 4, 4), seed=4)


def test_a_share_of_nothing_is_nothing_and_an_empty_part_is_refused():
    few, _ = preferences_of([row(prompt=str(index)) for index in range(3)])
    assert [len(part) for part in split(few, (1, 0, 2), seed=0)] == [1, 0, 2]
    with pytest.raises(ValueError, match="3 preferences on 3 prompts cannot be split 1,1,1,1"):
        split(few, (1, 1, 1, 1), seed=0)


def test_ties_and_circles_are_dropped():
    consistent = without_contradictions(
        [
            *preferences(("a", "b"), ("b", "c"), ("c", "a"), ("a", "d")),  # a circle of three, above d
            *preferences(("a", "b"), ("b", "a"), ("a", "c"), prompt="tie"),
            *preferences(("a", "b"), ("a", "b"), ("b", "c"), prompt="said twice"),
        ]
    )
    kept = sorted((one.prompt, one.chosen, one.rejected) for one in consistent.kept)
    twice = ("said twice", "a", "b")
    assert kept == [("p", "a", "d"), twice, twice, ("said twice", "b", "c"), ("tie", "a", "c")]
    assert (consistent.num_tied, consistent.num_cyclic) == (2, 3)
