"""Lists and maps of many small objects that worker processes share without copying them.

A forked worker shares its parent's memory until one of the two writes to it, and Python writes to every object it
touches (its reference count). Over an epoch each worker would so come to own a copy of all rows. Pickled into one
block, they are only ever read.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Packed(Sequence[T]):
    """A list in one block; each access makes a new object, equal to the one that was packed."""

    def __init__(self, items: Iterable[T]) -> None:
        blobs = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = np.cumsum([len(blob) for blob in blobs], dtype=np.int64)
        self._block = np.frombuffer(b"".join(blobs), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> T:
        """Item i; a slice is refused (TypeError)."""
        number = i.__index__()
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        number %= len(self)
        start = self._ends[number - 1] if number else 0
        return pickle.loads(self._block[start : self._ends[number]].data)


class PackedMap(Generic[T]):
    """A map from whole numbers, packed likewise."""

    def __init__(self, items: Mapping[int, T]) -> None:
        self._keys = np.array(sorted(items), dtype=np.int64)
        self._values = Packed(items[key] for key in self._keys.tolist())

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: int) -> bool:
        return self._place(key) is not None

    def get(self, key: int) -> T | None:
        """The value of a key, or None."""
        place = self._place(key)
        return None if place is None else self._values[place]

    def _place(self, key: int) -> int | None:
        place = int(np.searchsorted(self._keys, key))
        return place if place < len(self._keys) and self._keys[place] == key else None
