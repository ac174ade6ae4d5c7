"""From a run's configuration to preprocessing, clips and batches; the sizes of the model come as plain numbers."""

from __future__ import annotations

import logging

from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from configs.schema import DataConfig, RunConfig
from dataset.avsbench import AvsBenchIndex
from dataset.clips import ClipDataset, ClipSettings
from dataset.collate import build_loader
from dataset.cot import read_cot, rows_with_reasoning
from dataset.mixture import MixtureSampler
from dataset.processor import AuroraProcessor
from dataset.prompt import Prompts
from dataset.refavs import RefAvsIndex
from dataset.reflective import read_reflective
from dataset.truth import ClipIndex
from utils.errors import ConfigError, DataError, Problem
from utils.types import MediaFormat, Sample

_log = logging.getLogger("aurora.data")


def build_processor(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, media: MediaFormat
) -> AuroraProcessor:
    """Preprocessing of a run.

    Args:
        config: the run; gives SAM's input size and the sections of frames and sound.
        tokenizer: of the base.
        media: what the base reads (`Backbone.media_format`).

    Raises:
        ConfigError: data.frame_size or data.audio_padding_seconds do not suit the base.
    """
    side, step = config.data.frame_size or media.frame_size, media.frame_step
    problems = []
    if side % step if step else side != media.frame_size:
        rule = f"this base takes frames of {f'any multiple of {step}' if step else media.frame_size} pixels"
        problems.append(Problem("data.frame_size", side, rule, f"set it to null ({media.frame_size}) or such a size"))
    padding = config.data.audio_padding_seconds
    if media.sound == "log_mel" and padding is not None:
        rule = "this base places frames in time by the length of the sound, which silence behind it would stretch"
        problems.append(Problem("data.audio_padding_seconds", padding, rule, "set it to null"))
    if problems:
        raise ConfigError(problems)
    return AuroraProcessor(
        tokenizer,
        side,
        config.model.sam_image_size,
        media.mel_bins,
        config.data.audio_padding_seconds,
        config.data.frame_resize,
        # The ten windows of the released code belong to VideoLLaMA2; elsewhere the whole sound is heard.
        audio_windows=10 if media.sound == "fbank" else None,
        system_prompt=config.model.system_prompt,
        seg_token=config.model.seg_token,
        frame_mean=media.frame_mean,
        frame_std=media.frame_std,
        sound=media.sound,
    )


def build_index(data: DataConfig) -> ClipIndex:
    """The rows and files of `data.benchmark` below `data.root`.

    Raises:
        DataError: its table is missing or faulty.
    """
    if data.benchmark == "refavs":
        return RefAvsIndex(data.root)
    return AvsBenchIndex(data.root, "s4" if data.benchmark == "avsbench_s4" else "ms3")


def training_clips(
    config: RunConfig, processor: AuroraProcessor, prompts: Prompts
) -> ClipDataset | ConcatDataset[Sample]:
    """The clips of the training split with their target answers, and the teacher's where the run distils.

    Stage reflective trains on two sources: the reflective paths, then the standard ones.

    Where `data.cot` lists records, rows without a usable one are an error or left out, as `data.incomplete_reasoning`
    says, whatever the answer holds: runs with and without reasoning (paper Table 2) are trained on the same rows.

    Raises:
        DataError: metadata or reasoning files are faulty, or no row is left.
    """
    data = config.data
    index = build_index(data)
    rows = [row for row in index.rows(data.train_split) if data.null_rows or not row.is_null]
    cot = {}
    distils = config.stage == "sft" and config.loss.distill > 0
    teacher_answer = config.sft.teacher_answer if distils else None
    if data.cot:
        cot = read_cot(data.cot, index, too_long=data.incomplete_reasoning)
        if data.incomplete_reasoning == "drop":
            complete = rows_with_reasoning(rows, cot)
            _log.info("%d of %d rows have a reasoning, the others are left out", len(complete), len(rows))
            rows = complete
    if not rows:
        raise DataError(f"{data.root}: no row to train on. Remedy: see data.train_split, data.null_rows and data.cot.")
    settings = ClipSettings(
        answer=data.answer,
        teacher_answer=teacher_answer,
        num_frames=data.num_frames,
        max_image_pixels=data.max_image_pixels,
        max_audio_seconds=data.max_audio_seconds,
        seed=config.seed,
    )
    standard = ClipDataset(index, rows, processor, prompts, cot, settings)
    if config.stage != "reflective":
        return standard
    options = config.reflective
    paths = read_reflective(options.paths, index, options.target, options.loss_on)
    chosen = [row for row in index.rows(data.train_split) if row.row in paths]
    if len(chosen) < len(paths):
        strangers = sorted(paths.keys() - {row.row for row in chosen})
        raise DataError(
            f"{', '.join(options.paths)}: row {strangers[0]} is not in split {data.train_split}. "
            "Remedy: mine and correct the training split alone."
        )
    return ConcatDataset([ClipDataset(index, chosen, processor, prompts, paths, settings), standard])


def training_batches(
    config: RunConfig, clips: Dataset[Sample], rank: int = 0, world: int = 1, consumed: int = 0
) -> DataLoader[Sample]:
    """An endless loader of this process's batches.

    Args:
        clips: from `training_clips`; two joined sources are mixed as `reflective.*_count` say.
        consumed: samples that all processes together have used already (a resumed run).

    Raises:
        DataError: more records are wanted of a source than it has.
    """
    sizes, counts = [len(clips)], [None]
    if isinstance(clips, ConcatDataset):
        sizes = [len(source) for source in clips.datasets]
        counts = [config.reflective.reflective_count, config.reflective.standard_count]
        for name, size, count in zip(("reflective_count", "standard_count"), sizes, counts, strict=True):
            if count is not None and count > size:
                raise DataError(f"reflective.{name} = {count}, but there are {size} records. Remedy: lower it.")
    order = MixtureSampler(sizes, config.seed, counts, rank, world, consumed)
    return build_loader(clips, order, config.engine.micro_batch, config.data.num_workers, config.seed)
