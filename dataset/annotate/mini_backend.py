"""The mini world as its own annotator: it knows the truth of its rows and makes mistakes by seed, so that the whole
data engine runs without a network and every gate has something to refuse.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal

import numpy as np

from dataset.annotate.backend import Reply, Request
from dataset.annotate.prompts import Style
from dataset.mini_language import Question, clause, questions, reasoning
from dataset.mini_scene import Scene, Thing
from dataset.refavs import Row
from dataset.reflective import without_seg
from utils.errors import DataError

WRITER_MISTAKES = ("wrong_target", "no_ending", "no_audio", "empty", "too_long")
CORRECTOR_MISTAKES = ("one_part", "right", "open_mark", "wrong_target", "rewritten", "empty")
WORDINGS = 24
"""True chains tried by the corrector, which keeps the one nearest to the wrong path."""


class MiniBackend:
    """Writes true chains, corrects wrong ones, names failure types; some replies are spoiled.

    Args:
        task: write, correct or classify.
        style: of written chains.
        mistakes: share of spoiled replies, 0..1.
        seed: of wording and mistakes; a reply depends on (seed, row, attempt) alone.
    """

    remote = False
    batch_size = 1

    def __init__(
        self,
        task: Literal["write", "correct", "classify"],
        style: Style = "flexible",
        mistakes: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.name = f"mini:{task}:{style}:{mistakes}:{seed}"
        self._task, self._style, self._mistakes, self._seed = task, style, mistakes, seed

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request.

        Raises:
            DataError: the row's truth is unknown (no mini world).
        """
        return [Reply(self._one(request)) for request in requests]

    def _one(self, request: Request) -> str:
        rng = random.Random(f"{self._seed}/{request.row.row}/{request.attempt}")
        spoiled = rng.random() < self._mistakes
        if self._task == "classify":
            from dataset.annotate.taxonomy import rule_label  # imported late: it needs this module's scenes

            return "no idea" if spoiled else rule_label(request.row, request.wrong)
        if self._task == "write":
            return self._write(request.row, rng, rng.choice(WRITER_MISTAKES) if spoiled else None)
        return self._correct(request, rng, rng.choice(CORRECTOR_MISTAKES) if spoiled else None)

    def _write(self, row: Row, rng: random.Random, mistake: str | None) -> str:
        scene, question = recover(row)
        text = reasoning(scene, question, row.reference, np.random.default_rng(rng.getrandbits(32)), scene.sounds)
        if self._style == "fixed":
            text = fixed_chain(row, scene, question)
        if mistake == "wrong_target":
            return re.sub(r"the target is .*$", f"the target is {_other(row)}.", text)
        if mistake == "no_ending":
            return text.rsplit(".", 2)[0] + "."
        if mistake == "no_audio":
            return " ".join(s for s in re.split(r"(?<=\.)\s+", text) if not re.search("audio|sound", s))
        return {"empty": "", "too_long": f"{text} " * 40}.get(mistake or "", text)

    def _correct(self, request: Request, rng: random.Random, mistake: str | None) -> str:
        row, wrong = request.row, without_seg(request.wrong)
        corrected = nearest_chain(row, wrong, self._seed)
        if mistake == "wrong_target":
            corrected = re.sub(r"the target is .*$", f"the target is {_other(row)}.", corrected)
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
        raise DataError(
            f"row {row.row} ({row.uid}): its truth is unknown. Remedy: the mini backend needs the mini world; "
            "choose another --backend."
        )
    things = tuple(
        Thing(name, colour, column, (0.0, 0.0), 0.0, 0.0, 0.0)
        for column, (colour, name) in enumerate(row.truth["things"])
    )
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
    chains = [
        reasoning(scene, question, row.reference, np.random.default_rng((seed, i)), scene.sounds)
        for i in range(WORDINGS)
    ]
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


def _other(row: Row) -> str:
    """Another class than the row's."""
    return next(name for _, name in row.truth["things"] + [["", "lamp"]] if name != row.class_name)
