"""The local backend with the real Qwen2.5-Omni classes, tiny and random."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset.annotate.backend import Request, choose_frames
from dataset.annotate.transformers_backend import TransformersBackend
from dataset.refavs import RefAvsIndex
from tests.data_builders import write_world
from tests.omni_case import write_tiny_omni
from utils.errors import WeightsError


@pytest.mark.smoke
def test_a_random_omni_answers_in_batches(tmp_path: Path) -> None:
    """Each request alone gets the answer that it gets in a padded batch (greedy)."""
    world = write_world(tmp_path / "w", [("c_0_10000", "c_0_10000_dog_1", "train", 0, "x")], size=(56, 56), seconds=1.0)
    index = RefAvsIndex(world)
    row = index.rows("train")[0]
    media = choose_frames(index, row.clip, (0, 4, 9)), index.audio_path(row.clip)
    requests = [Request(row, prompt, *media) for prompt in ("The object", "The object on the left of the cello")]
    backend = TransformersBackend(write_tiny_omni(tmp_path / "m"), 2, "cpu", max_tokens=4, temperature=0.0)
    together = backend.answer(requests)
    assert together == [backend.answer([request])[0] for request in requests]
    assert all(reply.tokens_out == 4 and reply.tokens_in > 20 for reply in together)
    assert together[0].tokens_in < together[1].tokens_in


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no Qwen2.5-Omni"):
        TransformersBackend(tmp_path)
