"""Readers against arrays that were written, and every kind of broken file."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
from PIL import Image

from dataset import media
from tests.data_builders import write_clip
from utils.errors import DataError

CLIP = "v_0_10000"


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    write_clip(tmp_path, CLIP, frames=12, seconds=0.1)
    return tmp_path / "media" / CLIP / "frames"


@pytest.fixture
def masks(frames: Path) -> Path:
    return frames.parents[2] / "gt_mask" / CLIP / "fid_0"


def test_frames_come_in_numeric_order_as_rgb(frames: Path) -> None:
    found = media.read_frames(frames)
    assert found.shape == (12, 48, 64, 3) and found.dtype == np.uint8
    for number in (2, 10):  # a sort by text would put 10.jpg before 2.jpg
        with Image.open(frames / f"{number}.jpg") as image:
            np.testing.assert_allclose(found[number].astype(int), np.asarray(image.convert("RGB")).astype(int), atol=2)


def test_evenly_spaced_frames_match_the_published_rule(frames: Path) -> None:
    fixture = np.load(Path(__file__).parent / "fixtures" / "videollama2_av_tiny" / "preprocess.npz")
    for total, count in [(10, 10), (240, 8), (240, 16), (37, 10)]:
        assert media.frame_indexes(total, count) == fixture[f"frame_sample_{total}_{count}"].tolist()
    some = media.read_frames(frames, count=4)
    np.testing.assert_array_equal(some, media.read_frames(frames)[media.frame_indexes(12, 4)])
    with pytest.raises(DataError, match=r"frames: 12 frames, 13 wanted.*Remedy"):
        media.read_frames(frames, count=13)


def test_missing_frame_is_named(frames: Path) -> None:
    (frames / "7.jpg").unlink()
    with pytest.raises(DataError, match=r"frames: image 7 is missing, though 11 exists.*Remedy"):
        media.read_frames(frames)


def test_odd_names_are_refused(frames: Path, tmp_path: Path) -> None:
    (frames / "frame_1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"frame_1\.jpg: an image is named by its number"):
        media.read_frames(frames)
    (frames / "frame_1.jpg").rename(frames / "03.jpg")
    with pytest.raises(DataError, match=r"3\.jpg: number 3 is also"):
        media.read_frames(frames)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        media.read_frames(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        media.read_frames(tmp_path / "absent")


def test_truncated_jpeg_is_refused(frames: Path) -> None:
    path = frames / "3.jpg"
    data = path.read_bytes()
    for keep in (0.3, 0.9, 0.999):
        path.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(DataError, match=r"3\.jpg: (truncated|cannot be decoded|not a JPEG).*Remedy"):
            media.read_frames(frames)
    thumbnail = b"\xff\xd8\xff\xda\x00\x02\x00\xff\xd9"  # its end marker must not stand for the image's
    with_thumbnail = data[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
    path.write_bytes(with_thumbnail)
    assert len(media.read_frames(frames)) == 12
    path.write_bytes(with_thumbnail[:-20])
    with pytest.raises(DataError, match=r"3\.jpg: truncated"):
        media.read_frames(frames)


def test_no_image_and_empty_file_are_refused(frames: Path) -> None:
    for content in (b"", b"hello", b"GIF89a" + bytes(50)):
        (frames / "0.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"0\.jpg: not a JPEG or PNG"):
            media.read_frames(frames)


def test_frames_of_unequal_size_are_refused(frames: Path) -> None:
    cv2.imwrite(str(frames / "5.jpg"), np.zeros((50, 64, 3), np.uint8))
    with pytest.raises(DataError, match=r"5\.jpg: 64x50 pixels, but 0\.jpg has 64x48.*Remedy"):
        media.read_frames(frames)


def test_large_image_is_refused_by_its_header(frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.cv2, "imdecode", lambda *_: pytest.fail("decoded before the limit was checked"))
    with pytest.raises(DataError, match=r"0\.jpg: 64x48 pixels, limit 3000.*max_image_pixels"):
        media.read_frames(frames, max_pixels=3000)


def test_masks(masks: Path) -> None:
    found = media.read_masks(masks, 12, (48, 64))
    assert found.shape == (12, 48, 64) and found.dtype == bool
    assert found[3].sum() == 12 * 16 and found[3, 12, 3] and not found[3, 12, 2]
    np.testing.assert_array_equal(media.read_masks(masks, 12, (48, 64), [1, 9]), found[[1, 9]])


def test_mask_of_another_size_value_or_count_is_refused(masks: Path) -> None:
    with pytest.raises(DataError, match=r"00000\.png: 64x48 pixels, but the frame has 65x48.*Remedy"):
        media.read_masks(masks, 12, (48, 65))
    with pytest.raises(DataError, match=r"fid_0: 12 masks for 13 frames.*Remedy"):
        media.read_masks(masks, 13, (48, 64))
    cv2.imwrite(str(masks / "00002.png"), np.full((48, 64), 1, np.uint8))
    with pytest.raises(DataError, match=r"00002\.png: values \[1\]; .*0 \(background\) and 255.*Remedy"):
        media.read_masks(masks, 12, (48, 64))
    assert media.read_masks(media.ImageFolder(masks, any_value=True), 12, (48, 64))[2].all()
    path = masks / "00001.png"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"00001\.png: truncated"):
        media.read_masks(masks, 12, (48, 64))


def test_bilevel_and_rgb_masks_are_read(masks: Path) -> None:
    expected = media.read_masks(masks, 12, (48, 64))
    for number, mode in ((0, "1"), (1, "RGB")):
        path = masks / f"{number:05d}.png"
        with Image.open(path) as image:
            image.convert(mode).save(path)
    np.testing.assert_array_equal(media.read_masks(masks, 12, (48, 64)), expected)


@pytest.mark.smoke
def test_audio_is_the_mean_of_channels_at_16_khz(tmp_path: Path) -> None:
    time = np.arange(48_000) / 48_000
    left, right = np.sin(2 * np.pi * 440 * time), np.zeros_like(time)
    path = tmp_path / "audio.wav"
    soundfile.write(path, np.stack([left, right], 1).astype(np.float32), 48_000, subtype="FLOAT")
    wave = media.read_audio(path)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert wave.shape == (16_000,) and wave.dtype == np.float32
    np.testing.assert_allclose(wave, expected, atol=1e-5)  # the tone is periodic in the clip: Fourier is exact
    np.testing.assert_allclose(media.read_audio(path, 48_000), left / 2, atol=1e-7)


def test_broken_audio_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audio.wav"
    with pytest.raises(DataError, match=r"audio\.wav: no such file.*Remedy"):
        media.read_audio(path)
    for content in (b"RIFF0000", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"audio\.wav: cannot be read as sound.*Remedy"):
            media.read_audio(path)
    for samples, words in (
        (np.zeros(0), r"audio\.wav: holds no sound.*Remedy"),
        (np.full(100, np.nan), "NaN or infinite"),
        (np.full(100, np.inf), "NaN or infinite"),
        (np.zeros(32_000), r"2\.0 s, limit 1\.5 s.*max_audio_seconds"),
    ):
        soundfile.write(path, samples.astype(np.float32), 16_000, subtype="FLOAT")
        with pytest.raises(DataError, match=words):
            media.read_audio(path, max_seconds=1.5)
