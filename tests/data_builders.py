"""Tiny synthetic data in the official Ref-AVS layout, and a tiny Qwen2 tokenizer, for tests."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import soundfile
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from scripts import build_reflective

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = (
    "The reference is: the object making a sound on the left. Please segment the corresponding object in the images.",
    "In the video a man plays the cello. The audio holds a cello. So the target is the cello. It is",
    "system user assistant You are a helpful assistant.",
)
ROWS = (
    # (vid, uid, split, fid, exp)
    ("-a_b_0_10000", "-a_b_0_10000_cello_1", "train", 0, "The cello on the left. "),
    ("-a_b_0_10000", "-a_b_0_10000_hair-dryer_1", "train", 1, "The loud, hot thing."),
    ("clip2_0_10000", "clip2_0_10000_man_1", "train", 0, "man."),
    ("-a_b_0_10000", "null_m--a_b_0_10000_null_1", "train", 0, "The sounding object"),
    ("clip3_0_10000", "clip3_0_10000_man_1", "TODO", 0, "left out"),
    ("clip4_0_10000", "clip4_0_10000_dog_2", "test_s", 0, "The dog"),
    ("clip5_0_10000", "clip5_0_10000_dog_1", "test_s", 2, "The dog"),
    ("clip5_0_10000", "clip5_0_10000_dog_1", "test_s", 0, "The other dog"),
)
"""Eight rows: a clip that begins with '-', a quoted cell, a null row, a TODO row, a duplicated uid."""
TRAIN_ROWS = [row for row in ROWS if row[2] == "train"]
WRONG_PATH = "The man plays. The audio holds a cello. So the target is the cello. It is [SEG]."
RIGHT_PATH = "The man plays. The audio holds a man. So the target is the man. It is [SEG]."


def write_metadata(root: Path, rows: Sequence[tuple] = ROWS) -> Path:
    """metadata.csv as published: CRLF, quotes only where a cell needs them."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(("vid", "uid", "split", "fid", "exp"))
        writer.writerows(rows)
    return root / "metadata.csv"


def write_clip(
    root: Path,
    clip: str,
    fids: Sequence[int] = (0,),
    frames: int = 10,
    size: tuple[int, int] = (48, 64),
    seconds: float = 10.0,
    sample_rate: int = 16_000,
    channels: int = 1,
    seed: int = 0,
) -> None:
    """Frames, masks (one rectangle per object, moving) and sound of one clip; `size` is (height, width)."""
    rng = np.random.default_rng(seed)
    height, width = size
    folder = root / "media" / clip / "frames"
    folder.mkdir(parents=True)
    for t in range(frames):
        image = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (width, height))
        cv2.imwrite(str(folder / f"{t}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    for fid in fids:
        masks = root / "gt_mask" / clip / f"fid_{fid}"
        masks.mkdir(parents=True)
        for t in range(frames):
            mask = np.zeros(size, np.uint8)
            mask[height // 4 : height // 2, t : t + width // 4] = 255
            cv2.imwrite(str(masks / f"{t:05d}.png"), mask)
    wave = rng.uniform(-0.3, 0.3, (round(seconds * sample_rate), channels)).astype(np.float32)
    soundfile.write(root / "media" / clip / "audio.wav", wave, sample_rate, subtype="PCM_16")


def write_world(root: Path, rows: Sequence[tuple] = ROWS, **clip_options: object) -> Path:
    """metadata.csv and the media of all its rows (null clips get no mask folder); returns the root."""
    write_metadata(root, rows)
    fids: dict[str, set[int]] = {}
    for _, uid, _, fid, _ in rows:
        clip, class_name, _ = uid.rsplit("_", 2)
        fids.setdefault(clip, set()).update(() if class_name == "null" else (fid,))
    for number, (clip, objects) in enumerate(fids.items()):
        write_clip(root, clip, sorted(objects), seed=number, **clip_options)
    return root


def write_lines(path: Path, records: Sequence[dict | str]) -> Path:
    """JSONL; a str is written as it is (to make a malformed line)."""
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_reasoning(path: Path, rows: Sequence[tuple] = TRAIN_ROWS, text: str = "So the target is it.") -> Path:
    """A reasoning record of each row that is not None, at its number."""
    return write_lines(path, [
        {"row": i, "uid": row[1], "reasoning": text, "target": row[1].rsplit("_", 2)[1]}
        for i, row in enumerate(rows) if row is not None
    ])  # fmt: skip


def write_reflective_files(folder: Path) -> tuple[Path, Path]:
    """A world of the training rows, and reflective paths of its rows 0 and 2 -> (world, reflective.jsonl)."""
    world = write_world(folder / "data", TRAIN_ROWS)
    records = [
        {"row": 2, "uid": ROWS[2][1], "target": "man", "wrong": WRONG_PATH, "corrected": RIGHT_PATH},
        {"row": 0, "uid": ROWS[0][1], "target": "cello", "wrong": RIGHT_PATH, "corrected": WRONG_PATH},
    ]
    corrections, out = write_lines(folder / "corrections.jsonl", records), folder / "cot" / "reflective.jsonl"
    assert build_reflective.main(["--corrections", str(corrections), "--out", str(out)]) == 0
    return world, out


def write_tokenizer(folder: Path, extra_tokens: Sequence[str] = (), vocabulary: int = 420) -> Path:
    """tokenizer.json of a byte-level BPE built like Qwen2's, with its control tokens; returns the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in extra_tokens])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}), encoding="utf-8")
    return folder


def png_file(width: int, height: int, data: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A greyscale PNG of the claimed size around any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *[chunk(*e) for e in extra], chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
