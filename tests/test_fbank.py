"""The filter bank against Kaldi's torch port (stored results) and against a loop in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset.fbank import LOG_FLOOR, frame_count, kaldi_fbank, layout_clips

TINY = Path(__file__).parent / "fixtures" / "videollama2_av_tiny"
SECOND = 16_000


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    with np.load(TINY / "inputs.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in ("wav_2s", "wav_10s")}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    with np.load(TINY / "expected.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in file.files if k.startswith("fbank")}


def test_parity_short(inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    found = kaldi_fbank(inputs["wav_2s"])
    assert found.shape == (198, 128) and found.dtype == torch.float32
    # bit-equal with the torch build of the fixture's run; another FFT may round differently
    torch.testing.assert_close(found, expected["fbank_short"][0], atol=1e-3, rtol=0)
    assert (found - expected["fbank_short"][0]).abs().mean() < 1e-5


def test_parity_30_s(inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    found = kaldi_fbank(inputs["wav_10s"], samples=30 * SECOND)
    assert found.shape == (2998, 128)
    torch.testing.assert_close(found[:40], expected["fbank_30s_head"][0], atol=1e-3, rtol=0)
    torch.testing.assert_close(found[985:1010], expected["fbank_30s_boundary"][0], atol=2e-3, rtol=0)
    mean, std, low, high = expected["fbank_30s_stats"].tolist()
    assert math.isclose(found.double().mean(), mean, abs_tol=1e-4) and math.isclose(
        found.double().std(), std, abs_tol=1e-4
    )
    assert low == high and (found[1500:] == LOG_FLOOR).all() and math.isclose(low, LOG_FLOOR, abs_tol=1e-5)


@pytest.mark.parametrize("length", [400, 401, 7999, 16_000])
def test_filled_padding_equals_computed_padding(inputs: dict[str, Tensor], length: int) -> None:
    wave = inputs["wav_2s"][:length]
    computed = kaldi_fbank(torch.nn.functional.pad(wave, (0, 2 * SECOND - length)))
    torch.testing.assert_close(kaldi_fbank(wave, samples=2 * SECOND), computed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mel_bins", [20, 32, 128])
def test_against_a_loop_in_float64(inputs: dict[str, Tensor], mel_bins: int) -> None:
    wave = inputs["wav_2s"][:1200]
    found = kaldi_fbank(wave, mel_bins)
    assert found.shape == (frame_count(1200), mel_bins)
    for frame in range(len(found)):
        expected = _loop(wave[160 * frame : 160 * frame + 400].double().tolist(), mel_bins)
        np.testing.assert_allclose(found[frame].numpy(), expected, atol=5e-3)


def _loop(samples: list[float], mel_bins: int) -> list[float]:
    """One frame, written out: DC removal, pre-emphasis, window, power spectrum, triangles, logarithm."""

    def mel(hertz: float) -> float:
        return 1127 * math.log(1 + hertz / 700)

    x = [s * 32768 for s in samples]
    mean = sum(x) / 400
    x = [s - mean for s in x]
    x = [x[n] - 0.97 * x[max(n - 1, 0)] for n in range(400)]
    x = [s * (0.5 - 0.5 * math.cos(2 * math.pi * n / 399)) ** 0.85 for n, s in enumerate(x)]
    power = np.abs(np.fft.fft(x, 512)) ** 2
    step = (mel(8000) - mel(20)) / (mel_bins + 1)
    energies = []
    for k in range(mel_bins):
        left = mel(20) + k * step
        energy = 0.0
        for n in range(256):
            at = mel(n * 31.25)
            energy += max(0.0, min((at - left) / step, (left + 2 * step - at) / step)) * power[n]
        energies.append(math.log(max(energy, 2.0**-23)))
    return energies


@pytest.mark.parametrize(
    ("wave", "words"),
    [
        (torch.zeros(399), "one window needs 400"),
        (torch.zeros(2, 400), r"must be float32 \[samples\]"),
        (torch.zeros(400, dtype=torch.float64), "must be float32"),
        (torch.zeros(900), "padded length 800"),
    ],
)
def test_bad_waves(wave: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kaldi_fbank(wave, samples=800 if len(wave) == 900 else None)


def test_silence_is_the_floor() -> None:
    assert (kaldi_fbank(torch.zeros(1000), 32) == LOG_FLOOR).all()


def test_ten_windows_tile_ten_seconds() -> None:
    wave = torch.arange(10 * SECOND, dtype=torch.float32)
    torch.testing.assert_close(layout_clips(wave), wave, atol=0, rtol=0)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 4.7, 9.999, 10.001, 25.0])
def test_windows_start_where_the_published_sampler_starts(seconds: float) -> None:
    count = round(seconds * SECOND)
    wave = torch.arange(count, dtype=torch.float32)
    parts = []
    for k in range(10):  # pytorchvideo's ConstantClipsPerVideoSampler(clip_duration=1, clips_per_video=10)
        start = int(k * max(count - SECOND, 0) / 9)
        parts.append(wave[start : start + SECOND])
    torch.testing.assert_close(layout_clips(wave), torch.cat(parts), atol=0, rtol=0)
