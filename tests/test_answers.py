"""Parsing of answers: one string per rule, the reason beside it."""

from __future__ import annotations

import pytest

from utils.answers import parse_answer, reasoning_steps, sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man plays, so the target is cello. It is [SEG].", "cello"),  # the paper's form
        ("The target is the cello. It is [SEG].", "cello"),  # the article is optional, any case
        ("the target is emergency-car. It is [SEG].", "emergency-car"),  # Ref-AVS joins words with hyphens
        ("the target is vacuum cleaner. It is [SEG].", "vacuum cleaner"),  # several words
        ("the target is lawn_mower, clearly", "lawn_mower"),  # a comma ends the name
        ('the target is "violin". It is [SEG].', "violin"),  # straight quotes
        ("the target is the “violin”.", "violin"),  # typographic quotes, as the paper prints them
        ("the target is **piano**.", "piano"),  # emphasis
        ("the target is man's hat.", "man's hat"),  # an inner apostrophe is part of the name
        ("the target is dog . It is [SEG] .", "dog"),  # spaces before punctuation
        ("the target is dog It is [SEG].", "dog"),  # the full stop is missing
        ("the target is the cat\nIt is [SEG].", "cat"),  # a line break ends the name
        ("the target is [SEG].", None),  # a token is no name
        ("The target is: piano", "piano"),  # a colon may come between
        ("so the  target\nis the  big   Dog.", "big dog"),  # spaces collapse, letters are lowered
        ("the target is dog. Wait, no. the target is cat. It is [SEG].", "cat"),  # reflective paths: the last counts
        ("the target is dog. Wait. the target is", "dog"),  # ... that names something
        ("the target is girafe", "girafe"),  # cut at the length limit
        ("the target isn't a dog. It is [SEG].", None),  # not the phrase
        ("our targets are dogs", None),
        ("It is dog [SEG].", None),  # the teacher's answer names its class in another form
        ("", None),
    ],
)
def test_parse_answer(text: str, expected: str | None) -> None:
    assert parse_answer(text) == expected


def test_reasoning_is_told_into_its_four_steps():
    answer = (
        "The audio holds a cello, seen in the images. In the video a man plays it. Two strings are broken. "
        "We look for the object just left of the man: it is the cello. Wait, let me check. So the target is the cello. "
        "It is [SEG]."
    )
    assert reasoning_steps(answer, "The object just left of the man.") == [
        ("audio", "The audio holds a cello, seen in the images."),
        ("video", "In the video a man plays it. Two strings are broken."),
        ("reference", "We look for the object just left of the man: it is the cello."),
        ("reflection", "Wait, let me check."),
        ("answer", "So the target is the cello. It is [SEG]."),
    ]
    assert reasoning_steps("", "x") == []
    assert reasoning_steps("Nothing to go by.", "") == [("video", "Nothing to go by.")]


def test_sentences():
    assert sentences("I see a cat. It is loud! The target is the cat. It is [SEG].") == [
        "I see a cat.", "It is loud!", "The target is the cat.", "It is [SEG]."]
    assert sentences("  ") == []
