"""Splice: a loop-written oracle on ragged batches, the published merge's outputs, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.config import BeatsConfig, LanguageConfig, VideoLlama2Config, VisionConfig
from model.backbones.videollama2.splice import splice
from utils.types import AUDIO_PLACEHOLDER, IGNORE, VIDEO_PLACEHOLDER, MediaFeatures, PackedInputs

SEG = 99


def oracle(prompts: list, answers: list, video: int, audio: int, has_audio: list, left: bool) -> list[dict]:
    """One position at a time, in plain lists."""
    rows = []
    for prompt, answer, sound in zip(prompts, answers, has_audio, strict=True):
        row = {"token_ids": [], "media_index": [], "labels": [], "seg": -1}

        def put(token: int, media: int, label: int, row: dict = row) -> None:
            row["token_ids"].append(token)
            row["media_index"].append(media)
            row["labels"].append(label)

        for token in prompt:
            if token == VIDEO_PLACEHOLDER:
                for m in range(video + (audio if sound else 0)):
                    put(0, m, IGNORE)
            elif token == AUDIO_PLACEHOLDER:
                for m in range(audio):
                    put(0, video + m, IGNORE)
            else:
                put(token, -1, IGNORE)
        for token in answer:
            if token == SEG:
                row["seg"] = len(row["token_ids"])
            put(token, -1, token)
        rows.append(row)
    longest = max(len(row["token_ids"]) for row in rows)
    for row in rows:
        count = longest - len(row["token_ids"])
        row["mask"] = [True] * len(row["token_ids"])
        for name, value in (("token_ids", 0), ("media_index", -1), ("labels", IGNORE), ("mask", False)):
            row[name] = [value] * count + row[name] if left else row[name] + [value] * count
        if left and row["seg"] >= 0:
            row["seg"] += count
    return rows


def test_against_the_loop_on_random_ragged_batches() -> None:
    rng = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=rng))

    for case in range(60):
        video, audio = draw(6) + 1, draw(6) + 1
        prompts, answers, has_audio = [], [], []
        for _ in range(draw(4) + 1):
            prompt = [draw(98) + 1 for _ in range(draw(7) + 1)]
            kind = draw(3)
            if kind < 2:
                prompt.insert(draw(len(prompt) + 1), (VIDEO_PLACEHOLDER, AUDIO_PLACEHOLDER)[kind])
            if draw(2):
                prompt.insert(0, SEG)  # a [SEG] in the prompt never counts
            prompts.append(prompt)
            answers.append([SEG if draw(4) == 0 else draw(98) + 1 for _ in range(draw(8))])
            has_audio.append(kind == 1 or bool(draw(2)))
        side = ("right", "left")[case % 2]
        packed = splice([torch.tensor(p) for p in prompts], [torch.tensor(a, dtype=torch.long) for a in answers],
                        video, audio, SEG, has_audio, side)  # fmt: skip
        rows = oracle(prompts, answers, video, audio, has_audio, side == "left")
        for name in ("token_ids", "media_index", "labels"):
            assert getattr(packed, name).tolist() == [row[name] for row in rows]
        assert packed.attention_mask.tolist() == [row["mask"] for row in rows]
        assert packed.seg_positions.tolist() == [row["seg"] for row in rows]
        assert packed.has_seg.tolist() == [row["seg"] >= 0 for row in rows]


def test_reads_like_the_picture() -> None:
    """prompt [5, <video>, 6] + answer [7, SEG, 8, SEG, 9], two video tokens and one of sound."""
    packed = splice([torch.tensor([5, VIDEO_PLACEHOLDER, 6])], [torch.tensor([7, SEG, 8, SEG, 9])], 2, 1, SEG)
    assert packed.token_ids.tolist() == [[5, 0, 0, 0, 6, 7, SEG, 8, SEG, 9]]
    assert packed.media_index.tolist() == [[-1, 0, 1, 2, -1, -1, -1, -1, -1, -1]]
    assert packed.labels.tolist() == [[-100, -100, -100, -100, -100, 7, SEG, 8, SEG, 9]]
    assert packed.seg_positions.tolist() == [8]


def test_no_answers_means_no_labels() -> None:
    packed = splice([torch.tensor([SEG, 5]), torch.tensor([5])], None, 0, 0, SEG, padding_side="left")
    assert packed.attention_mask.tolist() == [[True, True], [False, True]]
    assert (packed.labels == IGNORE).all()
    assert packed.seg_positions.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("prompt", "answer", "video", "audio", "message"),
    [
        ([1, VIDEO_PLACEHOLDER, VIDEO_PLACEHOLDER], [2], 3, 2, "row 0: 2 placeholders"),
        ([VIDEO_PLACEHOLDER, AUDIO_PLACEHOLDER], [2], 3, 2, "at most one"),
        ([1, VIDEO_PLACEHOLDER], [2], 0, 2, "asks for media that the row does not have"),
        ([1, AUDIO_PLACEHOLDER], [2], 3, 0, "asks for media"),
        ([1, -200], [2], 3, 2, "id -200 is no placeholder"),
        ([1], [2, VIDEO_PLACEHOLDER], 3, 2, "answer holds negative id -201"),
        ([], [], 3, 2, "both empty"),
        ([[1]], [2], 3, 2, "1-D"),
    ],
)
def test_refusals(prompt: list, answer: list, video: int, audio: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splice([torch.tensor(prompt, dtype=torch.long)], [torch.tensor(answer, dtype=torch.long)], video, audio, SEG)


def test_refuses_batches_that_do_not_line_up() -> None:
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="2 prompts, 1 answers"):
        splice([one, one], [one], 0, 0, SEG)
    with pytest.raises(ValueError, match="no rows"):
        splice([], [], 0, 0, SEG)
    with pytest.raises(ValueError, match="padding_side"):
        splice([one], None, 0, 0, SEG, padding_side="middle")


@pytest.fixture(scope="module")
def small() -> VideoLlama2:
    torch.manual_seed(0)
    return VideoLlama2(
        VideoLlama2Config(
            LanguageConfig(16, 32, 1, 2, 1, 100),
            VisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, attention_dropout=0.0),
            BeatsConfig(4, 4, 8, 16, 1, 2, conv_pos=4, conv_pos_groups=2, mel_bins=4),
            select_layer=-1,
        )
    )


def embed_oracle(model: VideoLlama2, packed: PackedInputs, media: MediaFeatures) -> Tensor:
    rows = []
    for b in range(packed.token_ids.shape[0]):
        tokens = torch.cat([x[b] for x in (media.video, media.audio) if x is not None])
        row = []
        for s in range(packed.token_ids.shape[1]):
            if not packed.attention_mask[b, s]:
                row.append(tokens.new_zeros(tokens.shape[1]))
            elif packed.media_index[b, s] >= 0:
                row.append(tokens[packed.media_index[b, s]])
            else:
                row.append(model.language_model.model.embed_tokens.weight[packed.token_ids[b, s]])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_embed_gathers_and_differentiates_through_words_and_media(small: VideoLlama2) -> None:
    prompts = [torch.tensor([3, VIDEO_PLACEHOLDER, 4]), torch.tensor([AUDIO_PLACEHOLDER, 7]), torch.tensor([8, 8])]
    packed = splice(prompts, [torch.tensor([5, SEG])] * 3, 3, 2, SEG)
    video, audio = torch.randn(3, 3, 16, requires_grad=True), torch.randn(3, 2, 16, requires_grad=True)
    words = small.language_model.model.embed_tokens.weight
    media = MediaFeatures(video, audio)
    results = []
    for embed in (small.embed, lambda p, m: embed_oracle(small, p, m)):
        out = embed(packed, media)
        weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out) / out.numel()
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), [video, audio, words])))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive)
    assert results[0][1][1:].abs().sum() == 0, "rows without video leave its features untouched"


def test_embed_refuses_missing_or_mismatched_media(small: VideoLlama2) -> None:
    packed = splice([torch.tensor([3, VIDEO_PLACEHOLDER])], None, 3, 0, SEG)
    with pytest.raises(ValueError, match="no media features"):
        small.embed(packed)
    with pytest.raises(ValueError, match="2 rows for 1"):
        small.embed(packed, MediaFeatures(torch.zeros(2, 3, 16), None))
    text = splice([torch.tensor([3, 4])], None, 0, 0, SEG)
    assert torch.equal(small.embed(text), small.language_model.model.embed_tokens(text.token_ids))
