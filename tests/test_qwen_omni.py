"""Qwen2.5-Omni's thinker as a backbone: against transformers' processor and full model, and in all that is done with a
backbone. Random weights of the tiny size, float32."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
    processing_utils,
)

from configs.schema import TrainableConfig
from dataset.fbank import whisper_log_mel
from dataset.processor import AuroraProcessor
from dataset.prompt import load_tokenizer
from model.aurora.generation import generate
from model.aurora.model import AuroraModel
from model.aurora.sampling import Sampling
from model.aurora.trainable import apply_trainable
from model.aurora.trained import load_trained, save_trained
from model.backbones.qwen_omni import (
    OmniConfig,
    QwenOmni,
    export_state,
    load_backbone,
    media_layout,
    released_config,
    step_seconds,
    to_patches,
)
from tests.aurora_cases import SEG, StubTokenizer, stir, tiny_batch, tiny_sample, tiny_segmenter
from tests.omni_case import MEL_BINS, write_tiny_omni
from tests.tiny_run import make_tiny_run, metrics, train
from utils.tensor_files import TensorFileError
from utils.types import AUDIO_PLACEHOLDER, Batch

SIDE, FRAMES = 56, 4
LORA = TrainableConfig(lora_rank=2, lora_dropout=0.0, full=(), seg_rows_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture
def backbone(folder: Path) -> QwenOmni:
    return load_backbone(folder)[0]


@pytest.fixture
def model(backbone: QwenOmni) -> AuroraModel:
    return AuroraModel(backbone, tiny_segmenter(), SEG).eval()


def clip_batch(frames: int = FRAMES, side: int = SIDE, mel_frames: int = 100 * FRAMES) -> Batch:
    """Two clips with prompts of unequal length; the first answer asks for a mask."""
    samples = []
    for row, (answer, words) in enumerate((((5, 6, SEG, 7), 6), ((9, SEG, 4, 3), 9))):
        generator = torch.Generator().manual_seed(row)
        sizes = {"pixel_values": (frames, 3, side, side), "sam_pixels": (frames, 3, 32, 32),
                 "fbank": (mel_frames, MEL_BINS)}  # fmt: skip
        media = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        samples.append(replace(tiny_sample(row, answer, words), **media, masks=torch.zeros(frames, 20, 30) > 0))
    return tiny_batch(*samples)


# ---- inputs


@pytest.mark.parametrize("samples", [160_000, 63_901, 12_345])
@pytest.mark.parametrize("seconds", [12, 30])
def test_log_mel_is_that_of_the_feature_extractor(samples: int, seconds: int) -> None:
    wave = np.random.default_rng(samples).uniform(-0.5, 0.5, samples).astype(np.float32)
    wave[-300:] *= 1.9  # the loudest part reaches beyond the last frame
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=seconds)
    found = extractor(wave, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    expected = found["input_features"][0].T[found["attention_mask"][0].bool()]
    torch.testing.assert_close(whisper_log_mel(torch.from_numpy(wave)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", [4, 3])
def test_patches_are_those_of_the_video_processor(frames: int) -> None:
    pixels = torch.randint(0, 256, (frames, 3, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Qwen2VLVideoProcessor()(
        pixels, do_resize=False, do_sample_frames=False, return_tensors="pt", input_data_format="channels_first"
    )
    processor = AuroraProcessor(None, 84, 32, frame_mean=(0.48145466, 0.4578275, 0.40821073),
                                frame_std=(0.26862954, 0.26130258, 0.27577711))  # fmt: skip
    own = to_patches(processor.vision_pixels(pixels.permute(0, 2, 3, 1).numpy())[None], 14, 2, 2)
    assert found["video_grid_thw"].tolist() == [[2, 6, 6]]
    torch.testing.assert_close(own, found["pixel_values_videos"], rtol=0, atol=1e-5)


# ---- layout


def spelled(backbone: QwenOmni, ids: Tensor, index: Tensor, video_tokens: int) -> Tensor:
    """Token ids with the pads of transformers at the places of the media."""
    config = backbone.config.thinker
    pads = torch.where(index < video_tokens, config.video_token_id, config.audio_token_id)
    return torch.where(index >= 0, pads, ids)


def test_positions_are_those_of_transformers_on_500_layouts(folder: Path) -> None:
    config = OmniConfig.from_folder(folder)
    with torch.device("meta"):
        backbone = QwenOmni(config)
        reference = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker)
    draw = random.Random(0)
    outlasting = 0
    for _ in range(500):
        frames, side = draw.randint(1, 13), 28 * draw.choice([1, 2, 3, 4, 12])
        mel = max(round(100 * frames * draw.choice([0.25, 0.5, 0.75, 1.0])) + draw.randint(-3, 3), 8)
        batch = tiny_batch(*(replace(tiny_sample(row, (5, SEG, 7), draw.randint(2, 9)),
                                     pixel_values=torch.empty(frames, 0, side, side), fbank=torch.empty(mel, 0))
                             for row in range(2)))  # fmt: skip
        packed = backbone.layout(batch, batch.prompts, batch.answers, SEG)
        ids = spelled(backbone, packed.token_ids, packed.media_index, config.video_tokens(frames, side))
        step = step_seconds(frames, mel, 2)
        grid = torch.tensor([[-(-frames // 2), side // 14, side // 14]] * 2)
        known = packed.attention_mask
        expected, _ = reference.get_rope_index(
            ids, None, grid, known.long(), True, torch.tensor([mel] * 2), torch.tensor([step] * 2)
        )
        assert packed.position_ids[:, known].equal(expected[:, known]), (frames, side, mel)
        answers = packed.position_ids[:, known & (packed.labels >= 0)]
        assert answers.equal(answers[:1].expand(3, -1))
        outlasting += int(packed.position_ids[:, 0, known[0]].max() > answers[0, :3].max())
        assert packed.token_ids[packed.answer_of_query, packed.position_of_query].tolist() == [SEG, SEG]
    assert outlasting  # the case in which the highest position is not the last


def test_long_steps_make_long_chunks() -> None:
    """Five frames of ten seconds: a pair stands for 4 s, and 4 s of sound follow it."""
    found = media_layout((3, 1, 1), 250, 4.0)
    assert found.order[:1].tolist() == [0] and found.order[1:101].tolist() == list(range(3, 103))
    assert found.order[101] == 1 and found.positions[0, 101] == 100
    assert step_seconds(10, 997, 2) == 2.0 and step_seconds(5, 1000, 2) == 4.0


def test_sound_alone_and_text_alone_count_like_words(backbone: QwenOmni) -> None:
    batch = clip_batch()
    prompts = [torch.tensor([1, 2, AUDIO_PLACEHOLDER, 3]), torch.tensor([4, 5])]
    packed = backbone.layout(batch, prompts, None, SEG)
    config = backbone.config.thinker
    assert packed.attention_mask.sum(1).tolist() == [100 + 2 + 3, 2]
    assert packed.token_ids[0, [2, 103]].tolist() == [config.audio_start_token_id, config.audio_end_token_id]
    assert packed.position_ids.equal(torch.arange(105).expand(3, 2, -1))


# ---- against the full model


def full_forward(folder: Path, frames: Tensor, wave: np.ndarray, text: str) -> tuple[Tensor, Tensor]:
    """(token ids, logits [S,V]) of transformers' processor and thinker for one clip."""
    processor = Qwen2_5OmniProcessor.from_pretrained(str(folder), local_files_only=True)
    pixels = frames.shape[2] * frames.shape[3]
    video = {"fps": 1.0, "size": {"shortest_edge": pixels, "longest_edge": pixels}, "do_sample_frames": False,
             "cap_pixels_per_frame": False}  # fmt: skip
    if hasattr(processing_utils, "OmniModalProcessingKwargs"):
        sound = {"load_audio_from_video": True, "audio_from_video_indices": [0]}
    else:  # transformers 5.20 has another name for it
        sound, video["use_audio_in_video"] = {}, True
    inputs = processor(
        text=[text], videos=[frames], audio=[wave], return_tensors="pt", audio_kwargs={"sampling_rate": 16_000},
        videos_kwargs=video, **sound,
    )  # fmt: skip
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(str(folder), local_files_only=True).eval()
    with torch.no_grad():
        return inputs["input_ids"][0], thinker(**inputs, use_audio_in_video=True).logits[0]


def test_own_path_equals_processor_and_full_model(folder: Path, model: AuroraModel) -> None:
    """Two clips with prompts of unequal length, padded on the right, against one by one through transformers."""
    rng = np.random.default_rng(0)
    tokenizer, _ = load_tokenizer(folder)
    media = model.backbone.media_format
    processor = AuroraProcessor(tokenizer, SIDE, 32, media.mel_bins, None, audio_windows=None, system_prompt="qwen2",
                                frame_mean=media.frame_mean, frame_std=media.frame_std, sound=media.sound)  # fmt: skip
    frames = [rng.integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8) for _ in range(2)]
    waves = [rng.uniform(-0.5, 0.5, 16_000 * FRAMES).astype(np.float32) for _ in range(2)]
    references = ["The dog", "The man on the left who plays the cello"]
    batch = processor(frames, waves, references)
    packed = model.pack(batch, None)
    with torch.no_grad():
        logits = model.backbone.lm_head(model.hidden_states(packed, model.encode(batch, masks=False)))
    for row, reference in enumerate(references):
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_bos|><|VIDEO|><|vision_eos|>\nThe reference is: {reference} Please segment the corresponding "
            "object in the images.<|im_end|>\n<|im_start|>assistant\n"
        )
        ids, expected = full_forward(folder, torch.from_numpy(frames[row]).permute(0, 3, 1, 2), waves[row], text)
        known = packed.attention_mask[row]
        own = spelled(model.backbone, packed.token_ids[row], packed.media_index[row],
                      model.backbone.config.video_tokens(FRAMES, SIDE))  # fmt: skip
        assert own[known].equal(ids)
        assert expected.abs().max() > 1
        torch.testing.assert_close(logits[row, known], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_towers_give_each_clip_what_they_give_it_alone(model: AuroraModel) -> None:
    batch = clip_batch()
    together, alone = model.encode(batch, masks=False), model.encode(batch.clip(1), masks=False)
    assert together.video.shape == (2, 8, 32) and together.audio.shape == (2, 100, 32)
    torch.testing.assert_close(together.video[1:], alone.video, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.audio[1:], alone.audio, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="a multiple of 28"):
        model.backbone.run_tower(model.backbone.towers[0], torch.zeros(1, 2, 3, 60, 60))


def test_odd_frames_and_other_sizes_have_the_tokens_that_are_counted(model: AuroraModel) -> None:
    batch, config = clip_batch(frames=3, side=84, mel_frames=301), model.backbone.config
    media = model.encode(batch, masks=False)
    assert media.video.shape[1] == config.video_tokens(3, 84) == 18
    assert media.audio.shape[1] == config.audio_tokens(301) == 75
    released = released_config()
    assert (released.video_tokens(10), released.audio_tokens(1000)) == (1280, 250)


# ---- groups


def log_probs(model: AuroraModel, batch: Batch, answers: list[Tensor], copies: bool) -> Tensor:
    """Of every token of R = 2 * G answers: read behind G copies of each prompt, or behind one."""
    group = len(answers) // 2
    if not copies:
        packed = model.pack_group(batch, answers, group)
        return model(packed, model.encode(batch, masks=False)).log_probs[packed.mask]
    rows = model.pack(batch, answers, [prompt for prompt in batch.prompts for _ in range(group)])
    plain = model(rows, model.encode(batch, masks=False).repeat(group))
    return plain.answer_logits.log_softmax(-1).gather(-1, plain.answer_labels[:, None])[:, 0]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("clip", [(FRAMES, SIDE, 100 * FRAMES), (2, 336, 20)])
def test_a_group_is_scored_as_full_copies(model: AuroraModel, clip: tuple[int, int, int], checkpointed: bool) -> None:
    """In values and in all gradients. The second clip outlasts its sound: the highest position is not the last."""
    model.backbone.set_gradient_checkpointing(checkpointed)
    batch = clip_batch(*clip)
    answers = [torch.randint(1, 500, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 3, 2, 6)]
    found = {}
    for copies in (True, False):
        model.zero_grad()
        scores = log_probs(model, batch, answers, copies)
        (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
        found[copies] = scores, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[False][0], found[True][0], rtol=1e-6, atol=2e-6)
    expected, scale = found[True][1], max(float(g.abs().max()) for g in found[True][1].values())
    assert {"backbone.vision_tower.patch_embed.proj.weight", "backbone.audio_tower.conv1.weight"} < expected.keys()
    assert found[False][1].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[False][1][name], gradient, rtol=1e-5, atol=1e-6 * scale)


@torch.no_grad()
def test_answers_are_drawn_from_what_scoring_says(model: AuroraModel) -> None:
    """Token by token behind a prompt that is kept, against one pass over everything; with the states at [SEG]."""
    batch, group = clip_batch(2, 336, 20), 2
    media, sampling = model.encode(batch), Sampling(1.0, generator=torch.Generator().manual_seed(0))
    drawn = generate(model, batch, media, StubTokenizer(), 6, group, sampling)
    expected = log_probs(model, batch, drawn.token_ids, copies=True)
    torch.testing.assert_close(torch.cat(drawn.log_probs), expected, rtol=0, atol=1e-5)
    packed = model.pack(batch, None)
    positions = packed.position_ids[:, 0, packed.attention_mask[0]]
    assert positions.max() > positions[0, -1]  # so the drawn answers do not follow the highest position


# ---- weights


def whole_model(thinker: Path, folder: Path, **changes: Tensor | None) -> Path:
    """A folder as released: the thinker's configuration inside, speech beside it; `changes` replace tensors."""
    folder.mkdir()
    config = json.loads((thinker / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "thinker_config": config}))
    tensors = load_file(thinker / "model.safetensors") | {"talker.a": torch.ones(1), "token2wav.b": torch.ones(2)}
    tensors |= changes
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors")
    return folder


def test_a_released_folder_is_read_whole_and_its_speech_left(folder: Path, backbone: QwenOmni, tmp_path: Path) -> None:
    loaded, unread = load_backbone(whole_model(folder, tmp_path / "omni"), torch.bfloat16)
    assert unread == ["talker.a", "token2wav.b"]
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == len(backbone.state_dict())
    assert backbone.decoder.embed_tokens.weight.equal(stored["thinker.model.embed_tokens.weight"])
    assert loaded.lm_head.weight.equal(stored["thinker.lm_head.weight"].bfloat16())


@pytest.mark.parametrize(("change", "complaint"), [
    ({"thinker.lm_head.weight": None}, "missing: thinker.lm_head.weight"),
    ({"thinker.model.norm.weight": torch.ones(31)}, r"shape: thinker.model.norm.weight is \(31,\)"),
    ({"thinker.talker.x": torch.ones(1)}, "unexpected: thinker.talker.x"),
])  # fmt: skip
def test_keys_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, change: dict[str, Tensor | None], complaint: str
) -> None:
    with pytest.raises(TensorFileError, match=complaint):
        load_backbone(whole_model(folder, tmp_path / "omni", **change))


@pytest.mark.parametrize(("field", "value", "complaint"), [
    ("tie_word_embeddings", True, "tie_word_embeddings = True"),
    ("vision_start_token_id", None, "vision_start_token_id is missing"),
    ("text_config", None, "text_config missing"),
])  # fmt: skip
def test_unsupported_configurations_are_refused(
    folder: Path, tmp_path: Path, field: str, value: Any, complaint: str
) -> None:
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    if value is None:
        del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TensorFileError, match=complaint):
        OmniConfig.from_folder(tmp_path)


def test_what_is_written_is_read_here_and_by_transformers(folder: Path, backbone: QwenOmni, tmp_path: Path) -> None:
    state = backbone.state_dict()
    export_state(backbone.config, state, tmp_path, "float32")
    again, unread = load_backbone(tmp_path)
    assert not unread and all(again.state_dict()[name].equal(x) for name, x in state.items())
    _, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        str(tmp_path), local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(TensorFileError, match="missing: thinker.lm_head.weight"):
        export_state(backbone.config, {k: x for k, x in state.items() if "lm_head" not in k}, tmp_path, "float32")


def test_a_cast_leaves_all_phases_exact(backbone: QwenOmni) -> None:
    positions = torch.full((3, 1, 1), 2000)
    one = torch.zeros(1, 1, 32)
    before = backbone.decoder.rotary_emb(one, positions)
    places = torch.tensor([[100, 90]])
    seen = backbone.vision_tower.rotary_pos_emb(one, places)
    backbone.to(torch.bfloat16)
    after = (*backbone.decoder.rotary_emb(one, positions), *backbone.vision_tower.rotary_pos_emb(one, places))
    for found, expected in zip(after, (*before, *seen), strict=True):
        assert found.equal(expected)


@pytest.mark.parametrize(("size", "values"), [("3b", 4_703_464_448), ("7b", 8_931_813_888)])
def test_released_sizes(size: str, values: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in QwenOmni(released_config(size)).parameters()) == values


# ---- training


def test_adapters_reach_the_decoder_alone(model: AuroraModel) -> None:
    """peft can rewrite a choice so that it reaches the audio tower, whose layers have the same names."""
    apply_trainable(model, LORA)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    layers = (f"backbone.language_model.model.layers.{i}.self_attn.{q}_proj" for i in range(2) for q in "qv")
    assert adapted == set(layers)
    output = model.train()(model.pack(batch := clip_batch(), batch.answers), model.encode(batch))
    (output.answer_logits.square().mean() + output.mask_logits.square().mean()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("lora_B", "embed_tokens.seg_row", "lm_head.seg_row", "text_hidden_fcs", "segmenter.sam.mask_decoder"):
        assert any(part in name for name in trained), part
    assert not any(name.startswith(("backbone.vision", "backbone.audio")) for name in trained)


@torch.no_grad()
def test_light_checkpoint_restores_the_model(folder: Path, model: AuroraModel, tmp_path: Path) -> None:
    apply_trainable(model, LORA)
    stir(model, 1)
    save_trained(model, tmp_path)
    other = AuroraModel(load_backbone(folder)[0], tiny_segmenter(), SEG).eval()
    apply_trainable(other, LORA)
    batch = clip_batch()
    answers = [m(m.pack(batch, batch.answers), m.encode(batch)) for m in (model, other)]
    assert not answers[0].mask_logits.allclose(answers[1].mask_logits)
    load_trained(other, tmp_path)
    again = other(other.pack(batch, batch.answers), other.encode(batch))
    assert again.mask_logits.equal(answers[0].mask_logits) and again.answer_logits.equal(answers[0].answer_logits)


def omni_run(folder: Path, omni: Path, **sections: Any) -> Path:
    """As `make_tiny_run`, with the tiny thinker in the place of its base."""
    config = make_tiny_run(folder, **sections)
    for path in omni.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "base" / path.name)
    return config


def test_every_stage_trains_from_files(folder: Path, tmp_path: Path) -> None:
    """train_ds.py itself: teacher, student, policy, each from the weights of the one before."""
    lean = {"lora_rank": 2, "lora_dropout": 0.1, "full": [], "seg_rows_only": True}
    config = omni_run(tmp_path / "t", folder, trainable=lean, data={"frame_size": SIDE},
                      optim={"steps": 2, "warmup_steps": 1}, model={"system_prompt": "qwen2"})  # fmt: skip
    runs = {name: tmp_path / "t" / name for name in ("teacher", "sft", "grpo")}
    stages = {
        "teacher": [],
        "sft": [f"sft.teacher_checkpoint={runs['teacher']}/final", "trainable.mask_decoder=false", "loss.distill=1.0",
                "data.answer=reasoning", f"data.cot=['{tmp_path}/t/cot.jsonl']"],
        "grpo": [f"init_from={runs['sft']}/final", "loss.ce=0.0", "data.answer=plain", "grpo.group_size=2",
                 "grpo.max_new_tokens=6", "grpo.reward_module=tests.omni_case:text_reward",
                 "grpo.reward_weights={text_reward: 1.0}"],
    }  # fmt: skip
    for stage, changes in stages.items():
        done = train(config, f"stage={stage}", f"output_dir={runs[stage]}", *changes)
        assert done.returncode == 0, done.stderr
        rows = metrics(runs[stage])
        assert len(rows) == 2 and all(np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)
