"""Ask a trained model about one clip of your own.

    python scripts/predict.py --checkpoint runs/quickstart/sft/final --video clip.mp4 \\
        --reference "The object making a sound on the left." --out prediction

The clip is a video file (mp4, webm, mkv ...) with its sound, or a folder of numbered frames (0.jpg, 1.jpg, ...) with an
audio.wav in it or beside it. Ten frames at equal distances are read of a video. Writes into --out:

    overlay.mp4 (or .gif)   the frames with the mask, and the sound; small frames enlarged to be seen
    masks/00000.png ...     0 and 255, one per frame, in the size of the video
    answer.txt              reference and reasoning
    answer.json             the same with the steps, the class, times and areas of the frames, masks as COCO RLE

A checkpoint is a folder of train_ds.py (<run>/final) or an export (scripts/export.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint, a run or an export")
    parser.add_argument("--video", type=Path, required=True, help="video file, or folder of frames")
    parser.add_argument("--reference", required=True, help="what is to be segmented, as a sentence")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    sound = parser.add_mutually_exclusive_group()
    sound.add_argument("--sound", type=Path, help="sound file that takes the place of the video's own")
    sound.add_argument("--need-sound", action="store_true", help="fail where there is no sound (default: warn)")
    sound.add_argument("--silent", action="store_true", help="silence instead of any sound, without a warning")
    parser.add_argument("--frames", type=int, default=10, help="frames read of a video (default: %(default)s)")
    parser.add_argument("--overlay", choices=("mp4", "gif"), default="mp4", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    parser.add_argument("overrides", nargs="*", metavar="model.field=value", help="put over the checkpoint's config")
    options = parser.parse_intermixed_args(arguments)
    for name in ("frames", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if not options.reference.strip():
        parser.error("--reference: says nothing; describe what is to be segmented")
    return options


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    OPTIONS = parse()  # before the imports below, which take seconds: --help and a slip of the pen are answered at once

import numpy as np  # noqa: E402
import torch  # noqa: E402

from configs.schema import RunConfig  # noqa: E402
from dataset.loader import build_processor  # noqa: E402
from dataset.media import SAMPLE_RATE, read_audio  # noqa: E402
from dataset.processor import AuroraProcessor  # noqa: E402
from dataset.prompt import load_tokenizer  # noqa: E402
from dataset.video import VideoClip, read_clip  # noqa: E402
from model.aurora.build import build_model  # noqa: E402
from model.aurora.export import from_pretrained  # noqa: E402
from model.aurora.inference import predict  # noqa: E402
from model.aurora.model import AuroraModel  # noqa: E402
from utils.answers import reasoning_steps  # noqa: E402
from utils.config import check_paths, load_config  # noqa: E402
from utils.draw import PREDICTION, overlay, save_masks, write_gif, write_mp4  # noqa: E402
from utils.errors import ConfigError, DataError, Problem, run_command  # noqa: E402
from utils.files import write_bytes, write_json  # noqa: E402
from utils.results import encode_masks  # noqa: E402
from utils.types import Prediction  # noqa: E402

EXPORT_FILE = "preprocessor_config.json"
MAX_PIXELS, MAX_SECONDS = 50_000_000, 600.0
OVERLAY_SIDE = 240
"""Frames with a shorter side than this are enlarged by a whole factor in the overlay (never the masks)."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Predict and write the results. A faulty video is found before the model is loaded."""
    clip = heard_clip(options)
    model, processor = load(options.checkpoint, options.overrides, options.device)
    try:
        batch = processor(clip.frames, clip.sound, options.reference)
    except ValueError as error:  # a sound longer than the length to which the checkpoint pads it
        raise DataError(f"the clip cannot be read by this model: {error}") from error
    parameter = next(model.parameters())
    batch = batch.to(parameter.device, parameter.dtype)
    write_results(options, clip, predict(model, batch, processor.tokenizer, options.max_new_tokens)[0])


def heard_clip(options: argparse.Namespace) -> VideoClip:
    """The clip with the sound that the options choose; where there is none, silence and a warning.

    Raises:
        DataError: the clip or the sound cannot be read, or there is none though it is needed.
    """
    own = options.sound is None and not options.silent
    clip = read_clip(options.video, options.frames, MAX_PIXELS, MAX_SECONDS, own)
    if options.sound is not None:
        wave = read_audio(options.sound, SAMPLE_RATE, MAX_SECONDS)
        if len(wave) < SAMPLE_RATE:
            raise DataError(f"{options.sound}: {len(wave) / SAMPLE_RATE:.2f} s. Remedy: use a second of sound or more.")
        return replace(clip, sound=wave)
    if clip.sound is not None:
        return clip
    remedy = "Remedy: give its sound (--sound FILE), or say that it is silent (--silent)."
    if options.need_sound:
        raise DataError(f"{options.video}: has no sound. {remedy}")
    if not options.silent:
        print(f"warning: {options.video}: has no sound; the model hears silence. {remedy}", file=sys.stderr)
    return replace(clip, sound=np.zeros(round(clip.seconds * SAMPLE_RATE), np.float32))


def load(
    checkpoint: Path, overrides: Sequence[str] = (), device: str | None = None
) -> tuple[AuroraModel, AuroraProcessor]:
    """Model and preprocessing of a checkpoint or an export.

    Args:
        checkpoint: its folder, or a run's.
        overrides: `section.field=value` over the configuration that is stored with a checkpoint.
        device: name, or None to choose.

    Raises:
        AuroraError: no checkpoint there, or weights that are missing or do not fit.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (checkpoint / EXPORT_FILE).is_file():
        return from_pretrained(checkpoint, device=device), AuroraProcessor.from_pretrained(checkpoint)
    config = checkpoint_config(checkpoint, overrides)
    tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
    model = build_model(config, len(tokenizer), seg_id, device)
    return model, build_processor(config, tokenizer, model.backbone.media_format)


def checkpoint_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration stored with a checkpoint, as one that evaluates it and keeps no features.

    Raises:
        ConfigError: there is none, or it names files that do not exist.
    """
    found = [path for path in (folder / "config.yaml", folder / "final" / "config.yaml") if path.is_file()]
    if not found:
        remedy = "name the folder of a run, of one of its checkpoints, or of an export"
        raise ConfigError([Problem("--checkpoint", str(folder), f"holds no config.yaml and no {EXPORT_FILE}", remedy)])
    saved = load_config(found[0], overrides)
    training = {"root": str(folder), "cot": (), "feature_cache": "none"}  # the data of the training need not be here
    config = saved.model_copy(update={
        "stage": "eval",
        "init_from": None,
        "eval": saved.eval.model_copy(update={"checkpoint": str(folder)}),
        "data": saved.data.model_copy(update=training),
    })  # fmt: skip
    check_paths(config)
    return config


def write_results(options: argparse.Namespace, clip: VideoClip, prediction: Prediction) -> None:
    """Write overlay, masks and answer, and print the answer."""
    masks = (prediction.mask_logits > 0).cpu().numpy()
    drawn = np.stack([overlay(frame, mask, PREDICTION) for frame, mask in zip(clip.frames, masks, strict=True)])
    times = -(-OVERLAY_SIDE // min(drawn.shape[1:3]))
    drawn = drawn.repeat(times, 1).repeat(times, 2)
    out = options.out
    if options.overlay == "gif":
        write_gif(out / "overlay.gif", drawn, clip.seconds)
    else:
        write_mp4(out / "overlay.mp4", drawn, clip.seconds, None if options.silent else clip.sound, SAMPLE_RATE)
    save_masks(out / "masks", masks)
    steps = reasoning_steps(prediction.text, options.reference)
    write_bytes(out / "answer.txt", f"{options.reference.strip()}\n\n{prediction.text}\n".encode())
    write_json(out / "answer.json", {
        "video": str(options.video),
        "checkpoint": str(options.checkpoint),
        "reference": options.reference.strip(),
        "reasoning": prediction.text,
        "steps": [{"step": name, "text": text} for name, text in steps],
        "answer_class": prediction.class_name,
        "has_seg": prediction.has_seg,
        "frames": [
            {"second": round(time, 3), "mask_share": float(mask.mean())}
            for time, mask in zip(clip.times, masks, strict=True)
        ],
        "masks": encode_masks(masks),
    })  # fmt: skip
    print(prediction.text)
    if not prediction.has_seg:
        print("warning: the answer asks for no mask ([SEG] is missing); the masks are empty", file=sys.stderr)
    shares = ", ".join(f"{100 * mask.mean():.1f}" for mask in masks)
    print(f"{out}: overlay.{options.overlay}, masks, answer.txt, answer.json; mask in % of each frame: {shares}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(OPTIONS)))
