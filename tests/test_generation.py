"""Generation against teacher-forced forwards, the published greedy continuation, and the predictions made of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.aurora.generation import generate
from model.aurora.inference import predict
from model.aurora.model import AuroraModel
from model.aurora.sampling import GenerationDefaults, Sampling, read_generation_defaults
from tests.aurora_cases import (
    BASE,
    LORA,
    SEG,
    STOP,
    StubTokenizer,
    stir,
    three_clips,
    tiny_batch,
    tiny_model,
    tiny_sample,
)
from utils.errors import WeightsError
from utils.types import EMPTY_LOGIT, Batch, Generation, MediaFeatures

TOKENIZER = StubTokenizer()


@pytest.fixture(scope="module")
def model() -> AuroraModel:
    return tiny_model().eval()


@pytest.fixture
def scripted(model: AuroraModel, monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """Make row r of each step draw scripts[r][step], whatever the logits say."""

    def script(scripts: list[list[int]]) -> None:
        step = iter(range(10**6))

        def draw(self: Sampling, log_probs: Tensor) -> Tensor:
            t = next(step)
            return torch.tensor([row[t] if t < len(row) else 1 for row in scripts])

        monkeypatch.setattr(Sampling, "draw", draw)

    return script


def forward_of(model: AuroraModel, batch: Batch, answers: list[Tensor], group: int = 1):  # noqa: ANN201
    """Teacher-forced output of the answers, with per-answer logits."""
    prompts = [p for p in batch.prompts for _ in range(group)]
    with torch.no_grad():
        output = model(model.pack(batch, answers, prompts), model.encode(batch).repeat(group))
    return output, output.answer_logits.split([len(a) for a in answers])


def run(model: AuroraModel, batch: Batch, length: int = 6, **settings: object) -> Generation:
    return generate(model, batch, model.encode(batch), TOKENIZER, length, **settings)


@pytest.mark.smoke
def test_greedy_equals_the_published_continuation(model: AuroraModel) -> None:
    """Fixture generate.npz: 10 frames and 2 s of sound, 16 tokens."""
    with np.load(BASE / "generate.npz") as wanted, np.load(BASE / "inputs.npz") as inputs:
        prompt, greedy = torch.from_numpy(wanted["prompt_ids"][0]), wanted["greedy_ids"][0].tolist()
        pixels = (torch.from_numpy(inputs["pixel_values_u8"]).float() / 255 - 0.5) / 0.5
        fbank = torch.from_numpy(inputs["fbank_short"])
    sample = replace(tiny_sample(0), prompt_ids=prompt)
    batch = replace(tiny_batch(sample), pixel_values=pixels[None], fbank=fbank)
    with torch.no_grad():
        media = model.encode(batch, masks=False)
    assert generate(model, batch, media, TOKENIZER, 16).token_ids[0].tolist() == greedy


def test_greedy_equals_the_argmax_of_the_forward(model: AuroraModel) -> None:
    """Prompts of three lengths in one batch."""
    batch = three_clips()
    drawn = run(model, batch)
    _, logits = forward_of(model, batch, drawn.token_ids)
    for answer, row in zip(drawn.token_ids, logits, strict=True):
        assert answer.tolist() == row.argmax(-1).tolist()


def test_a_batch_equals_its_rows_alone(model: AuroraModel) -> None:
    batch = three_clips()
    together = run(model, batch)
    for i, sample in enumerate(batch.samples):
        alone = run(model, tiny_batch(sample))
        assert alone.token_ids[0].tolist() == together.token_ids[i].tolist()
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_those_of_the_forward(model: AuroraModel, temperature: float) -> None:
    batch = three_clips()
    drawn = run(model, batch, group=3, sampling=Sampling(temperature, generator=torch.Generator().manual_seed(0)))
    _, logits = forward_of(model, batch, drawn.token_ids, group=3)
    for answer, row, scores in zip(drawn.token_ids, logits, drawn.log_probs, strict=True):
        wanted = (row / temperature).log_softmax(-1).gather(-1, answer[:, None])[:, 0]
        torch.testing.assert_close(scores, wanted, atol=2e-5, rtol=1e-5)


def test_a_group_shares_its_prompt(model: AuroraModel) -> None:
    """Greedy members are equal, sampled members differ, an equal seed repeats them."""
    batch = tiny_batch(tiny_sample(0), tiny_sample(1, prompt_length=9))
    single, greedy = run(model, batch), run(model, batch, group=2)
    ids = [g.tolist() for g in greedy.token_ids]
    assert ids == [a for row in single.token_ids for a in [row.tolist()] * 2]
    sampled = [
        run(model, batch, group=4, sampling=Sampling(1.0, generator=torch.Generator().manual_seed(s))).token_ids
        for s in (0, 0, 1)
    ]
    first, again, other = ([row.tolist() for row in rows] for rows in sampled)
    assert first == again != other
    assert len({tuple(row) for row in first[:4]}) == 4


def test_captured_seg_state_is_that_of_the_forward(model: AuroraModel, scripted) -> None:  # noqa: ANN001
    """One [SEG], two (the last counts), none, and one drawn at the very end."""
    scripts = [[5, SEG, 7, STOP], [SEG, 4, SEG, 6, STOP], [3, 4, STOP], [3, 4, 9, 8, 6, SEG]]
    batch = tiny_batch(*(tiny_sample(i, prompt_length=3 + i) for i in range(4)))
    scripted(scripts)
    drawn = run(model, batch)
    assert [a.tolist() for a in drawn.token_ids] == scripts
    assert drawn.has_seg.tolist() == [True, True, False, True]
    assert drawn.truncated.tolist() == [False, False, False, True]
    output, _ = forward_of(model, batch, drawn.token_ids)
    assert drawn.answer_of_query.tolist() == [0, 1, 3]
    torch.testing.assert_close(model.project(drawn.seg_hidden), output.seg_features, atol=1e-5, rtol=1e-4)


def test_answers_end_at_the_stop_token(model: AuroraModel, scripted) -> None:  # noqa: ANN001
    """What a finished row draws while others go on is not part of its answer, not even a [SEG]."""
    scripted([[5, STOP, SEG, 8], [6, 7, 8, STOP]])
    drawn = run(model, tiny_batch(tiny_sample(0), tiny_sample(1)), length=9)
    assert [a.tolist() for a in drawn.token_ids] == [[5, STOP], [6, 7, 8, STOP]]
    assert drawn.texts == ["w5", "w6 w7 w8"] and not drawn.has_seg.any() and not drawn.truncated.any()
    assert [len(s) for s in drawn.log_probs] == [2, 4]


def test_generation_leaves_the_mode_and_uses_no_dropout() -> None:
    """Half of the adapters' inputs would be dropped, and checkpointing would switch the cache off, in train mode."""
    model, batch = tiny_model(LORA), three_clips()
    stir(model, 0)
    model.backbone.set_gradient_checkpointing(True)
    with torch.no_grad():
        media = model.eval().encode(batch)
    wanted = generate(model, batch, media, TOKENIZER, 5)
    model.train()
    again = generate(model, batch, media, TOKENIZER, 5)
    assert model.training and model.backbone.language_model.training
    assert [a.tolist() for a in again.token_ids] == [a.tolist() for a in wanted.token_ids]
    assert all(torch.equal(a, b) for a, b in zip(again.log_probs, wanted.log_probs, strict=True))


def test_top_p_distribution_equals_the_loop() -> None:
    logits = 2 * torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in ((1.0, 0.9), (0.5, 0.5), (2.0, 0.01)):
        got = Sampling(temperature, top_p).log_probs(logits, torch.empty(5, 0, dtype=torch.long))
        for row, scores in zip((logits / temperature).softmax(-1).tolist(), got, strict=True):
            kept, mass = [], 0.0
            for i in sorted(range(len(row)), key=lambda i: -row[i]):
                kept.append(i)
                mass += row[i]
                if mass >= top_p:
                    break
            wanted = torch.tensor([row[i] / mass if i in kept else 0.0 for i in range(len(row))])
            torch.testing.assert_close(scores.exp(), wanted, atol=1e-6, rtol=1e-5)


def test_draws_follow_the_distribution() -> None:
    log_probs = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)
    drawn = Sampling(1.0, generator=torch.Generator().manual_seed(0)).draw(log_probs)
    assert (torch.bincount(drawn, minlength=3) / 4000 - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.03


def test_top_k_and_repetition_penalty_equal_the_loop() -> None:
    """Rows that hold words 2 and 3: their logits pay the penalty first, then the three likeliest words remain."""
    logits, answers = 2 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1)), torch.tensor([[2, 3, 2]] * 4)
    got = Sampling(0.7, 1.0, top_k=3, repetition_penalty=1.3).log_probs(logits, answers)
    for row, scores in zip(logits.tolist(), got, strict=True):
        for word in (2, 3):
            row[word] = row[word] / 1.3 if row[word] > 0 else row[word] * 1.3
        kept = sorted(range(9), key=lambda i: -row[i])[:3]
        weights = torch.tensor([math.exp(row[i] / 0.7) if i in kept else 0.0 for i in range(9)])
        torch.testing.assert_close(scores.exp(), weights / weights.sum(), atol=1e-6, rtol=1e-5)


def test_a_penalty_reaches_greedy_answers(model: AuroraModel) -> None:
    """As transformers draws them from embeddings, and by default as the base's generation_config.json says."""
    batch = tiny_batch(tiny_sample(0))
    plain, found = run(model, batch, 12), run(model, batch, 12, sampling=Sampling(repetition_penalty=4.0))
    packed = model.pack(batch, None)
    wanted = model.backbone.language_model.generate(
        inputs_embeds=model.backbone.embed(packed, model.encode(batch)), attention_mask=packed.attention_mask.long(),
        do_sample=False, repetition_penalty=4.0, max_new_tokens=12, eos_token_id=STOP, pad_token_id=0,
    )  # fmt: skip
    assert found.token_ids[0].tolist() == wanted[0].tolist() != plain.token_ids[0].tolist()
    model.generation_defaults = GenerationDefaults(repetition_penalty=4.0)
    by_default = run(model, batch, 12).token_ids[0].tolist()
    model.generation_defaults = GenerationDefaults()
    assert by_default == wanted[0].tolist()


def test_what_a_folder_says_of_drawing_words(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults(50, 1.0)  # transformers' own
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05}')
    assert read_generation_defaults(tmp_path) == GenerationDefaults(20, 1.05)
    assert "repetition penalty 1.05" in str(read_generation_defaults(tmp_path).greedy())
    assert read_generation_defaults(tmp_path).greedy(1.0) == Sampling()
    for broken in ('{"repetition_penalty": -1}', '{"top_k": "many"}', "{"):
        path.write_text(broken)
        with pytest.raises(WeightsError, match="generation_config.json"):
            read_generation_defaults(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"repetition_penalty": 0.0}]
)
def test_impossible_sampling_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{"group": 0}, {"max_new_tokens": 0}])
def test_impossible_settings_are_refused(model: AuroraModel, settings: dict[str, object]) -> None:
    batch = tiny_batch(tiny_sample(0))
    arguments = {"max_new_tokens": 2, "tokenizer": TOKENIZER} | settings
    with pytest.raises(ValueError, match="at least"):
        generate(model, batch, MediaFeatures(None, None), **arguments)


# ---- predictions


def test_predictions_are_masks_of_the_generated_answers(model: AuroraModel, scripted) -> None:  # noqa: ANN001
    batch = tiny_batch(tiny_sample(0), tiny_sample(1))
    scripted([[5, SEG, STOP], [5, 6, STOP]])
    found = predict(model, batch, TOKENIZER, 8)
    assert [p.row for p in found] == [0, 1] and [p.has_seg for p in found] == [True, False]
    assert [p.text for p in found] == ["w5 [SEG]", "w5 w6"]
    output, _ = forward_of(model, batch, [torch.tensor([5, SEG, STOP]), torch.tensor([5, 6, STOP])])
    wanted = model.segmenter.upscale(output.mask_logits[0], (22, 32), (20, 30))
    torch.testing.assert_close(found[0].mask_logits, wanted, atol=1e-3, rtol=1e-3)
    assert found[1].mask_logits.shape == (2, 21, 30) and (found[1].mask_logits == EMPTY_LOGIT).all()


def test_class_names_come_from_the_text(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = StubTokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda *a, **k: "so the target is the cat. It is [SEG].", raising=False)
    found = predict(model, tiny_batch(tiny_sample(0)), tokenizer, 2)
    assert found[0].class_name == "cat"


def test_cross_entropy_of_drawn_answers_is_the_mean_log_prob(model: AuroraModel) -> None:
    """Ties generation, splice and the labels of the forward together: rule 1 of the project."""
    batch = three_clips()
    drawn = run(model, batch, sampling=Sampling(1.0, generator=torch.Generator().manual_seed(3)))
    output, _ = forward_of(model, batch, drawn.token_ids)
    wanted = -torch.cat(drawn.log_probs).mean()
    torch.testing.assert_close(
        F.cross_entropy(output.answer_logits, output.answer_labels), wanted, atol=1e-5, rtol=1e-5
    )
