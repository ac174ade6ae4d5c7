"""Scenes of the mini world in the layout of AVSBench S4 (v2, AVSBench-semantic), for Table 6 at mini size.

Scenes in which one thing alone makes a sound and no other thing is of its class: five frames and five seconds from its
onset on, its mask in every frame (training clips: in the first alone, as S4 is annotated). They are drawn with seeds of
their own, so no clip of data/mini comes again. Equal settings give equal files; a killed run leaves no half-written
folder. `mini_s4.json` marks the folder as synthetic.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import soundfile

from dataset.avsbench import SPLITS
from dataset.mini.scene import SAMPLE_RATE, Scene, make_scene, render_audio, render_frames

FRAMES = 5
LABEL = "v1s"
_CODE = 64
"""First number of the scenes' seeds; the mini world's are (its seed, 1..5, index)."""


def make_mini_s4(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write `counts` clips of each split below `root`, replacing what is there."""
    temporary = root.with_name(f".{root.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    lines = []
    for number, split in enumerate(SPLITS):
        index = 0
        for clip in range(counts[split]):
            scene, target = None, None
            while target is None:
                scene = make_scene((seed, _CODE + number, index))
                target, index = _single_source(scene), index + 1
            uid = f"mini_{split}{clip:04d}_0_5000"
            _write_clip(temporary / LABEL / uid, scene, target, split)
            lines.append((uid.rsplit("_", 2)[0], uid, scene.things[target].class_name, split, LABEL))
    with open(temporary / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("vid", "uid", "a_obj", "split", "label"), *lines])
    (temporary / "mini_s4.json").write_text(json.dumps({"seed": seed, **counts}) + "\n", encoding="utf-8")
    shutil.rmtree(root, ignore_errors=True)
    temporary.rename(root)


def _single_source(scene: Scene) -> int | None:
    """Number of the one thing that sounds, None if there are several or others of its class."""
    names = [thing.class_name for thing in scene.things]
    if len(scene.sounds) != 1 or names.count(scene.sounds[0][0]) != 1:
        return None
    return names.index(scene.sounds[0][0])


def _write_clip(folder: Path, scene: Scene, target: int, split: str) -> None:
    frames, owner = render_frames(scene)
    wave = render_audio(scene)
    first = min(int(scene.things[target].onset), len(frames) - FRAMES)
    (folder / "frames").mkdir(parents=True)
    (folder / "labels_rgb").mkdir()
    for k in range(FRAMES):
        cv2.imwrite(str(folder / "frames" / f"{k}.jpg"), frames[first + k][..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        if k == 0 or split != "train":
            mask = (owner[first + k] == target + 1).astype(np.uint8) * 255
            cv2.imwrite(str(folder / "labels_rgb" / f"{k}.png"), mask)
    sound = wave[first * SAMPLE_RATE : (first + FRAMES) * SAMPLE_RATE]
    soundfile.write(folder / "audio.wav", sound, SAMPLE_RATE, subtype="PCM_16")
