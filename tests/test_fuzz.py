"""Made-up text, tables, headers and records: a typed error or a value, and no control token from data."""

from __future__ import annotations

import io
import json
import wave
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import RunConfig
from dataset import media
from dataset.avsbench import AvsBenchIndex
from dataset.prompt import Prompts, load_tokenizer
from dataset.records import read_cot, read_reflective
from dataset.refavs import RefAvsIndex
from tests.data_builders import CONTROL_TOKENS, png_file, write_tokenizer
from utils.answers import parse_answer, reasoning_steps
from utils.checkpoint import read_manifest
from utils.config import load_config
from utils.errors import AuroraError, CheckpointError, DataError
from utils.results import decode_masks, encode_masks, read_parts

CLIP = "v_0_10000"
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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
    content = bytearray(png_file(3, 3, zlib.compress(bytes(12))))
    content[position : position + len(junk)] = junk
    path = tmp_path / "0.png"
    path.write_bytes(bytes(content[: cut + 20]))
    typed(media.read_image, path, cv2.IMREAD_GRAYSCALE, 10_000)


@FUZZ
@given(st.one_of(JSON.map(json.dumps), TEXT))
def test_fuzzed_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(read_manifest(tmp_path), dict)
    except CheckpointError as error:
        assert "Remedy" in str(error)
