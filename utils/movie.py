"""A few pictures with their sound as an mp4 that browsers play, or as a GIF."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

RATE = 10
"""Pictures per second of an mp4; each frame is repeated, as many players stumble over one a second."""
_SOUND_BLOCK = 1024


def write_mp4(path: Path, frames: np.ndarray, seconds: float, sound: np.ndarray | None, sample_rate: int) -> None:
    """H.264 with AAC.

    Args:
        path: of the file; its folder is made.
        frames: uint8 [T,H,W,3] RGB, shown for equal times.
        seconds: length of the movie.
        sound: float32 [samples] mono in [-1, 1], or None for a silent movie.
        sample_rate: of the sound, Hz.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # H.264 halves the colours
    count = max(len(frames), round(seconds * RATE))
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE, options={"crf": "18", "preset": "veryfast"})
        video.height, video.width, video.pix_fmt = *even.shape[1:3], "yuv420p"
        voice = None if sound is None else container.add_stream("aac", rate=sample_rate, layout="mono")
        for i in range(count):
            picture = np.ascontiguousarray(even[i * len(even) // count])
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if voice is not None:
            for start in range(0, len(sound), _SOUND_BLOCK):
                block = np.clip(sound[None, start : start + _SOUND_BLOCK], -1, 1).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = sample_rate, start, Fraction(1, sample_rate)
                container.mux(voice.encode(frame))
            container.mux(voice.encode())


def write_gif(path: Path, frames: np.ndarray, seconds: float) -> None:
    """Frames uint8 [T,H,W,3] RGB, shown for equal times within `seconds`, again and again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame).quantize(128) for frame in frames]
    duration = max(20, round(1000 * seconds / len(frames)))
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
