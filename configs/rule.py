"""What a broken rule between fields says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BrokenRule:
    """Fields (dotted) that cannot go together, why, and what to change."""

    fields: tuple[str, ...]
    rule: str
    remedy: str
    values: tuple[object, ...] = ()
    """Of the fields, filled in by `configs.rules.broken_rules`."""
