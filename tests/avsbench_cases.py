"""Miniature copies of both released layouts of AVSBench: the real file names, made-up pictures and sounds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import soundfile

FRAMES = 5
S4 = (
    # (name, start, category, split)
    ("_a-b", 3, "playing_violin", "train"),
    ("cd_e", 0, "dog_barking", "train"),
    ("-fgh", 1, "dog_barking", "test"),
    ("ijkl", 0, "male_speech", "test"),
    ("mnop", 0, "race_car", "val"),
)
MS3 = (("q_r1", "train"), ("st-2", "test"))


def write_v1(root: Path, size: tuple[int, int] = (32, 32), seconds: float = 5.0) -> Path:
    """AVSBench-object: frames and masks numbered from 1, one annotated frame per S4 training clip; returns the root."""
    single, multi = root / "Single-source", root / "Multi-sources"
    _write_table(single / "s4_meta_data.csv", ("name", "start", "category", "split"), S4)
    _write_table(multi / "ms3_meta_data.csv", ("video_id", "split"), MS3)
    for seed, (name, _, category, split) in enumerate(S4):
        inner, data = f"{split}/{category}/{name}", single / "s4_data"
        _write_images(data / "visual_frames" / inner, f"{name}_", 1, FRAMES, size, seed)
        _write_masks(data / "gt_masks" / inner, f"{name}_", 1, 1 if split == "train" else FRAMES, size, 255)
        _write_sound(data / "audio_wav" / f"{inner}.wav", seconds, seed)
    for seed, (name, split) in enumerate(MS3, 10):
        data = multi / "ms3_data"
        _write_images(data / "visual_frames" / name, f"{name}.mp4_", 1, FRAMES, size, seed)
        _write_masks(data / "gt_masks" / split / name, f"{name}_", 1, FRAMES, size, 255, empty=(2,))
        _write_sound(data / "audio_wav" / split / f"{name}.wav", seconds, seed)
    return root


def write_v2(root: Path, size: tuple[int, int] = (36, 48), labels: str = "labels_semantic") -> Path:
    """AVSBench-semantic: one table for v1s, v1m and v2, images numbered from 0, class numbers in the masks."""
    lines = [("v", f"{name}_0_5000", "dog", split, "v1s") for name, _, _, split in S4]
    lines += [("v", f"{name}_0_5000", "dog_man", split, "v1m") for name, split in MS3]
    lines += [("v", "other_0_10000", "tuba", "train", "v2")]
    _write_table(root / "metadata.csv", ("vid", "uid", "a_obj", "split", "label"), lines)
    for seed, (_, uid, _, split, label) in enumerate(lines[:-1]):
        folder = root / label / uid
        _write_images(folder / "frames", "", 0, FRAMES, size, seed, ".jpg")
        partly = label == "v1s" and split == "train"
        _write_masks(folder / labels, "", 0, 1 if partly else FRAMES, size, 45)
        _write_sound(folder / "audio.wav", 5.0, seed)
    return root


def _write_table(path: Path, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *lines])


def _write_images(
    folder: Path, prefix: str, first: int, count: int, size: tuple[int, int], seed: int, suffix: str = ".png"
) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(first, first + count):
        image = cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), size[::-1])
        cv2.imwrite(str(folder / f"{prefix}{number}{suffix}"), image)


def _write_masks(
    folder: Path, prefix: str, first: int, count: int, size: tuple[int, int], value: int, empty: Sequence[int] = ()
) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        mask = np.zeros(size, np.uint8)
        if k not in empty:
            mask[size[0] // 4 : size[0] // 2, k : k + size[1] // 4] = value
        cv2.imwrite(str(folder / f"{prefix}{first + k}.png"), mask)


def _write_sound(path: Path, seconds: float, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(seed).uniform(-0.3, 0.3, (round(16_000 * seconds), 2)).astype(np.float32)
    soundfile.write(path, wave, 16_000, subtype="PCM_16")
