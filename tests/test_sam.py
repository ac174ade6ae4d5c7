"""The SAM adapter against the stock package and against outputs of the published code (fixture lisa_head)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.nn import functional as F

from model.objectives.mask import mask_bce, mask_dice, mask_losses
from model.segmenters.sam import (
    PIXEL_MEAN,
    PIXEL_STD,
    SAM_SIZES,
    SamSegmenter,
    SamSizes,
    assemble_sam,
    build_segmenter,
    resample_grid,
    resample_relative,
)
from utils.errors import ConfigError, WeightsError

FIXTURE = Path(__file__).parent / "fixtures" / "videollama2_av_tiny" / "lisa_head"
SIZES = SamSizes(
    encoder_width=32, encoder_depth=2, encoder_heads=2, global_blocks=(1,), prompt_width=64, decoder_mlp=128,
    iou_head_width=64,
)  # fmt: skip
TINY = SamSizes(
    encoder_width=16, encoder_depth=2, encoder_heads=2, global_blocks=(1,), patch_size=8, window_size=3,
    prompt_width=32, decoder_heads=4, decoder_mlp=32, iou_head_width=16, mask_channels=4,
)  # fmt: skip


def load_npz(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURE / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_npz("inputs")


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_npz("expected")


@pytest.fixture(scope="module")
def head() -> dict[str, Tensor]:
    return load_file(FIXTURE / "head.safetensors")


@pytest.fixture(scope="module")
def segmenter(head: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> SamSegmenter:
    folder = tmp_path_factory.mktemp("sam")
    SIZES.to_json(folder / "sam.json")
    prefix = "visual_model."
    save_file({k[len(prefix) :]: v for k, v in head.items() if k.startswith(prefix)}, folder / "sam.safetensors")
    return build_segmenter(str(folder / "sam.json"), 224, folder / "sam.safetensors")


def tiny(image_size: int = 32, seed: int = 0) -> SamSegmenter:
    torch.manual_seed(seed)
    segmenter = SamSegmenter(assemble_sam(TINY, image_size), TINY)
    for parameter in segmenter.parameters():  # position tables start at zero, which would hide a mistake
        nn.init.normal_(parameter, std=0.2)
    return segmenter


def sam_pixels(image_u8: Tensor, side: int) -> Tensor:
    mean, std = torch.tensor(PIXEL_MEAN)[:, None, None], torch.tensor(PIXEL_STD)[:, None, None]
    normal = (image_u8.float() - mean) / std
    return F.pad(normal, (0, side - normal.shape[-1], 0, side - normal.shape[-2]))


def test_published_head_is_reproduced(segmenter, head, inputs, expected) -> None:
    pixels = sam_pixels(inputs["image_u8"], 224)
    torch.testing.assert_close(pixels[0][:, 120:130, 218:224], expected["sam_input_frame0_corner"])
    embeddings = segmenter.encode(pixels[None])
    torch.testing.assert_close(embeddings[0], expected["image_embeddings"], atol=2e-5, rtol=0)
    torch.testing.assert_close(segmenter.dense_pe, expected["dense_pe"], atol=0, rtol=0)

    fcs = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Dropout(0.0))
    fcs.load_state_dict({k.removeprefix("text_hidden_fcs.0."): v for k, v in head.items() if k.startswith("text_")})
    hidden = inputs["hidden_states"].clone().requires_grad_()
    last = int(inputs["seg_token_mask"].nonzero()[-1])
    prompt = fcs(hidden[:, last])
    torch.testing.assert_close(prompt, expected["pred_embedding"], atol=1e-6, rtol=0)
    low = segmenter.decode(embeddings, prompt)
    torch.testing.assert_close(low[0], expected["low_res_masks"][:, 0], atol=2e-3, rtol=0)

    resize, original = tuple(inputs["resize"].tolist()), tuple(inputs["original_size"].tolist())
    masks = segmenter.upscale(low[0], resize, original)
    torch.testing.assert_close(masks, expected["pred_masks"], atol=2e-3, rtol=0)

    targets = inputs["gt_masks"].bool()
    torch.testing.assert_close(mask_bce(masks, targets), expected["bce_per_frame"], atol=1e-4, rtol=0)
    torch.testing.assert_close(mask_dice(masks, targets), expected["dice_per_frame"].float(), atol=1e-4, rtol=0)
    losses = mask_losses([masks], [targets])
    assert abs(losses.bce.item() - float(expected["bce_raw"])) < 1e-4
    assert abs(losses.dice.item() - float(expected["dice_raw"])) < 1e-4
    total = 2.0 * losses.bce + 0.5 * losses.dice
    assert abs(total.item() - float(expected["mask_loss"])) < 1e-4

    total.backward()
    # Relative to the largest entry. The random decoder is badly conditioned: a float64 run of the same weights differs
    # from the stored float32 gradients by 8e-4, the stock decoder in float32 by 1.7e-3.
    for got, name in (
        (hidden.grad, "grad_hidden"),
        (fcs[0].weight.grad, "grad_fc0_weight"),
        (segmenter.sam.mask_decoder.mask_tokens.weight.grad, "grad_mask_token"),
    ):
        wanted = expected[name]
        assert float((got - wanted).abs().max()) < 5e-3 * float(wanted.abs().max()), name
    segmenter.zero_grad()


def test_position_tables_are_resampled_as_published(inputs, expected) -> None:
    grid = resample_grid(inputs["pos_embed_64"], (14, 14))  # torch 2.9 and 2.14 are 1.3e-6 apart here
    torch.testing.assert_close(grid, expected["pos_embed_14"], atol=4e-6, rtol=0)
    relative = resample_relative(inputs["rel_pos_127"], 27)
    torch.testing.assert_close(relative, expected["rel_pos_27"], atol=4e-6, rtol=0)


@pytest.mark.smoke
def test_decode_equals_the_stock_decoder_frame_by_frame() -> None:
    segmenter = tiny().eval()
    torch.manual_seed(1)
    embeddings, prompts = torch.randn(3, 2, 32, 4, 4), torch.randn(3, 32)
    batched = segmenter.decode(embeddings, prompts)
    assert batched.shape == (3, 2, 16, 16)
    sam = segmenter.sam
    for clip in range(3):
        for frame in range(2):
            _, dense = sam.prompt_encoder(None, None, None)
            stock, _ = sam.mask_decoder(
                image_embeddings=embeddings[clip, frame][None],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=prompts[clip][None, None],
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            torch.testing.assert_close(batched[clip, frame], stock[0, 0], atol=1e-5, rtol=1e-5)


def test_decode_gradient_equals_the_stock_decoder() -> None:
    segmenter = tiny().eval()
    torch.manual_seed(1)
    embeddings, prompts = torch.randn(1, 1, 32, 4, 4), torch.randn(1, 32, requires_grad=True)
    segmenter.decode(embeddings, prompts).square().mean().backward()
    sam = segmenter.sam
    ours = {n: p.grad.clone() for n, p in sam.mask_decoder.named_parameters() if p.grad is not None}
    prompt_gradient, prompts.grad = prompts.grad, None
    segmenter.zero_grad()
    _, dense = sam.prompt_encoder(None, None, None)
    pe = sam.prompt_encoder.get_dense_pe()
    stock, _ = sam.mask_decoder(embeddings[0], pe, prompts[:, None], dense, multimask_output=False)
    stock.square().mean().backward()
    torch.testing.assert_close(prompt_gradient, prompts.grad, atol=1e-6, rtol=1e-4)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, sam.mask_decoder.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


def test_upscale_equals_postprocess_masks() -> None:
    segmenter = tiny()
    logits = torch.randn(2, 16, 16)
    stock = segmenter.sam.postprocess_masks(logits[:, None], (20, 32), (45, 71))[:, 0]
    torch.testing.assert_close(segmenter.upscale(logits, (20, 32), (45, 71)), stock, atol=0, rtol=0)
    assert segmenter.upscale(logits.bfloat16(), (20, 32), (45, 71)).dtype == torch.float32


@pytest.mark.smoke
def test_encode_is_chunked_frozen_and_of_the_stock_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = tiny()
    pixels = torch.randn(2, 3, 3, 32, 32)
    whole = segmenter.encode(pixels)
    assert whole.shape == (2, 3, 32, 4, 4) and not whole.requires_grad
    stock = segmenter.sam.image_encoder(pixels.flatten(0, 1))
    torch.testing.assert_close(whole.flatten(0, 1), stock, atol=1e-6, rtol=0)
    monkeypatch.setattr("model.segmenters.sam.ATTENTION_VALUES", 1)
    assert segmenter.frames_per_chunk == 1
    torch.testing.assert_close(segmenter.encode(pixels), whole, atol=1e-5, rtol=0)


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.sam_image_size"):
        tiny().encode(torch.zeros(1, 1, 3, 24, 32))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoint_of_another_image_size(suffix: str, tmp_path: Path) -> None:
    TINY.to_json(tmp_path / "tiny.json")
    big = tiny(64).sam.state_dict()
    path = tmp_path / f"big{suffix}"
    torch.save(big, path) if suffix == ".pth" else save_file(big, path)
    small = build_segmenter(str(tmp_path / "tiny.json"), 32, path)
    encoder = small.sam.image_encoder
    torch.testing.assert_close(encoder.pos_embed, resample_grid(big["image_encoder.pos_embed"], (4, 4)))
    torch.testing.assert_close(encoder.blocks[0].attn.rel_pos_h, big["image_encoder.blocks.0.attn.rel_pos_h"])
    relative = big["image_encoder.blocks.1.attn.rel_pos_h"]
    torch.testing.assert_close(encoder.blocks[1].attn.rel_pos_h, resample_relative(relative, 7))
    torch.testing.assert_close(small.dense_pe, small.sam.prompt_encoder.get_dense_pe())
    assert small.encode(torch.randn(1, 1, 3, 32, 32)).isfinite().all()


def test_a_checkpoint_at_1024_is_taken_as_it_is(tmp_path: Path) -> None:
    """At the size it was made for nothing is resampled, and the encoder is the package's own."""
    sizes = replace(SIZES, encoder_depth=1, global_blocks=())  # windows alone: 64 x 64 patches are cheap
    sizes.to_json(tmp_path / "sizes.json")
    torch.manual_seed(0)
    stock = ImageEncoderViT(
        depth=1, embed_dim=32, img_size=1024, mlp_ratio=4, norm_layer=partial(nn.LayerNorm, eps=1e-6), num_heads=2,
        patch_size=16, qkv_bias=True, use_rel_pos=True, global_attn_indexes=(), window_size=14, out_chans=64,
    ).eval()  # fmt: skip
    nn.init.normal_(stock.pos_embed, std=0.2)
    state = assemble_sam(sizes, 1024).state_dict()
    state |= {f"image_encoder.{name}": tensor for name, tensor in stock.state_dict().items()}
    torch.save(state, tmp_path / "sam.pth")
    segmenter = build_segmenter(str(tmp_path / "sizes.json"), 1024, tmp_path / "sam.pth")
    for name, tensor in segmenter.sam.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    pixels = torch.randn(1, 1, 3, 1024, 1024)
    with torch.no_grad():
        torch.testing.assert_close(segmenter.encode(pixels)[0], stock(pixels[0]), atol=2e-5, rtol=0)


def test_a_checkpoint_that_does_not_fit_names_every_key(tmp_path: Path) -> None:
    TINY.to_json(tmp_path / "tiny.json")
    state = tiny().sam.state_dict()
    state["mask_decoder.surplus"] = torch.zeros(1)
    del state["mask_decoder.iou_token.weight"]
    state["image_encoder.neck.0.weight"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError) as error:
        build_segmenter(str(tmp_path / "tiny.json"), 32, tmp_path / "bad.safetensors")
    for word in ("missing mask_decoder.iou_token.weight", "unexpected mask_decoder.surplus", "neck.0.weight has shape"):
        assert word in str(error.value)


def test_wrong_names_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vit_b"):
        build_segmenter("vit_x", 224)
    (tmp_path / "bad.json").write_text('{"encoder_width": 8, "depth": 2}')
    with pytest.raises(ConfigError, match="unknown fields \\['depth'\\]"):
        build_segmenter(str(tmp_path / "bad.json"), 32)
    TINY.to_json(tmp_path / "tiny.json")
    with pytest.raises(ConfigError, match="multiple of SAM's patch"):
        build_segmenter(str(tmp_path / "tiny.json"), 30)
    with pytest.raises(WeightsError, match="nowhere"):
        build_segmenter(str(tmp_path / "tiny.json"), 32, tmp_path / "nowhere.pth")
    for name in ("odd.bin", "broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(WeightsError, match=name):
            build_segmenter(str(tmp_path / "tiny.json"), 32, tmp_path / name)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    TINY.to_json(tmp_path / "tiny.json")
    torch.save({"image_encoder.pos_embed": Path("/")}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match="code.pth"):
        build_segmenter(str(tmp_path / "tiny.json"), 32, tmp_path / "code.pth")


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [("vit_b", 314, 93_735_472), ("vit_l", 482, 312_342_832), ("vit_h", 594, 641_090_608)],
)
def test_released_sizes(name: str, keys: int, values: int) -> None:
    """Numbers of the released files: 93.7 M, 312 M and 641 M parameters at 1024 pixels."""
    with torch.device("meta"):
        sam = assemble_sam(SAM_SIZES[name], 1024)
    assert sum(p.numel() for p in sam.parameters()) == values
    assert len(sam.state_dict()) == keys


def test_bfloat16_keeps_the_positional_encoding_of_float32() -> None:
    segmenter = tiny()
    wanted = segmenter.dense_pe.clone()
    segmenter.bfloat16()
    torch.testing.assert_close(segmenter.dense_pe, wanted.bfloat16(), atol=0, rtol=0)
    low = segmenter.decode(torch.randn(2, 1, 32, 4, 4), torch.randn(2, 32))
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_positional_encoding_follows_a_loaded_state() -> None:
    first, second = tiny(seed=0), tiny(seed=1)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.dense_pe, first.dense_pe, atol=0, rtol=0)
