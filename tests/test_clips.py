"""Samples, their order, and batches: from metadata rows to what the model is given."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import ConcatDataset

from dataset import clips
from dataset.clips import ClipDataset, ClipSettings, Packed, derangement
from dataset.loader import MixtureSampler, build_loader
from dataset.processor import AuroraProcessor, collate
from dataset.prompt import Prompts, load_tokenizer
from dataset.records import CotRecord
from dataset.refavs import RefAvsIndex
from tests.data_builders import write_clip, write_metadata, write_tokenizer, write_world
from utils.errors import DataError
from utils.types import Batch, Sample

Parts = tuple[RefAvsIndex, AuroraProcessor, Prompts]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(*load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), "qwen2")


@pytest.fixture(scope="module")
def processor() -> AuroraProcessor:
    return AuroraProcessor(
        None, vision_size=28, sam_size=32, mel_bins=16, audio_padding_seconds=None, audio_windows=None
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, processor: AuroraProcessor, prompts: Prompts) -> Parts:
    return RefAvsIndex(write_world(tmp_path_factory.mktemp("world"), seconds=1.0)), processor, prompts


@pytest.fixture
def fresh(tmp_path: Path, processor: AuroraProcessor, prompts: Prompts) -> Parts:
    """A world of its own, to be damaged."""
    return RefAvsIndex(write_world(tmp_path, seconds=1.0)), processor, prompts


def _dataset(parts: Parts, split: str = "train", cot: dict | None = None, **settings: object) -> ClipDataset:
    index, processor, prompts = parts
    return ClipDataset(index, index.rows(split), processor, prompts, cot, ClipSettings(**settings))


def _same(a: Sample, b: Sample) -> bool:
    names = ("pixel_values", "sam_pixels", "fbank", "masks", "prompt_ids", "answer_ids", "teacher_ids")
    return a.row == b.row and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def test_sample(parts: Parts) -> None:
    index, _, prompts = parts
    sample = _dataset(parts, answer="class", teacher_answer="plain", keep_frames=True)[1]
    assert (sample.row, sample.uid) == (1, "-a_b_0_10000_hair-dryer_1")
    assert (sample.split, sample.class_name, sample.reference) == ("train", "hair-dryer", "The loud, hot thing.")
    assert type(sample.split) is str and sample.pixel_values.shape == (10, 3, 28, 28)
    assert -1 <= sample.pixel_values.min() <= sample.pixel_values.max() <= 1
    assert sample.sam_pixels.shape == (10, 3, 32, 32) and sample.sam_size == (24, 32)
    assert sample.fbank.shape == (98, 16) and sample.fbank.dtype == torch.float32
    assert sample.masks.shape == (10, 48, 64) and sample.masks.dtype == torch.bool and sample.masks.any()
    assert sample.prompt_ids.equal(prompts.prompt_ids(sample.reference))
    assert sample.answer_ids.equal(prompts.answer_ids("class", "hair-dryer"))
    assert sample.teacher_ids.equal(prompts.answer_ids("plain", "hair-dryer"))
    assert sample.video_key == sample.audio_key == sample.clip == "-a_b_0_10000"
    assert sample.frames.shape == (10, 48, 64, 3) and sample.truth is None


def test_evaluation_sample_has_no_answer_and_no_frames(parts: Parts) -> None:
    sample = _dataset(parts)[0]
    assert sample.answer_ids.shape == sample.teacher_ids.shape == (0,) and sample.answer_ids.dtype == torch.int64
    assert sample.frames is None


def test_a_sample_depends_on_its_index_alone(parts: Parts) -> None:
    forward = [s for s in map(_dataset(parts).__getitem__, range(4))]
    dataset = pickle.loads(pickle.dumps(_dataset(parts)))  # as a spawned worker gets it
    np.random.seed(1)
    torch.manual_seed(1)
    assert all(_same(dataset[i], forward[i]) for i in (3, 0, 2, 1, 0))


@pytest.mark.parametrize("probe", clips.PROBES)
def test_a_clip_that_repeats_is_decoded_once(parts: Parts, probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, kept = (_dataset(parts, "test_s", probe=probe, seed=1, repeated=repeated) for repeated in (False, True))
    expected = [plain[i] for i in range(len(plain))]
    read: list[str] = []
    for name in ("read_frames", "read_audio"):
        reader = getattr(clips, name)
        monkeypatch.setattr(clips, name, lambda path, *rest, of=reader: (read.append(str(path)), of(path, *rest))[1])
    assert all(_same(kept[i], expected[i]) for i in range(len(kept)))
    changes = sum(kept.rows[i].clip != kept.rows[i - 1].clip for i in range(1, len(kept))) + 1
    assert 1 < changes < len(kept) and len(read) == changes * (3 if probe == "shuffle_video" else 2)
    assert all(_same(kept[i], expected[i]) for i in reversed(range(len(kept))))


def test_packed_items_come_back_equal(parts: Parts) -> None:
    rows = parts[0].rows("train")
    packed = Packed([*rows, None])
    assert list(packed) == [*rows, None] and len(packed) == 5 and packed[-2] == rows[-1] and rows[2] in packed
    for number in (5, -6):
        with pytest.raises(IndexError):
            packed[number]
    with pytest.raises(TypeError):
        packed[1:3]
    assert list(Packed([])) == []


def test_nothing_is_read_at_construction(tmp_path: Path, processor: AuroraProcessor, prompts: Prompts) -> None:
    world = write_world(tmp_path, seconds=0.1)
    (tmp_path / "media").rename(tmp_path / "elsewhere")
    dataset = _dataset((RefAvsIndex(world), processor, prompts))
    assert len(dataset) == 4
    with pytest.raises(DataError, match=r"sample -a_b_0_10000_cello_1 \(row 0\): .*no such folder"):
        dataset[0]


def test_null_row(fresh: Parts) -> None:
    index = fresh[0]
    null = index.rows("train")[3]
    sample = _dataset(fresh)[3]
    assert sample.class_name == "null" and sample.masks.shape == (10, 48, 64) and not sample.masks.any()
    folder = index.mask_folder(null)
    folder.mkdir(parents=True)
    for t in range(10):
        cv2.imwrite(str(folder / f"{t:05d}.png"), np.zeros((48, 64), np.uint8))
    assert not _dataset(fresh)[3].masks.any()
    cv2.imwrite(str(folder / "00004.png"), np.full((48, 64), 255, np.uint8))
    assert not _dataset(fresh)[3].masks.any()  # counted by check_data, and no end of a run


def test_fewer_frames(parts: Parts) -> None:
    sample, whole = _dataset(parts, num_frames=4)[0], _dataset(parts)[0]
    kept = [1, 3, 6, 8]
    assert torch.equal(sample.pixel_values, whole.pixel_values[kept]) and torch.equal(sample.masks, whole.masks[kept])


def test_reasoning_is_required_for_every_row(parts: Parts) -> None:
    rows = parts[0].rows("train")
    cot = {r.row: CotRecord(r.row, r.uid, f"Chain {r.row}.", r.class_name) for r in rows}
    sample = _dataset(parts, cot=cot, answer="reasoning")[2]
    assert sample.answer_ids.equal(parts[2].answer_ids("reasoning", "man", "Chain 2."))
    with pytest.raises(DataError, match=r"1 of 4 rows have no reasoning, first clip2_0_10000_man_1 \(row 2\)"):
        _dataset(parts, cot={k: v for k, v in cot.items() if k != 2}, answer="reasoning")
    cot[1] = CotRecord(1, "another_uid_1", "x", "y")
    with pytest.raises(DataError, match="the reasoning is about another_uid_1"):
        _dataset(parts, cot=cot, answer="reasoning")


def _sound(samples: int) -> Callable[[Path, Path], None]:
    return lambda media, _: soundfile.write(media / "audio.wav", np.zeros(samples, np.float32), 16_000)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda media, _: _cut(media / "frames" / "4.jpg"), r"4\.jpg: truncated"),
        (lambda media, _: (media / "frames" / "4.jpg").unlink(), "image 4 is missing"),
        (lambda media, _: (media / "frames" / "9.jpg").unlink(), "10 masks for 9 frames"),
        (_sound(0), r"audio\.wav: holds no sound"),
        (_sound(300), r"audio\.wav: wave: 300 samples; one window needs 400"),
        (
            lambda _, masks: cv2.imwrite(str(masks / "00002.png"), np.zeros((10, 10), np.uint8)),
            r"00002\.png: 10x10 pixels, but the frame has 64x48",
        ),
        (lambda _, masks: masks.rename(masks.with_name("gone")), "fid_0: no such folder"),
    ],
)
def test_broken_media_name_the_sample_and_the_remedy(
    fresh: Parts, damage: Callable[[Path, Path], object], words: str
) -> None:
    index = fresh[0]
    row = index.rows("train")[2]
    damage(index.frames_folder(row.clip).parent, index.mask_folder(row))
    with pytest.raises(DataError, match=rf"sample clip2_0_10000_man_1 \(row 2\): .*{words}.*Remedy"):
        _dataset(fresh)[2]
    with pytest.raises(DataError, match=r"sample clip2_0_10000_man_1"):  # as it comes from a worker
        list(build_loader(_dataset(fresh), [2], batch_size=1, workers=1, seed=0))


def test_limits_reach_the_readers(parts: Parts) -> None:
    with pytest.raises(DataError, match=r"cello_1 \(row 0\).*limit 100"):
        _dataset(parts, max_image_pixels=100)[0]
    with pytest.raises(DataError, match=r"cello_1 \(row 0\).*limit 0\.5 s"):
        _dataset(parts, max_audio_seconds=0.5)[0]


@pytest.mark.parametrize("count", [2, 3, 50])
def test_derangement(count: int) -> None:
    clips = [f"clip{i}" for i in range(count)]
    other = derangement(clips, seed=3)
    assert set(other) == set(other.values()) == set(clips) and all(a != b for a, b in other.items())
    assert other == derangement(clips, seed=3) and (count < 4 or other != derangement(clips, seed=4))


def test_probes_exchange_media_and_keep_the_masks(parts: Parts) -> None:
    plain = _dataset(parts, "test_s")
    sound = _dataset(parts, "test_s", probe="shuffle_audio", seed=1)
    video = _dataset(parts, "test_s", probe="shuffle_video", seed=1)
    silent = _dataset(parts, "test_s", probe="zero_audio")
    by_clip = {s.clip: s for s in map(plain.__getitem__, range(3))}
    for i in range(3):
        own, other = plain[i], by_clip[sound[i].audio_key]
        assert other.clip != own.clip
        assert torch.equal(sound[i].fbank, other.fbank) and torch.equal(sound[i].pixel_values, own.pixel_values)
        assert torch.equal(video[i].pixel_values, by_clip[video[i].video_key].pixel_values)
        assert torch.equal(video[i].fbank, own.fbank) and torch.equal(video[i].masks, own.masks)
        assert video[i].video_key != own.clip == video[i].audio_key
        assert silent[i].fbank.unique().numel() == 1 and silent[i].audio_key not in by_clip
    assert sound[1].audio_key == sound[2].audio_key  # rows of one clip hear the same other clip
    subset = ClipDataset(parts[0], parts[0].rows("test_s")[2:], *parts[1:], settings=sound.settings)
    assert subset[0].audio_key == sound[2].audio_key  # independent of which rows are evaluated


def test_exchanged_frames_leave_sam_its_own(tmp_path: Path, parts: Parts) -> None:
    write_metadata(tmp_path, [(v, f"{v}_dog_1", "val", 0, "The dog") for v in ("a", "b")])
    write_clip(tmp_path, "a", seconds=0.1, size=(48, 64))
    write_clip(tmp_path, "b", seconds=0.1, size=(40, 20), frames=12)
    parts = (RefAvsIndex(tmp_path), *parts[1:])
    own = _dataset(parts, "val", num_frames=5)[0]
    exchanged = _dataset(parts, "val", num_frames=5, probe="shuffle_video", keep_frames=True)[0]
    assert exchanged.masks.shape == (5, 48, 64) and exchanged.masks.any() and exchanged.video_key == "b"
    assert torch.equal(exchanged.sam_pixels, own.sam_pixels) and exchanged.sam_size == own.sam_size
    assert not torch.equal(exchanged.pixel_values, own.pixel_values) and exchanged.frames.shape == (5, 48, 64, 3)
    with pytest.raises(DataError, match=r"a_dog_1 \(row 0\): 10 frames, but those of clip b, .* are 12.*Remedy"):
        _dataset(parts, "val", probe="shuffle_video")[0]


def test_probe_needs_two_clips_and_a_known_name(tmp_path: Path, parts: Parts) -> None:
    one = write_world(tmp_path, [("a", "a_dog_1", "val", 0, "The dog")], frames=1, seconds=0.1)
    with pytest.raises(DataError, match=r"1 clips: an exchange needs two.*Remedy"):
        _dataset((RefAvsIndex(one), *parts[1:]), "val", probe="shuffle_audio")
    with pytest.raises(ValueError, match="probe = 'mute'"):
        _dataset(parts, probe="mute")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_collate(parts: Parts, count: int) -> None:
    samples = [_dataset(parts, answer="class")[i] for i in range(count)]
    batch = collate(samples)
    assert isinstance(batch, Batch) and [s.row for s in batch.samples] == [s.row for s in samples]
    assert batch.pixel_values.shape == (count, 10, 3, 28, 28) and batch.fbank.shape == (count, 98, 16)
    assert batch.sam_pixels.shape == (count, 10, 3, 32, 32) and batch.mask_sizes == [(48, 64)] * count
    assert all(_same(a, b) for a, b in zip(samples, batch.samples, strict=True))
    memory = batch.pixel_values.untyped_storage().data_ptr()
    assert all(s.pixel_values.untyped_storage().data_ptr() == memory for s in batch.samples)
    assert batch.to("cpu", torch.bfloat16).pixel_values.dtype == torch.bfloat16


def test_collate_keeps_ragged_masks_and_refuses_unequal_stacks(tmp_path: Path, parts: Parts) -> None:
    rows = [(v, f"{v}_dog_1", "val", 0, "The dog " * n) for n, v in enumerate(("same", "tall", "few", "long"), 1)]
    write_metadata(tmp_path, rows)
    write_clip(tmp_path, "same", seconds=0.5)
    write_clip(tmp_path, "tall", seconds=0.5, size=(70, 50))
    write_clip(tmp_path, "few", seconds=0.5, frames=8)
    write_clip(tmp_path, "long", seconds=0.6)
    val = _dataset((RefAvsIndex(tmp_path), *parts[1:]), "val", answer="plain")
    same, tall, few, long = (val[i] for i in range(4))
    assert collate([same, tall]).mask_sizes == [(48, 64), (70, 50)]
    with pytest.raises(DataError, match=r"pixel_values: sample same_dog_1 .*few_dog_1 .*data\.num_frames"):
        collate([same, few])
    with pytest.raises(DataError, match=r"fbank: sample same_dog_1 .*long_dog_1 .*data\.audio_padding_seconds"):
        collate([same, long])
    with pytest.raises(DataError, match="an empty batch"):
        collate([])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(parts: Parts, workers: int) -> None:
    sources = ConcatDataset([_dataset(parts), _dataset(parts, "test_s")])
    loader = build_loader(sources, MixtureSampler([4, 3], seed=2), batch_size=2, workers=workers, seed=0)
    batches = list(islice(loader, 7))
    assert all(isinstance(b, Batch) for b in batches)
    rows = [s.row for b in batches for s in b.samples]
    assert sorted(rows[:7]) == sorted(rows[7:]) == [0, 1, 2, 3, 5, 6, 7]
    expected = list(islice(MixtureSampler([4, 3], seed=2), 14))
    assert all(_same(s, sources[i]) for s, i in zip((s for b in batches for s in b.samples), expected, strict=True))
    finite = build_loader(_dataset(parts), range(4), batch_size=3, workers=workers, seed=0)
    for _ in range(2):  # persistent workers serve a second pass
        assert [[s.row for s in b.samples] for b in finite] == [[0, 1, 2], [3]]


def test_a_worker_lost_while_it_hands_tensors_over_is_named(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversation with a killed worker may break before the worker counts as dead."""
    loader = build_loader(_dataset(parts), MixtureSampler([4], seed=2), batch_size=1, workers=1, seed=0)
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would tell of the death first
    try:
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - others
        time.sleep(1.0)  # it has decoded the next batches, and waits to hand them over
        monkeypatch.setattr(BaseProcess, "is_alive", lambda process: True)
        worker.kill()
        with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid {worker.pid}\) ended with status -9"):
            list(batches)
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGCHLD, handler)
