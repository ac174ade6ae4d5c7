"""Files made to harm: refused with a typed error or read as plain text, before memory is given away."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import cv2
import pytest
import torch

from dataset import media
from dataset.avsbench import AvsBenchIndex
from dataset.refavs import RefAvsIndex
from tests.data_builders import png_file, write_clip, write_metadata
from utils.config import load_config
from utils.errors import ConfigError, DataError, WeightsError
from utils.tensor_files import load_pickle

CLIP = "v_0_10000"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_metadata(root, [(CLIP, f"{CLIP}_dog_1", "val", 0, "a dog")])
    write_clip(root, CLIP, frames=2, seconds=0.1)
    return root


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["media/v_0_10000", "media/v_0_10000/frames", "media/v_0_10000/audio.wav"])
def test_link_out_of_the_data_is_refused(world: Path, name: str) -> None:
    outside = world.parent / "outside"
    (world / name).rename(outside)
    (world / name).symlink_to(outside)
    index = RefAvsIndex(world)
    with pytest.raises(DataError, match="leads out of.*Remedy"):
        media.read_frames(index.frames_folder(CLIP))
        media.read_audio(index.audio_path(CLIP))


def test_linked_mask_folder_or_file_is_refused(world: Path) -> None:
    index, outside = RefAvsIndex(world), world.parent / "outside"
    frame = world / "media" / CLIP / "frames" / "1.jpg"
    frame.rename(outside)
    frame.symlink_to(outside)
    with pytest.raises(DataError, match=r"1\.jpg: leads out of"):
        media.read_frames(index.frames_folder(CLIP))
    folder = world / "gt_mask" / CLIP
    folder.rename(world.parent / "masks")
    folder.symlink_to(world.parent / "masks")
    with pytest.raises(DataError, match="leads out of"):
        index.mask_folder(index.rows("val")[0])
    folder.unlink()
    folder.symlink_to(folder)  # a circle
    with pytest.raises(DataError):
        media.read_masks(index.mask_folder(index.rows("val")[0]), 2, (48, 64))


def test_links_within_the_data_and_of_its_root_are_followed(world: Path, tmp_path: Path) -> None:
    (world / "media" / "null_m-x").symlink_to(world / "media" / CLIP)
    (world / "media").rename(tmp_path / "disk")
    (world / "media").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "null_m-x").unlink()
    (tmp_path / "disk" / "null_m-x").symlink_to(CLIP)
    (tmp_path / "root").symlink_to(world)
    index = RefAvsIndex(tmp_path / "root")
    assert len(media.read_frames(index.frames_folder("null_m-x"))) == 2
    assert len(media.read_audio(index.audio_path(CLIP))) == 1600


@pytest.mark.parametrize("uid", ["../../etc", "/etc", "a/b", "..", "a\\b", "C:"])
def test_path_in_an_avsbench_table_is_refused(tmp_path: Path, uid: str) -> None:
    (tmp_path / "metadata.csv").write_text(f"vid,uid,a_obj,split,label\nv,{uid},dog,train,v1s\n", encoding="utf-8")
    with pytest.raises(DataError, match="not the name of one folder"):
        AvsBenchIndex(tmp_path, "s4")


def test_archive_in_place_of_a_folder_is_refused(world: Path) -> None:
    frames = world / "media" / CLIP / "frames"
    archive = frames.with_name("frames.tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(frames, "../../escape")
    for path in frames.iterdir():
        path.unlink()
    frames.rmdir()
    archive.rename(frames)
    with pytest.raises(DataError, match="no such folder.*Remedy"):
        media.read_frames(frames)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_png_bombs_are_refused_undecoded(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(png_file(50_000, 50_000, zlib.compress(bytes(10_000_000), 9)))  # 2.5 G pixels in 10 kB
    with pytest.raises(DataError, match=r"0\.png: (50000x50000 pixels, limit|not a JPEG or PNG image)"):
        media.read_image(path, cv2.IMREAD_GRAYSCALE, 10_000)
    bomb = b"text\0\0" + zlib.compress(bytes(200_000_000), 9)  # a comment of 200 MB in 200 kB
    path.write_bytes(png_file(4, 4, zlib.compress(bytes(20)), (b"zTXt", bomb)))
    with pytest.raises(DataError, match=r"0\.png: not a JPEG or PNG image"):
        media.read_image(path, cv2.IMREAD_GRAYSCALE, 10_000)
    path.write_bytes(png_file(4, 4, zlib.compress(bytes(50_000_000), 9)))  # more data than its 16 pixels hold
    assert media.read_image(path, cv2.IMREAD_GRAYSCALE, 10_000).shape == (4, 4)


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: 1 TB
    with pytest.raises(DataError, match=r"0\.png: 1099511627776 bytes.*Remedy"):
        media.read_image(path, cv2.IMREAD_COLOR, 10_000)


def wav_header(rate: int, channels: int, data_bytes: int) -> bytes:
    block = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, min(rate * block, 2**32 - 1), block, 16)
    riff = b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVEfmt " + struct.pack("<I", 16)
    return riff + form + b"data" + struct.pack("<I", data_bytes)


@pytest.mark.parametrize(("rate", "channels"), [(2**31 - 1, 1), (16_000, 1000), (1, 1), (16_000, 1)])
def test_wav_that_promises_too_much_is_refused(tmp_path: Path, rate: int, channels: int) -> None:
    path = tmp_path / "audio.wav"
    with path.open("wb") as file:
        file.write(wav_header(rate, channels, 2**31))
        file.truncate(2**31)
    with pytest.raises(DataError, match=r"audio\.wav: .*(Hz|limit|cannot be read).*Remedy"):
        media.read_audio(path, max_seconds=120)


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "stage: !!python/object/apply:os.system ['touch {mark}']",
        "stage: !!python/name:os.system",
        "stage: !!python/module:os",
        "seed: &a [1]\nstage: *a",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "stage: !include /etc/passwd",
        "[" * 5000,
    ],
)
def test_yaml_with_tags_aliases_or_depth_is_refused(tmp_path: Path, text: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "run.yaml"
    path.write_text(text.format(mark=mark), encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(path)
    assert not mark.exists()


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "sam.pth", tmp_path / "mark"
    path.write_bytes(pickle.dumps({"state": _Bomb(mark)}, protocol=2))
    with pytest.raises(WeightsError, match="refused"):
        load_pickle(path)
    torch.save({"state": _Bomb(mark)}, path)
    with pytest.raises(WeightsError, match="refused"):
        load_pickle(path)
    assert not mark.exists()
