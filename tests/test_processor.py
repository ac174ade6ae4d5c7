"""Preprocessing against the stored results of SigLIP's and SAM's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.processor import AuroraProcessor, sam_inner_size

TINY = Path(__file__).parent / "fixtures" / "videollama2_av_tiny"


def _processor(**options: object) -> AuroraProcessor:
    return AuroraProcessor(**{"tokenizer": None, "vision_size": 98, "sam_size": 224, **options})


@pytest.mark.parametrize(("mode", "key"), [("warp", "expected_resize_only"), ("pad", "expected_pad_square")])
def test_vision_parity(mode: str, key: str) -> None:
    with np.load(TINY / "preprocess.npz") as file:
        image, expected = file["image_u8"], file[key]
    found = _processor(frame_resize=mode).vision_pixels(image[None])
    assert found.shape == (1, 3, 98, 98) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_sam_parity() -> None:
    with np.load(TINY / "lisa_head" / "inputs.npz") as file:
        frames, size = file["image_u8"].transpose(0, 2, 3, 1), tuple(file["resize"].tolist())
    with np.load(TINY / "lisa_head" / "expected.npz") as file:
        corner = file["sam_input_frame0_corner"]
    found, inner = _processor().sam_pixels(frames)
    assert found.shape == (3, 3, 224, 224) and inner == size == (126, 224)
    np.testing.assert_allclose(found[0, :, 120:130, 218:224].numpy(), corner, atol=1e-6)
    assert (found[:, :, 126:] == 0).all()


def test_sam_resize_against_the_original_transform() -> None:
    transforms = pytest.importorskip("segment_anything.utils.transforms")
    rng = np.random.default_rng(0)
    for height, width in [(90, 160), (160, 90), (31, 31), (7, 400)]:
        frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        resized = transforms.ResizeLongestSide(64).apply_image(frame)
        found, inner = _processor(sam_size=64).sam_pixels(frame[None])
        assert inner == resized.shape[:2] == sam_inner_size(height, width, 64)
        mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
        expected = ((resized - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(found[0, :, : inner[0], : inner[1]].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(20, 60), (60, 20)])
def test_pad_mode_centres_the_frame_on_grey(height: int, width: int) -> None:
    frames = np.full((2, height, width, 3), 255, np.uint8)
    found = _processor(vision_size=60, frame_resize="pad").vision_pixels(frames)
    grey = (127 / 255 - 0.5) / 0.5
    along = found[0, 0, :, 30] if height < width else found[0, 0, 30]
    np.testing.assert_allclose(along.numpy(), [grey] * 20 + [1.0] * 20 + [grey] * 20, atol=1e-6)


def test_frames_of_the_right_size_are_not_resampled() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    frames.setflags(write=False)
    processor = _processor(vision_size=96, sam_size=96)
    back = ((processor.vision_pixels(frames) * 0.5 + 0.5) * 255).round().permute(0, 2, 3, 1).byte().numpy()
    np.testing.assert_array_equal(back, frames)
    assert processor.sam_pixels(frames)[1] == (96, 96)


@pytest.mark.parametrize(
    ("options", "seconds", "frames"),
    [
        ({"audio_padding_seconds": 30.0}, 10, 2998),
        ({"audio_padding_seconds": None}, 10, 998),
        ({"audio_padding_seconds": None}, 7, 998),  # ten 1-s windows overlap
        ({"audio_padding_seconds": None, "audio_windows": None}, 7, 698),
        ({"audio_padding_seconds": None, "mel_bins": 32}, 10, 998),
    ],
)
def test_fbank_shape(options: dict, seconds: int, frames: int) -> None:
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, seconds * 16_000).astype(np.float32)
    assert _processor(**options).fbank(wave).shape == (frames, options.get("mel_bins", 128))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"frame_resize = 'crop'.*Remedy"):
        _processor(frame_resize="crop")
    with pytest.raises(ValueError, match="padded length"):
        _processor(audio_padding_seconds=5.0).fbank(np.zeros(160_000, np.float32))
