"""Kaldi's log-mel filter bank, as the audio tower was trained on it, and how a clip's sound is laid out before.

Equal to `torchaudio.compliance.kaldi.fbank(wave * 2**15, num_mel_bins, sample_frequency=16000, frame_length=25,
frame_shift=10)` (bit-equal on the parity fixture), without needing torchaudio. Everything is float32: the released
code rounds the result to bfloat16 before it is normalised (AURORA utils/sem_seg_dataset.py:220), up to 0.03 off.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

SAMPLE_RATE = 16_000
WINDOW = 400
"""Samples of a frame: 25 ms."""
SHIFT = 160
"""Samples from frame to frame: 10 ms."""
_FFT = 512
_LOW_HZ, _HIGH_HZ = 20.0, 8000.0
_PREEMPHASIS = 0.97
_BLOCK = 256
"""Frames computed at a time: the intermediates of a block stay in the cache (a 10-s clip at once is twice as slow)."""
_PCM_SCALE = 32768.0
"""Kaldi expects the range of 16-bit integers."""
LOG_FLOOR = math.log(torch.finfo(torch.float32).eps)
"""-15.94: the value of digital silence in every mel bin."""


def frame_count(samples: int) -> int:
    """Frames of a sound: windows that fit wholly (Kaldi's snip_edges)."""
    return 0 if samples < WINDOW else 1 + (samples - WINDOW) // SHIFT


def kaldi_fbank(wave: Tensor, mel_bins: int = 128, samples: int | None = None) -> Tensor:
    """Log-mel energies of a mono sound.

    Args:
        wave: float32 [samples] in about [-1, 1], 16 kHz.
        mel_bins: K; triangles equally wide on the mel scale from 20 to 8000 Hz.
        samples: length to which the sound is padded with zeros at its end; None = as it is. Frames that lie wholly in
            the padding are filled in, not computed: their value is LOG_FLOOR.

    Returns:
        float32 [F,K], natural logarithm of the power, not normalised (the audio tower applies mean and std).

    Raises:
        ValueError: not one-dimensional float32, shorter than one window, or longer than `samples`.
    """
    if wave.ndim != 1 or wave.dtype != torch.float32:
        raise ValueError(f"wave: {wave.dtype} {list(wave.shape)}; must be float32 [samples]. Remedy: average channels.")
    total = len(wave) if samples is None else samples
    if len(wave) > total:
        raise ValueError(f"wave: {len(wave)} samples, padded length {total}. Remedy: raise the padded length.")
    frames = frame_count(total)
    if frames == 0:
        raise ValueError(f"wave: {total} samples; one window needs {WINDOW}. Remedy: use a longer sound.")
    sounding = min(frames, math.ceil(len(wave) / SHIFT))
    missing = max(0, (sounding - 1) * SHIFT + WINDOW - len(wave))
    energies = _log_mel(torch.nn.functional.pad(wave, (0, missing)), sounding, mel_bins)
    return torch.nn.functional.pad(energies, (0, 0, 0, frames - sounding), value=LOG_FLOOR)


def whisper_log_mel(wave: Tensor, mel_bins: int = 128) -> Tensor:
    """Whisper's log-mel spectrogram of a mono sound, as Qwen2.5-Omni hears it.

    Equal to the valid frames of transformers' `WhisperFeatureExtractor` whatever length that pads to: a frame of 10 ms
    for every 160 samples begun, 80 dB below the loudest cut off, about [-1, 1.5].

    Args:
        wave: float32 [samples] in about [-1, 1], 16 kHz.
        mel_bins: K; Slaney's triangles from 0 to 8000 Hz.

    Returns:
        float32 [F,K]

    Raises:
        ValueError: not one-dimensional float32, or shorter than one window.
    """
    if wave.ndim != 1 or wave.dtype != torch.float32 or len(wave) < WINDOW:
        raise ValueError(f"wave: {wave.dtype} {list(wave.shape)}; must be float32 [samples], {WINDOW} or more.")
    # The last frames see the silence that the extractor pads with, not the sound mirrored at its end.
    padded = torch.nn.functional.pad(wave, (0, WINDOW))
    spectrum = torch.stft(padded, WINDOW, SHIFT, window=torch.hann_window(WINDOW), return_complex=True)
    log = (_slaney(mel_bins).T @ (spectrum.abs() ** 2)).clamp(min=1e-10).log10()
    log = (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0
    return log[:, : math.ceil(len(wave) / SHIFT)].T.contiguous()


@lru_cache(maxsize=4)
def _slaney(mel_bins: int) -> Tensor:
    """float32 [201,K]"""
    filters = mel_filter_bank(1 + WINDOW // 2, mel_bins, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()


def layout_clips(wave: Tensor, windows: int = 10, seconds: float = 1.0, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Evenly spaced windows of a sound, joined (AURORA utils/sem_seg_dataset.py:191-210).

    Ten 1-s windows tile a 10-s clip exactly; a shorter clip is read with overlaps, a longer one with gaps.

    Args:
        wave: [samples].
        windows: number of windows.
        seconds: length of a window; a sound shorter than one window is taken whole each time.

    Returns:
        [windows * length], a view of `wave` where the windows tile it.
    """
    length = round(seconds * sample_rate)
    spare = max(len(wave) - length, 0)
    if windows * length == len(wave):
        return wave
    # the released start times are exact fractions, cut down to samples: whole-number arithmetic says the same
    starts = [spare * k // max(windows - 1, 1) for k in range(windows)]
    return torch.cat([wave[s : s + length] for s in starts])


def _log_mel(wave: Tensor, frames: int, mel_bins: int) -> Tensor:
    windows, window, filters = wave.unfold(0, WINDOW, SHIFT), _window(), _mel_filters(mel_bins)
    energies = torch.empty(frames, mel_bins)
    for start in range(0, frames, _BLOCK):
        stop = min(start + _BLOCK, frames)
        x = windows[start:stop] * _PCM_SCALE
        x -= x.mean(dim=1, keepdim=True)
        # product before difference, and |z| before its square, as Kaldi's torch port rounds them: bit-equal energies
        emphasised = x.clone()
        emphasised[:, 1:] -= x[:, :-1] * _PREEMPHASIS
        emphasised[:, 0] -= x[:, 0] * _PREEMPHASIS  # the first sample is repeated to its left
        power = torch.fft.rfft(emphasised.mul_(window), n=_FFT).abs().square_()
        torch.mm(power, filters, out=energies[start:stop])
    return energies.clamp_min_(torch.finfo(torch.float32).eps).log_()


@lru_cache(maxsize=1)
def _window() -> Tensor:
    """Povey's window: a symmetric Hann window to the power 0.85."""
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float32).pow(0.85)


@lru_cache(maxsize=8)
def _mel_filters(mel_bins: int) -> Tensor:
    """float32 [257,K]: triangles on the mel scale; the Nyquist bin belongs to none."""
    low, high = _mel(_LOW_HZ), _mel(_HIGH_HZ)
    step = (high - low) / (mel_bins + 1)
    number = torch.arange(mel_bins, dtype=torch.float32)
    left, centre, right = (low + (number + k) * step for k in (0.0, 1.0, 2.0))
    hertz = SAMPLE_RATE / _FFT * torch.arange(_FFT // 2, dtype=torch.float32)
    mel = (1127.0 * (1.0 + hertz / 700.0).log()).unsqueeze(1)
    triangles = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp_min_(0.0)
    return torch.nn.functional.pad(triangles, (0, 0, 0, 1))


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)
