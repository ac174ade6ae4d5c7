"""The order of samples: every one once an epoch over the ranks, mixtures, resuming."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from dataset.loader import MixtureSampler, mixture_members


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_per_epoch_over_the_ranks(world: int) -> None:
    samplers = [MixtureSampler([7, 4], seed=5, rank=r, world=world) for r in range(world)]
    streams = [iter(s) for s in samplers]
    dealt = [next(streams[n % world]) for n in range(33)]  # three epochs of 11, which no world here divides but 1
    for epoch in range(3):
        assert sorted(dealt[11 * epoch : 11 * (epoch + 1)]) == list(range(11))
        assert dealt[11 * epoch : 11 * (epoch + 1)] == samplers[0].epoch_order(epoch).tolist()
    assert dealt[:11] != dealt[11:22]


@pytest.mark.parametrize("consumed", [0, 1, 6, 11, 24])
def test_order_resumes_from_the_counter(consumed: int) -> None:
    whole = list(islice(MixtureSampler([11], seed=5), 60))
    for world in (1, 2):  # a run may be resumed on another number of ranks
        streams = [iter(MixtureSampler([11], seed=5, rank=r, world=world, consumed=consumed)) for r in range(world)]
        assert [next(streams[n % world]) for n in range(30)] == whole[consumed : consumed + 30]
    assert whole[:11] != list(islice(MixtureSampler([11], seed=6), 11))


def test_mixture_by_counts() -> None:
    members = mixture_members([1505, 14113], [None, 3500], seed=0)
    assert len(members) == len(set(members.tolist())) == 5005
    assert members[:1505].tolist() == list(range(1505)) and 1505 <= members[1505] and members[-1] < 1505 + 14113
    assert members.equal(mixture_members([1505, 14113], [None, 3500], seed=0))
    assert not members.equal(mixture_members([1505, 14113], [None, 3500], seed=1))
    counts = Counter(i >= 1505 for i in islice(MixtureSampler([1505, 14113], seed=0, counts=[None, 3500]), 2 * 5005))
    assert counts == {False: 2 * 1505, True: 2 * 3500}
    with pytest.raises(ValueError, match=r"source 1: 9 samples wanted of 4.*Remedy"):
        MixtureSampler([3, 4], seed=0, counts=[None, 9])
    with pytest.raises(ValueError, match="holds no sample"):
        MixtureSampler([0], seed=0)
    for options in ({"rank": 2, "world": 2}, {"consumed": -1}):
        with pytest.raises(ValueError, match=r"rank = \d, world = \d, consumed = -?\d: a rank is"):
            MixtureSampler([3], seed=0, **options)
