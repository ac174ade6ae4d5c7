"""The mini world as its own annotator: it knows the truth of its rows and makes mistakes by seed, so that the whole
data engine runs without a network and every gate has something to refuse.
"""

from __future__ import annotations

import random
import re
from difflib import SequenceMatcher
from typing import Literal

import numpy as np

from dataset.annotate.backends import Reply, Request
from dataset.annotate.prompts import Style
from dataset.mini.language import NULL_KIND, Question, clause, place, questions, reasoning
from dataset.mini.scene import CLASSES, COLOURS, Scene, Thing
from dataset.records import without_seg
from dataset.refavs import Row
from utils.answers import parse_answer
from utils.errors import DataError

WRITER_MISTAKES = ("wrong_target", "no_ending", "no_audio", "empty", "too_long")
CORRECTOR_MISTAKES = ("one_part", "right", "open_mark", "wrong_target", "rewritten", "empty")
WORDINGS = 24
"""True chains tried by the corrector, which keeps the one nearest to the wrong path."""

_CLASS = "|".join(sorted(map(re.escape, CLASSES), key=len, reverse=True))
_SEEN = re.compile(rf"({'|'.join(COLOURS)}) ({_CLASS})(?![\w-])")
_HEARD = re.compile(rf"(?<![\w-])({_CLASS}|loud|quiet)(?![\w-])")


class MiniBackend:
    """Writes true chains, corrects wrong ones, names failure types; some replies are spoiled.

    Args:
        task: write, correct or classify.
        style: of written chains.
        mistakes: share of spoiled replies, 0..1.
        seed: of wording and mistakes; a reply depends on (seed, row, attempt) alone.
    """

    def __init__(self, task: Literal["write", "correct", "classify"], style: Style, mistakes: float, seed: int) -> None:
        self._task, self._style, self._mistakes, self._seed = task, style, mistakes, seed

    def answer(self, request: Request) -> Reply:
        """One reply.

        Raises:
            DataError: the row's truth is unknown (no mini world).
        """
        rng = random.Random(f"{self._seed}/{request.row.row}/{request.attempt}")
        spoiled = rng.random() < self._mistakes
        if self._task == "classify":
            return Reply("no idea" if spoiled else rule_label(request.row, request.wrong))
        if self._task == "write":
            return Reply(self._write(request.row, rng, rng.choice(WRITER_MISTAKES) if spoiled else None))
        return Reply(self._correct(request, rng, rng.choice(CORRECTOR_MISTAKES) if spoiled else None))

    def _write(self, row: Row, rng: random.Random, mistake: str | None) -> str:
        scene, question = recover(row)
        text = reasoning(scene, question, row.reference, np.random.default_rng(rng.getrandbits(32)), scene.sounds)
        if self._style == "fixed":
            text = fixed_chain(row, scene, question)
        if mistake == "wrong_target":
            return _with_another_target(text, row)
        if mistake == "no_ending":
            return text.rsplit(".", 2)[0] + "."
        if mistake == "no_audio":
            return " ".join(s for s in re.split(r"(?<=\.)\s+", text) if not re.search("audio|sound", s))
        return {"empty": "", "too_long": f"{text} " * 40}.get(mistake or "", text)

    def _correct(self, request: Request, rng: random.Random, mistake: str | None) -> str:
        row, wrong = request.row, without_seg(request.wrong)
        corrected = nearest_chain(row, wrong, self._seed)
        if mistake == "wrong_target":
            corrected = _with_another_target(corrected, row)
        if mistake == "rewritten":
            corrected = " ".join(reversed(corrected.split())) + f" So the target is {row.class_name}."
        if mistake == "right" or corrected == wrong:
            return "right"
        first, second = mark_changes(wrong, corrected)
        if mistake == "open_mark":
            second += ' "'
        if mistake == "empty":
            return ""
        if mistake == "one_part":
            return f"Your corrected answer: {second}"
        return f"(1) The original LVLM's answer: {first}\n(2) Your corrected answer: {second}"


def recover(row: Row) -> tuple[Scene, Question | None]:
    """The scene's words and the question behind a row, from its truth (positions and sound levels are not needed).

    Raises:
        DataError: the row's truth is unknown.
    """
    if row.truth is None:
        raise DataError(f"row {row.row} ({row.uid}): its truth is unknown; the mini backend needs the mini world. "
                        "Remedy: choose another --backend.")  # fmt: skip
    named = enumerate(row.truth["things"])
    things = tuple(Thing(name, colour, column, (0.0, 0.0), 0.0, 0.0, 0.0) for column, (colour, name) in named)
    scene = Scene(things, tuple((name, level) for name, level in row.truth["sounds"]), (0,))
    if row.truth["target"] is None:
        return scene, None
    known = [q for q in questions(scene) if q.reference == row.reference and q.target == row.truth["target"]]
    return scene, known[0] if known else Question(row.kind, row.reference, row.truth["target"])


def fixed_chain(row: Row, scene: Scene, question: Question | None) -> str:
    """The rigid format of paper section 8.2."""
    names = [thing.name for thing in scene.things]
    heard = " and ".join(name for name, _ in scene.sounds) or "nothing"
    it = "no object in the images" if question is None else f"the {names[question.target]}"
    return (
        f"Reasoning: 1) Analyze the Reference: The reference asks for {clause(row.reference)}. "
        f"2) Analyze the Audio: The audio holds {heard}. "
        f"3) Analyze the Images: The images show a {names[0]}, a {names[1]} and a {names[2]}. "
        f"4) Connect Audio and Visuals: The reference fits {it}. "
        f"5) Deduce the Target: Therefore the target is {row.class_name}."
    )


def nearest_chain(row: Row, wrong: str, seed: int) -> str:
    """Of several wordings of the true chain, the one that keeps most words of the wrong path."""
    scene, question = recover(row)
    draws = (np.random.default_rng((seed, i)) for i in range(WORDINGS))
    chains = [reasoning(scene, question, row.reference, rng, scene.sounds) for rng in draws]
    words = wrong.split()
    return max(dict.fromkeys(chains), key=lambda c: SequenceMatcher(None, words, c.split(), autojunk=False).ratio())


def mark_changes(wrong: str, corrected: str) -> tuple[str, str]:
    """Both texts with what differs in quotes, word by word."""
    left, right = wrong.split(), corrected.split()
    first, second = [], []
    for kind, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        old, new = " ".join(left[a:b]), " ".join(right[c:d])
        first += [old if kind == "equal" else f'"{old}"'] if old else []
        second += [new if kind == "equal" else f'"{new}"'] if new else []
    return " ".join(first), " ".join(second)


def _with_another_target(text: str, row: Row) -> str:
    other = next(name for _, name in [*row.truth["things"], ["", "lamp"]] if name != row.class_name)
    return re.sub(r"the target is .*$", f"the target is {other}.", text)


def rule_label(row: Row, text: str) -> str:
    """The type of a mini-world failure.

    Args:
        row: with its truth.
        text: the wrong path.

    Returns:
        The first that holds: classes seen are wrong (visual_misidentification), only colours are (entity_attribute),
        they stand in other places (spatial_referential), sounds or loudness are wrong (audio_perception), only their
        order is (temporal_reasoning); all steps right but the thing picked (spatial_referential or temporal_reasoning
        by the kind of question, else logical_contradiction); a step that is missing, or an answer that names another
        class than the thing picked (logical_contradiction).
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    restated = [s for s in sentences if clause(row.reference) in s]
    others = [s for s in sentences if s not in restated]
    seen = next((_SEEN.findall(s) for s in others if len(_SEEN.findall(s)) == 3), None)
    heard = next((_HEARD.findall(s) for s in others if re.search(r"\baudio\b", s)), None)
    found = _perception(row, seen, heard)
    if found or seen is None or heard is None or not restated:
        return found or "logical_contradiction"
    return _decision(row, restated[0], text)


def _perception(row: Row, seen: list[tuple[str, str]] | None, heard: list[str] | None) -> str | None:
    """The first wrong step of what is seen and heard, None if both are right (or absent)."""
    things = [tuple(thing) for thing in row.truth["things"]]
    if seen is not None and seen != things:
        if sorted(seen) == sorted(things):
            return "spatial_referential"
        same = [name for _, name in seen] == [name for _, name in things]
        return "entity_attribute" if same else "visual_misidentification"
    expected = [w for name, level in row.truth["sounds"] for w in ((name,) if level == "alone" else (name, level))]
    if heard is not None and heard != expected:
        same = _pairs(heard) == _pairs(expected)
        return "temporal_reasoning" if same else "audio_perception"
    return None


def _pairs(words: list[str]) -> list[list[str]]:
    """(class, loudness) regardless of order."""
    return sorted(words[i : i + 2] for i in range(0, len(words), 2))


def _decision(row: Row, sentence: str, text: str) -> str:
    """All that is perceived is right: was the wrong thing picked, or another one answered?"""
    things, target = row.truth["things"], row.truth["target"]
    picked = sentence.rsplit("it is ", 1)[-1]
    right = target is not None and " ".join(things[target]) in picked and place(target) in picked
    named = _SEEN.search(picked)
    if right or (named and named[2] != parse_answer(text)) or row.kind == NULL_KIND:
        return "logical_contradiction"
    if row.kind == "temporal":
        return "temporal_reasoning"
    return "spatial_referential" if row.kind in ("spatial", "audio_spatial") else "logical_contradiction"
