"""One video file with its sound, or a folder of frames with a wav -> what the model reads of a clip.

A clip is read as the benchmark's are: T frames at equal distances from its beginning (ten of a ten-second clip: one a
second) and mono sound at 16 kHz. decord decodes the frames, PyAV the sound: of stereo tracks (AAC, Opus and MP3 were
tried) decord 0.6 gives NaN, and its mono is louder by the square root of 2 than the channels' mean, which the model
knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import decord
import numpy as np

from dataset.media import SAMPLE_RATE, read_audio, read_frames, resampled
from utils.errors import DataError

FRAMES = 10
"""Frames of a clip (Ref-AVS: ten seconds, one frame a second)."""
MIN_SECONDS = 1.0
"""The audio tower reads windows of one second."""


@dataclass(frozen=True)
class VideoClip:
    """What the model sees and hears."""

    frames: np.ndarray
    """uint8 [T,H,W,3] RGB."""
    times: tuple[float, ...]
    """Second of the clip at which each frame is shown."""
    seconds: float
    sound: np.ndarray | None
    """float32 [samples] mono at SAMPLE_RATE; None where there is none."""


@dataclass(frozen=True)
class Streams:
    """What a video file holds."""

    video: str
    """Name of the codec."""
    audio: str | None


def read_clip(path: Path, frames: int = FRAMES, max_pixels: int | None = None, max_seconds: float | None = None,
              with_sound: bool = True) -> VideoClip:  # fmt: skip
    """A video file, or a folder of numbered frames (or with `frames/` in it) and `audio.wav`.

    Args:
        path: of the file or folder.
        frames: T of a video file, at equal distances; a folder is read whole.
        max_pixels: larger frames are refused.
        max_seconds: longer videos are refused.
        with_sound: False leaves the sound unread.

    Raises:
        DataError: no such path, no video stream, a codec that cannot be decoded, less than MIN_SECONDS, fewer than
            `frames` frames, broken files.
    """
    if path.is_dir():
        return _read_folder(path, max_pixels, max_seconds, with_sound)
    streams = probe(path)  # asked first: a missing stream and a codec that cannot be decoded are told apart
    try:
        # one thread: decord's pool can deadlock in a forked worker (VideoLLaMA2 mm_utils.py, same note)
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        total, rate = len(reader), float(reader.get_avg_fps())
        seconds = total / rate if rate > 0 else 0.0
        height, width = reader[0].shape[:2] if total else (0, 0)
        for broken, rule in (
            (seconds < MIN_SECONDS,
             f"{seconds:.2f} s; the model reads windows of one second. Remedy: use a clip of a second or more."),
            (max_seconds is not None and seconds > max_seconds,
             f"{seconds:.1f} s, limit {max_seconds} s. Remedy: cut it."),
            (total < frames, f"{total} frames, {frames} wanted. Remedy: ask for fewer frames."),
            (max_pixels is not None and height * width > max_pixels,
             f"{width}x{height} pixels, limit {max_pixels}. Remedy: scale it down."),
        ):  # fmt: skip
            if broken:
                raise DataError(f"{path}: {rule}")
        found = np.stack([_without_padding(reader[int(k * total / frames + 1e-6)].asnumpy()) for k in range(frames)])
    except (decord.DECORDError, RuntimeError) as error:
        # the last part of decord's first line, without time and source file
        reason = str(error).splitlines()[0].rpartition("] ")[2].rpartition(".cc:")[2].partition(": ")[2]
        raise DataError(
            f"{path}: video codec {streams.video} cannot be decoded ({reason or str(error)[:80]}). "
            f"Remedy: convert it, ffmpeg -i {path.name} -c:v libx264 -c:a aac converted.mp4."
        ) from error
    sound = read_sound(path, seconds) if with_sound and streams.audio else None
    return VideoClip(found, tuple(seconds * k / frames for k in range(frames)), seconds, sound)


def probe(path: Path) -> Streams:
    """The streams of a video file, without decoding it.

    Raises:
        DataError: no such file, no media file, or no video stream.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder. Remedy: name an existing video.")
    try:
        with av.open(str(path)) as container:
            pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            sounds = container.streams.audio
            names = [_codec(stream) for stream in (*pictures[:1], *sounds[:1])]
    except (av.FFmpegError, OSError) as error:
        raise DataError(
            f"{path}: not a media file that can be read ({error.strerror or error}). Remedy: convert it to mp4."
        ) from error
    if not pictures:
        raise DataError(f"{path}: has no video stream{' (only sound)' if sounds else ''}. Remedy: name a video.")
    return Streams(names[0], names[1] if sounds else None)


def read_sound(path: Path, seconds: float) -> np.ndarray:
    """The sound of a video file: mean of the channels at SAMPLE_RATE, cut or filled with silence to its length.

    Args:
        path: of a file with an audio stream.
        seconds: length of the video.

    Returns:
        float32 [samples].

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with av.open(str(path)) as container:
            rate = container.streams.audio[0].rate
            planes = av.AudioResampler(format="fltp")  # the same samples as float, one line per channel
            frames = [*container.decode(audio=0), None]
            blocks = [piece.to_ndarray() for frame in frames for piece in planes.resample(frame)]
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: its sound cannot be decoded ({error}). Remedy: convert it to AAC, or give a wav."
        ) from error
    if not blocks:
        raise DataError(f"{path}: its audio stream is empty. Remedy: give a wav.")
    wave = resampled(np.concatenate(blocks, axis=1).mean(axis=0), rate)
    samples = round(seconds * SAMPLE_RATE)
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))


def _without_padding(frame: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] of a frame as decord gives it.

    decord 0.6 takes the padded length of a line for its channels where that is four times the width (48 and 72 of 19
    widths that were tried): get_batch fails, a single frame comes as [H,W,4] with its lines padded at the end.
    """
    height, width, channels = frame.shape
    if channels == 3:
        return frame
    return np.ascontiguousarray(frame.reshape(height, -1)[:, : 3 * width]).reshape(height, width, 3)


def _read_folder(path: Path, max_pixels: int | None, max_seconds: float | None, with_sound: bool) -> VideoClip:
    inner = path / "frames"
    found = read_frames(inner if inner.is_dir() else path, None, max_pixels)
    wav = next((p for p in (path / "audio.wav", path.parent / "audio.wav") if p.is_file()), None)
    sound = read_audio(wav, SAMPLE_RATE, max_seconds) if with_sound and wav is not None else None
    seconds = len(found) * 1.0 if sound is None else len(sound) / SAMPLE_RATE
    if seconds < MIN_SECONDS:
        raise DataError(f"{wav}: {seconds:.2f} s; the model reads windows of one second. Remedy: use a longer sound.")
    return VideoClip(found, tuple(seconds * k / len(found) for k in range(len(found))), seconds, sound)


def _codec(stream: av.stream.Stream) -> str:
    """Its name; a stream whose decoder is unknown has none."""
    return stream.codec_context.codec.canonical_name if stream.codec_context is not None else "unknown"
