"""Vision tower, connector and BEATs against the released code's outputs, and against naive formulas."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dataset.fbank import kaldi_fbank
from model.backbones.videollama2.audio_tower import AudioTower
from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.beats import BeatsEncoder, WeightNormConv, relative_buckets
from model.backbones.videollama2.config import BeatsConfig, LanguageConfig, VideoLlama2Config, VisionConfig
from model.backbones.videollama2.vision_tower import VisionTower
from model.backbones.videollama2.weights import load_backbone

TOLERANCE = 2e-5
"""Stated for tower outputs (float32, CPU)."""


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


def mini_config() -> VideoLlama2Config:
    return VideoLlama2Config(
        LanguageConfig(48, 96, 2, 4, 2, 100),
        VisionConfig(24, 48, 3, 4, image_size=48, patch_size=12),
        BeatsConfig(32, 16, 24, 48, 3, 4, conv_pos=16, conv_pos_groups=4, mel_bins=32),
    )


def test_vision_tower(tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict) -> None:
    close(tiny_backbone.vision_tower(tiny_inputs["pixels"]), tiny_expected["vision_features"])


@pytest.mark.smoke
def test_vision_tower_equals_hidden_states_of_the_whole_model() -> None:
    torch.manual_seed(0)
    for select in (-1, -2, 1, 0):
        tower = VisionTower(replace(mini_config(), select_layer=select)).eval()
        pixels = torch.rand(2, 3, 48, 48)
        close(tower(pixels), tower.siglip(pixels, output_hidden_states=True).hidden_states[select], 1e-6)


def test_connector_stages(tiny_backbone: VideoLlama2, tiny_expected: dict) -> None:
    connector = tiny_backbone.mm_projector
    x = tiny_expected["vision_features"].unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    close(connector.s1.b1(x[:2]), tiny_expected["stc_s1_b1"])
    stage1 = connector.s1(x)
    close(stage1[:2], tiny_expected["stc_s1"])
    sampled = connector.sampler(stage1.unsqueeze(0).transpose(1, 2))
    close(sampled, tiny_expected["stc_sampler"])
    close(connector.s2(sampled[0].transpose(0, 1)), tiny_expected["stc_s2"])


def test_video_tokens_of_any_length(tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict) -> None:
    pixels = tiny_inputs["pixels"].unsqueeze(0)
    close(tiny_backbone.encode_video(pixels), tiny_expected["stc_out"])
    close(tiny_backbone.encode_video(pixels[:, :4]), tiny_expected["stc_out_4frames"])
    close(tiny_backbone.encode_video(pixels[:, :5]), tiny_expected["stc_out_5frames"])
    for frames in (2, 3, 7):
        assert tiny_backbone.encode_video(pixels[:, :frames]).shape[1] == tiny_backbone.config.video_tokens(frames)


def test_rows_of_a_batch_do_not_touch(tiny_backbone: VideoLlama2, tiny_inputs: dict) -> None:
    pixels = torch.stack([tiny_inputs["pixels"], tiny_inputs["pixels"].flip(0)])
    fbank = torch.cat([tiny_inputs["fbank_short"], tiny_inputs["fbank_short"].flip(1)])
    for encode, media in ((tiny_backbone.encode_video, pixels), (tiny_backbone.encode_audio, fbank)):
        close(encode(media), torch.cat([encode(row.unsqueeze(0)) for row in media]))


def test_beats_stages(tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict) -> None:
    tower = tiny_backbone.audio_tower
    x = (tiny_inputs["fbank_short"] - 15.41663) / (2 * 6.55582)
    patches = tower.patch_embedding(x.unsqueeze(1))
    assert list(patches.shape[2:]) == tiny_expected["beats_patch_grid"].tolist()
    close(patches, tiny_expected["beats_patch"])
    x = tower.post_extract_proj(tower.layer_norm(patches.flatten(2).transpose(1, 2)))
    encoder = tower.encoder
    close(encoder.pos_conv[0].weight(), tiny_expected["beats_pos_conv_weight"])
    position = encoder.pos_conv(x.transpose(1, 2))
    close(position, tiny_expected["beats_pos_conv"])
    x = encoder.layer_norm(x + position.transpose(1, 2))
    close(x, tiny_expected["beats_enc_ln"])
    close(encoder.layers[0](x, encoder.position_bias(x.shape[1])), tiny_expected["beats_layer0"])


def test_weight_norm_holds_its_epsilon() -> None:
    """w = g * v / sqrt(sum v^2 + 1e-6): with sum v^2 = 1e-6 the kernel is g / sqrt(2) of the unit kernel."""
    conv = WeightNormConv(4, 3, 2)
    torch.nn.init.constant_(conv.weight_g, 5.0)
    torch.nn.init.constant_(conv.weight_v, 1e-3 / math.sqrt(8))
    close(conv.weight(), torch.full((4, 2, 3), 5 / math.sqrt(2 * 8)), 1e-6)


def test_audio_tokens(tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict) -> None:
    fbank = tiny_inputs["fbank_short"]
    close(tiny_backbone.audio_tower(fbank), tiny_expected["beats_out"])
    close(tiny_backbone.encode_audio(fbank), tiny_expected["audio_proj_out"])
    assert tiny_backbone.encode_audio(fbank[:, :37]).shape[1] == tiny_backbone.config.audio_tokens(37) == 16


def test_thirty_seconds_of_sound(tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict) -> None:
    """Long distances (clipped buckets) and digital silence; the fused softmax over 1496 keys rounds a little more."""
    fbank = kaldi_fbank(F.pad(tiny_inputs["wav_10s"], (0, 20 * 16000))).unsqueeze(0)
    with torch.no_grad():
        eager = tiny_backbone.audio_tower.encoder.layers[0].self_attn.eager
        close(tiny_backbone.audio_tower(fbank), tiny_expected["beats_out_30s"], TOLERANCE if eager else 5e-5)


def test_relative_buckets(tiny_expected: dict) -> None:
    distance, bucket = tiny_expected["rel_bucket"]
    assert torch.equal(relative_buckets(distance, 320, 800), bucket)


def test_position_bias_is_the_table_at_key_minus_query() -> None:
    encoder = BeatsEncoder(mini_config().beats)
    bias = encoder.position_bias(5)
    for i in range(5):
        for j in range(5):
            bucket = relative_buckets(torch.tensor(j - i), 320, 800)
            assert torch.equal(bias[:, i, j], encoder.relative_attention_bias.weight[bucket])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gated_attention_written_as_published(attention: str) -> None:
    """Loop over heads, with the published division and multiplication by 32 around the softmax."""
    torch.manual_seed(0)
    encoder = BeatsEncoder(mini_config().beats, attention).double()
    attn, length, dim = encoder.layers[0].self_attn, 7, 6
    torch.nn.init.normal_(attn.grep_a)
    x, bias = torch.randn(1, length, 24, dtype=torch.double), encoder.position_bias(length)
    heads = []
    for h in range(4):
        cut = slice(h * dim, (h + 1) * dim)
        q = attn.q_proj(x)[0, :, cut] * dim**-0.5 / 32
        k, v = attn.k_proj(x)[0, :, cut], attn.v_proj(x)[0, :, cut]
        gate = torch.sigmoid(attn.grep_linear(q * 32 / dim**-0.5).view(length, 2, 4).sum(-1))
        factor = gate[:, :1] * (gate[:, 1:] * attn.grep_a[0, h, 0, 0] - 1) + 2
        scores = q @ k.T
        scores = (scores - scores.amax(-1, keepdim=True)) * 32 + factor * bias[h]
        heads.append(scores.softmax(-1) @ v)
    close(attn(x, bias), attn.out_proj(torch.cat(heads, -1)).unsqueeze(0).detach(), 1e-6)


def test_gradient_shrinks_at_each_layer_entry() -> None:
    """Layer i of n receives decay^(n-1-i), the patch embedding decay^n; values do not change."""
    torch.manual_seed(0)
    config = mini_config()
    plain = AudioTower(replace(config, beats=replace(config.beats, layer_wise_gradient_decay_ratio=1.0)))
    decayed = AudioTower(config)
    decayed.load_state_dict(plain.state_dict())
    fbank = torch.randn(2, 96, 32)
    outputs = [tower(fbank) for tower in (plain, decayed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for name, power in (("encoder.layers.2.fc1.weight", 0), ("encoder.layers.1.fc1.weight", 1),
                        ("encoder.layers.0.fc1.weight", 2), ("patch_embedding.weight", 3)):  # fmt: skip
        expected = plain.get_parameter(name).grad * 0.6**power
        torch.testing.assert_close(decayed.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-9)


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = VideoLlama2(mini_config()).train()
    fbank, grads = torch.randn(1, 96, 32), []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad()
        hidden = model.language_model(inputs_embeds=model.encode_audio(fbank), use_cache=False).logits
        hidden.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-9)


def test_gradient_checkpointing_recomputes_the_layers_and_leaves_the_word_embeddings_alone() -> None:
    torch.manual_seed(0)
    model = VideoLlama2(mini_config()).train()
    language, ids = model.language_model, torch.arange(7)[None]
    calls, found = [], []
    language.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for enabled in (False, True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.set_gradient_checkpointing(enabled)
        calls.clear()
        model.zero_grad()
        language(input_ids=ids, use_cache=False).logits.square().mean().backward()
        found.append((len(calls), {n: p.grad.clone() for n, p in language.named_parameters()}))
    assert [count for count, _ in found] == [1, 2, 1]
    for _, grads in found[1:]:
        assert all(torch.equal(grads[name], grad) for name, grad in found[0][1].items())
    model.set_gradient_checkpointing(True)
    assert not language.requires_grad_(False)(input_ids=ids, use_cache=False).logits.requires_grad


def test_training_mode_is_deterministic() -> None:
    """No dropout, no layerdrop: a frozen tower left in training mode gives one answer."""
    torch.manual_seed(0)
    tower = AudioTower(mini_config()).train()
    fbank = torch.randn(1, 64, 32)
    assert all(torch.equal(tower(fbank), tower(fbank)) for _ in range(20))


def test_random_start_is_sane() -> None:
    """Training from scratch begins with features of order one and gradients in every part that is run."""
    torch.manual_seed(0)
    model = VideoLlama2(mini_config())
    tokens = torch.cat([model.encode_video(torch.rand(2, 4, 3, 48, 48)), model.encode_audio(torch.randn(2, 96, 32))], 1)
    model.language_model(inputs_embeds=tokens).logits.square().mean().backward()
    assert 0.01 < float(tokens.detach().std()) < 10
    unused = ("siglip.encoder.layers.2.", "siglip.post_layernorm", "siglip.head", "predictor", "embed_tokens")
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert (parameter.grad is None) == any(part in name for part in unused), name


def test_bfloat16_stays_near_float32(tiny_inputs: dict, tiny_folder: Path) -> None:
    """Mean deviation in bf16 (steps of one part in 256) under 3 % of the features' root mean square."""
    exact, _ = load_backbone(tiny_folder)
    rounded, _ = load_backbone(tiny_folder, dtype=torch.bfloat16)
    for encode, media in (("encode_video", tiny_inputs["pixels"].unsqueeze(0)),
                          ("encode_audio", tiny_inputs["fbank_short"])):  # fmt: skip
        wanted, got = getattr(exact, encode)(media).detach(), getattr(rounded, encode)(media).detach()
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).abs().mean() < 0.03 * wanted.square().mean().sqrt()


def test_wrong_input_is_refused() -> None:
    model = VideoLlama2(mini_config())
    with pytest.raises(ValueError, match="resize the frames"):
        model.encode_video(torch.zeros(1, 2, 3, 40, 40))
    with pytest.raises(ValueError, match="at least 2 frames"):
        model.encode_video(torch.zeros(1, 1, 3, 48, 48))
    with pytest.raises(ValueError, match="B, T, 3, P, P"):
        model.encode_video(torch.zeros(2, 3, 48, 48))
    with pytest.raises(ValueError, match=r"\[B, F, 32\]"):
        model.encode_audio(torch.zeros(1, 64, 128))
    with pytest.raises(ValueError, match="one patch of frames"):
        model.encode_audio(torch.zeros(1, 31, 32))
    with pytest.raises(ValueError, match="float32"):
        model.encode_audio(torch.zeros(1, 64, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="attention = 'fast'"):
        VideoLlama2(mini_config(), "fast")


def test_released_token_counts() -> None:
    config = VideoLlama2Config(LanguageConfig(3584, 18944, 28, 28, 4, 152064))
    assert [config.video_tokens(t) for t in (8, 10, 11, 16)] == [676, 845, 845, 1352]
    assert [config.audio_tokens(f) for f in (998, 2998)] == [496, 1496]
    assert config.vision_layers == 26
    assert math.isclose((2 * config.beats.encoder_layers) ** 0.25, 2.2134, abs_tol=1e-4)
