"""Released key names <-> ours, and the comparison of what a checkpoint stores with what a model needs.

The released checkpoint nests everything under `model.` and repeats BEATs' one relative-position table once per layer.
`RULES` is the whole mapping. `check_keys` explains every key: loaded, tolerated (and why), missing, unexpected, or of
another shape; `moved_component` recognises a part that was stored under another prefix, which a loose load would leave
at random values without a word (users of the original report exactly this of its vision tower).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RULES: tuple[tuple[str, str], ...] = (
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.siglip.", "model.vision_tower.vision_tower.vision_model."),
    ("mm_projector.", "model.mm_projector."),
    ("mm_projector_a.", "model.mm_projector_a."),
    ("audio_tower.", "model.audio_tower."),
    ("language_model.model.", "model."),
)
"""(our prefix, released prefix); the first that fits applies, so the catch-all `model.` comes last."""

COMPONENTS = {
    "model.vision_tower.": "vision tower",
    "model.mm_projector.": "video projector",
    "model.audio_tower.": "audio tower",
    "model.mm_projector_a.": "audio projector",
    "": "language model",
}
"""Released prefix -> part of the model, the most special first."""

TABLE = "audio_tower.encoder.relative_attention_bias.weight"
RELEASED_TABLE = "model.audio_tower.encoder.layers.{}.self_attn.relative_attention_bias.weight"
"""The shared table is stored under every layer (or under layer 0 alone) and held once here."""

UNUSED = re.compile(
    r"model\.vision_tower\.vision_tower\.vision_model\.(head|post_layernorm)\.|model\.audio_tower\.predictor\."
)
"""Stored, never read by a forward: may be missing."""

STALE_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Constants that transformers < 4.32 stored: may be there."""

RELEASED_KEYS = Path(__file__).with_name("released_keys.txt")
"""Names, shapes and multiplicities of VideoLLaMA2.1-7B-AV, one pattern per line."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KeyCheck:
    """What became of one released name."""

    name: str
    status: Literal["loaded", "tolerated", "missing", "unexpected", "shape"]
    stored: Shape | None
    expected: Shape | None
    note: str = ""
    """Why it is tolerated."""

    @property
    def is_fault(self) -> bool:
        return self.status not in ("loaded", "tolerated")

    @property
    def component(self) -> str:
        """Part of the model that the name belongs to."""
        return next(part for prefix, part in COMPONENTS.items() if self.name.startswith(prefix))

    def __str__(self) -> str:
        if self.status == "shape":
            return f"shape: {self.name} is {self.stored}, the config asks for {self.expected}"
        note = f" ({self.note})" if self.note else ""
        return f"{self.status}: {self.name} {self.expected if self.stored is None else self.stored}{note}"


def to_released(name: str, beats_layers: int) -> list[str]:
    """Released name(s) of one of our parameters: one, or `beats_layers` for the shared table."""
    if name == TABLE:
        return [RELEASED_TABLE.format(i) for i in range(beats_layers)]
    for ours, released in RULES:
        if name.startswith(ours):
            return [released + name.removeprefix(ours)]
    raise ValueError(f"{name}: not a parameter of the backbone; merge or remove adapters before saving")


def from_released(name: str) -> str:
    """Our name of a released key; a key that no rule explains comes back unchanged (and is then unexpected)."""
    if re.fullmatch(RELEASED_TABLE.replace(".", r"\.").format(r"\d+"), name):
        return TABLE
    for ours, released in RULES:
        if name.startswith(released):
            return ours + name.removeprefix(released)
    return name


def check_keys(stored: dict[str, Shape], expected: dict[str, Shape], complete: bool = False) -> list[KeyCheck]:
    """Explain every name that is stored or expected, expected ones first.

    Args:
        stored: released names of a checkpoint with their shapes.
        expected: released names of the model with theirs.
        complete: nothing may be absent (before saving).
    """
    first_table = RELEASED_TABLE.format(0)
    checks = []
    for name, shape in expected.items():
        if name in stored:
            checks.append(KeyCheck(name, "loaded" if stored[name] == shape else "shape", stored[name], shape))
        elif not complete and from_released(name) == TABLE and name != first_table:
            checks.append(KeyCheck(name, "tolerated", None, shape, "copy of the one position table, read from layer 0"))
        elif not complete and UNUSED.match(name):
            checks.append(KeyCheck(name, "tolerated", None, shape, "no forward reads it; zeros take its place"))
        else:
            checks.append(KeyCheck(name, "missing", None, shape))
    for name in stored.keys() - expected.keys():
        if not complete and STALE_BUFFERS.match(name):
            checks.append(KeyCheck(name, "tolerated", stored[name], None, "a constant that is recomputed; ignored"))
    extra = sorted(name for name in stored.keys() - expected.keys() if complete or not STALE_BUFFERS.match(name))
    return checks + [KeyCheck(name, "unexpected", stored[name], None) for name in extra]


def moved_component(checks: list[KeyCheck]) -> list[str]:
    """One sentence for each part that is missing under its prefix and there under another one."""
    lacking: dict[str, dict[str, Shape | None]] = {}
    for check in checks:
        if check.status == "missing":
            released = next(prefix for _, prefix in RULES if check.name.startswith(prefix))
            lacking.setdefault(released, {})[check.name.removeprefix(released)] = check.expected
    strangers = [check for check in checks if check.status == "unexpected"]
    sentences = []
    for prefix, tails in lacking.items():
        found = Counter(other for stranger in strangers for other in _prefixes(stranger, tails))
        # Equal counts (a part of one tensor): the prefix that ends as it should is the likelier one.
        other, count = max(found.items(), key=lambda item: (item[1], item[0].endswith(prefix)), default=("", 0))
        if 2 * count > len(tails):
            part = KeyCheck(prefix, "missing", None, None).component
            sentences.append(
                f"the {part} is stored under '{other}' instead of '{prefix}' ({count} of {len(tails)} missing keys). "
                "Remedy: rename these keys; loaded as it is, the part would keep random weights"
            )
    return sentences


def released_keys() -> dict[str, Shape]:
    """Every key of the released VideoLLaMA2.1-7B-AV with its shape (1156 names), from the list beside this file."""
    keys: dict[str, Shape] = {}
    for line in RELEASED_KEYS.read_text(encoding="utf-8").splitlines():
        if line.startswith("TOTAL"):
            continue
        pattern, shape, times = line.split("\t")
        group = re.search(r"\{(.*)\}", pattern)
        fills = group.group(1).split(",") if group else [str(i) for i in range(int(times.removeprefix("x")))]
        size = tuple(int(n) for n in re.findall(r"\d+", shape))
        keys |= {re.sub(r"\*|\{.*\}", fill, pattern): size for fill in fills}
    return keys


def _prefixes(stranger: KeyCheck, tails: dict[str, Shape | None]) -> list[str]:
    """Beginnings of a name that leave one of `tails`, which has the stranger's shape."""
    parts = stranger.name.split(".")
    return [
        "".join(f"{part}." for part in parts[:cut])
        for cut in range(len(parts))
        if tails.get(".".join(parts[cut:])) == stranger.stored
    ]
