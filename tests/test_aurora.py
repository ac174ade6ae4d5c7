"""The joint model: forward, features and their cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from model.aurora.features import FeatureCache, tower_fingerprint
from model.aurora.inference import answer_mask
from model.aurora.model import AuroraModel
from tests.aurora_cases import (
    FRAMES,
    LORA,
    SEG,
    VOCABULARY,
    WHOLE,
    stir,
    three_clips,
    tiny_batch,
    tiny_model,
    tiny_sample,
    tiny_segmenter,
)
from utils.tensor_files import TensorFileError
from utils.types import IGNORE, MediaFeatures


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
            own = slice(i, i + 1)  # of the two queries; the last answer has none
            torch.testing.assert_close(together.seg_features[own], alone.seg_features, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(together.mask_logits[own], alone.mask_logits, atol=1e-3, rtol=1e-3)


def test_seg_feature_is_the_state_at_the_last_seg_of_the_answer(plain: AuroraModel) -> None:
    """Row 1 has two [SEG]; position and projection are worked out by hand."""
    batch = three_clips()
    packed = plain.pack(batch, batch.answers)
    with torch.no_grad():
        output, hidden = plain(packed, plain.encode(batch)), plain.hidden_states(packed, plain.encode(batch))
    media = plain.backbone.config.video_tokens(2) + plain.backbone.config.audio_tokens(40)
    position = 9 + media + 4  # prompt words, media, index of the last [SEG] within the answer
    assert packed.token_ids[1, position] == SEG
    projection = plain.text_hidden_fcs[0]
    by_hand = projection[2](F.relu(projection[0](hidden[1, position])))
    torch.testing.assert_close(output.seg_features[1], by_hand, atol=1e-6, rtol=1e-5)


def test_an_answer_without_seg_has_no_query(plain: AuroraModel) -> None:
    batch = three_clips()
    packed = plain.pack(batch, batch.answers)
    output = plain(packed, plain.encode(batch))
    assert packed.has_seg.tolist() == [True, True, False] and packed.answer_of_query.tolist() == [0, 1]
    assert output.seg_features.shape == (2, 32) and output.mask_logits.shape == (2, FRAMES, 16, 16)


def test_a_batch_without_queries_decodes_no_mask_but_keeps_the_decoder_in_the_graph(plain: AuroraModel) -> None:
    """Its gradients are there and zero, as processes whose batches have queries expect of it."""
    batch = tiny_batch(tiny_sample(0, answer=(4, 5)), tiny_sample(1, answer=(6,)))
    output = plain(plain.pack(batch, batch.answers), plain.encode(batch))
    assert output.seg_features.shape == (0, 32) and output.mask_logits.shape == (0, FRAMES, 16, 16)
    trained = [*plain.text_hidden_fcs.parameters(), plain.segmenter.sam.mask_decoder.mask_tokens.weight]
    assert not any(g.any() for g in torch.autograd.grad(output.mask_logits.sum(), trained))


def test_an_answer_about_two_objects_has_two_queries(plain: AuroraModel) -> None:
    """Queries are a list of their own: the second row asks at both of its [SEG]."""
    batch = three_clips()
    packed, media = plain.pack(batch, batch.answers), plain.encode(batch)
    row, last = packed.token_ids[1], int(packed.seg_positions[1])
    first = int((row == SEG).nonzero()[0])
    both = replace(
        packed, answer_of_query=torch.tensor([0, 1, 1]), position_of_query=torch.tensor(
            [int(packed.seg_positions[0]), first, last]
        )
    )
    with torch.no_grad():
        output, single = plain(both, media), plain(packed, media)
    assert first < last and both.seg_positions.tolist() == packed.seg_positions.tolist()
    torch.testing.assert_close(output.mask_logits[[0, 2]], single.mask_logits, atol=1e-4, rtol=1e-4)
    union = answer_mask(output.mask_logits, both.answer_of_query, 1)
    assert torch.equal(union > 0, (output.mask_logits[1] > 0) | (output.mask_logits[2] > 0))


def test_logits_are_those_of_the_whole_sequence(plain: AuroraModel) -> None:
    batch = three_clips()
    packed = plain.pack(batch, batch.answers)
    with torch.no_grad():
        output = plain(packed, plain.encode(batch))
        everywhere = plain.backbone.lm_head(plain.hidden_states(packed, plain.encode(batch)))
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
    torch.testing.assert_close(some, whole[torch.arange(2)[:, None], index[:2]], atol=1e-4, rtol=1e-4)
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


def test_towers_read_the_memory_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy before the transfer: rows picked by a list would leave the memory that the loader has pinned."""
    model, batch = tiny_model().requires_grad_(False).eval(), three_clips()
    read: dict[str, set[int]] = {}
    towers = {"pixel_values": model.backbone.vision_tower, "fbank": model.backbone.audio_tower}
    for name, tower in {**towers, "sam_pixels": model.segmenter.sam.image_encoder}.items():

        def noted(x: torch.Tensor, name: str = name, run: object = tower.forward) -> torch.Tensor:
            read.setdefault(name, set()).add(x.untyped_storage().data_ptr())
            return run(x)

        monkeypatch.setattr(tower, "forward", noted)
    own = {name: {getattr(batch, name).untyped_storage().data_ptr()} for name in (*towers, "sam_pixels")}
    for cache in ("none", "memory"):
        model.feature_cache = FeatureCache(cache)
        model.encode(batch)
        assert read == own
        read.clear()


def test_cache_shares_equal_keys_and_keeps_no_batch_alive() -> None:
    cache, calls = FeatureCache("memory"), []

    def run(rows: torch.Tensor) -> torch.Tensor:
        calls.append(rows.flatten().tolist())
        return 10 * rows

    rows = torch.tensor([[0.0], [1.0], [2.0]])
    assert cache.fetch("t", ["a", "b", "a"], run, rows).tolist() == [[0.0], [10.0], [0.0]]
    assert cache.fetch("t", ["b", "c"], run, rows[1:]).tolist() == [[10.0], [20.0]]
    assert calls == [[0.0], [1.0], [2.0]]
    assert cache.fetch("other", ["a"], run, rows[:1]).tolist() == [[0.0]]
    with pytest.raises(ValueError, match="folder"):
        FeatureCache("disk")
    with pytest.raises(ValueError, match="tape"):
        FeatureCache("tape")


def test_features_on_disk_outlive_the_model_but_neither_its_weights_nor_the_media(tmp_path: Path) -> None:
    model, batch = tiny_model().requires_grad_(False).eval(), three_clips()

    def encode(mode: str = "disk") -> MediaFeatures:
        """As a new process would."""
        model.feature_cache = FeatureCache(mode, tmp_path, lambda tower: tower_fingerprint(model, tower))
        return model.encode(batch)

    plain, first = encode("memory"), encode()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = encode()
    assert torch.equal(first.image_embeddings, plain.image_embeddings) and torch.equal(first.video, plain.video)
    assert torch.equal(again.image_embeddings, first.image_embeddings) and torch.equal(again.video, first.video)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    batch.sam_pixels[0] += 0.5  # the clip's media change under the same name
    assert not torch.equal(encode().image_embeddings[0], first.image_embeddings[0])
    with torch.no_grad():
        model.segmenter.sam.image_encoder.pos_embed += 1.0
    count = len(list(tmp_path.rglob("image_encoder-*/*")))
    encode()
    assert len(list(tmp_path.rglob("image_encoder-*/*"))) == count + len({s.clip for s in batch.samples})


def test_a_damaged_feature_on_disk_is_named(tmp_path: Path) -> None:
    def fetch() -> torch.Tensor:
        cache = FeatureCache("disk", tmp_path, lambda tower: "same")
        return cache.fetch("tower", ["a"], lambda rows: torch.ones(1, 2), torch.zeros(1, 3))

    fetch()
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TensorFileError, match=rf"{path.name}: .*truncated.* Remedy: delete it"):
        fetch()
    path.unlink()
    assert torch.equal(fetch(), torch.ones(1, 2))
