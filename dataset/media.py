"""Frames, masks and sound of a clip -> arrays. What is broken is refused here; nothing is replaced or guessed.

Readers: opencv for images, librosa for sound (`dataset.video` reads video files). Every failure is a DataError that
names the file and the remedy (`dataset.clips` adds the sample). The released loader pads, truncates or substitutes
30 s of silence instead (AURORA utils/sem_seg_dataset.py:197-201, VideoLLaMA2 mm_utils.py:302).
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import librosa
import numpy as np
import soundfile
from PIL import Image

from dataset.refavs import Row, contained
from utils.errors import DataError

SAMPLE_RATE = 16_000
"""Hz; the rate of BEATs' filter bank."""
MAX_SAMPLE_RATE, MAX_CHANNELS = 384_000, 32
"""What a sound file may claim in its header: no recording has more, and memory grows with both."""
MAX_BYTES_PER_PIXEL = 16
"""Larger files than this for each pixel that may be decoded hold something else (RGBA of 16 bits has 8)."""

_NUMBERED = re.compile(r"([0-9]{1,9})\.(jpg|jpeg|png)", re.IGNORECASE)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images named `<prefix><number>.<suffix>`, where a benchmark does not name them 0.jpg, 1.jpg ..."""

    path: Path
    prefix: str = ""
    first: int = 0
    """Smallest number."""
    any_value: bool = False
    """Masks: every value but 0 is foreground (AVSBench marks objects with grey levels or colours of their class)."""
    partly: bool = False
    """Masks: the first frames alone may have one (AVSBench S4 annotates one frame of a training clip)."""

    def __str__(self) -> str:
        return str(self.path)


class ClipIndex(Protocol):
    """Where the media of a benchmark lie (`dataset.refavs.RefAvsIndex`, `dataset.avsbench.AvsBenchIndex`)."""

    table: Path
    """The file that lists the rows."""

    def rows(self, split: str) -> list[Row]: ...

    def clips(self, split: str) -> list[str]: ...

    def frames_folder(self, clip: str) -> Path | ImageFolder: ...

    def audio_path(self, clip: str) -> Path: ...

    def mask_folder(self, row: Row) -> Path | ImageFolder: ...


def list_images(source: Path | ImageFolder) -> list[Path]:
    """Numbered images of a folder in numeric order (2.jpg before 10.jpg), without a gap from the first number on.

    Raises:
        DataError: no folder, no image, an image whose name is not a number, a number missing or given twice, a link
            out of the data set.
    """
    named = source if isinstance(source, ImageFolder) else ImageFolder(source)
    folder, prefix, first = named.path, named.prefix, named.first
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder}: no such folder. Remedy: restore it from the benchmark's archive.") from error
    found: dict[int, Path] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        path = folder / name
        if match is None:
            rule = f"an image is named by its number, as {prefix}{first}.jpg"
            raise DataError(f"{path}: {rule}. Remedy: rename or remove it.")
        number = int(match.group(1))
        if number in found:
            raise DataError(f"{path}: number {number} is also {found[number].name}. Remedy: remove one of them.")
        # a link within the data set is fine (a null clip may share the frames of its original), one out of it is not
        found[number] = contained(path, folder.resolve().parent.parent) if path.is_symlink() else path
    if not found:
        raise DataError(f"{folder}: holds no image. Remedy: restore the clip from the benchmark's archive.")
    wanted = range(first, first + len(found))
    missing = next((number for number in wanted if number not in found), None)
    if missing is not None:
        raise DataError(
            f"{folder}: image {missing} is missing, though {max(found)} exists; images are numbered from {first} "
            "without a gap. Remedy: restore the missing file."
        )
    return [found[number] for number in wanted]


def frame_indexes(total: int, count: int) -> list[int]:
    """`count` frames evenly spaced among `total`: centres of equal segments (VideoLLaMA2 mm_utils.py, frame_sample).

    Raises:
        DataError: fewer than `count` frames exist. (Upstream repeats or paints black frames.)
    """
    if total < count:
        raise DataError(f"{total} frames, {count} wanted. Remedy: lower data.num_frames, or restore missing frames.")
    segment = (total - 1) / count
    return [round(segment * (k + 0.5) + 1e-6) for k in range(count)]


def read_frames(folder: Path | ImageFolder, count: int | None = None, max_pixels: int | None = None) -> np.ndarray:
    """Frames of a clip in numeric order, uint8 [T,H,W,3] RGB.

    Args:
        folder: `media/<clip>/frames`, or where another benchmark keeps them.
        count: frames wanted, evenly spaced; None = all.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        DataError: a gap in the numbers, a truncated or unreadable image, images of unequal size.
    """
    paths = list_images(folder)
    if count is not None:
        try:
            paths = [paths[i] for i in frame_indexes(len(paths), count)]
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error
    frames = [read_image(path, cv2.IMREAD_COLOR, max_pixels) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise DataError(
                f"{path}: {frame.shape[1]}x{frame.shape[0]} pixels, but {paths[0].name} has "
                f"{frames[0].shape[1]}x{frames[0].shape[0]}; frames of a clip share one size. "
                "Remedy: extract the clip again."
            )
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in frames])


def read_masks(
    folder: Path | ImageFolder,
    count: int,
    size: tuple[int, int],
    indexes: list[int] | None = None,
    max_pixels: int | None = None,
) -> np.ndarray:
    """Masks of one object, one for each frame of its clip, bool [T,H,W].

    Foreground is 255 and background 0. The released loader takes 255 as foreground and all else as background
    (AURORA utils/sem_seg_dataset.py:557), the official one thresholds above 0; on {0, 255} they agree, so any other
    value is refused here instead of being read either way.

    Args:
        folder: `gt_mask/<clip>/fid_<fid>`, or where another benchmark keeps them.
        count: frames of the clip on disk; the folder must hold exactly as many masks.
        size: (height, width) of the frames.
        indexes: the masks wanted; None = all.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        DataError: a mask without a frame or the reverse, another size, a value other than 0 and 255, a broken file.
    """
    paths = list_images(folder)
    any_value = isinstance(folder, ImageFolder) and folder.any_value
    if len(paths) != count:
        raise DataError(
            f"{folder}: {len(paths)} masks for {count} frames; each frame has one mask. "
            f"Remedy: restore the missing files of {'the masks' if len(paths) < count else 'the frames'}."
        )
    masks = []
    for path in paths if indexes is None else [paths[i] for i in indexes]:
        image = read_image(path, cv2.IMREAD_GRAYSCALE, max_pixels)
        if image.shape != tuple(size):
            raise DataError(
                f"{path}: {image.shape[1]}x{image.shape[0]} pixels, but the frame has {size[1]}x{size[0]}; "
                "a mask has its frame's size. Remedy: restore mask and frame from one release."
            )
        mask = image != 0
        if not any_value and not np.array_equal(mask, image == 255):
            odd = sorted(set(np.unique(image).tolist()) - {0, 255})
            raise DataError(
                f"{path}: values {odd[:5]}; a mask holds 0 (background) and 255 (object) only. "
                "Remedy: write it as an 8-bit black and white PNG."
            )
        masks.append(mask)
    return np.stack(masks)


def read_truth(
    index: ClipIndex,
    row: Row,
    size: tuple[int, int],
    num_frames: int | None = None,
    max_pixels: int | None = None,
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Ground truth of a row, bool [T,H,W], and which of the T frames have one (None = all; the others are False).

    A null row's mask is empty by definition: its folder may be absent; one that is there is not read. Where it marks
    an object, scripts/check_data.py counts it ("object of a null row", a warning), and the run goes on.

    Args:
        index: says where media lie.
        row: the row.
        size: (height, width) of the clip's frames.
        num_frames: frames read of the clip, evenly spaced; None = all.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        DataError: see `read_masks`.
    """
    total = len(list_images(index.frames_folder(row.clip)))
    indexes = list(range(total)) if num_frames is None else frame_indexes(total, num_frames)
    folder = index.mask_folder(row)
    masks = np.zeros((len(indexes), *size), dtype=bool)
    if isinstance(folder, ImageFolder) and folder.partly:
        count = min(len(list_images(folder)), total)
        labelled = tuple(k for k, i in enumerate(indexes) if i < count)
        if not labelled:
            raise DataError(f"{folder}: none of the frames read has a mask. Remedy: set data.num_frames to null.")
        masks[list(labelled)] = read_masks(folder, count, size, [indexes[k] for k in labelled], max_pixels)
        return masks, None if len(labelled) == len(indexes) else labelled
    return (masks if row.is_null else read_masks(folder, total, size, indexes, max_pixels)), None


def read_audio(path: Path, sample_rate: int = SAMPLE_RATE, max_seconds: float | None = None) -> np.ndarray:
    """Mono sound, float32 [samples] in about [-1, 1]: the mean of the channels, Fourier-resampled.

    The released code does the same (AURORA utils/sem_seg_dataset.py:147-152).

    Args:
        path: a file that libsndfile reads (wav, flac, ogg, mp3).
        sample_rate: Hz wanted.
        max_seconds: longer files are refused before they are decoded.

    Raises:
        DataError: missing, unreadable, empty, too long, or not finite.
    """
    remedy = "Remedy: extract the clip's sound again."
    if not path.is_file():
        raise DataError(f"{path}: no such file. {remedy}")
    try:
        info = soundfile.info(str(path))
        if info.frames == 0:
            raise DataError(f"{path}: holds no sound (0 samples). {remedy}")
        if info.samplerate > MAX_SAMPLE_RATE or info.channels > MAX_CHANNELS:  # the length in seconds says nothing then
            limits = f"limits {MAX_SAMPLE_RATE} and {MAX_CHANNELS}"
            raise DataError(f"{path}: {info.samplerate} Hz, {info.channels} channels; {limits}. {remedy}")
        if max_seconds is not None and info.duration > max_seconds:
            raise DataError(
                f"{path}: {info.duration:.1f} s, limit {max_seconds:g} s. "
                "Remedy: cut it, or raise data.max_audio_seconds."
            )
        wave, rate = librosa.load(path, sr=None, mono=False, dtype=np.float32)
    except soundfile.SoundFileError as error:
        raise DataError(f"{path}: cannot be read as sound ({error}). {remedy}") from error
    if wave.shape[-1] < info.frames:
        raise DataError(f"{path}: {info.frames} samples promised, {wave.shape[-1]} read. {remedy}")
    if wave.ndim == 2:
        wave = wave.mean(axis=0)
    if not np.isfinite(wave).all():
        raise DataError(f"{path}: holds NaN or infinite samples. {remedy}")
    return resampled(wave, rate, sample_rate)


def resampled(wave: np.ndarray, rate: float, wanted: int = SAMPLE_RATE) -> np.ndarray:
    """float32 [samples] of a mono sound at `wanted` Hz, by the Fourier method."""
    if rate != wanted:
        wave = librosa.resample(wave, orig_sr=rate, target_sr=wanted, res_type="fft")
    return np.ascontiguousarray(wave, dtype=np.float32)


def read_image(path: Path, mode: int, max_pixels: int | None) -> np.ndarray:
    """One image as opencv's `mode` reads it, uint8 [H,W,3] BGR or [H,W] (uint16 where the mode keeps the depth).

    The orientation tag is ignored, as masks are drawn on the stored pixels. Raises DataError for a broken file.
    """
    remedy = "Remedy: restore the file from the benchmark's archive."
    most = None if max_pixels is None else MAX_BYTES_PER_PIXEL * max_pixels + (1 << 20)
    try:
        size = path.stat().st_size
        if most is not None and size > most:
            raise DataError(
                f"{path}: {size} bytes, no image of the allowed size has more than {most}. "
                "Remedy: restore the file, or raise data.max_image_pixels."
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. {remedy}") from error
    height, width = _header_size(path, data)
    if max_pixels is not None and height * width > max_pixels:
        raise DataError(
            f"{path}: {width}x{height} pixels, limit {max_pixels}. "
            "Remedy: scale it down, or raise data.max_image_pixels."
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({error.err}). {remedy}") from error
    if image is None or image.shape[:2] != (height, width):
        raise DataError(f"{path}: cannot be decoded. {remedy}")
    return image


def _header_size(path: Path, data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG or PNG whose end marker is there."""
    remedy = "Remedy: restore the file from the benchmark's archive."
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            kind = image.format
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a JPEG or PNG image ({error}). {remedy}") from error
    # opencv fills what a truncated file lacks with grey and says nothing; the end markers tell. An embedded thumbnail
    # has its own end marker, therefore it must come after the last start of scan.
    complete = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") if kind == "JPEG" else b"IEND\xaeB`\x82" in data[-64:]
    if not complete:
        raise DataError(f"{path}: truncated ({len(data)} bytes, the end marker is missing). {remedy}")
    return height, width
