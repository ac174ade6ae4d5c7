"""The released AURORA checkpoint as a light checkpoint of this project, with a report of every tensor.

    python scripts/convert_aurora.py mp_rank_00_model_states.pt runs/released --base weights/VideoLLaMA2.1-7B-AV \\
        --sam weights/sam_vit_h_4b8939.pth

The result stands wherever a run does: eval.checkpoint=runs/released, init_from=runs/released, scripts/export.py. The
file is read without running anything it may hold; one that needs more than tensors is refused. See docs/weights.md.

| released (`mp_rank_00_model_states.pt`, DeepSpeed) | here |
|---|---|
| names of peft 0.4: `base_model.model.` in front, adapted weights without `.base_layer` | our names |
| `model.visual_model.*`, `model.text_hidden_fcs.*` | `segmenter.sam.*`, `text_hidden_fcs.*` |
| LoRA on every q_proj and v_proj of language model, BEATs and mask decoder (train_ds.py:204-224) | `lora_targets` |
| all 8.5 G weights, frozen ones too | what differs from base and SAM |
| 151,647 rows of embed_tokens and lm_head (train_ds.py:242 shrinks them to the tokenizer's length) | 152,064 rows |

The rows: an id is a row number, so the 151,647 rows go to the same places and [SEG] keeps its id, the last of them. The
417 rows behind them exist only in the base; they belong to no token, are never in a prompt, and keep the base's values,
which the base was trained to never choose. Zeros would be worse: a logit of 0 can beat that of a real token.

Frozen weights must be the base's. Equal ones are dropped; the released code loads SigLIP in float16 before it casts to
bf16, so a difference within rounding counts as equal. Anything else that differs is kept as trained, and reported.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the project's root must be on the path first
from torch import Tensor  # noqa: E402

from configs.rules import VOCABULARY  # noqa: E402
from configs.schema import TrainableConfig  # noqa: E402
from dataset.prompt import load_tokenizer  # noqa: E402
from model.aurora.build import build_meta_model  # noqa: E402
from model.aurora.trainable import MASK_DECODER, SEG_HEAD  # noqa: E402
from model.aurora.trained import SEGMENTER, Trained, below_adapters, check_fit, write_trained  # noqa: E402
from model.backbones.videollama2.weights import Checkpoint, from_released, to_released  # noqa: E402
from model.segmenters.sam import read_sam  # noqa: E402
from utils.config import load_config, save_config  # noqa: E402
from utils.errors import WeightsError, run_command  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.tables import format_table  # noqa: E402
from utils.tensor_files import TensorFileError, load_pickle  # noqa: E402

REPORT = "convert_report.json"
BACKBONE = "backbone."
MATRICES = tuple(BACKBONE + name for name in VOCABULARY)
PARTS = (("model.visual_model.", SEGMENTER), ("model.text_hidden_fcs.", SEG_HEAD))
IGNORED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)$|segmenter\.sam\.pixel_(mean|std)$")
"""Constants that are computed here."""
NO_GRADIENT = ("segmenter.sam.image_encoder.", "segmenter.sam.prompt_encoder.")
"""SAM's parts that every forward runs without gradient."""
TARGETS = tuple(rf"{part}\..*\.(q_proj|v_proj)$" for part in ("language_model", "audio_tower", "mask_decoder"))
ROUNDING = 2.0**-7
"""Relative difference of two bf16 roundings of one number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="mp_rank_00_model_states.pt")
    parser.add_argument("out", type=Path, help="folder of the light checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="released VideoLLaMA2.1-7B-AV")
    parser.add_argument("--sam", type=Path, required=True, help="SAM weights that it was trained from")
    parser.add_argument("--sam-type", default="vit_h", help="default: %(default)s")
    parser.add_argument("--sam-image-size", type=int, default=224, help="default: %(default)s, as in the released code")
    parser.add_argument("--alpha", type=float, default=16.0, help="LoRA's alpha (default: %(default)s, as released)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/grpo.yaml", help="settings to write beside it")
    options = parser.parse_args(arguments)
    return run_command(lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    """Read, map, check against the joint model, print the report and write.

    Raises:
        WeightsError: a file is missing or refused, a tensor has no place, or the tokenizer is another one.
    """
    places = {"model.base": options.base, "model.sam_checkpoint": options.sam, "model.sam_type": options.sam_type,
              "model.sam_image_size": options.sam_image_size, "output_dir": options.out}  # fmt: skip
    config = load_config(options.config, [f"{name}={value}" for name, value in places.items()])
    _, seg_id = load_tokenizer(options.base, config.model.seg_token)
    released = read_released(options.file)
    none = config.trainable.model_copy(update={"lora_rank": 0, "lora_targets": (), "full": (), "seg_rows_only": False})
    plain = build_meta_model(config.model_copy(update={"trainable": none}), seg_token_id=seg_id)
    sam = read_sam(plain.segmenter, options.sam)
    names = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    report = Report()
    kept = changed_tensors(released, Checkpoint(options.base), sam, names, report)
    print(report)
    rows, token = report.rows[0], config.model.seg_token
    if rows and rows - 1 != seg_id:
        raise WeightsError(
            f"the last of the file's {rows} rows is {rows - 1}, but the tokenizer of {options.base} gives {token} the "
            f"id {seg_id}. Remedy: use the tokenizer that the checkpoint was trained with."
        )
    if report.unknown:
        raise WeightsError(f"{len(report.unknown)} tensors have no place here; nothing was written")
    trainable = trained_settings(kept, report.changed, names, options.alpha)
    config = config.model_copy(update={"trainable": trainable})
    trained = Trained(options.out, trainable, seg_id, below_adapters(kept), config.model)
    check_fit(trained, build_meta_model(config, seg_token_id=seg_id))
    write_trained(trained)
    save_config(config, options.out)
    table = [dict(zip(("part", "fate", "tensors", "values"), row, strict=True)) for row in report.table()]
    write_json(options.out / REPORT, {
        "file": str(options.file), "alpha": options.alpha, "tensors": table, "changed": report.changed,
        "unknown": report.unknown, "rows": report.rows, "seg_token_id": seg_id,
    })  # fmt: skip
    print(f"written: {options.out}")


@dataclass
class Report:
    """What became of every tensor of the file."""

    fates: list[tuple[str, str, int]] = field(default_factory=list)
    """(part of the model, fate, values); fates: adapter, trained, same, same to rounding, changed, ignored."""
    changed: list[str] = field(default_factory=list)
    """Frozen in the released trainer, yet not the base's."""
    unknown: list[str] = field(default_factory=list)
    """Names without a place."""
    rows: tuple[int, int] = (0, 0)
    """Rows of the vocabulary matrices: in the file, in the base."""

    def add(self, name: str, fate: str, tensor: Tensor) -> None:
        part = name.removeprefix(BACKBONE).removeprefix("segmenter.").split(".")[0]
        self.fates.append((part, fate, tensor.numel()))

    def table(self) -> list[tuple[str, str, int, int]]:
        """(part, fate, tensors, values), sorted."""
        counts = Counter((part, fate) for part, fate, _ in self.fates)
        values = Counter[tuple[str, str]]()
        for part, fate, number in self.fates:
            values[part, fate] += number
        return [(*key, count, values[key]) for key, count in sorted(counts.items())]

    def __str__(self) -> str:
        rows = [[part, fate, tensors, f"{values:,}"] for part, fate, tensors, values in self.table()]
        lines = [format_table(["part", "fate", "tensors", "values"], rows)]
        if self.rows[0]:
            have, need = self.rows
            lines.append(f"rows: {have} of the file, then {need - have} of the base; [SEG] = {have - 1}")
        for title, names in (("changed though frozen", self.changed), ("without a place", self.unknown)):
            if names:
                lines.append(f"{title}: {len(names)}\n  " + "\n  ".join(names[:40]))
        return "\n".join(lines)


def read_released(path: str | Path) -> dict[str, Tensor]:
    """Tensors of the released checkpoint under our names, adapters in the middle of names (`.lora_A.default.`).

    Args:
        path: DeepSpeed's model states, or a plain state dict of the same names.

    Raises:
        TensorFileError: no such file, one that would run code, or one without a state dict.
    """
    data = load_pickle(path)
    state = data.get("module", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise TensorFileError(f"{path}: no `module` with names and tensors, as DeepSpeed's model states have it")
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = our_name(name)
        if ours in named and not torch.equal(named[ours], tensor):
            raise TensorFileError(f"{path}: {name} differs from its copy under another layer")
        named[ours] = tensor
    return named


def our_name(name: str) -> str:
    """Our name of a released key (base weights of adapted layers without `.base_layer.`)."""
    name = name.removeprefix("module.").removeprefix("base_model.model.").replace(".base_layer.", ".")
    for released, ours in PARTS:
        if name.startswith(released):
            return ours + name.removeprefix(released)
    return BACKBONE + from_released(name)


def changed_tensors(
    released: Mapping[str, Tensor],
    base: Checkpoint,
    sam: Mapping[str, Tensor],
    names: Mapping[str, tuple[int, ...]],
    report: Report,
) -> dict[str, Tensor]:
    """The tensors that are not those of base and SAM, by our names (without `.base_layer.`).

    Args:
        released: from `read_released`.
        base: the released backbone.
        sam: SAM's tensors at the checkpoint's image size, SAM's own names.
        names: shapes of our plain joint model (no adapters), by name.
        report: is filled; `unknown` must be empty for the result to be whole.

    Raises:
        TensorFileError: more rows than the base has, or a shape that does not fit.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in released.items():
        if ".lora_A." in name or ".lora_B." in name:
            report.add(name, "adapter", tensor)
            if name.split(".lora_")[0] + ".weight" not in names:
                report.unknown.append(name)
            kept[name] = tensor
        elif IGNORED.match(name):
            report.add(name, "ignored", tensor)
        elif name not in names:
            report.unknown.append(name)
        else:
            whole = _with_rows(name, tensor, base, report)
            if tuple(whole.shape) != tuple(names[name]):
                raise TensorFileError(f"{name} has shape {tuple(whole.shape)}, this model needs {tuple(names[name])}")
            fate = _fate(name, whole, base, sam)
            report.add(name, fate, tensor)
            if fate == "changed" and name.startswith(NO_GRADIENT):
                report.unknown.append(f"{name} (not that of the SAM file; nothing here could train it)")
            elif fate in ("trained", "changed"):
                kept[name] = whole.contiguous()
                report.changed += [name] * (fate == "changed")
    return kept


def _with_rows(name: str, tensor: Tensor, base: Checkpoint, report: Report) -> Tensor:
    """Vocabulary matrices on the base's rows; other tensors as they are."""
    if name not in MATRICES:
        return tensor
    own = base.get(to_released(name.removeprefix(BACKBONE), 1)[0]).to(tensor.dtype)
    report.rows = (len(tensor), len(own))
    if len(tensor) > len(own):
        raise TensorFileError(
            f"{name} has {len(tensor)} rows, the base {len(own)}: they are not of one tokenizer. Remedy: give the base "
            "that the checkpoint was trained from."
        )
    return torch.cat([tensor, own[len(tensor) :]])


def _fate(name: str, tensor: Tensor, base: Checkpoint, sam: Mapping[str, Tensor]) -> str:
    """Whether a weight was trained, is the base's, or has changed though it was frozen."""
    if name.startswith((SEG_HEAD, MASK_DECODER)) or name in MATRICES:
        return "trained"
    if name.startswith(BACKBONE):
        released = to_released(name.removeprefix(BACKBONE), 1)[0]
        if released not in base.shapes:
            return "ignored"  # an unused head that the base does not store
        own = base.get(released)
    else:
        own = sam[name.removeprefix(SEGMENTER)]
    own = own.to(tensor.dtype)
    if torch.equal(own, tensor):
        return "same"
    near = torch.isclose(own.float(), tensor.float(), rtol=ROUNDING, atol=1e-5)
    return "same to rounding" if bool(near.all()) else "changed"


def trained_settings(
    kept: Mapping[str, Tensor], changed: Sequence[str], names: Mapping[str, tuple[int, ...]], alpha: float
) -> TrainableConfig:
    """The section `trainable` that describes a checkpoint with the tensors `kept`.

    Args:
        kept, changed, names: see `changed_tensors`.
        alpha: LoRA's scale, which the file does not hold (released code train_ds.py:87: 16).

    Raises:
        TensorFileError: adapters of several ranks.
    """
    ranks = {x.shape[0] for k, x in kept.items() if ".lora_A." in k}
    if len(ranks) > 1:
        raise TensorFileError(f"adapters of several ranks: {sorted(ranks)}; one rank is needed")
    linear = {k.removesuffix(".weight") for k in names if k.endswith(".weight")}
    modules = {k.split(".lora_A.")[0] for k in kept if ".lora_A." in k}
    return TrainableConfig(
        lora_rank=ranks.pop() if ranks else 0,
        lora_alpha=alpha,
        lora_targets=tuple(_patterns(modules, linear)),
        full=tuple(re.escape(name) + "$" for name in (*(v for v in MATRICES if v in kept), *changed)),
        seg_head=True,
        mask_decoder=True,
    )


def _patterns(modules: set[str], linear: set[str]) -> Iterator[str]:
    """The released patterns where they match exactly the adapted modules, else one pattern per module."""
    left = set(modules)
    for pattern in TARGETS:
        found = {name for name in linear if re.search(pattern, name)}
        if found and found <= modules and "image_encoder" not in " ".join(found):
            left -= found
            yield pattern
    yield from (f"^{re.escape(name)}$" for name in sorted(left))


if __name__ == "__main__":
    sys.exit(main())
