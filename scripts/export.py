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
from dataset.loader import build_processor  # noqa: E402
from dataset.prompt import load_tokenizer  # noqa: E402
from model.aurora.build import build_model  # noqa: E402
from model.aurora.export import SAM, SAM2, SAM_JSON, read_metrics, save_pretrained, write_card  # noqa: E402
from utils.config import check_paths, load_config, save_config  # noqa: E402
from utils.errors import ConfigError, Problem, run_command  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run or checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write; must not hold another model")
    parser.add_argument("--kind", choices=("light", "merged"), default="merged", help="default: %(default)s")
    parser.add_argument("--metrics", type=Path, nargs="*", default=[], help="metrics.json files for the model card")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="stored type (default: as the run was trained)")
    options = parser.parse_args(arguments)
    return run_command(lambda: export(options.run, options.out, options.kind, options.metrics, options.precision))


def export(run: Path, out: Path, kind: str, metrics: Sequence[Path] = (), precision: str | None = None) -> None:
    """Build the model of a run on the CPU and write the export with processor, settings and card.

    Args:
        run: folder of a run or of one of its checkpoints.
        out: made if needed.
        kind: light or merged.
        metrics: metrics.json files for the card.
        precision: fp32 or bf16; None = as the run was trained.

    Raises:
        AuroraError: the folder holds no config.yaml, or a file that the run needs is missing or does not fit.
    """
    config = exported_config(run, precision)
    check_paths(config)
    scores = [read_metrics(path) for path in metrics]  # a wrong file is said before an hour of writing
    tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
    model = build_model(config, len(tokenizer), seg_id)
    save_pretrained(model, out, merge=kind == "merged")
    build_processor(config, tokenizer, model.backbone.media_format).save_pretrained(out)
    saved = load_config(_config_file(run), [f"engine.precision={config.engine.precision}"])
    if kind == "merged":  # it is its own base and SAM
        places = {"base": str(out), "sam_checkpoint": str(out / (SAM if saved.model.segmenter == "sam" else SAM2))}
        places |= {"sam_type": str(out / SAM_JSON)} if (out / SAM_JSON).is_file() else {}
        saved = saved.model_copy(update={"model": saved.model.model_copy(update=places)})
    save_config(saved, out)
    write_card(out, saved, scores)
    print(f"{kind} export in {out}")


def exported_config(run: Path, precision: str | None) -> RunConfig:
    """The run's own configuration as one that evaluates it, without the data, which an export does not read."""
    own = [f"eval.checkpoint={run}", *([f"engine.precision={precision}"] if precision else [])]
    config = load_config(_config_file(run), own)
    data = config.data.model_copy(update={"root": ".", "cot": ()})
    return config.model_copy(update={"stage": "eval", "data": data, "init_from": None})


def _config_file(run: Path) -> Path:
    found = [path for path in (run / "config.yaml", run / "final" / "config.yaml") if path.is_file()]
    if not found:
        rule, remedy = "holds no config.yaml", "name the folder of a run, or one of its checkpoints"
        raise ConfigError([Problem("run", str(run), rule, remedy)])
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
