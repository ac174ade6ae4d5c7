"""The model card of an export: what it is, how to load it, and the numbers of its evaluations. No number is invented:
without a metrics.json the card says that the model has not been evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from configs.schema import RunConfig
from model.aurora.trained import SETTINGS
from utils.errors import DataError
from utils.tensor_files import read_json

CARD = "README.md"
SCORES = ("J", "F", "J&F", "S")
SHARES = {
    "class_accuracy": "class accuracy",
    "format_share": "well-formed answers",
    "faithful": "faithful reasoning",
}


def write_card(folder: str | Path, config: RunConfig, metrics: Iterable[Path] = ()) -> Path:
    """Write README.md into an export.

    Args:
        folder: written by `export.save_pretrained`.
        config: of the run that was exported.
        metrics: metrics.json files of its evaluations (train_ds_test.py writes one per split).

    Raises:
        DataError: a metrics file is unreadable or holds no scores.
    """
    folder = Path(folder)
    settings = read_json(folder / SETTINGS)
    found = [read_metrics(path) for path in metrics]
    files = [(path.name, path.stat().st_size) for path in sorted(folder.iterdir()) if path.is_file()]
    text = card(settings, config, found, [item for item in files if item[0] != CARD])
    (folder / CARD).write_text(text, encoding="utf-8")
    return folder / CARD


def read_metrics(path: str | Path) -> dict[str, Any]:
    """A metrics.json of train_ds_test.py.

    Raises:
        DataError: unreadable, or without a split and its scores.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        data["split"], data["scores"]["n"], data["protocols"]  # noqa: B018 - the fields that a card needs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no metrics of an evaluation ({error!r}). Remedy: name a metrics.json of train_ds_test.py."
        ) from error
    return data


def card(
    settings: Mapping[str, Any], config: RunConfig, metrics: list[dict[str, Any]], files: list[tuple[str, int]]
) -> str:
    """The text of the card: YAML header, use, training, evaluation, files."""
    merged = settings["kind"] == "merged"
    header = {
        "library_name": "pytorch" if merged else "peft",
        "pipeline_tag": "mask-generation",
        "base_model": config.model.base,
        "tags": ["audio-visual segmentation", "reasoning segmentation", "Ref-AVS", "AURORA"],
    }
    if metrics:
        header["model-index"] = [{"name": f"aurora-{config.stage}", "results": [_result(m) for m in metrics]}]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n",
        f"# AURORA, stage {config.stage} ({settings['kind']})\n",
        _use(merged),
        _training(settings, config),
        _evaluation(metrics),
        "## Files\n\n| file | bytes |\n|---|---:|\n" + "".join(f"| {name} | {size:,} |\n" for name, size in files),
    ]
    return "\n".join(parts)


def _use(merged: bool) -> str:
    needs = (
        "The folder holds everything: backbone under the released names, SAM, the [SEG] head and the tokenizer."
        if merged
        else "The folder holds what training changed; base and SAM are read from where trained.json remembers them "
        "(pass `base=` and `sam_checkpoint=` if they are elsewhere). The adapters are in peft's own format."
    )
    return f"""Answers a question about a clip with its reasoning and segments the object in every frame.

```python
import torch
from dataset.processor import AuroraProcessor
from model.aurora.inference import predict
from model.aurora.export import from_pretrained

model = from_pretrained("FOLDER", dtype=torch.bfloat16, device="cuda")
processor = AuroraProcessor.from_pretrained("FOLDER")
batch = processor(frames, sound, "The object that makes the sound on the left.")  # uint8 [T,H,W,3], float32 16 kHz
answer = predict(model, batch, processor.tokenizer, max_new_tokens=512)[0]
print(answer.text, (answer.mask_logits > 0).shape)
```

{needs} Run it in bf16 or fp32: float16 overflows.
"""


def _training(settings: Mapping[str, Any], config: RunConfig) -> str:
    t, o, e = config.trainable, config.optim, config.engine
    trained = [f"LoRA rank {t.lora_rank}, alpha {t.lora_alpha:g}"] if t.lora_rank else []
    trained += [f"whole: `{'`, `'.join(t.full)}`"] if t.full else []
    trained += ["[SEG] rows of embedding and lm_head"] * t.seg_rows_only
    trained += ["[SEG] head"] * t.seg_head + ["mask decoder"] * t.mask_decoder
    audio = config.data.audio_padding_seconds
    rows = {
        "stage": config.stage,
        "base": config.model.base,
        "SAM": f"{config.model.sam_checkpoint} at {config.model.sam_image_size} pixels",
        "trained": ", ".join(trained),
        "optimiser steps": o.steps,
        "peak learning rate": f"{o.lr:g} ({o.schedule})",
        "clips per step and process": e.micro_batch * e.accumulation,
        "sound": "not padded" if audio is None else f"padded to {audio:g} s",
        "frames": config.data.frame_resize,
        "seed": config.seed,
        "stored type": settings["dtype"],
        "id of [SEG]": settings["seg_token_id"],
    }
    return "## Training\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _evaluation(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return "## Evaluation\n\nNot evaluated: no metrics.json was given when this card was written.\n"
    header = ["split", "protocol", "n", *SCORES, *SHARES.values()]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for m in metrics:
        scores = m["scores"]
        for protocol in m["protocols"]:
            cells = [m["split"], protocol, scores["n"], *(scores[protocol].get(name) for name in SCORES)]
            cells += [scores.get(name) for name in SHARES]
            lines.append(f"| {' | '.join(_cell(value) for value in cells)} |")
    hashes = sorted({str(m.get("checkpoint_sha256", "unknown"))[:12] for m in metrics})
    probes = sorted({str(m.get("probe", "none")) for m in metrics})
    lines += ["", f"In percent, as train_ds_test.py wrote them (checkpoint {', '.join(hashes)}; "
              f"probe {', '.join(probes)}; code {metrics[0].get('git', 'unknown')})."]  # fmt: skip
    return "## Evaluation\n\n" + "\n".join(lines) + "\n"


def _result(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the hub's model index."""
    protocol = metrics["protocols"][0]
    scores = metrics["scores"][protocol]
    return {
        "task": {"type": "mask-generation"},
        "dataset": {"type": "ref-avs", "name": "Ref-AVS", "split": metrics["split"]},
        "metrics": [
            {"type": name, "value": round(scores[name], 4), "name": f"{name} ({protocol})"}
            for name in SCORES
            if name in scores
        ],
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
