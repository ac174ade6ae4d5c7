"""Scenes of the mini world: coloured things that move in a 96-pixel picture, each class with its own timbre.

A scene is a pure function of its seed. Three things stand in three columns (left, middle, right), drift up and
down, and carry a class (shape + pattern + timbre) and a colour. In a good share of scenes two things share a class
or a colour, so that neither words, nor sight, nor sound alone names the one a reference asks for. A class that
makes a sound has an onset and is loud or quiet; where two things share a sounding class, both play.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

FRAME_SIDE = 96
FRAMES = 10
SECONDS = 10
SAMPLE_RATE = 16_000

SEEN_CLASSES = ("drum", "guitar", "flute", "dog", "cat", "clock", "car", "hair-dryer", "piano")
UNSEEN_CLASSES = ("tuba", "sheep", "emergency-car")
CLASSES = SEEN_CLASSES + UNSEEN_CLASSES
COLOURS = {
    "red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230),
    "yellow": (230, 220, 40), "purple": (170, 50, 200), "white": (238, 238, 238),
}  # fmt: skip
COLUMNS = ("left", "middle", "right")

# Timbre per class: fundamental (Hz), number of harmonics, tremolo (Hz), share of noise.
_TIMBRES = {
    "drum": (90, 2, 4.0, 0.5), "guitar": (330, 6, 0.0, 0.0), "flute": (1050, 2, 0.0, 0.0), "dog": (480, 3, 3.0, 0.1),
    "cat": (760, 4, 1.5, 0.0), "clock": (2200, 1, 8.0, 0.0), "car": (130, 12, 11.0, 0.0),
    "hair-dryer": (3600, 1, 0.0, 0.9), "piano": (210, 4, 2.0, 0.0), "tuba": (60, 5, 0.0, 0.0),
    "sheep": (620, 6, 14.0, 0.0), "emergency-car": (1500, 3, 0.7, 0.0),
}  # fmt: skip

# The dark part of each class's pattern, over pixel offsets (u, v) from the centre, in the order of CLASSES.
_PATTERNS = (
    lambda u, v: np.hypot(u, v) < 4.5,
    lambda u, v: v % 6 < 3,
    lambda u, v: u % 6 < 3,
    lambda u, v: np.zeros_like(u, bool),
    lambda u, v: (u + v) % 8 < 4,
    lambda u, v: np.hypot(u, v) > 7.5,
    lambda u, v: (u // 4 + v // 4) % 2 < 1,
    lambda u, v: np.abs(u) < 3.3,
    lambda u, v: np.abs(v) < 3.3,
    lambda u, v: (u - v) % 8 < 4,
    lambda u, v: u < 0,
    lambda u, v: v < 0,
)


@dataclass(frozen=True)
class Thing:
    """One object: its words, its path in pixels, and its sound (`amplitude` 0 = silent, `onset` in seconds)."""

    class_name: str
    colour: str
    column: int
    centre: tuple[float, float]
    velocity: float
    radius: float
    phase: float
    amplitude: float = 0.0
    onset: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.class_name}"


@dataclass(frozen=True)
class Scene:
    """Things from left to right, the classes that sound in order of their onset, and the seed of the noise."""

    things: tuple[Thing, ...]
    sounds: tuple[tuple[str, str], ...]
    """(class, "loud" | "quiet" | "alone") in order of onset."""
    seed: tuple[int, ...]

    def sounding(self, class_name: str) -> bool:
        return any(name == class_name for name, _ in self.sounds)


def make_scene(seed: tuple[int, ...], classes: tuple[str, ...] = SEEN_CLASSES, include: str | None = None) -> Scene:
    """Draw one scene.

    Args:
        seed: any tuple of non-negative ints; equal seeds give equal scenes.
        classes: the classes to draw from.
        include: a class that must appear (an unseen one, for test_u).
    """
    rng = np.random.default_rng(seed)
    names = list(rng.permutation(classes)[:3])
    if include is not None:
        names = [include, *(name for name in names if name != include)][:3]
    if rng.random() < 0.55:
        names[2] = names[int(rng.integers(2))]
    colours = list(rng.permutation(list(COLOURS))[:3])
    if rng.random() < 0.5:
        first, second = rng.permutation(3)[:2]
        if names[first] != names[second]:
            colours[second] = colours[first]
    order = rng.permutation(3)
    names, colours = [str(names[i]) for i in order], [str(colours[i]) for i in order]

    sounds = _draw_sounds(rng, names)
    things = []
    for column, (name, colour) in enumerate(zip(names, colours, strict=True)):
        amplitude, onset = sounds.get(name, (0.0, 0.0))
        centre = (16 + 32 * column + rng.uniform(-3, 3), rng.uniform(22, 74))
        things.append(Thing(name, colour, column, centre, rng.uniform(-5, 5), rng.uniform(9.5, 12.5),
                            rng.uniform(0, 6.28), amplitude, onset))  # fmt: skip
    return Scene(tuple(things), _describe(sounds), tuple(seed))


def _draw_sounds(rng: np.random.Generator, names: list[str]) -> dict[str, tuple[float, float]]:
    """Class -> (RMS amplitude, onset in seconds) for one or two of the classes present."""
    present = list(dict.fromkeys(names))
    playing = [present[i] for i in rng.permutation(len(present))[: 1 + int(rng.random() < 0.6)]]
    if len(playing) == 1:
        return {playing[0]: (rng.uniform(0.1, 0.35), float(rng.integers(0, 5)))}
    quiet = rng.uniform(0.06, 0.1)
    loud = quiet * rng.uniform(3.2, 4.5)
    first = float(rng.integers(0, 3))
    second = first + float(rng.integers(2, 5))
    amplitudes = (loud, quiet) if rng.random() < 0.5 else (quiet, loud)
    return {playing[0]: (amplitudes[0], first), playing[1]: (amplitudes[1], second)}


def _describe(sounds: dict[str, tuple[float, float]]) -> tuple[tuple[str, str], ...]:
    if len(sounds) == 1:
        return ((next(iter(sounds)), "alone"),)
    loudest = max(sounds, key=lambda name: sounds[name][0])
    ordered = sorted(sounds, key=lambda name: sounds[name][1])
    return tuple((name, "loud" if name == loudest else "quiet") for name in ordered)


def render_frames(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw the scene: frames uint8 [T,H,W,3] RGB, and owner uint8 [T,H,W] (0 background, k+1 the k-th thing)."""
    rng = np.random.default_rng((*scene.seed, 1))
    slope = np.linspace(-25, 25, FRAME_SIDE)[None, :, None] * rng.uniform(-1, 1)
    background = rng.uniform(20, 90, 3)[None, None] + slope
    frames = np.empty((FRAMES, FRAME_SIDE, FRAME_SIDE, 3), np.uint8)
    owner = np.zeros((FRAMES, FRAME_SIDE, FRAME_SIDE), np.uint8)
    shades = [rng.uniform(0.92, 1.06) for _ in scene.things]
    for t in range(FRAMES):
        image = background + rng.normal(0, 6, (FRAME_SIDE, FRAME_SIDE, 3))
        for k, thing in enumerate(scene.things):
            x = thing.centre[0] + 2.5 * np.sin(0.7 * t + thing.phase)
            y = _bounce(thing.centre[1] + thing.velocity * t, 15, FRAME_SIDE - 15)
            shape, dark = _silhouette(thing.class_name, x, y, thing.radius)
            colour = np.array(COLOURS[thing.colour]) * shades[k]
            noise = rng.normal(0, 6, (int(shape.sum()), 3))
            image[shape] = colour * np.where(dark[shape], 0.45, 1.0)[:, None] + noise
            owner[t][shape] = k + 1
        frames[t] = np.clip(image, 0, 255)
    return frames, owner


def _bounce(value: float, low: float, high: float) -> float:
    span = high - low
    return low + span - abs((value - low) % (2 * span) - span)


def _silhouette(name: str, x: float, y: float, r: float) -> tuple[np.ndarray, np.ndarray]:
    """bool [H,W] shape of a class at (x, y) and the dark part of its pattern."""
    mask = np.zeros((FRAME_SIDE, FRAME_SIDE), np.uint8)
    u, v = np.meshgrid(np.arange(FRAME_SIDE) - x, np.arange(FRAME_SIDE) - y)
    index = CLASSES.index(name)
    outline = index % 4
    if outline == 0:
        cv2.circle(mask, (round(x), round(y)), round(r), 1, -1)
    elif outline == 1:
        corners = [(x + a * 1.1 * r, y + b * 0.8 * r) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1)
    elif outline == 2:
        corners = [(x, y - 1.2 * r), (x + 1.1 * r, y), (x, y + 1.2 * r), (x - 1.1 * r, y)]
        cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1)
    else:
        corners = [(x, y - 1.2 * r), (x - 1.1 * r, y + r), (x + 1.1 * r, y + r)]
        cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1)
    return mask > 0, _PATTERNS[index](u, v)


def render_audio(scene: Scene, muted: bool = False, replaced_by: str | None = None) -> np.ndarray:
    """The scene's sound: float32 [SECONDS * SAMPLE_RATE] in [-1, 1].

    Args:
        muted: leave only the room's noise (null clips `null_m-`).
        replaced_by: play this class instead of the scene's own (null clips `null_c-`).
    """
    rng = np.random.default_rng((*scene.seed, 2))
    wave = 0.004 * rng.standard_normal(SECONDS * SAMPLE_RATE).astype(np.float32)
    playing = {thing.class_name: (thing.amplitude, thing.onset) for thing in scene.things if thing.amplitude > 0}
    if muted:
        playing = {}
    elif replaced_by is not None:
        playing = {replaced_by: (0.25, 1.0)}
    for name in sorted(playing):
        amplitude, onset = playing[name]
        start = int(onset * SAMPLE_RATE)
        wave[start:] += amplitude * _timbre(name, len(wave) - start, rng)
    return np.clip(wave, -1, 1)


def _timbre(name: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [samples] of unit RMS: harmonics with a tremolo, some noise."""
    fundamental, harmonics, tremolo, noise = _TIMBRES[name]
    fundamental *= 1 + rng.uniform(-0.04, 0.04)
    time = np.arange(samples, dtype=np.float32) / SAMPLE_RATE
    wave = np.zeros(samples, np.float32)
    for k in range(1, harmonics + 1):
        if fundamental * k < 7600:
            wave += (np.sin(2 * np.pi * fundamental * k * time + rng.uniform(0, 6.28)) / k**0.7).astype(np.float32)
    if noise:
        wave = (1 - noise) * wave + noise * rng.standard_normal(samples).astype(np.float32)
    if tremolo:
        wave *= (0.55 + 0.45 * np.sin(2 * np.pi * tremolo * time + rng.uniform(0, 6.28))).astype(np.float32)
    return wave / (float(np.sqrt(np.mean(wave**2))) + 1e-6)
