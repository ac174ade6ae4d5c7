"""How a knob is declared: `knob` for documented fields, `Section` for frozen strict models."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def knob(default: Any, description: str, unit: str, source: str, **rules: Any) -> Any:
    """A documented field: `unit` and `source` go to the JSON schema, `rules` are pydantic's (ge, le, pattern ...)."""
    return Field(default, description=description, json_schema_extra={"unit": unit, "source": source}, **rules)


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error})") from error
    return pattern


Regex = Annotated[str, AfterValidator(_regular_expression)]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Frozen, strictly typed, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
