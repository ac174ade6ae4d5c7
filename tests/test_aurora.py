"""The joint model, what it trains, its light checkpoints and its builder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from configs.schema import TrainableConfig
from model.aurora.adapters import apply_trainable, component_counts, format_counts, freeze, is_adapter
from model.aurora.build import build_model
from model.aurora.features import FeatureCache, tower_fingerprint
from model.aurora.model import COMPONENTS, EMPTY_LOGIT, AuroraModel, evaluating
from model.aurora.trained import find_trained, load_mask_decoder, load_trained, save_trained
from tests.aurora_cases import (
    BASE,
    LORA,
    SAM,
    SAM_SIDE,
    SEG,
    VOCABULARY,
    WHOLE,
    run_config,
    stir,
    three_clips,
    tiny_batch,
    tiny_model,
    tiny_sample,
    tiny_segmenter,
)
from utils.errors import ConfigError, WeightsError
from utils.types import IGNORE


@pytest.fixture(scope="module")
def plain() -> AuroraModel:
    return tiny_model().eval()


# ---- forward


def test_every_row_equals_the_row_alone(plain: AuroraModel) -> None:
    batch = three_clips()
    with torch.no_grad():
        together = plain(plain.pack(batch, batch.answers), plain.encode(batch))
        for i, sample in enumerate(batch.samples):
            alone_batch = tiny_batch(sample)
            alone = plain(plain.pack(alone_batch, alone_batch.answers), plain.encode(alone_batch))
            assert bool(alone.has_seg) == bool(together.has_seg[i])
            torch.testing.assert_close(together.seg_features[i], alone.seg_features[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(together.mask_logits[i], alone.mask_logits[0], atol=1e-3, rtol=1e-3)


def test_seg_feature_is_the_state_at_the_last_seg_of_the_answer(plain: AuroraModel) -> None:
    """Row 1 has two [SEG]; position and projection are worked out by hand."""
    batch = three_clips()
    packed = plain.pack(batch, batch.answers)
    with torch.no_grad():
        output = plain(packed, plain.encode(batch))
    media = plain.backbone.config.video_tokens(2) + plain.backbone.config.audio_tokens(40)
    position = 9 + media + 4  # prompt words, media, index of the last [SEG] within the answer
    assert packed.token_ids[1, position] == SEG
    projection = plain.text_hidden_fcs[0]
    by_hand = projection[2](F.relu(projection[0](output.hidden[1, position])))
    torch.testing.assert_close(output.seg_features[1], by_hand, atol=1e-6, rtol=1e-5)


def test_an_answer_without_seg_has_no_feature_no_mask_and_no_gradient(plain: AuroraModel) -> None:
    batch = three_clips()
    output = plain(plain.pack(batch, batch.answers), plain.encode(batch))
    assert output.has_seg.tolist() == [True, True, False]
    assert not output.seg_features[2].any()
    assert (output.mask_logits[2] == EMPTY_LOGIT).all() and (output.mask_logits[0] != EMPTY_LOGIT).any()
    head = list(plain.text_hidden_fcs.parameters())
    gradients = torch.autograd.grad(output.seg_features[2].sum() + output.mask_logits[2].sum(), head)
    assert not any(g.any() for g in gradients)


def test_logits_are_those_of_the_whole_sequence(plain: AuroraModel) -> None:
    batch = three_clips()
    packed = plain.pack(batch, batch.answers)
    with torch.no_grad():
        output = plain(packed, plain.encode(batch))
        everywhere = plain.backbone.language_model.lm_head(output.hidden)
    assert output.answer_labels.tolist() == [t for a in batch.answers for t in a.tolist()]
    row_major = [
        everywhere[b, s - 1] for b in range(3) for s in range(packed.labels.shape[1]) if packed.labels[b, s] != IGNORE
    ]
    torch.testing.assert_close(output.answer_logits, torch.stack(row_major), atol=1e-6, rtol=1e-5)
    whole = F.cross_entropy(everywhere[:, :-1].flatten(0, 1), packed.labels[:, 1:].flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(F.cross_entropy(output.answer_logits, output.answer_labels), whole)


def test_chosen_frames_are_frames_of_the_whole_decode(plain: AuroraModel) -> None:
    batch = three_clips()
    packed = plain.pack(batch, batch.answers)
    with torch.no_grad():
        media = plain.encode(batch)
        whole = plain(packed, media).mask_logits
        index = torch.tensor([[1], [0], [1]])
        some = plain(packed, media, index).mask_logits
        no_images = plain(packed, plain.encode(batch, masks=False)).mask_logits
    torch.testing.assert_close(some, whole[torch.arange(3)[:, None], index], atol=1e-4, rtol=1e-4)
    assert no_images is None


def test_a_repeated_prompt_equals_a_repeated_batch(plain: AuroraModel) -> None:
    """How a group of answers is scored: features repeated, prompts repeated."""
    batch, answers = tiny_batch(tiny_sample(0), tiny_sample(1)), [torch.tensor([5, SEG]), torch.tensor([SEG, 4, 3])]
    with torch.no_grad():
        prompts = [batch.prompts[0]] * 2 + [batch.prompts[1]] * 2
        grouped = plain(plain.pack(batch, answers * 2, prompts), plain.encode(batch).repeat(2))
        doubled_batch = tiny_batch(*(s for s in batch.samples for _ in range(2)))
        doubled = plain(plain.pack(doubled_batch, answers * 2), plain.encode(doubled_batch))
    torch.testing.assert_close(grouped.seg_features, doubled.seg_features, atol=1e-5, rtol=1e-5)


def test_seg_without_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="600 rows"):
        AuroraModel(tiny_model().backbone, tiny_segmenter(), VOCABULARY)


# ---- towers: gradient and cache


def test_gradient_reaches_trained_towers_only() -> None:
    batch = three_clips()
    model = tiny_model(LORA)
    media = model.encode(batch)
    assert media.audio.requires_grad and not media.video.requires_grad and not media.image_embeddings.requires_grad
    media = tiny_model(WHOLE).encode(batch)
    assert media.video.requires_grad and not media.audio.requires_grad


def test_cached_features_are_bit_equal_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(WHOLE, cache="memory"), three_clips()
    fresh = tiny_model(WHOLE).encode(batch)
    rows_seen: list[int] = []
    tower = model.backbone.vision_tower.forward
    monkeypatch.setattr(
        model.backbone.vision_tower, "forward", lambda frames: rows_seen.append(len(frames)) or tower(frames)
    )
    first, media = model.encode(batch), model.encode(batch)
    for name in ("video", "audio", "image_embeddings"):
        assert torch.equal(getattr(media, name), getattr(first, name))
        torch.testing.assert_close(getattr(media, name), getattr(fresh, name), atol=1e-5, rtol=1e-5)
    assert sum(rows_seen) == 6 and media.video.requires_grad  # the projector is trained, so it runs every time
    mixed = model.encode(tiny_batch(tiny_sample(4), batch.samples[1]))
    assert sum(rows_seen) == 8 and torch.equal(mixed.audio[1], first.audio[1])


def test_a_trained_tower_is_never_cached() -> None:
    model, batch = tiny_model(LORA, cache="memory").eval(), three_clips()
    before = model.encode(batch).audio
    stir(model, 1)
    assert not torch.equal(model.encode(batch).audio, before)
    assert {tower for tower, _ in model.feature_cache._stored} == {"mm_projector", "image_encoder"}


def test_reuse_takes_frozen_features_and_renews_the_others() -> None:
    model, batch = tiny_model(LORA), three_clips()
    with torch.no_grad():
        first = model.encode(batch)
    again = model.encode(batch, reuse=first)
    assert again.video is first.video and again.image_embeddings is first.image_embeddings
    assert again.audio.requires_grad and not first.audio.requires_grad


def test_cache_shares_equal_keys_and_keeps_no_batch_alive() -> None:
    cache, calls = FeatureCache("memory"), []

    def compute(rows: list[int]) -> torch.Tensor:
        calls.append(rows)
        return torch.tensor([[10.0 * r] for r in rows])

    assert cache.fetch("t", ["a", "b", "a"], compute).tolist() == [[0.0], [10.0], [0.0]]
    assert cache.fetch("t", ["b", "c"], compute).tolist() == [[10.0], [10.0]]
    assert sum(calls, []) == [0, 1, 1] and len(cache) == 3 and cache.bytes == 12
    assert cache.fetch("other", ["a"], compute).tolist() == [[0.0]]
    with pytest.raises(ValueError, match="folder"):
        FeatureCache("disk")
    with pytest.raises(ValueError, match="tape"):
        FeatureCache("tape")


def test_features_on_disk_outlive_the_model_but_neither_its_weights_nor_the_media(tmp_path: Path) -> None:
    model, batch = tiny_model().requires_grad_(False).eval(), three_clips()

    def cache() -> FeatureCache:
        return FeatureCache("disk", tmp_path, lambda tower: tower_fingerprint(model, tower))

    plain = model.encode(batch, cache=FeatureCache("memory"))
    first = model.encode(batch, cache=cache())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = model.encode(batch, cache=cache())
    assert torch.equal(first.image_embeddings, plain.image_embeddings) and torch.equal(first.video, plain.video)
    assert torch.equal(again.image_embeddings, first.image_embeddings) and torch.equal(again.video, first.video)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    batch.sam_pixels[0] += 0.5  # the clip's media change under the same name
    assert not torch.equal(model.encode(batch, cache=cache()).image_embeddings[0], first.image_embeddings[0])
    with torch.no_grad():
        model.segmenter.sam.image_encoder.pos_embed += 1.0
    count = len(list(tmp_path.rglob("image_encoder-*/*")))
    model.encode(batch, cache=cache())
    assert len(list(tmp_path.rglob("image_encoder-*/*"))) == count + len({s.clip for s in batch.samples})


# ---- what is trained


def test_published_set_of_adapters() -> None:
    """q_proj and v_proj of LM (2 layers), BEATs (2) and the mask decoder (7 attentions); not the vision tower's."""
    model = tiny_model(LORA)
    adapted = {n.split(".lora_A.")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    parts = {part: sum(part in name for name in adapted) for part in ("language_model", "audio_tower", "mask_decoder")}
    assert parts == {"language_model": 4, "audio_tower": 4, "mask_decoder": 14} and len(adapted) == 22


@pytest.mark.parametrize("trainable", [LORA, WHOLE], ids=["lora", "whole"])
def test_frozen_parts_have_no_gradient_and_stay_in_eval_mode(trainable: TrainableConfig) -> None:
    model = tiny_model(trainable).train()
    for parts in COMPONENTS:
        component = model.get_submodule(parts)
        assert component.training != model.is_frozen(parts), parts
    assert model.is_frozen("backbone.vision_tower", "segmenter.sam.image_encoder", "segmenter.sam.prompt_encoder")
    batch = three_clips()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    output = model(model.pack(batch, batch.answers), model.encode(batch))
    loss = F.cross_entropy(output.answer_logits, output.answer_labels) + output.mask_logits[:2].square().mean()
    loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved <= trained
    # the mask tokens that a single mask does not use, and the IoU head, get no gradient
    idle = r"iou_prediction_head|output_hypernetworks_mlps\.[123]|lora_A|k_proj\.bias"
    assert all(re.search(idle, name) for name in trained - moved), sorted(trained - moved)


def test_new_adapters_change_nothing() -> None:
    batch = three_clips()
    base, adapted = tiny_model().eval(), tiny_model(LORA).eval()
    adapted.text_hidden_fcs.load_state_dict(base.text_hidden_fcs.state_dict())
    with torch.no_grad():
        first, second = (m(m.pack(batch, batch.answers), m.encode(batch)) for m in (base, adapted))
    torch.testing.assert_close(first.answer_logits, second.answer_logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(first.seg_features, second.seg_features, atol=1e-6, rtol=1e-5)


def test_seg_rows_alone_equal_training_the_rows_of_whole_matrices() -> None:
    """Same loss, and the gradient of the two rows is that of the [SEG] rows of fully trained matrices."""
    batch = three_clips()
    lean = tiny_model(TrainableConfig(lora_rank=0, lora_targets=(), full=(), seg_rows_only=True))
    whole = tiny_model(TrainableConfig(lora_rank=0, lora_targets=(), full=(r"embed_tokens\.", r"lm_head\.")))
    whole.text_hidden_fcs.load_state_dict(lean.text_hidden_fcs.state_dict())
    for model in (lean, whole):
        output = model(model.pack(batch, batch.answers), model.encode(batch))
        (F.cross_entropy(output.answer_logits, output.answer_labels) + output.seg_features.square().sum()).backward()
    rows, matrices = lean.backbone.language_model, whole.backbone.language_model
    for name in ("model.embed_tokens", "lm_head"):
        row = rows.get_submodule(name).seg_row.grad
        torch.testing.assert_close(row, matrices.get_submodule(name).weight.grad[SEG], atol=1e-6, rtol=1e-4)
        assert rows.get_submodule(name).weight.grad is None
    counts = {c.name: c.trainable for c in component_counts(lean)}
    assert counts["backbone.language_model"] == 2 * 64 and counts["backbone.audio_tower"] == 0


def test_patterns_that_match_nothing_are_all_reported() -> None:
    wrong = TrainableConfig(
        lora_rank=2,
        lora_targets=(r"language_model\..*q_proj$", r"\.qkv_projection$"),
        full=(r"embed_tok$", r"image_encoder"),
    )
    with pytest.raises(ConfigError) as error:
        tiny_model(wrong)
    fields = [p.field for p in error.value.problems]
    assert fields == ["trainable.lora_targets[1]", "trainable.full[0]", "trainable.full[1]"]
    assert "no gradient reaches" in str(error.value) and "matches no parameter" in str(error.value)


def test_trainables_are_chosen_once() -> None:
    with pytest.raises(RuntimeError, match="already"):
        apply_trainable(tiny_model(WHOLE), WHOLE)


def test_counts_cover_every_parameter_once() -> None:
    model = tiny_model(LORA)
    counts = component_counts(model)
    assert sum(c.total for c in counts) == sum(p.numel() for p in model.parameters())
    assert sum(c.trainable for c in counts) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "total" in format_counts(counts).splitlines()[-1]


def test_freeze_covers_adapters() -> None:
    model = tiny_model(LORA).train()
    freeze(model, "segmenter.sam.mask_decoder.")
    assert model.is_frozen("segmenter.sam.mask_decoder") and not model.segmenter.sam.mask_decoder.training
    assert any(is_adapter(n) for n, p in model.segmenter.named_parameters())


def test_evaluating_restores_the_mode() -> None:
    model = tiny_model(LORA).train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training and not model.backbone.language_model.training
        raise KeyError
    assert model.training and model.backbone.language_model.training and not model.backbone.vision_tower.training


def test_gradient_checkpointing_changes_no_gradient() -> None:
    batch, gradients = three_clips(), []
    settings = LORA.model_copy(update={"lora_dropout": 0.0})
    for enabled in (False, True):
        model = tiny_model(settings).train()
        stir(model, 3)
        model.backbone.set_gradient_checkpointing(enabled)
        output = model(model.pack(batch, batch.answers), model.encode(batch))
        F.cross_entropy(output.answer_logits, output.answer_labels).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


# ---- light checkpoints


@pytest.mark.parametrize("trainable", [LORA, WHOLE], ids=["lora", "whole"])
def test_light_checkpoint_restores_the_model(trainable: TrainableConfig, tmp_path: Path) -> None:
    first, second = tiny_model(trainable, seed=0).eval(), tiny_model(trainable, seed=1).eval()
    for frozen in ("image_encoder", "prompt_encoder"):  # belong to the base, which the two share
        second.segmenter.sam.get_submodule(frozen).load_state_dict(
            first.segmenter.sam.get_submodule(frozen).state_dict()
        )
    second.segmenter.load_state_dict(second.segmenter.state_dict())  # renews the positional encoding
    stir(first, 7)
    save_trained(first, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trained.json", "trained.safetensors"]
    load_trained(second, tmp_path)
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), parameter, atol=0, rtol=0)
    batch = three_clips()
    with torch.no_grad():
        outputs = [m(m.pack(batch, batch.answers), m.encode(batch)) for m in (first, second)]
    torch.testing.assert_close(outputs[0].mask_logits, outputs[1].mask_logits, atol=0, rtol=0)


def test_light_checkpoint_holds_what_differs_from_the_base(tmp_path: Path) -> None:
    model = tiny_model(LORA.model_copy(update={"mask_decoder": False, "seg_head": False}))
    save_trained(model, tmp_path)
    names = set(load_file(tmp_path / "trained.safetensors"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= names
    assert {
        n for n, _ in model.named_parameters() if n.startswith(("text_hidden_fcs", "segmenter.sam.mask_d"))
    } <= names
    assert not any(n.endswith("embed_tokens.weight") or "image_encoder" in n for n in names)


def test_what_an_earlier_stage_trained_is_kept(tmp_path: Path) -> None:
    """Stage 2 trains less than stage 1: its checkpoint must still hold what stage 1 changed."""
    first = tiny_model(WHOLE)
    stir(first, 2)
    save_trained(first, tmp_path / "one")
    second = tiny_model(WHOLE.model_copy(update={"full": (r"language_model\.lm_head\.",)}))
    load_trained(second, tmp_path / "one")
    save_trained(second, tmp_path / "two")
    assert (
        load_file(tmp_path / "two" / "trained.safetensors").keys()
        == load_file(tmp_path / "one" / "trained.safetensors").keys()
    )


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    save_trained(tiny_model(LORA), tmp_path)
    with pytest.raises(WeightsError, match="lora_rank is 2 there and 0 here") as error:
        load_trained(tiny_model(WHOLE), tmp_path)
    assert "no parameter of this model" in str(error.value) and "trained here, but not stored" in str(error.value)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    model = tiny_model(WHOLE)
    with pytest.raises(WeightsError, match="no light checkpoint"):
        load_trained(model, tmp_path)
    save_trained(model, tmp_path)
    tensors = load_file(tmp_path / "trained.safetensors")
    tensors.pop("text_hidden_fcs.0.0.weight")
    save_file(tensors, tmp_path / "trained.safetensors")
    with pytest.raises(WeightsError, match="SHA-256"):
        load_trained(model, tmp_path)
    save_trained(model, tmp_path)
    settings = json.loads((tmp_path / "trained.json").read_text())
    (tmp_path / "trained.json").write_text(json.dumps(settings | {"format": 9}))
    with pytest.raises(WeightsError, match="format 9"):
        load_trained(model, tmp_path)
    (tmp_path / "trained.json").write_text("{")
    with pytest.raises(WeightsError, match="not the settings"):
        load_trained(model, tmp_path)
    assert not (tmp_path / "trained.safetensors.part").exists()


def test_run_folders_are_searched(tmp_path: Path) -> None:
    def touch(folder: str) -> Path:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "trained.json").write_text("{}")
        return tmp_path / folder

    touch("checkpoints/step_9")
    latest = touch("checkpoints/step_10")
    assert find_trained(tmp_path) == latest and find_trained(latest) == latest
    final = touch("final")
    assert find_trained(tmp_path) == final


def test_mask_decoder_alone_is_taken(tmp_path: Path) -> None:
    teacher, student = tiny_model(LORA, seed=0), tiny_model(LORA, seed=1)
    stir(teacher, 5)
    save_trained(teacher, tmp_path)
    head = student.text_hidden_fcs[0][0].weight.detach().clone()
    load_mask_decoder(student, tmp_path)
    for name, parameter in teacher.segmenter.sam.mask_decoder.named_parameters():
        torch.testing.assert_close(student.segmenter.sam.mask_decoder.get_parameter(name), parameter, atol=0, rtol=0)
    assert torch.equal(student.text_hidden_fcs[0][0].weight, head)
    with pytest.raises(WeightsError, match="lora_targets"):
        load_mask_decoder(tiny_model(WHOLE), tmp_path)


# ---- builder


@pytest.fixture(scope="module")
def sam_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("sam")
    SAM.to_json(folder / "sam.json")
    save_file(tiny_segmenter().sam.state_dict(), folder / "sam.safetensors")
    return {
        "base": str(BASE),
        "sam_type": str(folder / "sam.json"),
        "sam_checkpoint": str(folder / "sam.safetensors"),
        "sam_image_size": SAM_SIDE,
    }


def test_stages_start_from_each_other(sam_files: dict[str, object], tmp_path: Path) -> None:
    """Teacher, then a student with its frozen decoder, then the student evaluated with its stored settings."""
    teacher = build_model(run_config("teacher", model=sam_files), VOCABULARY, SEG)
    assert teacher.training and not teacher.backbone.vision_tower.training
    stir(teacher, 1)
    save_trained(teacher, tmp_path / "teacher")

    student = build_model(
        run_config("sft", model=sam_files, sft={"teacher_checkpoint": str(tmp_path / "teacher")}), VOCABULARY, SEG
    )
    assert student.is_frozen("segmenter.sam.mask_decoder")
    name = "mask_decoder.mask_tokens.weight"
    torch.testing.assert_close(student.segmenter.sam.get_parameter(name), teacher.segmenter.sam.get_parameter(name))
    assert not torch.equal(student.text_hidden_fcs[0][0].weight, teacher.text_hidden_fcs[0][0].weight)
    stir(student, 2)
    save_trained(student, tmp_path / "sft" / "final")

    evaluated = build_model(
        run_config("eval", model=sam_files, trainable=LORA.model_dump(), eval={"checkpoint": str(tmp_path / "sft")}),
        VOCABULARY,
        SEG,
    )
    assert not evaluated.training and not any(p.requires_grad for p in evaluated.parameters())
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(evaluated.get_parameter(key), parameter, atol=0, rtol=0)


def test_bfloat16_model(sam_files: dict[str, object]) -> None:
    model = build_model(run_config("teacher", model=sam_files, engine={"precision": "bf16"}), VOCABULARY, SEG)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = three_clips()
    output = model(model.pack(batch, batch.answers), model.encode(batch))
    assert output.answer_logits.isfinite().all() and output.mask_logits.isfinite().all()


def test_a_vocabulary_without_a_spare_row_is_refused(sam_files: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="no spare row"):
        build_model(run_config("teacher", model=sam_files), VOCABULARY + 1, VOCABULARY)
    with pytest.raises(ValueError, match="outside the tokenizer"):
        build_model(run_config("teacher", model=sam_files), SEG, SEG)
