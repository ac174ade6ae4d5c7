"""The page that `python train_ds.py --help` prints, made from the schema; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs.schema import RunConfig


def help_text() -> str:
    """Every field with its default, unit, source and meaning; a blank line between sections."""
    lines: list[str] = []
    section = ""
    for path, info in fields(RunConfig):
        if path.rpartition(".")[0] != section:
            section = path.rpartition(".")[0]
            lines.append("")
        extra: dict[str, Any] = info.json_schema_extra  # type: ignore[assignment]
        default = "required" if info.is_required() else json.dumps(info.default)
        choices = " | ".join(map(str, _literals(info.annotation)))
        lines.append(f"  {path} = {default}  [{extra['unit']}]  ({extra['source']})")
        lines.append(f"      {info.description}{f'; one of {choices}' if choices else ''}")
    return "\n".join(lines)


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field of a config model with its dotted path, in order."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def _literals(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        if isinstance(argument, str | int):
            yield argument
        else:
            yield from _literals(argument)
