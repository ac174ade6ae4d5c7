"""Training, every stage: `deepspeed --num_gpus=2 train_ds.py --config configs/sft.yaml [section.field=value ...]`.

One process needs no launcher: `python train_ds.py --config configs/mini/sft.yaml`. `torchrun` works too. A run that was
interrupted continues from its newest complete checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys

from configs.schema import RunConfig
from utils.config import check_paths, help_text, load_config, save_config
from utils.errors import AuroraError, ConfigError, Problem, run_command

INTACT = "the last checkpoint is intact, and the same command continues from it"


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, RunConfig]:
    """Options and configuration of a command line; ends the process with 1 where the configuration is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"fields, as section.field=value (value in YAML):\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file, e.g. configs/sft.yaml")
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier run is kept under another name")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if config.stage == "eval":
            raise ConfigError([Problem("stage", "eval", "is no training stage", "use train_ds_test.py")])
        check_paths(config)
    except AuroraError as error:
        parser.exit(1, f"error: {error}\n")
    return options, config


if __name__ == "__main__":
    PARSED = parse()  # --help and every error of the configuration come before what follows, which takes seconds

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from dataset.loader import build_processor, training_batches, training_clips
from dataset.prompt import build_prompts, load_tokenizer
from model.aurora.build import build_model
from model.aurora.trainable import component_counts, format_counts, total_count
from model.aurora.trained import save_trained
from model.stages import build_stage
from model.stages.base import Stage
from utils import checkpoint, distributed
from utils.checkpoint import Progress
from utils.ds import deepspeed
from utils.engine import build_engine, gradient_norm
from utils.files import write_text
from utils.guards import check_finite
from utils.log import RunLog, due, setup_logging
from utils.types import Batch


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return train_command(*parse(arguments))


def train_command(options: argparse.Namespace, config: RunConfig) -> int:
    """Train; returns the exit status."""
    advice = partial(distributed.memory_advice, options.config, options.overrides)
    return run_command(lambda: run(config, options.fresh), INTACT, advice)


def run(config: RunConfig, fresh: bool = False) -> None:
    """Build the parts, train to `optim.steps`, leave the trained weights in `output_dir/final`.

    Args:
        config: the run.
        fresh: start at step 0 though the folder holds an earlier run, which is renamed.
    """
    device = distributed.start(config.engine.threads)
    logger, stop = setup_logging(), distributed.StopSignal(config.log.grace_seconds)
    output = Path(config.output_dir)
    held = checkpoint.claim(output)
    if fresh:
        checkpoint.put_aside(output)
    earlier = checkpoint.checkpoint_to_resume(config)

    distributed.seed_everything(config.seed)  # the same on every process while weights are made
    tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
    model = build_model(config, len(tokenizer), seg_id, device)
    processor = build_processor(config, tokenizer, model.backbone.media_format)
    clips = training_clips(config, processor, build_prompts(config.model, tokenizer, seg_id))
    counts = component_counts(model)
    total = total_count(counts)
    logger.info("%d rows; %s of %s parameters are trained", len(clips), f"{total.trainable:,}", f"{total.total:,}")

    engine = build_engine(model, config)
    stage = build_stage(config, engine, tokenizer)
    distributed.seed_everything(config.seed, distributed.rank())
    progress = checkpoint.load_checkpoint(engine, earlier) if earlier else Progress()
    loader = training_batches(config, clips, distributed.rank(), distributed.world_size(), progress.samples)
    log = RunLog(output, config, progress.step)
    if distributed.is_main():
        save_config(config, output)
        write_text(output / "parameters.txt", format_counts(counts) + "\n")

    def save_weights(folder: Path) -> None:
        save_trained(model, folder, write=distributed.is_main())

    for _ in train(engine, stage, loader, config, progress, log, stop):
        checkpoint.save_checkpoint(engine, config, progress, save_weights)
    log.close()
    if progress.step < config.optim.steps:
        logger.info("stopped by SIGTERM after step %d; the same command continues", progress.step)
    else:
        save_weights(output / "final")
        if distributed.is_main():
            save_config(config, output / "final")
        logger.info("done: %d steps, weights in %s", progress.step, output / "final")
    stop.close()
    engine.destroy()
    distributed.stop()
    del held


def train(
    engine: deepspeed.DeepSpeedEngine,
    stage: Stage,
    loader: Iterable[Batch],
    config: RunConfig,
    progress: Progress,
    log: RunLog,
    stop: distributed.StopSignal,
) -> Iterator[None]:
    """The loop of every stage: counts `progress` up to `optim.steps` and yields where a checkpoint is due.

    An optimiser step reads `engine.accumulation` micro-batches. A stage first prepares each of them without gradient (a
    teacher's features, sampled answers and their rewards), then trains on it `stage.updates` times.

    Ends early, after a last yield, when a process was asked to stop.
    """
    batches, accumulation, steps = iter(loader), config.engine.accumulation, config.optim.steps
    engine.train()
    # Every process asks, so that all of them stop after the same step.
    stopping = stop.requested()
    while progress.step < steps and not stopping:
        start = progress.step
        # A batch is prepared when its turn comes; only several updates on the same samples need all of them kept.
        prepared = (stage.prepare(batch) for batch in islice(batches, accumulation))
        if stage.updates > 1:
            prepared = list(prepared)
        for update in range(stage.updates):
            rate = engine.get_lr()[0]
            for item in prepared:
                loss = stage.loss(item)
                check_finite(loss, progress.step + 1, item.batch)
                # DeepSpeed averages over the micro-batches and steps at the last of them.
                engine.backward(loss.total)
                engine.step()
                log.add(loss.parts, item.batch, item.answers if update == 0 else None)
            progress.step += 1
            log.step(progress.step, rate, gradient_norm(engine))
        progress.samples += accumulation * config.engine.micro_batch * distributed.world_size()
        if distributed.is_main() and due(config.log.samples_every, start, progress.step):
            log.samples(progress.step, stage.records(item))
        stopping = stop.requested()
        if stopping or due(config.log.save_every, start, progress.step) or progress.step >= steps:
            progress.metrics = log.means_since_save()
            yield
            stopping = stopping or stop.requested()  # asked meanwhile: the same state is not written twice


if __name__ == "__main__":
    sys.exit(train_command(*PARSED))
