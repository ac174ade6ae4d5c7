"""Lists and maps that workers share: equal to the plain ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.packed import Packed, PackedMap
from tests.test_annotate import row


def test_rows_come_back_equal() -> None:
    rows = [row(i, kind="audio", truth={"things": [["red", "cup"]]}) for i in range(5)]
    packed = Packed(rows)
    assert list(packed) == rows and len(packed) == 5 and packed[-1] == rows[-1] and rows[2] in packed
    for number in (5, -6):
        with pytest.raises(IndexError, match="of 5"):
            packed[number]
    assert list(Packed([])) == []


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.integers(0, 1 << 40), st.text()), st.integers(0, 1 << 40))
def test_maps_answer_as_dictionaries_do(items: dict[int, str], other: int) -> None:
    packed = PackedMap(items)
    assert len(packed) == len(items)
    for key in (*items, other):
        assert packed.get(key) == items.get(key) and (key in packed) == (key in items)
