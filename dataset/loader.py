"""From a run's configuration to batches: the rows, their order, and the processes that decode them.

The order of samples is a pure function of (sizes, counts, seed, epoch), dealt to ranks and resumed by one counter. The
released loader draws a random row with replacement at every step and ignores the index it is asked for (AURORA
utils/sem_seg_dataset.py:460), so it has no epochs and cannot be resumed. Here every row comes exactly once per epoch,
over all ranks together.
"""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module

import cv2
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from configs.schema import DataConfig, RunConfig
from dataset.avsbench import AvsBenchIndex
from dataset.clips import ClipDataset, ClipSettings
from dataset.media import ClipIndex
from dataset.processor import AuroraProcessor, collate
from dataset.prompt import Prompts
from dataset.records import read_cot, read_reflective
from dataset.refavs import RefAvsIndex
from utils.errors import ConfigError, DataError, Problem
from utils.types import Batch, MediaFormat, Sample

_log = logging.getLogger("aurora.data")


# ---- from the configuration


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
        segmenter=config.model.segmenter,
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
    cot = read_cot(data.cot, index, too_long=data.incomplete_reasoning) if data.cot else {}
    if data.cot and data.incomplete_reasoning == "drop":
        complete = [row for row in rows if row.row in cot]
        _log.info("%d of %d rows have a reasoning, the others are left out", len(complete), len(rows))
        rows = complete
    if not rows:
        raise DataError(f"{data.root}: no row to train on. Remedy: see data.train_split, data.null_rows and data.cot.")
    distils = config.stage == "sft" and config.loss.distill > 0
    settings = ClipSettings(
        answer=data.answer,
        teacher_answer=config.sft.teacher_answer if distils else None,
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
    strangers = sorted(paths.keys() - {row.row for row in chosen})
    if strangers:
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


# ---- the order of samples


def mixture_members(sizes: Sequence[int], counts: Sequence[int | None], seed: int) -> torch.Tensor:
    """Which samples a mixture holds: `counts[s]` of the `sizes[s]` samples of source s, drawn once by the seed.

    Paper section 4.1: 1,505 reflective paths are mixed with 3,500 standard ones; the set is fixed before training.

    Args:
        sizes: samples of each source.
        counts: samples wanted of each source; None = all.
        seed: of the draw.

    Returns:
        int64 [sum of counts], ascending indexes into the sources joined (torch's ConcatDataset).

    Raises:
        ValueError: more wanted than there are.
    """
    members, offset = [], 0
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        wanted = size if count is None else count
        if not 0 <= wanted <= size:
            raise ValueError(
                f"source {source}: {wanted} samples wanted of {size}. "
                "Remedy: lower the count, or give a longer reasoning file."
            )
        drawn = torch.randperm(size, generator=_generator(seed, -1, source))[:wanted]
        members.append(drawn.sort().values + offset)
        offset += size
    return torch.cat(members)


class MixtureSampler(Sampler[int]):
    """An endless stream of indexes, epoch after epoch, for one rank.

    The stream of all ranks together is epoch 0 shuffled, then epoch 1 shuffled, and so on; rank r takes its positions
    r, r + world, ... Epochs need not be multiples of the world size, and nothing is repeated or left out.

    Args:
        sizes: samples of each source, in the order of the ConcatDataset.
        seed: of the draw and of all shuffles.
        counts: samples wanted of each source (None = all), see `mixture_members`.
        rank, world: this process and the number of processes.
        consumed: samples already used by all ranks together (steps x samples per step); a run may be resumed on another
            number of ranks.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        counts: Sequence[int | None] | None = None,
        rank: int = 0,
        world: int = 1,
        consumed: int = 0,
    ) -> None:
        if not 0 <= rank < world or consumed < 0:
            rule = "a rank is 0..world-1, and consumed is not negative"
            raise ValueError(f"rank = {rank}, world = {world}, consumed = {consumed}: {rule}.")
        self.members = mixture_members(sizes, counts or [None] * len(sizes), seed)
        if len(self.members) == 0:
            raise ValueError("the mixture holds no sample. Remedy: raise a count, or choose another split.")
        self.seed, self.rank, self.world, self.consumed = seed, rank, world, consumed

    def epoch_order(self, epoch: int) -> torch.Tensor:
        """int64 [samples of an epoch]: all members, shuffled for that epoch."""
        return self.members[torch.randperm(len(self.members), generator=_generator(self.seed, epoch))]

    def __iter__(self) -> Iterator[int]:
        position = self.consumed + self.rank
        while True:
            epoch, start = divmod(position, len(self.members))
            for index in self.epoch_order(epoch)[start :: self.world].tolist():
                yield index
                position += self.world


def _generator(seed: int, epoch: int, source: int = 0) -> torch.Generator:
    """A generator of its own for every (seed, epoch, source); epoch -1 is the draw of members."""
    mixed = (seed * 1_000_003 + epoch + 1) * 1_009 + source
    return torch.Generator().manual_seed(mixed % (1 << 63))


# ---- decoding processes


def build_loader(
    dataset: Dataset[Sample], sampler: Iterable[int], batch_size: int, workers: int, seed: int
) -> DataLoader[Sample]:
    """A loader of `Batch`es whose order is the sampler's alone.

    Args:
        dataset: gives samples.
        sampler: indexes of this rank (a MixtureSampler, or a list).
        batch_size: samples per batch; the last batch of a finite sampler may be smaller.
        workers: decoding processes, kept between epochs; 0 = decode in this process.
        seed: of the workers' generators (samples do not draw from them).
    """
    if workers > 0:
        atexit.register(end_workers)
        import_module("librosa.core.audio")  # loaded at first use: once here, not once in every forked worker
    return ClipLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_init_patient_worker,
        generator=torch.Generator().manual_seed(seed),
    )


class ClipLoader(DataLoader):
    """A DataLoader that names a lost worker, however its loss shows.

    Tensors arrive as open files that the worker hands over when they are read. One that dies in between breaks that
    conversation before it counts as dead, and a bare EOFError or ConnectionError would end the run.
    """

    def __iter__(self) -> Iterator[Batch]:
        batches, workers = super().__iter__(), multiprocessing.active_children()
        try:
            yield from batches
        except (EOFError, ConnectionError) as error:
            for worker in workers:
                worker.join(1.0)
                if worker.exitcode is not None:
                    ended = f"DataLoader worker (pid {worker.pid}) ended with status {worker.exitcode}."
                    raise RuntimeError(ended) from error
            raise


def init_worker(worker: int) -> None:
    """One thread per worker: more would contend for the cores that the ranks share."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _init_patient_worker(worker: int) -> None:
    """SIGTERM is left to the process that trains or evaluates, and `end_workers` ends this one.

    A scheduler sends it to all, and a worker that died of it would end the run before it has saved.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()  # else a collection writes to all that is shared with the parent, and so copies it
    init_worker(worker)


def end_workers() -> None:
    """End this process's decoding processes; called when it exits.

    multiprocessing would send SIGTERM then, which they ignore, and wait for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call a killed worker an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
