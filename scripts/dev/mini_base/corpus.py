"""Text of the mini base's pretraining: captions, questions about clips, and recall exercises.

The base is to the mini world what VideoLLaMA2.1-7B-AV is to real clips: it describes what it sees and hears and
answers plain questions. It never sees the task's prompt, its chain of thought, or [SEG].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataset.mini import language as language
from dataset.mini import scene as scenes

DESCRIBE = "Describe the video and the audio."
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
"""Chat text before the media; a newline and the question follow it."""


@dataclass(frozen=True)
class Branch:
    """A piece of text that continues another: `parent` -1 is the media prefix, else the index of a branch.

    The loss falls on `lead` (a caption, so group "caption") and `answer` (group `group`), which follow each other.
    `on_text` continues the parent's text before its closing <|im_end|>.
    """

    question: str
    answer: str
    parent: int
    group: str
    on_text: bool = False
    lead: str = ""


def random_scene(rng: np.random.Generator) -> scenes.Scene:
    """A scene of any classes, half of them with an unseen one (the base knows all classes)."""
    include = str(rng.choice(scenes.UNSEEN_CLASSES)) if rng.random() < 0.4 else None
    return scenes.make_scene((9, int(rng.integers(2**40))), scenes.CLASSES, include)


def caption(scene: scenes.Scene, rng: np.random.Generator, sounds: tuple | None = None) -> str:
    steps = [language.video_step(scene, rng), language.audio_step(scene.sounds if sounds is None else sounds, rng)]
    if rng.random() < 0.35:
        steps.reverse()
    return " ".join(steps)


def close_turn(text: str) -> str:
    return f"{text}<|im_end|>\n"


def user_turn(question: str) -> str:
    return f"<|im_start|>user\n{first_turn(question)}"


def first_turn(question: str) -> str:
    """The question as it follows the media inside the first user turn."""
    return f"{question}<|im_end|>\n<|im_start|>assistant\n"


def direct_questions(scene: scenes.Scene, sounds: tuple, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(question, answer) pairs about single entities, which a look or a listen answers."""
    pairs: list[tuple[str, str]] = []
    things = scene.things
    for k, thing in enumerate(things):
        if sum(t.colour == thing.colour for t in things) == 1:
            pairs.append((f"What is the {thing.colour} object?", f"The {thing.class_name}."))
        if sum(t.class_name == thing.class_name for t in things) == 1:
            pairs.append((f"What colour is the {thing.class_name}?", f"{thing.colour.capitalize()}."))
            pairs.append((f"Where is the {thing.class_name}?", f"{language.place(k).capitalize()}."))
        else:
            pairs.append((f"Where is the {thing.name}?", f"{language.place(k).capitalize()}."))
        pairs += [(f"What is {language.place(k)}?", f"A {thing.name}.")] * 2
    absent = str(rng.choice([c for c in scenes.CLASSES if all(t.class_name != c for t in things)]))
    pairs += [(f"Is there a {absent}?", "No."), (f"Is there a {things[int(rng.integers(3))].class_name}?", "Yes.")]
    heard = " and the ".join(name for name, _ in sounds)
    pairs += [("What makes a sound?", f"The {heard}." if heard else "Nothing.")] * 2
    for name, level in sounds:
        if level != "alone":
            pairs.append((f"Is the {name} loud or quiet?", f"{level.capitalize()}."))
    if len(sounds) == 2:
        pairs += [("What sounds first?", f"The {sounds[0][0]}."), ("What sounds last?", f"The {sounds[1][0]}.")]
    return pairs


def tree(
    scene: scenes.Scene, rng: np.random.Generator, direct: int, after: int, then: int = 0, sounds: tuple | None = None,
    look_ups: int = 0,
) -> list[Branch]:  # fmt: skip
    """Caption, questions behind it and beside it.

    Args:
        scene: the clip.
        rng: draws wording and questions.
        direct: questions on the media alone, about single entities.
        after: questions or statements that follow the caption.
        then: instructions given before the caption and carried out after it (repeat a phrase, answer a question).
        sounds: what is heard if not the scene's own.
        look_ups: questions behind the caption about single entities, half of them about a place.
    """
    heard = scene.sounds if sounds is None else sounds
    branches = [Branch(first_turn(DESCRIBE), caption(scene, rng, heard), -1, "caption")]
    pairs = direct_questions(scene, heard, rng)
    for i in rng.integers(len(pairs), size=direct):
        branches.append(Branch(first_turn(pairs[i][0]), pairs[i][1], -1, "direct"))
    if sounds is not None:
        return branches
    branches += [Branch(user_turn(q), a, 0, "look") for q, a in _look_ups(scene, pairs, rng, look_ups)]
    for _ in range(after):
        question = _draw(scene, rng)
        phrase, answer = language.clause(question.reference), f"{language.answer(scene, question)}."
        reason = f"{question.anchor}, so " if question.anchor and rng.random() < 0.6 else ""
        if rng.random() < 0.6:
            opening = f" {phrase[:1].upper()}{phrase[1:]}:"
            branches.append(Branch(opening, f" {reason}{answer}", 0, f"state-{question.kind}", on_text=True))
        else:
            told = f"{reason}{answer}"
            branches.append(Branch(user_turn(f"Where is {phrase}?"), told, 0, f"ask-{question.kind}"))
    for _ in range(then):
        branches.append(_instruction(scene, rng))
    return branches


def place_drill(scene: scenes.Scene, rng: np.random.Generator, count: int = 4) -> list[Branch]:
    """A caption and, behind it, `count` times where one of its things stands, always asked in the same words."""
    branches = [Branch(first_turn(DESCRIBE), caption(scene, rng), -1, "caption")]
    for k in rng.integers(len(scene.things), size=count):
        asked, told = _found(scene, int(k))
        branches.append(Branch(user_turn(asked), told, 0, "look"))
    return branches


def _found(scene: scenes.Scene, k: int) -> tuple[str, str]:
    name = scene.things[k].name
    return f"Find the {name}.", f"The {name} {language.place(k)}."


def _look_ups(
    scene: scenes.Scene, pairs: list[tuple[str, str]], rng: np.random.Generator, count: int
) -> list[tuple[str, str]]:
    """`count` (question, answer) pairs about single entities, half of them about the place of a thing."""
    found = []
    for _ in range(count):
        if rng.random() < 0.5:
            found.append(pairs[int(rng.integers(len(pairs)))])
            continue
        k = int(rng.integers(len(scene.things)))
        where = (f"Where is the {scene.things[k].name}?", f"{language.place(k).capitalize()}.")
        found.append(where if rng.random() < 0.5 else _found(scene, k))
    return found


def _draw(scene: scenes.Scene, rng: np.random.Generator) -> language.Question:
    """A question of the scene, each kind equally often."""
    pool = language.questions(scene)
    kinds = sorted({q.kind for q in pool})
    kind = kinds[int(rng.integers(len(kinds)))]
    of_kind = [q for q in pool if q.kind == kind]
    return of_kind[int(rng.integers(len(of_kind)))]


def _instruction(scene: scenes.Scene, rng: np.random.Generator) -> Branch:
    """The question stands before the description, what is asked for behind it."""
    question = _draw(scene, rng)
    phrase = language.clause(question.reference)
    described = caption(scene, rng)
    if rng.random() < 0.3:
        asked = first_turn(f"Describe the video, then repeat: {phrase}.")
        return Branch(asked, f" You said {phrase}.", -1, "then-repeat", lead=described)
    reason = f"{question.anchor}, so " if question.anchor else ""
    told = f" {phrase[:1].upper()}{phrase[1:]}: {reason}{language.answer(scene, question)}."
    asked = first_turn(f"Describe the video, then tell me where {phrase} is.")
    return Branch(asked, told, -1, f"then-{question.kind}", lead=described)


def pretraining_text(seed: int, scenes_count: int) -> list[str]:
    """Text to train the tokenizer on: captions, questions, references, and the chat frame."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(scenes_count):
        scene = random_scene(rng)
        for branch in tree(scene, rng, 6, 6, 2):
            asked = branch.question.replace("<|im_end|>", "").replace("<|im_start|>", "")
            lines.append(f"{asked}{branch.lead}{branch.answer}")
        for question in language.questions(scene):
            lines.append(
                f"The reference is: {question.reference} Please segment the corresponding object in the images."
            )
            lines.append(language.reasoning(scene, question, question.reference, rng) + " It is")
    return lines


def recall_exercise(words: list[int], fillers: list[int], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Associative recall, plain or delayed, over token ids: returns (ids, labels), labels -100 but at answers.

    Plain: pairs (key, value) repeated in several orders, the value to be predicted from the second round on. Delayed:
    pairs once, then "filler ... key ... filler -> value" questions. Both teach a small model to look things up.
    """
    count = 6
    drawn = rng.permutation(len(words))[: 2 * count]
    keys, values = [words[i] for i in drawn[:count]], [words[i] for i in drawn[count:]]
    ids: list[int] = []
    labels: list[int] = []
    if rng.random() < 0.5:
        for turn in range(4):
            for j in rng.permutation(count):
                ids += [keys[j], values[j]]
                labels += [-100, values[j] if turn else -100]
        return ids, labels
    for key, value in zip(keys, values, strict=True):
        ids += [fillers[0], key, value]
    labels = [-100] * len(ids)
    for _ in range(9):
        j = int(rng.integers(count))
        asked, answer = (values[j], keys[j]) if rng.random() < 0.3 else (keys[j], values[j])
        before = [fillers[i] for i in rng.integers(1, len(fillers), rng.integers(0, 5))]
        marker = [fillers[-1]] if asked == values[j] else []
        after = [fillers[i] for i in rng.integers(1, len(fillers) - 1, rng.integers(0, 3))]
        question = [*before, *marker, asked, *after, fillers[0]]
        ids += [*question, answer]
        labels += [*[-100] * len(question), answer]
    return ids, labels
