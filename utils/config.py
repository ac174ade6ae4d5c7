"""YAML files and `section.field=value` overrides -> `RunConfig`; its help text; the resolved config beside every run.

Imports no torch: `python train_ds.py --help` and every config error come before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.schema import RunConfig
from utils.errors import ConfigError, Problem
from utils.files import write_text

FREE_ON_RESUME = ("optim.steps", "optim.decay_steps", "log.", "eval.", "watch.", "output_dir", "engine.threads",
                  "data.num_workers", "model.attention")  # fmt: skip
"""Fields (or sections) that may change when a run is resumed; nothing the run has learned depends on them."""


class _Loader(yaml.SafeLoader):
    """YAML with floats as people write them (`2e-5`), without aliases, Python tags or doubled keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not accepted; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if doubled := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"keys written twice: {', '.join(doubled)} (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, the files it inherits from, and the overrides of the command line.

    Args:
        path: YAML file; its key `inherit` (one path or a list, relative to the file) names files it builds upon.
        overrides: `section.field=value`, the value in YAML; later ones win.

    Raises:
        ConfigError: listing every unreadable override, unknown key, wrong type, bad value and broken rule at once.
            Rules between fields are checked even where fields are wrong, as far as they do not involve these.
    """
    data, problems = _read_yaml(Path(path), ()), []
    for text in overrides:
        try:
            _merge(data, _parse_override(text))
        except yaml.YAMLError as error:
            problems.append(Problem(text, text, f"not a readable override ({error})", "write section.field=value"))
    plain = json.loads(json.dumps(data, default=str))
    try:
        config = RunConfig.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        problems += _problems(error, plain)
    if problems:
        raise ConfigError(problems, str(path))
    return config


def check_paths(config: RunConfig) -> None:
    """Require that every file and folder the run reads exists.

    Raises:
        ConfigError: naming each missing path with its field.
    """
    stage, model = config.stage, config.model
    wanted = {
        "model.base": model.base,
        "model.sam_checkpoint": model.sam_checkpoint,
        "model.sam_type": model.sam_type if model.sam_type.endswith(".json") else None,
        "model.text_encoder": model.text_encoder,
        "data.root": config.data.root,
        "init_from": config.init_from,
        "sft.teacher_checkpoint": config.sft.teacher_checkpoint if stage == "sft" else None,
        "eval.checkpoint": config.eval.checkpoint if stage == "eval" else None,
        **{f"data.cot.{i}": path for i, path in enumerate(config.data.cot)},
        **{f"reflective.paths.{i}": path for i, path in enumerate(config.reflective.paths) if stage == "reflective"},
    }
    missing = [
        Problem(field, path, "does not exist", f"correct {field} or put the file there (looked in {os.getcwd()})")
        for field, path in wanted.items()
        if path is not None and not Path(path).exists()
    ]
    if missing:
        raise ConfigError(missing, "paths")


def save_config(config: RunConfig, folder: str | Path) -> Path:
    """Write `config.yaml` (loads back as it is, the git state in its first line), whole or not at all."""
    target = Path(folder) / "config.yaml"
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    write_text(target, f"# code: git {git_state()}\n{text}")
    return target


def git_state() -> str:
    """Commit of the running code ("-dirty" after it if tracked files were changed); "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def differences(ours: RunConfig, theirs: RunConfig, free: tuple[str, ...] = FREE_ON_RESUME) -> list[str]:
    """Fields that differ and are not `free` (names or beginnings of names), as `field: theirs -> ours`."""
    values = [(path, attrgetter(path)(theirs), attrgetter(path)(ours)) for path, _ in fields(RunConfig)]
    return [f"{p}: {old!r} -> {new!r}" for p, old, new in values if old != new and not p.startswith(free)]


def help_text() -> str:
    """Every field with its default, unit, source and meaning; a blank line between sections."""
    lines, section = [], ""
    for path, info in fields(RunConfig):
        if path.rpartition(".")[0] != section:
            section = path.rpartition(".")[0]
            lines.append("")
        default = "required" if info.is_required() else json.dumps(info.default)
        choices = " | ".join(map(str, _literals(info.annotation)))
        lines.append(f"  {path} = {default}  [{info.json_schema_extra['unit']}]  ({info.json_schema_extra['source']})")
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


def _read_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """One file with everything it inherits, the file's own values last. `chain` guards against circles."""
    if path.resolve() in chain:
        raise ConfigError([Problem("inherit", str(path), "inherits from itself", "remove the circle")], str(chain[0]))
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        problem = Problem("file", str(path), f"not readable: {error}", "correct the file or its path")
        raise ConfigError([problem]) from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        problem = Problem("file", type(data).__name__, "must be a mapping of sections", "see configs/sft.yaml")
        raise ConfigError([problem], str(path))
    parents = data.pop("inherit", [])
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        _merge(merged, _read_yaml(path.parent / parent, (*chain, path.resolve())))
    _merge(merged, data)
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise yaml.YAMLError("no '=' in it")
    nested: Any = yaml.load(value, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested


def _merge(base: dict[str, Any], update: dict[str, Any]) -> None:
    """Put `update` over `base` in place, section by section; a field's whole value is replaced, mappings too."""
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        base[key] = {**base[key], **value} if both else value


def _problems(error: ValidationError, data: dict[str, Any]) -> list[Problem]:
    """Wrong fields, and the broken rules between fields that are right (they are checked without the wrong ones)."""
    found, rules = [], []
    for item in error.errors(include_url=False):
        if item["type"] == "broken_rules":
            return [Problem(*rule) for rule in item["ctx"]["problems"]]
        loc = item["loc"]
        value = None if item["type"] == "missing" else item["input"]
        found.append(Problem(".".join(map(str, loc)), value, *_rule_and_remedy(item["type"], item["msg"], loc)))
        section = data.get(loc[0]) if len(loc) > 1 else data
        if isinstance(section, dict):
            section.pop(loc[:2][-1], None)
    try:
        RunConfig.model_validate_json(json.dumps(data))
    except ValidationError as second:
        rules = [Problem(*rule) for item in second.errors() for rule in item.get("ctx", {}).get("problems", [])]
    wrong = [problem.field for problem in found]
    return found + [
        rule
        for rule in rules
        if not any(w.startswith(f) or f.startswith(f"{w}.") for f in rule.field.split(" + ") for w in wrong)
    ]


def _rule_and_remedy(kind: str, message: str, loc: tuple[Any, ...]) -> tuple[str, str]:
    name = ".".join(map(str, loc))
    if kind == "missing":
        return "is required", f"set {name}"
    if kind == "extra_forbidden":  # the same name elsewhere, else a similar spelling
        paths = [path for path, _ in fields(RunConfig)]
        same = [path for path in paths if path.rsplit(".", 1)[-1] == str(loc[-1])]
        close = (same or difflib.get_close_matches(name, paths, 1, 0.75) or [None])[0]
        return "unknown key", f"write {close}" if close else "remove it (python train_ds.py --help lists every key)"
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:], f"see `python train_ds.py --help` on {'.'.join(map(str, loc[:2]))}"
