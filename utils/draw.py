"""Draws masks over frames and clips as strips, and writes them as JPEG, PNG, mp4 and GIF files."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

Colour = tuple[int, int, int]

PREDICTION: Colour = (255, 96, 32)
"""RGB of predicted masks."""
TRUTH: Colour = (32, 200, 96)
"""RGB of ground truth."""

RATE = 10
"""Pictures per second of an mp4; each frame is repeated, as many players stumble over one a second."""
_GAP = 3
"""White pixels between the frames of a strip."""


def overlay(frame: np.ndarray, mask: np.ndarray, colour: Colour, alpha: float = 0.45) -> np.ndarray:
    """Tint the mask's pixels and draw its outline.

    Args:
        frame: uint8 [H,W,3] RGB.
        mask: bool [H,W] of the same size.
        colour: RGB.
        alpha: share of the colour in the tint; 0 = outline only.

    Raises:
        ValueError: for a mask of another size or type.
    """
    if mask.dtype != np.bool_ or mask.shape != frame.shape[:2]:
        raise ValueError(f"mask {mask.dtype} {mask.shape} must be bool of the frame's size {frame.shape[:2]}")
    drawn = frame.copy()
    drawn[mask] = (1 - alpha) * frame[mask] + alpha * np.array(colour)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    thickness = max(1, round(min(mask.shape) / 200))
    return cv2.drawContours(drawn, outlines, -1, colour, thickness)


def strip(
    frames: np.ndarray, truth: np.ndarray, prediction: np.ndarray, columns: int = 5, max_width: int = 240
) -> np.ndarray:
    """A clip at a glance, uint8 [.,.,3] RGB: rows = frames, ground truth, prediction; columns = frames evenly spread.

    Outside the masks frames are dimmed.

    Args:
        frames: uint8 [T,H,W,3] RGB; frames of another size (exchanged by a probe) are stretched to the masks'.
        truth: bool [T,H,W].
        prediction: bool [T,H,W].
        columns: how many of the T frames are shown.
        max_width: larger frames are shrunk to this many pixels.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int))
    if frames.shape[1:3] != truth.shape[1:]:
        frames = np.stack([cv2.resize(frame, truth.shape[:0:-1]) for frame in frames])
    rows = [
        [frames[t] for t in chosen],
        [_spotlight(frames[t], truth[t], TRUTH) for t in chosen],
        [_spotlight(frames[t], prediction[t], PREDICTION) for t in chosen],
    ]
    gap = ((0, _GAP), (0, _GAP), (0, 0))
    padded = [[np.pad(shrink(image, max_width), gap, constant_values=255) for image in row] for row in rows]
    return np.vstack([np.hstack(row) for row in padded])[:-_GAP, :-_GAP]


def shrink(image: np.ndarray, max_width: int) -> np.ndarray:
    """uint8 [H,W,C], with its proportions in at most `max_width` pixels; smaller ones as they are."""
    height, width = image.shape[:2]
    if width <= max_width:
        return image
    size = (max_width, max(1, round(height * max_width / width)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1)


def jpeg(image: np.ndarray, quality: int = 85) -> bytes:
    """uint8 [H,W,3] RGB -> the bytes of a JPEG file."""
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"an image of shape {image.shape} and type {image.dtype} cannot be encoded as JPEG")
    return data.tobytes()


def save_masks(folder: Path, masks: np.ndarray) -> None:
    """bool [T,H,W] -> 0/255 PNG files named as the benchmark names them (00000.png, 00001.png, ...)."""
    _save_pngs(folder, masks.astype(np.uint8) * 255)


def save_probabilities(folder: Path, probabilities: np.ndarray) -> None:
    """float32 [T,H,W] in [0, 1] -> 16-bit grey PNG files (00000.png, ...); a value is kept to 1/131070."""
    _save_pngs(folder, np.rint(probabilities * np.float32(65535)).astype(np.uint16))


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
            wave = np.ascontiguousarray(np.clip(sound[None], -1, 1), np.float32)
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate = sample_rate
            container.mux(voice.encode(frame))
            container.mux(voice.encode())


def write_gif(path: Path, frames: np.ndarray, seconds: float) -> None:
    """Frames uint8 [T,H,W,3] RGB, shown for equal times within `seconds`, in a loop."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame).quantize(128) for frame in frames]
    duration = max(20, round(1000 * seconds / len(frames)))
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


def _save_pngs(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for t, image in enumerate(images):
        path = folder / f"{t:05d}.png"
        if not cv2.imwrite(str(path), image):
            raise OSError(f"{path}: could not be written (disk full or folder not writable?)")


def _spotlight(frame: np.ndarray, mask: np.ndarray, colour: Colour) -> np.ndarray:
    """`overlay` with the rest of the frame dimmed, so that masks stand out on any colour."""
    return overlay(np.where(mask[..., None], frame, frame // 2), mask, colour)
