"""References and chains of thought of the mini world, and the check whether a chain is true.

Every reference is kept only where exactly one thing satisfies it, so each has one right mask. The chains follow the
paper's four steps (section 3.1: video, audio, reference, answer) in its flexible format (section 8.2): wording is
drawn from several templates and the audio may come before the video.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from dataset.mini.scene import CLASSES, COLOURS, COLUMNS, Scene, Thing

KINDS = ("visual", "spatial", "audio", "temporal", "audio_spatial")
NULL_KIND = "null"
NEEDS_SOUND = ("audio", "temporal", "audio_spatial")
"""Kinds that cannot be answered without the sound."""
NEEDS_SIGHT = ("visual", "spatial", "audio_spatial")
"""Kinds that cannot be answered without the frames."""

NULL_REFERENCES = (
    "The sounding object.", "The object making a sound.", "The louder object.", "The first object to make a sound.",
    "The object that can be heard.", "The object that makes a sound.", "The object that sounds first.",
    "The last object to make a sound.",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A reference with its only answer: `target` indexes Scene.things; `anchor` explains a relation in the chain."""

    kind: str
    reference: str
    target: int
    anchor: str = ""


def place(column: int) -> str:
    return "in the middle" if column == 1 else f"on the {COLUMNS[column]}"


def _only(things: tuple[Thing, ...], test: Callable[[Thing], bool]) -> int | None:
    """Index of the one thing that passes, or None if none or several do."""
    found = [k for k, thing in enumerate(things) if test(thing)]
    return found[0] if len(found) == 1 else None


def _noun(scene: Scene, k: int) -> str:
    """The shortest name that only the k-th thing bears."""
    thing = scene.things[k]
    return thing.class_name if _only(scene.things, lambda t: t.class_name == thing.class_name) == k else thing.name


def questions(scene: Scene) -> list[Question]:
    """All references of the scene with a unique answer, in a fixed order."""
    return [*_visual(scene), *_spatial(scene), *_auditory(scene)]


def _visual(scene: Scene) -> Iterator[Question]:
    for k, thing in enumerate(scene.things):
        if _only(scene.things, lambda t, c=thing.colour: t.colour == c) is not None:
            yield Question("visual", f"The {thing.colour} object.", k)
        if _noun(scene, k) == thing.name:
            yield Question("visual", f"The {thing.name}.", k)


def _spatial(scene: Scene) -> Iterator[Question]:
    for k in range(len(scene.things)):
        name = _noun(scene, k)
        anchor = f"the {name} is {place(k)}"
        if k > 0:
            yield Question("spatial", f"The object just left of the {name}.", k - 1, anchor)
        if k < len(scene.things) - 1:
            yield Question("spatial", f"The object just right of the {name}.", k + 1, anchor)


@dataclass(frozen=True)
class _Role:
    """A way in which sound picks things: its phrase, the phrase with a colour slot, the verb of its explanation."""

    kind: str
    phrase: str
    coloured: str
    verb: str
    test: Callable[[Thing], bool]

    def explain(self, things: list[Thing]) -> str:
        names = list(dict.fromkeys(thing.class_name for thing in things))
        verb = self.verb if len(names) == 1 else {"makes": "make", "is": "are"}[self.verb.split()[0]] + self.verb[5:]
        return f"the {' and the '.join(names)} {verb}"


def _roles(scene: Scene) -> list[_Role]:
    names = [name for name, _ in scene.sounds]
    roles = [
        _Role("audio", "object making a sound", "{} object making a sound", "makes a sound",
              lambda t: t.class_name in names),
        _Role("audio", "silent object", "{} silent object", "makes no sound", lambda t: t.class_name not in names),
    ]  # fmt: skip
    if len(names) == 2:
        loud = next(name for name, level in scene.sounds if level == "loud")
        quiet = next(name for name in names if name != loud)
        for word, name in (("louder", loud), ("quieter", quiet)):
            test = partial(_is_of, name)
            roles.append(_Role("audio", f"{word} object", f"{word} {{}} object", f"is {word}", test))
        for order, name in zip(("first", "last"), names, strict=True):
            phrase = "object to make a sound"
            roles.append(_Role("temporal", f"{order} {phrase}", f"{order} {{}} {phrase}", f"sounds {order}",
                               partial(_is_of, name)))  # fmt: skip
    return roles


def _is_of(name: str, thing: Thing) -> bool:
    return thing.class_name == name


def _auditory(scene: Scene) -> Iterator[Question]:
    things = scene.things
    for role in _roles(scene):
        passing = [k for k, thing in enumerate(things) if role.test(thing)]
        explained = role.explain([things[k] for k in passing]) if passing else ""
        if len(passing) == 1:
            k = passing[0]
            yield Question(role.kind, f"The {role.phrase}.", k, explained)
            if role.phrase != "silent object":
                anchor = f"{explained} and is {place(k)}"
                if k > 0:
                    yield Question("audio_spatial", f"The object just left of the {role.phrase}.", k - 1, anchor)
                if k < len(things) - 1:
                    yield Question("audio_spatial", f"The object just right of the {role.phrase}.", k + 1, anchor)
            continue
        if len(passing) == 2 and things[passing[0]].class_name != things[passing[1]].class_name:
            # Of one class they would be found without listening: no other class stands there twice.
            yield Question("audio_spatial", f"The {role.phrase} that is further left.", passing[0], explained)
            yield Question("audio_spatial", f"The {role.phrase} that is further right.", passing[1], explained)
        for k in passing:
            colour = things[k].colour
            alone = sum(things[j].colour == colour for j in passing) == 1
            if alone and sum(t.colour == colour for t in things) > 1:
                yield Question(role.kind, f"The {role.coloured.format(colour)}.", k, explained)


def answer(scene: Scene, question: Question) -> str:
    """Place first, then the thing: each word follows from what was said by one look-up."""
    return f"{place(question.target)}: the {scene.things[question.target].name}"


def clause(reference: str) -> str:
    """A reference as it stands inside a sentence: no capital, no full stop."""
    text = reference.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def video_step(scene: Scene, rng: np.random.Generator) -> str:
    a, b, c = (thing.name for thing in scene.things)
    return (
        f"The images show a {a} on the left, a {b} in the middle and a {c} on the right.",
        f"On the left there is a {a}, in the middle a {b}, on the right a {c}.",
        f"From left to right I see a {a}, a {b} and a {c}.",
    )[int(rng.integers(3))]


def audio_step(sounds: tuple[tuple[str, str], ...], rng: np.random.Generator) -> str:
    if not sounds:
        return ("The audio is silent.", "I hear nothing in the audio.")[int(rng.integers(2))]
    if len(sounds) == 1:
        name = sounds[0][0]
        return (f"The audio has only the sound of the {name}.", f"In the audio I hear only the {name}.")[
            int(rng.integers(2))
        ]
    (first, level), (second, other) = sounds
    return (
        f"The audio starts with the {first}, which is {level}, then comes the {second}, which is {other}.",
        f"In the audio I hear the {first} first, {level}, and then the {second}, {other}.",
    )[int(rng.integers(2))]


def reasoning(scene: Scene, question: Question | None, reference: str, rng: np.random.Generator,
              sounds: tuple[tuple[str, str], ...] | None = None) -> str:  # fmt: skip
    """The true chain for a reference; `question=None` is a null reference, `sounds` overrides the scene's own."""
    steps = [video_step(scene, rng), audio_step(scene.sounds if sounds is None else sounds, rng)]
    if rng.random() < 0.35:
        steps.reverse()
    opening = ("The reference is", "The reference asks for", "We look for")[int(rng.integers(3))]
    close = ("So", "Therefore", "Thus")[int(rng.integers(3))]
    if question is None:
        steps.append(f"{opening} {clause(reference)}: no object in the images makes this sound.")
        return " ".join([*steps, f"{close}, the target is null."])
    thing = scene.things[question.target]
    relation = f"{question.anchor}, so " if question.anchor else ""
    steps.append(f"{opening} {clause(reference)}: {relation}it is {answer(scene, question)}.")
    return " ".join([*steps, f"{close}, {place(question.target)}, the target is {thing.class_name}."])


def truth(scene: Scene, question: Question | None, sounds: tuple[tuple[str, str], ...] | None = None) -> dict:
    """What `chain_is_faithful` compares with, as plain JSON."""
    return {
        "things": [[thing.colour, thing.class_name] for thing in scene.things],
        "sounds": [list(pair) for pair in (scene.sounds if sounds is None else sounds)],
        "target": None if question is None else question.target,
    }


_CLASS = "|".join(sorted(map(re.escape, CLASSES), key=len, reverse=True))
_NAMED = re.compile(rf"({'|'.join(COLOURS)}) ({_CLASS})(?![\w-])")
_HEARD = re.compile(rf"(?<![\w-])({_CLASS}|loud|quiet)(?![\w-])")


def chain_is_faithful(text: str, truth: dict, reference: str) -> bool:
    """Whether every step of a chain is right: what is seen and where, what is heard, the reference, the answer.

    Args:
        text: the generated answer.
        truth: as made by `truth`.
        reference: the referring expression, which the third step must restate.
    """
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s.strip()]
    restated = [s for s in sentences if clause(reference) in s]
    others = [s for s in sentences if s not in restated]
    seen = [s for s in others if len(_NAMED.findall(s)) == 3]
    heard = [s for s in others if re.search(r"\baudio\b", s)]
    if len(seen) != 1 or len(heard) != 1 or len(restated) != 1:
        return False
    things = [list(pair) for pair in _NAMED.findall(seen[0])]
    words = [word for word in _HEARD.findall(heard[0])]
    expected = [w for name, level in truth["sounds"] for w in ((name,) if level == "alone" else (name, level))]
    target = truth["target"]
    colour, name = (None, "null") if target is None else truth["things"][target]
    located = target is None or restated[0].endswith(f"it is {place(target)}: the {colour} {name}.")
    ending = f", the target is {name}." if target is None else f", {place(target)}, the target is {name}."
    answered = any(sentence.endswith(ending) for sentence in sentences[-2:])
    return things == truth["things"] and words == expected and located and answered
