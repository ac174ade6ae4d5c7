"""The whole backbone, folder in, tensors out, against outputs of the released code on the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.splice import splice
from model.backbones.videollama2.weights import from_released, load_backbone
from utils.types import MediaFeatures, PackedInputs

SEG = 599
EMBEDS, LOGITS, LOSS = 2e-5, 5e-5, 1e-4
"""Stated absolute tolerances (float32, CPU)."""


def split(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The fixture's one row of ids into prompt and answer."""
    start = int((labels != -100).nonzero()[0])
    return ids[:start], ids[start:]


def forward(model: VideoLlama2, packed: PackedInputs, media: MediaFeatures) -> dict[str, Tensor]:
    embeds = model.embed(packed, media)
    out = model.language_model(
        inputs_embeds=embeds, attention_mask=packed.attention_mask, labels=packed.labels, output_hidden_states=True
    )
    return {"inputs_embeds": embeds, "logits": out.logits, "loss": out.loss, "last_hidden_state": out.hidden_states[-1],
            "hidden_state_layer1": out.hidden_states[1]}  # fmt: skip


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def av(tiny_backbone: VideoLlama2, tiny_inputs: dict) -> tuple[PackedInputs, MediaFeatures, dict[str, Tensor]]:
    """Case "av": ten frames and two seconds of sound, with gradients kept."""
    media = MediaFeatures(
        tiny_backbone.encode_video(tiny_inputs["pixels"].unsqueeze(0)),
        tiny_backbone.encode_audio(tiny_inputs["fbank_short"]),
    )
    prompt, answer = split(tiny_inputs["ids_av"][0], tiny_inputs["labels_av"][0])
    packed = splice([prompt], [answer], 45, 96, SEG)
    return packed, media, forward(tiny_backbone, packed, media)


@pytest.mark.smoke
def test_video_with_sound(av: tuple, tiny_expected: dict) -> None:
    packed, _, out = av
    assert torch.equal(packed.attention_mask, tiny_expected["av_attention_mask"])
    assert torch.equal(packed.labels, tiny_expected["av_labels"])
    for name, tolerance in (("inputs_embeds", EMBEDS), ("hidden_state_layer1", LOGITS), ("last_hidden_state", LOGITS),
                            ("logits", LOGITS), ("loss", LOSS)):  # fmt: skip
        close(out[name], tiny_expected[f"av_{name}"], tolerance)


def test_seg_feature_is_read_at_the_token(av: tuple, tiny_expected: dict) -> None:
    packed, _, out = av
    at = int(packed.seg_positions[0])
    assert at == int(tiny_expected["av_seg_position"]) == 173
    assert tiny_expected["av_seg_token_mask"].nonzero().flatten().tolist() == [at]
    close(out["last_hidden_state"][0, at], tiny_expected["av_seg_hidden_at"], LOGITS)
    close(out["last_hidden_state"][0, at - 1], tiny_expected["av_seg_hidden_before"], LOGITS)
    assert (tiny_expected["av_seg_hidden_at"] - tiny_expected["av_seg_hidden_before"]).abs().max() > 0.1


def test_batch_with_and_without_sound(tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict) -> None:
    """Row 0 has both, row 1 (shorter) only frames; row 0's values are those of the row alone."""
    valid = tiny_inputs["attention_mask_batch2"]
    pairs = [split(ids[keep], labels[keep]) for ids, labels, keep in
             zip(tiny_inputs["ids_batch2"], tiny_inputs["labels_batch2"], valid, strict=True)]  # fmt: skip
    packed = splice([p for p, _ in pairs], [a for _, a in pairs], 45, 96, SEG, has_audio=[True, False])
    pixels = torch.stack([tiny_inputs["pixels"], tiny_inputs["pixels"].flip(0)])
    fbank = torch.cat([tiny_inputs["fbank_short"], torch.zeros_like(tiny_inputs["fbank_short"])])
    media = MediaFeatures(tiny_backbone.encode_video(pixels), tiny_backbone.encode_audio(fbank))
    out = forward(tiny_backbone, packed, media)
    assert torch.equal(packed.attention_mask, tiny_expected["batch2_attention_mask"])
    assert torch.equal(packed.labels, tiny_expected["batch2_labels"])
    length = int(packed.attention_mask[1].sum())
    for name, tolerance in (("inputs_embeds", EMBEDS), ("last_hidden_state", LOGITS), ("logits", LOGITS)):
        close(out[name][:1], tiny_expected[f"av_{name}"], tolerance)
        close(out[name][1, :length], tiny_expected[f"batch2_row1_{name}"], tolerance)
    close(out["loss"], tiny_expected["batch2_loss"], LOSS)
    assert packed.seg_positions.tolist() == [173, -1]


def test_sound_alone(tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict) -> None:
    packed = splice([tiny_inputs["ids_audio"][0]], None, 0, 96, SEG)
    out = forward(tiny_backbone, packed, MediaFeatures(None, tiny_backbone.encode_audio(tiny_inputs["fbank_short"])))
    for name, tolerance in (("inputs_embeds", EMBEDS), ("last_hidden_state", LOGITS), ("logits", LOGITS)):
        close(out[name], tiny_expected[f"audio_{name}"], tolerance)


def test_sound_alone_beside_a_video_row(av: tuple, tiny_backbone: VideoLlama2, tiny_inputs: dict,
                                        tiny_expected: dict) -> None:  # fmt: skip
    """Mixed batch: the audio-only row skips its video features."""
    prompt, answer = split(tiny_inputs["ids_av"][0], tiny_inputs["labels_av"][0])
    packed = splice([prompt, tiny_inputs["ids_audio"][0]], [answer, answer[:0]], 45, 96, SEG)
    out = forward(tiny_backbone, packed, av[1].repeat(2))
    close(out["logits"][0], tiny_expected["av_logits"][0], LOGITS)
    close(out["logits"][1, :107], tiny_expected["audio_logits"][0], LOGITS)


def test_frames_alone(tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict) -> None:
    prompt, answer = split(tiny_inputs["ids_av"][0], tiny_inputs["labels_av"][0])
    packed = splice([prompt], [answer], 45, 0, SEG)
    out = forward(tiny_backbone, packed, MediaFeatures(tiny_backbone.encode_video(tiny_inputs["pixels"][None]), None))
    assert torch.equal(packed.attention_mask, tiny_expected["video_attention_mask"])
    assert torch.equal(packed.labels, tiny_expected["video_labels"])
    for name, tolerance in (("inputs_embeds", EMBEDS), ("last_hidden_state", LOGITS), ("logits", LOGITS),
                            ("loss", LOSS)):  # fmt: skip
        close(out[name], tiny_expected[f"video_{name}"], tolerance)


@pytest.mark.smoke
def test_gradients(av: tuple, tiny_backbone: VideoLlama2, tiny_folder: Path, tiny_expected: dict) -> None:
    """Through loss, language model, splice, projectors and towers; audio carries the decay of .6 per layer."""
    with np.load(tiny_folder / "expected.npz") as file:
        names = [from_released(str(name)) for name in file["grad_names"]]
    parameters = [tiny_backbone.get_parameter(name) for name in names]
    grads = torch.autograd.grad(av[2]["loss"], parameters, retain_graph=True)
    norms = torch.stack([g.double().norm() for g in grads])
    torch.testing.assert_close(norms, tiny_expected["grad_norms"], rtol=1e-4, atol=0)
    assert names[0].endswith("layers.0.self_attn.q_proj.weight") and "audio" in names[0]
    wanted = tiny_expected["grad_audio_l0_q"]
    torch.testing.assert_close(grads[0], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_answer_log_probs_need_the_spliced_positions(av: tuple, tiny_inputs: dict, tiny_expected: dict) -> None:
    """Released code LISA_grpo.py:252-263 gathers with indices of the unspliced ids: other positions, other values."""
    packed, _, out = av
    answer = packed.labels[0][packed.labels[0] != -100]
    at = (packed.labels[0] != -100).nonzero().flatten() - 1
    log_probs = F.log_softmax(out["logits"][0, at].float(), -1).gather(-1, answer.unsqueeze(-1)).squeeze(-1)
    close(log_probs, tiny_expected["grpo_logps_correct"], LOSS)
    close(-log_probs.mean(), tiny_expected["av_loss"], LOSS)
    ids = tiny_inputs["ids_av"][0]
    first = len(ids) - len(answer) - 1
    unspliced = F.log_softmax(out["logits"][0, first : first + len(answer)], -1).gather(-1, answer[:, None]).squeeze(-1)
    close(unspliced, tiny_expected["grpo_logps_reference_buggy"], LOSS)
    assert (log_probs - tiny_expected["grpo_logps_reference_buggy"]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.smoke
def test_greedy_generation_with_a_cache(av: tuple, tiny_backbone: VideoLlama2, tiny_folder: Path) -> None:
    with np.load(tiny_folder / "generate.npz") as file:
        prompt, wanted = torch.from_numpy(file["prompt_ids"])[0], file["greedy_ids"][0].tolist()
    packed = splice([prompt], None, 45, 96, SEG)
    embeds = tiny_backbone.embed(packed, av[1])
    ids = tiny_backbone.language_model.generate(
        inputs_embeds=embeds, attention_mask=packed.attention_mask, max_new_tokens=len(wanted), do_sample=False
    )
    assert ids[0].tolist() == wanted


@torch.no_grad()
def test_left_padding_leaves_the_next_token_alone(av: tuple, tiny_backbone: VideoLlama2, tiny_inputs: dict) -> None:
    prompts = [split(tiny_inputs["ids_av"][0], tiny_inputs["labels_av"][0])[0], tiny_inputs["ids_audio"][0]]
    media = av[1].repeat(2)
    last = {}
    for side in ("right", "left"):
        packed = splice(prompts, None, 45, 96, SEG, padding_side=side)
        out = tiny_backbone.language_model(inputs_embeds=tiny_backbone.embed(packed, media),
                                           attention_mask=packed.attention_mask)  # fmt: skip
        ends = packed.attention_mask.sum(1) - 1 if side == "right" else torch.tensor([-1, -1])
        assert torch.isfinite(out.logits).all()
        last[side] = out.logits[torch.arange(2), ends]
    close(last["left"], last["right"], LOGITS)


@torch.no_grad()
def test_bfloat16_stays_near_float32(tiny_folder: Path, tiny_inputs: dict, tiny_expected: dict) -> None:
    """All in bf16: mean deviation of the logits under 3 % of their root mean square, loss within 0.05."""
    model, _ = load_backbone(tiny_folder, dtype=torch.bfloat16)
    video, audio = model.encode_video(tiny_inputs["pixels"][None]), model.encode_audio(tiny_inputs["fbank_short"])
    prompt, answer = split(tiny_inputs["ids_av"][0], tiny_inputs["labels_av"][0])
    out = forward(model, splice([prompt], [answer], 45, 96, SEG), MediaFeatures(video, audio))
    wanted = tiny_expected["av_logits"]
    assert out["logits"].dtype == torch.bfloat16
    assert (out["logits"].float() - wanted).abs().mean() < 0.03 * wanted.square().mean().sqrt()
    assert abs(float(out["loss"]) - float(tiny_expected["av_loss"])) < 0.05
