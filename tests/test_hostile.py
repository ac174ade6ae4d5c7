"""Files made to harm: refused with a typed error or read as plain text, before memory is given away."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import wave
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import RunConfig
from dataset import media
from dataset.avsbench import AvsBenchIndex
from dataset.cot import read_cot
from dataset.prompt import Prompts, load_tokenizer
from dataset.refavs import RefAvsIndex
from dataset.reflective import read_reflective
from tests.data_builders import CONTROL_TOKENS, write_clip, write_metadata, write_tokenizer
from utils.answers import parse_answer, reasoning_steps
from utils.config import load_config
from utils.errors import AuroraError, CheckpointError, ConfigError, DataError, WeightsError
from utils.results import decode_masks, encode_masks, read_parts
from utils.tensor_files import load_pickle

CLIP = "v_0_10000"
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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


def png(width: int, height: int, data: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A greyscale PNG of the claimed size around any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *[chunk(*e) for e in extra], chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_png_bombs_are_refused_undecoded(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(png(50_000, 50_000, zlib.compress(bytes(10_000_000), 9)))  # 2.5 G pixels in 10 kB
    with pytest.raises(DataError, match=r"0\.png: (50000x50000 pixels, limit|not a JPEG or PNG image)"):
        media.read_image(path, cv2.IMREAD_GRAYSCALE, 10_000)
    bomb = b"text\0\0" + zlib.compress(bytes(200_000_000), 9)  # a comment of 200 MB in 200 kB
    path.write_bytes(png(4, 4, zlib.compress(bytes(20)), (b"zTXt", bomb)))
    with pytest.raises(DataError, match=r"0\.png: not a JPEG or PNG image"):
        media.read_image(path, cv2.IMREAD_GRAYSCALE, 10_000)
    path.write_bytes(png(4, 4, zlib.compress(bytes(50_000_000), 9)))  # more data than its 16 pixels hold
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
    return b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack(
        "<I", data_bytes
    )


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


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    tokenizer, seg_id = load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return Prompts(tokenizer, seg_id, "none")


CONTROL = (*CONTROL_TOKENS, "[SEG]", "<video>", "<audio>", "<image>", "<s>", "[INST]", "\0", "\u202e")


@FUZZ
@given(st.lists(st.sampled_from([*CONTROL, "dog", " ", "\n", "<|im_", "start|>", "[S", "EG]"]), max_size=12))
def test_no_data_text_becomes_a_control_token(prompts: Prompts, parts: list[str]) -> None:
    text = "".join(parts)
    plain, ids = prompts.prompt_ids("dog"), prompts.prompt_ids(text)
    for control in (prompts.seg_id, prompts._start, prompts._end, *[-201, -202]):
        assert (ids == control).sum() == (plain == control).sum()
    answer = prompts.answer_ids("reasoning", text, text or "x")
    assert (answer == prompts.seg_id).sum() == 1 and (answer == prompts._end).sum() == 1


# --- parsers: a typed error or a value, nothing else ------------------------------------------------------------------


def typed(read: object, *arguments: object) -> None:
    try:
        read(*arguments)
    except AuroraError as error:
        assert str(error)


TEXT = st.text(max_size=60)
CELL = st.one_of(TEXT, st.sampled_from(["val", "train", "TODO", "0", "-1", "9" * 20, 'a"b', "a_b_1", f"{CLIP}_dog_1"]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
NAMES = ("row", "uid", "reasoning", "target", "wrong", "corrected", "trigger", "kind", "truth")
RECORD = st.one_of(JSON, st.dictionaries(st.sampled_from(NAMES), st.one_of(JSON, st.integers(0, 3)), max_size=9))


@FUZZ
@given(st.lists(st.lists(CELL, max_size=6), max_size=4), st.booleans(), st.binary(max_size=8))
def test_fuzzed_tables(tmp_path: Path, rows: list[list[str]], header: bool, junk: bytes) -> None:
    lines = ["vid,uid,split,fid,exp"] if header else []
    text = "\r\n".join([*lines, *[",".join(row) for row in rows]])
    (tmp_path / "metadata.csv").write_bytes(text.encode("utf-8", "surrogatepass") + junk)
    typed(RefAvsIndex, tmp_path)
    typed(RefAvsIndex, tmp_path, [])
    typed(AvsBenchIndex, tmp_path, "s4")


@FUZZ
@given(st.lists(st.one_of(RECORD.map(json.dumps), TEXT), max_size=4), st.binary(max_size=4))
def test_fuzzed_jsonl(tmp_path: Path, lines: list[str], junk: bytes) -> None:
    path = tmp_path / "rank0.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + junk)
    typed(read_cot, [path])
    typed(read_reflective, [path])
    typed(read_parts, tmp_path)


@FUZZ
@given(st.one_of(TEXT, JSON.map(lambda v: yaml.safe_dump(v)), st.sampled_from(list(RunConfig.model_fields))), JSON)
def test_fuzzed_yaml(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    typed(load_config, path)
    path.write_text(yaml.safe_dump({text: value, "stage": "sft", "optim": value}), encoding="utf-8")
    typed(load_config, path, [f"{text}={text}", text])


@FUZZ
@given(st.lists(st.one_of(TEXT, st.sampled_from(["the target is ", "It is [SEG].", "\n", "'", "the "])), max_size=8))
def test_fuzzed_answers(parts: list[str]) -> None:
    text = "".join(parts)
    found = parse_answer(text)
    assert found is None or found == found.strip()
    assert all(isinstance(step, str) for step, _ in reasoning_steps(text, text))


RLE = st.fixed_dictionaries(
    {},
    optional={
        "size": st.one_of(JSON, st.lists(st.integers(-2, 2**33), max_size=3)),
        "counts": st.one_of(JSON, st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)),
    },
)


@FUZZ
@given(st.lists(st.one_of(RLE, JSON), max_size=3))
def test_fuzzed_rle(rles: list) -> None:
    typed(decode_masks, rles)


def test_rle_that_lies_is_refused() -> None:
    good = encode_masks(np.eye(4, dtype=bool)[None])
    assert decode_masks(good)[0].sum() == 4
    right = good[0]["counts"]
    for size, counts in (([2**20, 2**20], right), ([2, 2], right), ([4, 4], "1111"), ([4, 4], "~"), ([4, 4], "`" * 9)):
        with pytest.raises(DataError, match="Remedy"):
            decode_masks([{"size": size, "counts": counts}])


@FUZZ
@given(st.integers(0, 60), st.binary(max_size=30), st.integers(0, 44))
def test_fuzzed_wav_headers(tmp_path: Path, cut: int, junk: bytes, position: int) -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(16))
    content = bytearray(buffer.getvalue())
    content[position : position + len(junk)] = junk
    path = tmp_path / "audio.wav"
    path.write_bytes(bytes(content[:cut]))
    typed(media.read_audio, path, 16_000, 10.0)


@FUZZ
@given(st.integers(0, 80), st.binary(max_size=12), st.integers(0, 80))
def test_fuzzed_images(tmp_path: Path, cut: int, junk: bytes, position: int) -> None:
    content = bytearray(png(3, 3, zlib.compress(bytes(12))))
    content[position : position + len(junk)] = junk
    path = tmp_path / "0.png"
    path.write_bytes(bytes(content[: cut + 20]))
    typed(media.read_image, path, cv2.IMREAD_GRAYSCALE, 10_000)


@FUZZ
@given(st.one_of(JSON.map(json.dumps), TEXT))
def test_fuzzed_manifests(tmp_path: Path, text: str) -> None:
    from utils.checkpoint import read_manifest

    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(read_manifest(tmp_path), dict)
    except CheckpointError as error:
        assert "Remedy" in str(error)
