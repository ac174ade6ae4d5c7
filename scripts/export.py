"""A trained run as a folder to hand on: light (adapters and heads) or merged (the whole model).

    python scripts/export.py runs/grpo exports/aurora-light --kind light
    python scripts/export.py runs/grpo exports/aurora --metrics runs/eval/*/metrics.json [--precision bf16]

Both load with model.aurora.export.from_pretrained and AuroraProcessor.from_pretrained, and stand in a checkpoint's
place in train_ds_test.py (eval.checkpoint=exports/aurora). Later stages start from light ones (init_from). See
docs/weights.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.schema import RunConfig  # noqa: E402 - the project's root must be on the path first
from utils.config import check_paths, load_config, save_config  # noqa: E402
from utils.errors import AuroraError, ConfigError, Problem  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run or checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write; must not hold another model")
    parser.add_argument("--kind", choices=("light", "merged"), default="merged", help="default: %(default)s")
    parser.add_argument("--metrics", type=Path, nargs="*", default=[], help="metrics.json files for the model card")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="stored type (default: as the run was trained)")
    options = parser.parse_args(arguments)
    try:
        config = exported_config(options.run, options.precision)
        check_paths(model_alone(config))
        export(config, options.out, options.kind, options.metrics)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"{options.kind} export in {options.out}")
    return 0


def exported_config(run: Path, precision: str | None) -> RunConfig:
    """The run's own configuration, with its weights in the place of `eval.checkpoint`.

    Raises:
        ConfigError: the folder holds no config.yaml.
    """
    found = [path for path in (run / "config.yaml", run / "final" / "config.yaml") if path.is_file()]
    if not found:
        rule, remedy = "holds no config.yaml", "name the folder of a run, or one of its checkpoints"
        raise ConfigError([Problem("run", str(run), rule, remedy)])
    overrides = [f"eval.checkpoint={run}", *([f"engine.precision={precision}"] if precision else [])]
    return load_config(found[0], overrides)


def model_alone(config: RunConfig) -> RunConfig:
    """The configuration without the data and the earlier stage, which an export does not read."""
    data = config.data.model_copy(update={"root": ".", "cot": ()})
    return config.model_copy(update={"stage": "eval", "data": data, "init_from": None})


def export(config: RunConfig, out: Path, kind: str, metrics: Sequence[Path] = ()) -> None:
    """Build the model of a run on the CPU and write the export with processor, settings and card.

    Args:
        config: of the run, `eval.checkpoint` naming its weights.
        out: made if needed.
        kind: light or merged.
        metrics: for the card.
    """
    from dataset.build import build_processor
    from dataset.prompt import load_tokenizer
    from model.aurora.build import build_model
    from model.aurora.card import read_metrics, write_card
    from model.aurora.export import save_pretrained

    for path in metrics:
        read_metrics(path)  # a wrong file is said before an hour of writing
    tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
    model = build_model(config.model_copy(update={"stage": "eval"}), len(tokenizer), seg_id)
    save_pretrained(model, out, merge=kind == "merged")
    build_processor(config, tokenizer, model.backbone.media_format).save_pretrained(out)
    save_config(written_config(config, out, kind == "merged"), out)
    write_card(out, config, metrics)


def written_config(config: RunConfig, out: Path, merged: bool) -> RunConfig:
    """The run's configuration as it stands beside an export: a merged one is its own base and SAM."""
    from model.aurora.export import SAM, SAM_JSON

    plain = config.model_copy(update={"eval": config.eval.model_copy(update={"checkpoint": None})})
    if not merged:
        return plain
    places = {"base": str(out), "sam_checkpoint": str(out / SAM)}
    if (out / SAM_JSON).is_file():
        places["sam_type"] = str(out / SAM_JSON)
    return plain.model_copy(update={"model": config.model.model_copy(update=places)})


if __name__ == "__main__":
    sys.exit(main())
