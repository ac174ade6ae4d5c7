"""Samples -> one `Batch`, and the loader that makes batches in worker processes."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.errors import DataError
from utils.types import Batch, Sample

_STACKED = {
    "pixel_values": "frames for the vision tower; clips of a batch need the same number of frames (data.num_frames)",
    "sam_pixels": "frames for SAM; clips of a batch need the same number of frames (data.num_frames)",
    "fbank": "sounds; clips of a batch need the same length (data.audio_padding_seconds)",
}
_LISTED = ("masks", "prompt_ids", "answer_ids", "teacher_ids")


@dataclass
class LoadedBatch(Batch):
    """A batch as the loader hands it out: knows how to pin its tensors for a quick copy to CUDA."""

    def pin_memory(self) -> LoadedBatch:
        """Called by the loader's pinning thread."""
        return replace(
            self,
            pixel_values=self.pixel_values.pin_memory(),
            sam_pixels=self.sam_pixels.pin_memory(),
            fbank=self.fbank.pin_memory(),
            masks=[m.pin_memory() for m in self.masks],
        )


def collate(samples: Sequence[Sample]) -> LoadedBatch:
    """Stack what must be equal, keep lists of what may differ (text lengths, native mask sizes).

    The samples share the batch's memory, and lists of tensors share one block each: nothing crosses a process boundary
    twice, and a batch takes seven open files there, however many samples it holds.

    Raises:
        DataError: no sample, or unequal frame counts, pixel sizes or sound lengths; names the samples.
    """
    if not samples:
        raise DataError("an empty batch. Remedy: choose rows that exist.")
    pixel_values, sam_pixels, fbank = (_stack(samples, name) for name in _STACKED)
    for sample in samples:
        if len(sample.masks) != len(sample.pixel_values):
            raise DataError(
                f"sample {sample.uid} (row {sample.row}): {len(sample.masks)} masks, "
                f"{len(sample.pixel_values)} frames; each frame has one mask. Remedy: restore the clip."
            )
    fields = {"pixel_values": pixel_values, "sam_pixels": sam_pixels, "fbank": fbank}
    fields |= {name: _joined([getattr(s, name) for s in samples]) for name in _LISTED}
    shared = [replace(s, **{name: field[i] for name, field in fields.items()}) for i, s in enumerate(samples)]
    return LoadedBatch(shared, pixel_values, sam_pixels, fbank, [s.masks for s in shared])


def build_loader(
    dataset: Dataset[Sample], sampler: Iterable[int], batch_size: int, workers: int, seed: int
) -> DataLoader[Sample]:
    """A loader of `Batch`es whose order is the sampler's alone.

    Args:
        dataset: gives samples.
        sampler: indexes of this rank (MixtureSampler, or a list from `shard`).
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
        return _named_losses(super().__iter__(), multiprocessing.active_children())


def _named_losses(batches: Iterator[Batch], workers: Sequence[multiprocessing.Process]) -> Iterator[Batch]:
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


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors as views of one block."""
    flat = torch.cat([t.flatten() for t in tensors]).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(flat, tensors, strict=True)]


def _stack(samples: Sequence[Sample], name: str) -> Tensor:
    tensors = [getattr(s, name) for s in samples]
    for sample, tensor in zip(samples, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise DataError(
                f"{name}: sample {samples[0].uid} (row {samples[0].row}) has {list(tensors[0].shape)}, "
                f"{sample.uid} (row {sample.row}) has {list(tensor.shape)}: {_STACKED[name]}. "
                "Remedy: set that option, or a batch of 1."
            )
    return torch.stack(tensors)
