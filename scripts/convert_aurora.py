"""The published AURORA checkpoint as a light checkpoint of this project, with a report of every tensor.

    python scripts/convert_aurora.py mp_rank_00_model_states.pt runs/published --base weights/VideoLLaMA2.1-7B-AV \\
        --sam weights/sam_vit_h_4b8939.pth

The result stands wherever a run does: eval.checkpoint=runs/published, init_from=runs/published, scripts/export.py. The
file is read without running anything it may hold; one that needs more than tensors is refused. See docs/weights.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.schema import RunConfig  # noqa: E402 - the project's root must be on the path first
from dataset.prompt import load_tokenizer  # noqa: E402
from model.aurora.build import build_meta_model  # noqa: E402
from model.aurora.convert import ConversionReport, convert, read_published  # noqa: E402
from model.aurora.trained import Trained, check_fit, write_trained  # noqa: E402
from model.backbones.videollama2.shards import Checkpoint  # noqa: E402
from model.segmenters.sam import SAM_SIZES  # noqa: E402
from model.segmenters.sam_weights import read_sam_file, refuse_sam, resample_position_tables  # noqa: E402
from utils.config import load_config, save_config  # noqa: E402
from utils.errors import AuroraError, WeightsError  # noqa: E402
from utils.results import write_json  # noqa: E402
from utils.tables import format_table  # noqa: E402

REPORT = "convert_report.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="mp_rank_00_model_states.pt")
    parser.add_argument("out", type=Path, help="folder of the light checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="released VideoLLaMA2.1-7B-AV")
    parser.add_argument("--sam", type=Path, required=True, help="SAM weights that it was trained from")
    parser.add_argument("--sam-type", default="vit_h", help="default: %(default)s")
    parser.add_argument("--sam-image-size", type=int, default=224, help="default: %(default)s, as published")
    parser.add_argument("--alpha", type=float, default=16.0, help="LoRA's alpha (default: %(default)s, as published)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/grpo.yaml", help="settings to write beside it")
    options = parser.parse_args(arguments)
    try:
        report = run(options)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    if report.unknown:
        print(f"error: {len(report.unknown)} tensors have no place here; nothing was written", file=sys.stderr)
        return 1
    print(f"written: {options.out}")
    return 0


def run(options: argparse.Namespace) -> ConversionReport:
    """Read, map, check against the joint model and write; prints the report."""
    config = conversion_config(options)
    tokenizer, seg_id = load_tokenizer(options.base, config.model.seg_token)
    published = read_published(options.file)
    none = config.trainable.model_copy(update={"lora_rank": 0, "lora_targets": (), "full": (), "seg_rows_only": False})
    plain = build_meta_model(config.model_copy(update={"trainable": none}), seg_token_id=seg_id)
    sam = read_sam_file(options.sam)
    wanted = plain.segmenter.sam.state_dict()
    refuse_sam(sam, wanted, plain.segmenter.sizes, SAM_SIZES, options.sam)
    sam = resample_position_tables(sam, wanted, plain.segmenter.sizes.global_blocks)
    names = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    with Checkpoint(options.base) as base:
        trained, report = convert(published, base, sam, names, options.out, options.alpha)
    print(report_text(report))
    if report.rows[0] and report.seg_token_id != seg_id:
        token, last = config.model.seg_token, report.seg_token_id
        raise WeightsError(
            f"the last of the file's {report.rows[0]} rows is {last}, but the tokenizer of {options.base} gives "
            f"{token} the id {seg_id}. Remedy: use the tokenizer that the checkpoint was trained with."
        )
    if not report.unknown:
        settings = config.model_copy(update={"trainable": trained.trainable})
        check_fit(trained, build_meta_model(settings, seg_token_id=seg_id))
        write(options, trained, settings, report)
    return report


def conversion_config(options: argparse.Namespace) -> RunConfig:
    """The settings of the published run with the paths of the command line."""
    places = {
        "model.base": options.base,
        "model.sam_checkpoint": options.sam,
        "model.sam_type": options.sam_type,
        "model.sam_image_size": options.sam_image_size,
        "output_dir": options.out,
    }
    return load_config(options.config, [f"{field}={value}" for field, value in places.items()])


def write(options: argparse.Namespace, trained: Trained, config: RunConfig, report: ConversionReport) -> None:
    """The light checkpoint, its settings and the report."""
    write_trained(trained)
    save_config(config, options.out)
    table = [
        {"part": part, "fate": fate, "tensors": n, "values": report.values[part, fate]}
        for (part, fate), n in sorted(report.counts.items())
    ]
    lists = {name: value for name, value in asdict(report).items() if name not in ("counts", "values")}
    write_json(options.out / REPORT, {"file": str(options.file), "alpha": options.alpha, "tensors": table, **lists})


def report_text(report: ConversionReport) -> str:
    """The table by part and fate, the rows, and what is remarkable."""
    rows = [[part, fate, n, f"{report.values[part, fate]:,}"] for (part, fate), n in sorted(report.counts.items())]
    lines = [format_table(["part", "fate", "tensors", "values"], rows)]
    if report.rows[0]:
        have, need = report.rows
        lines.append(f"rows: {have} of the file, then {need - have} of the base; [SEG] = {report.seg_token_id}")
    for title, names in (("changed though frozen", report.changed), ("without a place", report.unknown)):
        if names:
            lines.append(f"{title}: {len(names)}\n  " + "\n  ".join(names[:40]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
