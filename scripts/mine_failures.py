"""Mine the failures of a stage-1 checkpoint on the training split (paper section 3.2).

    deepspeed --num_gpus=2 scripts/mine_failures.py --checkpoint runs/sft/final --out runs/sft/failures.jsonl
    python scripts/mine_failures.py --config configs/mini/eval.yaml --checkpoint runs/mini/sft/final --out ...

Every training row is answered greedily, as in evaluation: by all processes, and an interrupted run continues when the
same command is given again. A row is kept if its mean IoU is below --iou and its answer names another class than the
true one, or none. Beside --out: <out>.report.json, and <out>.eval/ with all predictions.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_ds_test  # noqa: E402 - the project's root must be on the path first
from dataset.annotate.failures import IOU, write_failures  # noqa: E402
from utils.distributed import memory_advice  # noqa: E402
from utils.errors import AuroraError, run_command  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/eval.yaml", help="evaluation YAML (default: %(default)s)")
    parser.add_argument("--checkpoint", required=True, help="run or checkpoint folder of stage 1")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--iou", type=float, default=IOU, help="rows below this mean IoU (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. eval.limit=500")
    options = parser.parse_intermixed_args(arguments)
    if not 0 < options.iou <= 1:
        parser.error(f"--iou {options.iou}: must be in (0, 1]")
    folder = options.out.with_name(f"{options.out.name}.eval")
    settings = [
        *options.overrides,
        f"eval.checkpoint={options.checkpoint}",
        "eval.splits=[train]",
        "eval.protocol=[per_expression]",
        "eval.probe=none",
        "eval.pictures=0",
        f"eval.output_dir={folder}",
    ]

    def mine() -> None:
        config, stage = train_ds_test.evaluated_config(options.config, settings)
        if stage == "teacher":
            raise AuroraError(f"{options.checkpoint}: a teacher writes no reasoning. Remedy: name stage 1.")
        train_ds_test.run(config, stage)
        if os.environ.get("RANK", "0") == "0":
            report = write_failures(folder / "train" / "predictions.jsonl", options.out, options.iou)
            print("{mined} of {rows} rows mined ({mined_percent} %): ".format(**report) + str(options.out))

    advice = partial(memory_advice, options.config, settings)
    return run_command(mine, train_ds_test.INTACT, advice)


if __name__ == "__main__":
    sys.exit(main())
