"""The order of samples: a pure function of (sizes, counts, seed, epoch), dealt to ranks and resumed by one counter.

The published loader draws a random row with replacement at every step and ignores the index it is asked for (AURORA
utils/sem_seg_dataset.py:460), so it has no epochs and cannot be resumed. Here every row comes exactly once per epoch,
over all ranks together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


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
        ValueError: lists of unequal length, or more wanted than there are.
    """
    if len(sizes) != len(counts) or not sizes:
        raise ValueError(f"{len(sizes)} sources, {len(counts)} counts: must be equally many, at least one.")
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
        counts: samples wanted of each source (None = all), see `mixture_members`.
        seed: of the draw and of all shuffles.
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
        if not 0 <= rank < world:
            raise ValueError(f"rank = {rank}, world = {world}: a rank is 0..world-1.")
        if consumed < 0:
            raise ValueError(f"consumed = {consumed}: must not be negative.")
        self.members = mixture_members(sizes, counts or [None] * len(sizes), seed)
        if len(self.members) == 0:
            raise ValueError("the mixture holds no sample. Remedy: raise a count, or choose another split.")
        self.seed, self.rank, self.world, self.consumed = seed, rank, world, consumed

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch, over all ranks."""
        return len(self.members)

    def epoch_order(self, epoch: int) -> torch.Tensor:
        """int64 [epoch_length]: all members, shuffled for that epoch."""
        return self.members[torch.randperm(len(self.members), generator=_generator(self.seed, epoch))]

    def __iter__(self) -> Iterator[int]:
        position = self.consumed + self.rank
        while True:
            epoch, start = divmod(position, self.epoch_length)
            for index in self.epoch_order(epoch)[start :: self.world].tolist():
                yield index
                position += self.world


def shard(size: int, rank: int, world: int) -> list[int]:
    """Indexes rank, rank + world, ... below `size`: evaluation sees every sample once, without padding.

    (A DistributedSampler repeats samples to even out the ranks, which falsifies the means.)
    """
    return list(range(rank, size, world))


def _generator(seed: int, epoch: int, source: int = 0) -> torch.Generator:
    """A generator of its own for every (seed, epoch, source); epoch -1 is the draw of members."""
    mixed = (seed * 1_000_003 + epoch + 1) * 1_009 + source
    return torch.Generator().manual_seed(mixed % (1 << 63))
