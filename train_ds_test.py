"""Evaluation: `deepspeed --num_gpus=2 train_ds_test.py --config configs/eval.yaml eval.checkpoint=runs/sft/final`.

One process needs no launcher: `python train_ds_test.py --config configs/mini/eval.yaml`. Every row is answered greedily
and segmented; J, F, J&F (S on null rows), class accuracy and, where the true chain is known, the share of faithful
reasoning are printed per split and question kind. A checkpoint of stage teacher does not answer: it reads the true
answer, as it does when it teaches, so its J is what the mask decoder reaches when the words are right.

Files, per split: <eval.output_dir>/<split>/{metrics.json, predictions.jsonl, pictures/, masks/, probabilities/}. An
interrupted evaluation continues where it stopped when the same command is given again, at any number of processes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from configs.schema import EvalConfig, RunConfig
from utils.config import check_paths, help_text, load_config
from utils.errors import AuroraError, ConfigError, Problem, run_command

INTACT = "finished rows are on disk, and the same command continues"
INPUT_FIELDS = ("num_frames", "frame_resize", "audio_padding_seconds", "answer")
"""Fields of `data` that, like the section `model`, are the checkpoint's own unless the command line names them."""


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, RunConfig, str]:
    """Options, configuration and the checkpoint's stage; ends the process with 1 where the configuration is wrong."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"fields:\n{help_text()}", formatter_class=layout)
    parser.add_argument("--config", default="configs/eval.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        return options, *evaluated_config(options.config, options.overrides)
    except AuroraError as error:
        parser.exit(1, f"error: {error}\n")


def evaluated_config(path: str, overrides: list[str]) -> tuple[RunConfig, str]:
    """A configuration with the checkpoint's model and input settings, and the checkpoint's stage.

    Args:
        path: YAML file.
        overrides: of the command line.

    Raises:
        ConfigError: it is wrong, the stage is not eval, the checkpoint has no config.yaml, or files are missing.
    """
    config = load_config(path, overrides)
    if config.stage != "eval" or config.eval.checkpoint is None:
        raise ConfigError([Problem("stage", config.stage, "must be eval", "train with train_ds.py")])
    folder = Path(config.eval.checkpoint)
    found = [path for path in (folder / "config.yaml", folder / "final" / "config.yaml") if path.is_file()]
    if not found:
        rule, remedy = "holds no config.yaml", "name the folder of a run, or one of its checkpoints"
        raise ConfigError([Problem("eval.checkpoint", str(folder), rule, remedy)])
    own = ("model.", *(f"data.{name}=" for name in INPUT_FIELDS))
    saved = load_config(found[0], [text for text in overrides if text.strip().startswith(own)])
    data = config.data.model_copy(update={name: getattr(saved.data, name) for name in INPUT_FIELDS})
    config = config.model_copy(update={"model": saved.model, "data": data})
    check_paths(config)
    return config, saved.stage


if __name__ == "__main__":
    PARSED = parse()  # --help and every error of the configuration come before what follows, which takes seconds

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.clips import ClipDataset, ClipSettings
from dataset.loader import build_index, build_loader, build_processor
from dataset.media import read_frames
from dataset.mini.language import chain_is_faithful
from dataset.prompt import NEED_REASONING, build_prompts, load_tokenizer
from dataset.records import read_cot
from model.aurora.build import build_model
from model.aurora.features import FeatureCache
from model.aurora.inference import predict, predict_given
from model.aurora.model import AuroraModel
from model.aurora.trained import find_trained
from utils import distributed
from utils.evaluation import SplitTask, evaluate_split, evaluation_facts, evenly, spread
from utils.log import setup_logging
from utils.tables import split_table
from utils.types import Batch, Prediction, Sample


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return evaluate_command(*parse(arguments))


def evaluate_command(options: argparse.Namespace, config: RunConfig, stage: str) -> int:
    """Evaluate; returns the exit status."""
    advice = partial(distributed.memory_advice, options.config, options.overrides)
    return run_command(lambda: run(config, stage), INTACT, advice)


def run(config: RunConfig, stage: str) -> dict[str, Any]:
    """Evaluate every split of the configuration; returns their scores (see `scoring.score_split`)."""
    device = distributed.start(config.engine.threads)
    logger = setup_logging()
    tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
    model = build_model(config, len(tokenizer), seg_id, device)
    processor = build_processor(config, tokenizer, model.backbone.media_format)
    prompts = build_prompts(config.model, tokenizer, seg_id)
    index = build_index(config.data)
    given = config.data.answer if stage == "teacher" else None
    settings = ClipSettings(given, None, config.data.num_frames, config.data.max_image_pixels,
                            config.data.max_audio_seconds, probe=config.eval.probe, seed=config.seed,
                            repeated=True)
    facts = evaluation_facts(config, stage, find_trained(str(config.eval.checkpoint)), index.table)
    # The teacher reads true answers; some are made from reasoning records, which only the mini world has for tests.
    known = read_cot(config.data.cot, index) if given in NEED_REASONING else {}

    def true_answer(sample: Sample) -> str:
        record = known.get(sample.row)
        return prompts.answer_text(given, sample.class_name, None if record is None else record.reasoning)

    predict_batch = predictor(model, tokenizer, config.eval, true_answer if given else None)
    if given is None and distributed.is_main():
        logger.info("answers are drawn %s", model.generation_defaults.greedy(config.eval.repetition_penalty))

    scores = {}
    for split in config.eval.splits:
        rows = index.rows(split)
        if config.eval.limit is not None:
            rows = [rows[i] for i in evenly(len(rows), min(config.eval.limit, len(rows)))]
        clips = ClipDataset(index, rows, processor, prompts, known, settings)
        numbers = tuple(row.row for row in rows)
        task = SplitTask(
            folder=Path(config.eval.output_dir) / split,
            split=split,
            rows=numbers,
            protocols=config.eval.protocol,
            batch_size=config.eval.batch_size,
            facts=facts,
            pictures=spread(numbers, [row.kind for row in rows], config.eval.pictures),
            save_masks=config.eval.save_masks,
            save_probabilities=config.eval.save_probabilities,
        )
        scores[split] = evaluate_split(
            task,
            lambda order, clips=clips: build_loader(
                clips, order, config.eval.batch_size, config.data.num_workers, config.seed
            ),
            predict_batch,
            lambda sample: read_frames(index.frames_folder(sample.video_key), config.data.num_frames),
            chain_is_faithful if given is None else None,
        )
        failed = scores[split]["failed"]
        if failed:
            logger.info("%s: %d answers without [SEG], scored as empty masks: rows %s", split, len(failed), failed[:20])
    if distributed.is_main():
        print(split_table(scores, config.eval.protocol), flush=True)
        print(f"checkpoint {facts['checkpoint_sha256'][:12]}, probe {config.eval.probe}: {config.eval.output_dir}")
    distributed.stop()
    return scores


def predictor(
    model: AuroraModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalConfig,
    true_answer: Callable[[Sample], str] | None,
) -> Callable[[Batch], list[Prediction]]:
    """Batch -> predictions: generated answers, or true answers read as they stand."""

    def predict_batch(batch: Batch) -> list[Prediction]:
        # Clips repeat within a batch. Memory that outlived it would grow with the split; files may stay.
        if model.feature_cache.mode != "disk":
            model.feature_cache = FeatureCache("memory")
        if true_answer is None:
            penalty = settings.repetition_penalty
            return predict(model, batch, tokenizer, settings.max_new_tokens, repetition_penalty=penalty)
        return predict_given(model, batch, [true_answer(sample) for sample in batch.samples])

    return predict_batch


if __name__ == "__main__":
    sys.exit(evaluate_command(*PARSED))
