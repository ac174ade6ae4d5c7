"""Run a training step again that stopped with a non-finite loss or gradient: which sample, which module?

    python scripts/replay.py runs/sft/dumps/step_000123_rank0
    python scripts/replay.py runs/sft/dumps/step_000123_rank0 --weights runs/sft/checkpoints/step_000100

Builds the model with the dump's weights (or those of a checkpoint) on one process without DeepSpeed, sets the random
generators as they were and runs each micro-batch of the dump, then each of its samples alone. Exit status 1 if
something is not finite.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import check_paths, load_config  # noqa: E402 - the project's root must be on the path first
from utils.errors import AuroraError, CheckpointError, DataError  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="folder <run>/dumps/step_..._rank...")
    parser.add_argument("--weights", type=Path, help="run or checkpoint folder to take the trained weights from")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        return replay(options.dump, options.weights, options.overrides)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def replay(dump: Path, weights: Path | None, overrides: Sequence[str]) -> int:
    """Run, print, and say whether anything was not finite."""
    from model.stages.replay import load_dump, run_again

    found = load_dump(dump)
    if weights is None and not found["weights"]:
        raise CheckpointError(f"{dump}: holds no weights (ZeRO-3). Remedy: --weights <run>/checkpoints/<newest>.")
    config = load_config(dump / "config.yaml", [*overrides, f"init_from={weights or dump}", "engine.zero_stage=0",
                                               "sft.student_start=init_from", "engine.offload=false"])  # fmt: skip
    check_paths(config)
    stage, batches = build(config, found["batches"])
    from dataset.collate import collate

    print(f"step {found['step']} of process {found['rank']}: {found['error']}")
    device, failed = stage.model.device, False
    for number, (samples, rng) in enumerate(zip(batches, found["rng"], strict=True), 1):
        rows = [(f"micro-batch {number} of {len(batches)}", samples)]
        rows += [(f"{s.uid} (row {s.row})", [s]) for s in samples]
        for name, members in rows:
            result = run_again(stage, collate(members).to(device), rng)
            print(f"{name}: {'NOT FINITE, ' if wrong(result) else ''}{sentence(result)}")
            failed = failed or wrong(result)
    return 1 if failed else 0


def build(config: Any, batches: list[list[dict[str, Any]]]) -> tuple[Any, list[list[Any]]]:
    """The stage around the bare model in training mode, and the dump's samples by micro-batch.

    Raises:
        DataError: the data no longer hold such a sample.
    """
    from dataset.build import build_processor, training_clips
    from dataset.prompt import load_tokenizer
    from dataset.references import build_prompts
    from model.aurora.build import build_model
    from model.stages.base import build_stage
    from model.stages.replay import describe
    from utils import distributed

    device = distributed.start(config.engine.threads)
    tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
    model = build_model(config, len(tokenizer), seg_id, device)
    sizes = model.backbone.config
    processor = build_processor(config, tokenizer, sizes.vision.image_size, sizes.beats.mel_bins)
    clips = training_clips(config, processor, build_prompts(config.model, tokenizer, seg_id))
    rows = [row.row for part in getattr(clips, "datasets", [clips]) for row in part.rows]

    def sample_of(one: dict[str, Any]) -> Any:
        near = (clips[i] for i, row in enumerate(rows) if row == one["row"])
        sample = next((s for s in near if describe(s) == one), None)
        if sample is None:
            raise DataError(f"{config.data.root}: row {one['row']} is not what it was. Remedy: restore the data.")
        return sample

    samples = [[sample_of(one) for one in batch] for batch in batches]
    return build_stage(config, model.train(), tokenizer), samples


def wrong(result: dict[str, Any]) -> bool:
    """Whether loss, gradient or a module's output is not finite."""
    return not math.isfinite(result["loss"] + result["gradient_norm"]) or result["module"] is not None


def sentence(result: dict[str, Any]) -> str:
    """A result in words."""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in result["parts"].items() if name != "loss")
    text = f"loss {result['loss']:.6g} ({parts}), gradient norm {result['gradient_norm']:.4g}"
    if result["module"]:
        text += f"; first non-finite output: {result['module']}"
    if result["parameter"]:
        text += f"; first non-finite gradient: {result['parameter']}"
    return text


if __name__ == "__main__":
    sys.exit(main())
