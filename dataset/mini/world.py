"""The embedded default data: the mini world written to disk in the official Ref-AVS layout.

    <root>/metadata.csv                          vid,uid,split,fid,exp (the official columns, CRLF)
    <root>/media/<clip>/frames/{0..9}.jpg        <root>/media/<clip>/audio.wav   (16 kHz, 10 s)
    <root>/gt_mask/<clip>/fid_<k>/0000{0..9}.png  values 0 and 255
    <root>/cot/train.jsonl                       true chains of thought, keyed by metadata row
    <root>/cot/held_out.jsonl                    those of the other splits, read by nothing but the teacher's evaluation
    <root>/mini_truth.jsonl                      question kind and the facts of each row (only this world knows them)

Null clips own folders (`null_m-<vid>`: muted, `null_c-<vid>`: the sound of a thing that is not seen), as in the real
data. Regeneration with equal settings is byte-identical; files are written below a temporary folder that is renamed
at the end, so a killed run leaves no half-written world.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import soundfile

from dataset.mini import language as language
from dataset.mini import scene as scenes
from utils.progress import counted

_SPLIT_CODES = {"train": 1, "val": 2, "test_s": 3, "test_u": 4, "test_n": 5}
_SHARES = {"visual": 1.0, "spatial": 1.2, "audio": 1.2, "temporal": 1.2, "audio_spatial": 1.2}


@dataclass(frozen=True)
class WorldSettings:
    """Sizes of the world, in clips; rows per clip as drawn. Defaults are those of the quickstart."""

    seed: int = 0
    train: int = 1200
    val: int = 60
    test_s: int = 100
    test_u: int = 80
    test_n: int = 20
    train_null: int = 180
    rows_per_train_clip: int = 6
    rows_per_test_clip: int = 3


@dataclass(frozen=True)
class _Clip:
    """One clip to be written: its folder, scene, what to do with the sound, and its rows."""

    folder: str
    vid: str
    split: str
    scene: scenes.Scene
    rows: tuple[tuple[language.Question | None, str], ...]
    """(question, reference); question None = null."""
    muted: bool = False
    replaced_by: str | None = None

    @property
    def sounds(self) -> tuple[tuple[str, str], ...]:
        if self.muted:
            return ()
        return self.scene.sounds if self.replaced_by is None else ((self.replaced_by, "alone"),)


def make_mini_world(
    root: Path, settings: WorldSettings = WorldSettings(), workers: int = 1, progress: bool = True
) -> None:
    """Write the world below `root` (replaced if its settings differ; left alone if they are equal).

    Raises:
        FileExistsError: `root` holds something that is not a mini world.
    """
    stamp = json.dumps({**asdict(settings), "generator": _generator()}, indent=1, sort_keys=True) + "\n"
    if root.exists() and any(root.iterdir()):
        if not (root / "settings.json").is_file():
            raise FileExistsError(f"{root}: not empty and not a mini world (no settings.json); name another folder")
        if (root / "settings.json").read_text() == stamp:
            return
    building = root.with_name(root.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "cot").mkdir(parents=True)
    clips = list(plan(settings))
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(partial(_write_clip, building), clips, chunksize=16)
        for _ in counted(done, len(clips), "mini world", "clips") if progress else done:
            pass
    _write_tables(building, clips, settings)
    (building / "settings.json").write_text(stamp)
    if root.exists():
        shutil.rmtree(root)
    building.rename(root)


def _generator() -> str:
    """Digest of the code that makes the world: a world of other code is made anew."""
    sources = (Path(module.__file__).read_bytes() for module in (scenes, language))
    return hashlib.sha256(b"".join([*sources, Path(__file__).read_bytes()])).hexdigest()[:16]


def plan(settings: WorldSettings) -> list[_Clip]:
    """All clips of the world, in the order of metadata.csv."""
    clips = [_clip(settings, split, i) for split in ("train", "val", "test_s", "test_u")
             for i in range(getattr(settings, split))]  # fmt: skip
    clips += [_null_clip(settings, "train", i) for i in range(settings.train_null)]
    return clips + [_null_clip(settings, "test_n", i) for i in range(settings.test_n)]


def _vid(split: str, index: int) -> str:
    """An 11-character id and a 10-s span; some ids begin with '-' or hold '_', as YouTube's do."""
    head = ("-ini", "m_ni", "mini")[0 if index % 40 == 7 else 1 if index % 7 == 3 else 2]
    return f"{head}{_SPLIT_CODES[split]}{index:06d}_0_10000"


def _clip(settings: WorldSettings, split: str, index: int) -> _Clip:
    seed = (settings.seed, _SPLIT_CODES[split], index)
    rng = np.random.default_rng((*seed, 3))
    if split == "test_u":
        include = scenes.UNSEEN_CLASSES[index % len(scenes.UNSEEN_CLASSES)]
        scene = scenes.make_scene(seed, scenes.CLASSES, include)
    else:
        scene = scenes.make_scene(seed)
    count = settings.rows_per_train_clip if split in ("train", "val") else settings.rows_per_test_clip
    chosen = _choose(scene, count, rng, unseen=split == "test_u")
    vid = _vid(split, index)
    return _Clip(vid, vid, split, scene, tuple((q, q.reference) for q in chosen))


def _choose(scene: scenes.Scene, count: int, rng: np.random.Generator, unseen: bool) -> list[language.Question]:
    """Draw rows, kinds first, so that rare kinds are not drowned; with `unseen`, at least one about an unseen class."""
    pool = language.questions(scene)
    chosen: list[language.Question] = []
    if unseen:
        about = [q for q in pool if scene.things[q.target].class_name in scenes.UNSEEN_CLASSES]
        chosen.append(about[int(rng.integers(len(about)))])
    while len(chosen) < min(count, len(pool)):
        left = [q for q in pool if q not in chosen]
        if unseen and rng.random() < 0.8:
            left = [q for q in left if scene.things[q.target].class_name in scenes.UNSEEN_CLASSES] or left
        kinds = sorted({q.kind for q in left})
        weights = np.array([_SHARES[k] for k in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        of_kind = [q for q in left if q.kind == kind]
        chosen.append(of_kind[int(rng.integers(len(of_kind)))])
    return chosen


def _null_clip(settings: WorldSettings, split: str, index: int) -> _Clip:
    """A copy of a train or test_s clip's frames with its sound muted or exchanged: nothing seen makes the sound."""
    source = "train" if split == "train" else "test_s"
    origin = _clip(settings, source, index)
    rng = np.random.default_rng((*origin.scene.seed, 4))
    references = [language.NULL_REFERENCES[i] for i in rng.permutation(len(language.NULL_REFERENCES))[:4]]
    muted = index % 2 == 0
    absent = [c for c in scenes.SEEN_CLASSES if all(c != thing.class_name for thing in origin.scene.things)]
    replaced = None if muted else str(absent[int(rng.integers(len(absent)))])
    folder = f"null_{'m' if muted else 'c'}-{origin.vid}"
    return _Clip(folder, origin.vid, split, origin.scene, tuple((None, r) for r in references), muted, replaced)


def _write_clip(root: Path, clip: _Clip) -> None:
    cv2.setNumThreads(0)
    frames, owner = scenes.render_frames(clip.scene)
    media = root / "media" / clip.folder
    (media / "frames").mkdir(parents=True)
    for t, frame in enumerate(frames):
        _save_image(media / "frames" / f"{t}.jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    wave = scenes.render_audio(clip.scene, clip.muted, clip.replaced_by)
    soundfile.write(media / "audio.wav", wave, scenes.SAMPLE_RATE, subtype="PCM_16")
    for fid in sorted({0 if q is None else q.target for q, _ in clip.rows}):
        folder = root / "gt_mask" / clip.folder / f"fid_{fid}"
        folder.mkdir(parents=True)
        empty = clip.rows[0][0] is None
        for t in range(len(frames)):
            mask = np.zeros_like(owner[t]) if empty else (owner[t] == fid + 1).astype(np.uint8) * 255
            _save_image(folder / f"{t:05d}.png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 3])


def _save_image(path: Path, image: np.ndarray, options: list[int]) -> None:
    if not cv2.imwrite(str(path), image, options):
        raise OSError(f"{path}: could not be written (disk full or folder not writable?)")


def _write_tables(root: Path, clips: list[_Clip], settings: WorldSettings) -> None:
    table, truths, chains = [], [], {"train": [], "held_out": []}
    for clip in clips:
        numbers: dict[str, int] = {}
        for question, reference in clip.rows:
            name = "null" if question is None else clip.scene.things[question.target].class_name
            numbers[name] = numbers.get(name, 0) + 1
            row, uid = len(table), f"{clip.folder}_{name}_{numbers[name]}"
            table.append((clip.vid, uid, clip.split, 0 if question is None else question.target, reference))
            kind = language.NULL_KIND if question is None else question.kind
            facts = language.truth(clip.scene, question, clip.sounds)
            truths.append({"row": row, "kind": kind, "truth": facts})
            rng = np.random.default_rng((settings.seed, 6, row))
            chain = language.reasoning(clip.scene, question, reference, rng, clip.sounds)
            record = {"row": row, "uid": uid, "reasoning": chain, "target": name}
            chains["train" if clip.split == "train" else "held_out"].append(record)
    with open(root / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(("vid", "uid", "split", "fid", "exp"))
        writer.writerows(table)
    _write_jsonl(root / "mini_truth.jsonl", truths)
    for name, records in chains.items():
        _write_jsonl(root / "cot" / f"{name}.jsonl", records)


def _write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
