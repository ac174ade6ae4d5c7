"""Parsing of answers: one string per rule, the reason beside it."""

from __future__ import annotations

import re

import pytest

from model.objectives.rewards import Judged, format_reward
from tests.evaluation_cases import make_prediction, make_sample
from utils.answers import parse_answer, plain_conclusion, reasoning_steps, sentences, well_formed, without_ending
from utils.scoring import score_row


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
        ("the correct target is ”violin”. It is [SEG].", "violin"),  # the example of the paper's section 6.1
        ("Thus the final target is the dog.", "dog"),
        ("the target is dog. Wait. the correct target is cat.", "cat"),  # the last counts here too
        ("the target is girafe", "girafe"),  # cut at the length limit
        ("the target isn't a dog. It is [SEG].", None),  # not the phrase
        ("our targets are dogs", None),
        ("It is dog [SEG].", None),  # the teacher's answer names its class in another form
        ("", None),
    ],
)
def test_parse_answer(text: str, expected: str | None) -> None:
    assert parse_answer(text) == expected


FORMATS = [
    # text, paper 3.3, released code, ours, why
    ("I hear a bark. The target is dog. It is [SEG].", 1, 1, 1, "the form of the paper"),
    ("The target is dog. It is [SEG]", 1, 0, 1, "the paper writes no full stop, the released code wants one"),
    ("It is [SEG].", 1, 1, 1, "the last sentence may be the only one"),
    ("The target is dog.\nIt is [SEG].\n", 1, 0, 1, "a line break ends a sentence; outer space does not count"),
    ("The target is dog. It is [SEG]. ", 1, 0, 1, "outer space"),
    ("Is it the dog? It is [SEG].", 1, 1, 1, "any mark may end the sentence before"),
    ('The target is "dog." It is [SEG].', 1, 1, 1, "the quotes close behind the full stop"),
    ("The target is “dog.” It is [SEG].", 1, 1, 1, "typographic quotes"),
    ("It barks (the target is dog.) It is [SEG].", 1, 1, 1, "a bracket closes behind it"),
    ('The target is "dog". It is [SEG].', 1, 1, 1, "the quotes close before it"),
    ("The target is dog, so It is [SEG].", 0, 1, 0, "only the end of a longer sentence"),
    ("The target is dog It is [SEG].", 0, 1, 0, "no mark ends the sentence before"),
    ("The target is dog. Bit is [SEG].", 0, 0, 0, "another word"),
    ("TheIt is [SEG].", 0, 1, 0, "the last characters alone"),
    ("The target is dog. It is dog [SEG].", 0, 0, 0, "the answer of the released teacher"),
    ("The target is dog. it is [SEG].", 0, 0, 0, "exactly: the case counts"),
    ("The target is dog. It is [SEG]!", 0, 0, 0, "another mark"),
    ("The target is dog. It is [SEG] .", 0, 0, 0, "a space before the full stop"),
    ("The target is dog. It is [SEG]. Good.", 0, 0, 0, "a sentence follows"),
    ("The target is dog. It is", 0, 0, 0, "cut off"),
    ("The target is dog.", 0, 0, 0, "no [SEG]"),
    ("", 0, 0, 0, "empty"),
]


def of_the_paper(text: str) -> bool:
    """The final sentence, cut off by hand, is "It is [SEG]"."""
    pieces = [piece for piece in re.split(r"(?<=[.!?])[\"”)]*\s+|\n", text.strip()) if piece]
    return bool(pieces) and pieces[-1].removesuffix(".") == "It is [SEG]"


def of_the_released_code(text: str) -> bool:
    """LISA_grpo.py:159-165."""
    return text.replace("<|im_end|>", "").endswith("It is [SEG].")


@pytest.mark.parametrize(("text", "paper", "released", "ours", "why"), FORMATS)
def test_the_format_has_one_rule(text: str, paper: int, released: int, ours: int, why: str) -> None:
    assert (of_the_paper(text), of_the_released_code(text)) == (bool(paper), bool(released)), why
    assert well_formed(text) == bool(ours) == bool(paper), why
    sample = make_sample(0)
    assert format_reward(Judged(text, sample, 0.5, has_seg=True, truncated=False, tokens=9)) == ours, why
    assert score_row(sample, make_prediction(sample, text=text), ()).well_formed == bool(ours), why


@pytest.mark.parametrize(
    ("reasoning", "plain"),
    [
        ("It sings, the correct target is ”violin”.", "It sings, the target is violin."),
        ("It sings. The correct target is the “violin.”", "It sings. The target is the violin."),
        ("the final target is hair-dryer", "the target is hair-dryer."),
        ("So the target is dog.", "So the target is dog."),
        ("the correct target is cat. No: the target is dog.", "the correct target is cat. No: the target is dog."),
        ("It is a dog.", "It is a dog."),
    ],
)
def test_conclusions_are_put_in_the_words_of_section_3_1(reasoning: str, plain: str) -> None:
    assert plain_conclusion(reasoning) == plain


def test_the_ending_is_cut_off_in_any_case_of_letters() -> None:
    assert [without_ending(text) for text in ("A. It is [SEG].", "A.\nit is [seg] . ", " A. ", "It is [SEG]")] == [
        "A.", "A.", "A.", ""]


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
