"""Another backbone and another segmenter, a class each, in the model, sampling, scoring and training as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from configs.schema import TrainableConfig
from model.aurora.build import backbone_kind
from model.aurora.features import FeatureCache, tower_fingerprint
from model.aurora.generation import generate
from model.aurora.inference import predict
from model.aurora.model import AuroraModel
from model.aurora.sampling import Sampling
from model.aurora.trainable import apply_trainable
from model.backbones.base import Backbone, Tower
from model.backbones.videollama2 import splice
from model.segmenters.base import Segmenter
from tests.aurora_cases import SEG, StubTokenizer, tiny_batch, tiny_sample
from utils.errors import ConfigError
from utils.types import Batch, PackedInputs

TRAINED = TrainableConfig(lora_rank=2, lora_targets=(r"language_model.*q_proj",), full=(), seg_rows_only=True)


class ExpertBackbone(Backbone):
    """Qwen3 with experts; a token a frame, a token a frame of sound. All media of a clip stand at one position."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
            vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
        ))  # fmt: skip
        self.vision_tower, self.mm_projector = nn.Linear(12, 8), nn.Linear(8, 32)
        self.audio_tower, self.mm_projector_a = nn.Linear(4, 32), nn.Identity()

    def run_tower(self, tower: Tower, inputs: Tensor) -> Tensor:
        return self.get_submodule(tower.tower)(inputs.flatten(2))

    def layout(
        self, batch: Batch, prompts: Sequence[Tensor], answers: Sequence[Tensor] | None, seg_token_id: int
    ) -> PackedInputs:
        packed = splice(prompts, answers, batch.pixel_values.shape[1], batch.fbank.shape[1], seg_token_id)
        return replace(packed, position_ids=(packed.media_index <= 0).long().cumsum(1) - 1)

    def set_gradient_checkpointing(self, enabled: bool) -> None: ...

    def reset_buffers(self, device: torch.device | str) -> None: ...


class DotSegmenter(Segmenter):
    """A mask is the dot product of the prompt with every pixel's embedding."""

    components, no_gradient = ("sam.encoder", "sam.mask_decoder"), ("sam.encoder",)
    image_size, prompt_width = 4, 6

    def __init__(self) -> None:
        super().__init__()
        self.sam = nn.ModuleDict({"encoder": nn.Linear(3, 6), "mask_decoder": nn.Linear(6, 6)})

    @torch.no_grad()
    def encode(self, sam_pixels: Tensor) -> Tensor:
        return self.sam["encoder"](sam_pixels.movedim(2, -1)).movedim(-1, 2)

    def decode(
        self,
        image_embeddings: Tensor,
        prompts: Tensor,
        clip_of_query: Tensor | None = None,
        frame_index: Tensor | None = None,
    ) -> Tensor:
        images = image_embeddings if clip_of_query is None else image_embeddings[clip_of_query]
        if frame_index is not None:
            images = images[torch.arange(len(images))[:, None], frame_index]
        return torch.einsum("qc,qtchw->qthw", self.sam["mask_decoder"](prompts), images)

    def upscale(self, logits: Tensor, sam_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
        return F.interpolate(logits[None].float(), out_size)[0]


@pytest.fixture
def model() -> AuroraModel:
    torch.manual_seed(0)
    return AuroraModel(ExpertBackbone(), DotSegmenter(), SEG).eval()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    sizes = {"pixel_values": (2, 3, 2, 2), "sam_pixels": (2, 3, 4, 4), "fbank": (3, 4)}
    media = [{name: torch.randn(size, generator=generator) for name, size in sizes.items()} for _ in range(2)]
    samples = (tiny_sample(0), tiny_sample(1, answer=(3, SEG), prompt_length=9))
    return tiny_batch(*(replace(sample, **own) for sample, own in zip(samples, media, strict=True)))


@torch.no_grad()
def test_sampling_scoring_and_the_plain_forward_agree(model: AuroraModel, batch: Batch) -> None:
    """With positions that are not 0, 1, 2, ...: all three read them from the layout."""
    media, group = model.encode(batch), 2
    sampling = Sampling(1.0, generator=torch.Generator().manual_seed(0))
    drawn = generate(model, batch, media, StubTokenizer(), 5, group, sampling)
    drawn.token_ids[1][-1] = SEG
    plain = model(model.pack(batch, drawn.token_ids, [p for p in batch.prompts for _ in range(2)]), media.repeat(2))
    scores = plain.answer_logits.log_softmax(-1).gather(-1, plain.answer_labels[:, None])[:, 0]
    packed = model.pack_group(batch, drawn.token_ids, group)
    shared = model(packed, media)
    torch.testing.assert_close(shared.log_probs[packed.mask], scores, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(shared.mask_logits, plain.mask_logits, rtol=1e-4, atol=2e-5)
    seen = torch.cat([x[:-1] if i == 1 else x for i, x in enumerate(drawn.log_probs)])
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[sum(map(len, drawn.token_ids[:2])) - 1] = False  # the token that was put in by hand
    torch.testing.assert_close(seen, scores[kept], rtol=1e-4, atol=2e-5)
    positions = torch.arange(packed.prompts.token_ids.shape[1]).expand_as(packed.prompts.position_ids)
    packed.prompts.position_ids = positions
    assert (model(packed, media).log_probs[packed.mask] - scores).abs().max() > 1e-4  # they do matter


def test_it_is_trained_cached_and_asked_like_any_other(model: AuroraModel, batch: Batch, tmp_path: Path) -> None:
    apply_trainable(model, TRAINED)
    model.feature_cache = FeatureCache("disk", tmp_path, lambda tower: tower_fingerprint(model, tower))
    output = model.train()(model.pack(batch, batch.answers), model.encode(batch))
    (F.cross_entropy(output.answer_logits, output.answer_labels) + output.mask_logits.square().mean()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("lora_B", "embed_tokens.seg_row", "lm_head.seg_row", "text_hidden_fcs", "segmenter.sam.mask_decoder"):
        assert any(part in name for name in trained), part
    assert not any(name.startswith(("backbone.vision", "segmenter.sam.encoder")) for name in trained)
    kept = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert kept == {"mm_projector", "mm_projector_a", "image_encoder"}
    found = predict(model, batch, StubTokenizer(), 4)
    assert [p.mask_logits.shape for p in found] == [masks.shape for masks in batch.masks]


def test_a_base_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ConfigError, match="says model_type 'llava'"):
        backbone_kind(str(tmp_path))
