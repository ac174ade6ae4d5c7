"""Pretraining of the mini base: packed trees equal their plain sequences, look-ups are true, answers count whole."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from dataset.mini.language import place
from dataset.mini.scene import Scene
from scripts.dev.mini_base.corpus import SYSTEM, Branch, place_drill, random_scene, tree
from scripts.dev.mini_base.reading import TextTasks, pretrain_places, whole_answers
from scripts.dev.mini_base.tokens import PackedTree, TreePacker
from tests.data_builders import write_tokenizer
from utils.types import IGNORE


@pytest.fixture(scope="module")
def packer(tmp_path_factory: pytest.TempPathFactory) -> TreePacker:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return TreePacker(Tokenizer.from_file(str(folder / "tokenizer.json")), media_tokens=7)


def plain_sequence(packer: TreePacker, branches: list[Branch], index: int) -> tuple[list[int], list[int]]:
    """(ids, labels) of one branch behind all that it continues, as a text of its own."""
    branch = branches[index]
    if branch.parent < 0:
        ids = packer.encode(SYSTEM) + packer.encode("\n")
    else:
        ids, _ = plain_sequence(packer, branches, branch.parent)
        ids = ids[:-1] if branch.on_text else ids + packer.encode("\n")
    told = packer.encode(branch.lead) + packer.encode(branch.answer + "<|im_end|>")
    ids = ids + packer.encode(branch.question)
    return ids + told, [IGNORE] * len(ids) + told


@torch.no_grad()
def test_a_packed_tree_is_its_plain_sequences(packer: TreePacker) -> None:
    torch.manual_seed(0)
    language = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=packer.tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48,
                    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    ).eval()  # fmt: skip
    rng = np.random.default_rng(1)
    branches = tree(random_scene(rng), rng, 3, 6, 3, look_ups=4)
    assert {b.parent for b in branches} == {-1, 0}
    assert any(b.on_text for b in branches) and any(b.lead for b in branches)
    packed = packer([branches], with_media=False)
    logits = language(input_ids=packed.ids, attention_mask=packed.allowed, position_ids=packed.positions).logits[0]
    wanted = packed.labels[0] != IGNORE
    found, expected = logits[wanted], []
    for index in range(len(branches)):
        ids, labels = plain_sequence(packer, branches, index)
        alone = language(input_ids=torch.tensor([ids])).logits[0, :-1]
        expected.append(alone[torch.tensor(labels[1:]) != IGNORE])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=2e-6)


def test_media_stand_before_every_branch(packer: TreePacker) -> None:
    rng = np.random.default_rng(2)
    packed = packer([tree(random_scene(rng), rng, 2, 2, 1), tree(random_scene(rng), rng, 1, 1)])
    assert packed.media.sum(1).tolist() == [7, 7]
    labelled = packed.labels != IGNORE
    seen = packed.allowed[:, 0] & packed.media[:, None]
    assert (seen.sum(-1)[labelled] == 7).all() and (packed.groups[labelled] >= 0).all()


def told_place(branch: Branch, scene: Scene) -> bool | None:
    """Whether a question for a place is answered truly; None for another question."""
    question = branch.question.split("user\n")[1].split("<|im_end|>")[0]
    if not question.startswith(("Where is the ", "Find the ")):
        return None
    name = question.removeprefix("Where is the ").removeprefix("Find the ").rstrip("?.")
    (k,) = [k for k, thing in enumerate(scene.things) if name in (thing.name, thing.class_name)]
    answers = {"W": f"{place(k).capitalize()}.", "F": f"The {scene.things[k].name} {place(k)}."}
    return branch.answer == answers[question[0]]


def test_look_ups_behind_the_caption_are_true() -> None:
    rng = np.random.default_rng(3)
    told, drilled = [], []
    for _ in range(40):
        scene = random_scene(rng)
        behind = tree(scene, rng, 0, 0, look_ups=6)[1:]
        drill = place_drill(scene, rng, 5)[1:]
        assert all(b.parent == 0 and b.group == "look" for b in [*behind, *drill])
        told += [told_place(b, scene) for b in behind]
        drilled += [told_place(b, scene) for b in drill]
    assert False not in told and 120 < told.count(True) < 200, "half of 240 or a little more ask for a place"
    assert drilled == [True] * 200


@pytest.mark.parametrize(("right", "steps"), [(1.0, 50), (0.9, 120)])
def test_the_drill_ends_when_it_is_learned(
    packer: TreePacker, monkeypatch: pytest.MonkeyPatch, right: float, steps: int
) -> None:
    model = SimpleNamespace(language_model=torch.nn.Linear(1, 1))
    taken: list[int] = []

    def exercise(tasks: TextTasks, language: torch.nn.Module, count: int) -> tuple[torch.Tensor, dict[str, float]]:
        taken.append(count)
        return language.weight.sum(), {"look": right}

    monkeypatch.setattr(TextTasks, "drill", exercise)
    monkeypatch.setattr(TextTasks, "recall", lambda tasks, language, count: (language.weight.sum(), torch.ones(())))
    pretrain_places(model, packer, 120, lambda line: None)
    assert len(taken) == steps


def test_an_answer_is_right_when_all_its_words_are() -> None:
    groups = torch.tensor([[-1, 0, 0, -1, 1, 1, -1], [1, -1, 0, 0, 0, -1, -1]])
    right = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    empty = torch.zeros(0)
    packed = PackedTree(empty, empty, empty, empty, empty, groups, ["then", "look"])
    assert whole_answers(packed, right) == [("then", True), ("look", False), ("look", True), ("then", False)]
