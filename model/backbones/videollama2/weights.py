"""Weights of VideoLLaMA2.1-AV: released key names <-> ours, read and written strictly, every fault named.

The released checkpoint nests everything under `model.` and repeats BEATs' one relative-position table once per layer.
`RULES` is the whole mapping; what it does not explain is an error, listed together with all others, unless `TOLERATED`
says why it may be. Not run but kept, so that a saved checkpoint holds the released names: SigLIP's last layer, its
post_layernorm and pooling head, and BEATs' AudioSet predictor.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.config import CONFIG_NAME, VideoLlama2Config
from utils.files import write_json
from utils.tensor_files import TensorFileError, load_state, write_safetensors

RULES: tuple[tuple[str, str], ...] = (
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.siglip.", "model.vision_tower.vision_tower.vision_model."),
    ("mm_projector.", "model.mm_projector."),
    ("mm_projector_a.", "model.mm_projector_a."),
    ("audio_tower.", "model.audio_tower."),
    ("language_model.model.", "model."),
)
"""(our prefix, released prefix); the first that fits applies, so the catch-all `model.` comes last."""

COMPONENTS = {
    "model.vision_tower.": "vision tower",
    "model.mm_projector.": "video projector",
    "model.audio_tower.": "audio tower",
    "thinker.visual.": "vision tower",
    "thinker.audio_tower.": "audio tower",
    "model.mm_projector_a.": "audio projector",
    "": "language model",
}
"""Released prefix -> part of the model, the most special first (Qwen2.5-Omni's among them)."""

TABLE = "audio_tower.encoder.relative_attention_bias.weight"
RELEASED_TABLE = "model.audio_tower.encoder.layers.{}.self_attn.relative_attention_bias.weight"
"""The shared table is stored under every layer (or under layer 0 alone) and held once here."""

ZEROS = "no forward reads it; zeros take its place"
TOLERATED: dict[str, tuple[tuple[str, str], ...]] = {
    "missing": (
        (r"model\.vision_tower\.vision_tower\.vision_model\.(head|post_layernorm)\.", ZEROS),
        (r"model\.audio_tower\.predictor\.", ZEROS),
        (RELEASED_TABLE.replace(".", r"\.").format(r"[1-9]\d*"), "copy of the one position table, read from layer 0"),
    ),
    "unexpected": (  # buffers that transformers < 4.32 stored
        (r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)$", "a constant that is recomputed; ignored"),
    ),
}
"""Status -> (pattern of names, why a checkpoint may be so)."""

RELEASED_KEYS = Path(__file__).with_name("released_keys.txt")
"""Names, shapes and multiplicities of VideoLLaMA2.1-7B-AV, one pattern per line."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KeyCheck:
    """What became of one released name."""

    name: str
    status: Literal["loaded", "tolerated", "missing", "unexpected", "shape"]
    stored: Shape | None
    expected: Shape | None
    note: str = ""
    """Why it is tolerated."""

    @property
    def is_fault(self) -> bool:
        return self.status not in ("loaded", "tolerated")

    def __str__(self) -> str:
        if self.status == "shape":
            return f"shape: {self.name} is {self.stored}, the config asks for {self.expected}"
        note = f" ({self.note})" if self.note else ""
        return f"{self.status}: {self.name} {self.expected if self.stored is None else self.stored}{note}"


@dataclass(frozen=True)
class LoadReport:
    """What a load did beyond the one-to-one mapping."""

    files: tuple[str, ...]
    parameters: int
    """Values in the model (the shared table counted once)."""
    ignored: tuple[str, ...]
    """Stored names that were skipped."""
    zero_filled: tuple[str, ...]
    """Unused tensors that the checkpoint lacks."""


class Checkpoint:
    """Names, shapes and lazily read tensors of a folder of weights: safetensors or torch files, single or sharded.

    Torch files are read with `weights_only=True`: a pickle that would run code is refused.

    Raises:
        TensorFileError: no weights, a missing or damaged shard, a shard that contradicts the index or another shard.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.files, index = _find_files(Path(folder))
        self.shapes: dict[str, Shape] = {}
        self._source: dict[str, dict[str, Tensor] | safe_open] = {}
        for path in self.files:
            if path.suffix == ".safetensors":
                try:
                    source = safe_open(path, framework="pt", device=str(self.device))
                except (SafetensorError, OSError) as error:
                    raise TensorFileError(f"{path}: damaged or truncated safetensors file ({error}). "
                                          "Remedy: download it again.") from error  # fmt: skip
                shapes = {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
            else:
                source = load_state(path)
                shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
            if twice := sorted(shapes.keys() & self.shapes.keys()):
                raise TensorFileError(f"{path}: holds {twice[0]!r}, which another shard holds as well")
            self.shapes |= shapes
            self._source |= dict.fromkeys(shapes, source)
        for name, file in index.items():
            if name not in self.shapes:
                raise TensorFileError(f"{Path(folder) / file}: lacks tensor {name!r}, which the index says it holds")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def get(self, name: str) -> Tensor:
        """The tensor `name`, on the device, in its stored dtype."""
        source = self._source[name]
        return source[name].to(self.device) if isinstance(source, dict) else source.get_tensor(name)


def _find_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The shard files of a folder, and name -> file of the index (empty for a single file)."""
    wanted = ("model.safetensors", "pytorch_model.bin")
    for single in wanted:
        index_path = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single], {}
        if not index_path.is_file():
            continue
        try:
            index = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            bad = [file for file in index.values() if Path(file).name != file]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TensorFileError(f"{index_path}: not a shard index with a weight_map ({error!r})") from error
        if bad or not index:
            raise TensorFileError(f"{index_path}: weight_map must name files of the same folder, got {bad[:3]}")
        names = sorted(set(index.values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise TensorFileError(
                f"{folder / missing[0]}: shard missing ({len(missing)} of {len(names)} named by {index_path.name} are "
                f"not there: {', '.join(missing)}). Remedy: download the missing shards."
            )
        return [folder / name for name in names], index
    raise TensorFileError(f"{folder}: no weights; {' or '.join(wanted)} is needed, alone or with a .index.json")


def to_released(name: str, beats_layers: int) -> list[str]:
    """Released name(s) of one of our parameters: one, or `beats_layers` for the shared table."""
    if name == TABLE:
        return [RELEASED_TABLE.format(i) for i in range(beats_layers)]
    for ours, released in RULES:
        if name.startswith(ours):
            return [released + name.removeprefix(ours)]
    raise ValueError(f"{name}: not a parameter of the backbone; merge or remove adapters before saving")


def from_released(name: str) -> str:
    """Our name of a released key; a key that no rule explains comes back unchanged (and is then unexpected)."""
    if re.fullmatch(RELEASED_TABLE.replace(".", r"\.").format(r"\d+"), name):
        return TABLE
    for ours, released in RULES:
        if name.startswith(released):
            return ours + name.removeprefix(released)
    return name


def released_keys() -> dict[str, Shape]:
    """Every key of the released VideoLLaMA2.1-7B-AV with its shape (1156 names), from the list beside this file."""
    keys: dict[str, Shape] = {}
    for line in RELEASED_KEYS.read_text(encoding="utf-8").splitlines():
        if line.startswith("TOTAL"):
            continue
        pattern, shape, times = line.split("\t")
        group = re.search(r"\{(.*)\}", pattern)
        fills = group.group(1).split(",") if group else [str(i) for i in range(int(times.removeprefix("x")))]
        size = tuple(int(n) for n in re.findall(r"\d+", shape))
        keys |= {re.sub(r"\*|\{.*\}", fill, pattern): size for fill in fills}
    return keys


def expected_keys(config: VideoLlama2Config) -> dict[str, Shape]:
    """Every released name with its shape, from a model on the meta device (allocates nothing)."""
    with torch.device("meta"):
        return _released_shapes(VideoLlama2(config))


def _released_shapes(model: VideoLlama2) -> dict[str, Shape]:
    state, layers = model.state_dict(), model.config.beats.encoder_layers
    return {released: tuple(x.shape) for name, x in state.items() for released in to_released(name, layers)}


def check_keys(stored: Mapping[str, Shape], expected: Mapping[str, Shape], complete: bool = False) -> list[KeyCheck]:
    """Explain every name that is stored or expected, expected ones first.

    Args:
        stored: released names of a checkpoint with their shapes.
        expected: released names of the model with theirs.
        complete: nothing is tolerated (before saving).
    """
    checks = []
    for name in [*expected, *sorted(stored.keys() - expected.keys())]:
        have, need = stored.get(name), expected.get(name)
        if have is not None and need is not None:
            checks.append(KeyCheck(name, "loaded" if have == need else "shape", have, need))
            continue
        status = "missing" if have is None else "unexpected"
        notes = [note for pattern, note in TOLERATED[status] if not complete and re.match(pattern, name)]
        checks.append(KeyCheck(name, "tolerated" if notes else status, have, need, *notes))
    return checks


def check_folder(config: VideoLlama2Config, folder: str | Path) -> list[KeyCheck]:
    """`check_keys` of a folder's weights; reads no tensor of safetensors."""
    return check_keys(Checkpoint(folder).shapes, expected_keys(config))


def refuse(checks: Sequence[KeyCheck], folder: str | Path) -> None:
    """Raise one TensorFileError that lists every key that does not fit; nothing where all do."""
    if faults := [check for check in checks if check.is_fault]:
        listed = "".join(f"\n  {line}" for line in [*moved_component(checks), *faults])
        raise TensorFileError(f"{folder}: {len(faults)} keys do not fit the model that config.json describes:{listed}")


def moved_component(checks: Sequence[KeyCheck]) -> list[str]:
    """One sentence for each part that is missing under its prefix and there under another one.

    A loose load would leave such a part at random values without a word; users of the original report exactly this of
    its vision tower.
    """
    sentences = []
    missing = [check for check in checks if check.status == "missing" and not check.name.startswith("thinker.")]
    for prefix in dict.fromkeys(_released_prefix(check.name) for check in missing):
        lacking = [check for check in missing if _released_prefix(check.name) == prefix]
        tails = {check.name.removeprefix(prefix): check.expected for check in lacking}
        found: Counter[str] = Counter()
        for stranger in (check for check in checks if check.status == "unexpected"):
            starts = [match.end() for match in re.finditer(r"^|\.", stranger.name)]
            found.update(stranger.name[:i] for i in starts if tails.get(stranger.name[i:]) == stranger.stored)
        # Equal counts (a part of one tensor): the prefix that ends as it should is the likelier one.
        other, count = max(found.items(), key=lambda item: (item[1], item[0].endswith(prefix)), default=("", 0))
        if 2 * count > len(tails):
            sentences.append(
                f"the {component(prefix)} is stored under '{other}' instead of '{prefix}' ({count} of {len(tails)} "
                "missing keys). Remedy: rename these keys; loaded as it is, the part would keep random weights"
            )
    return sentences


def component(name: str) -> str:
    """Part of the model that a released name belongs to."""
    return next(part for prefix, part in COMPONENTS.items() if name.startswith(prefix))


def _released_prefix(name: str) -> str:
    return next(prefix for _, prefix in RULES if name.startswith(prefix))


def load_backbone(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> tuple[VideoLlama2, LoadReport]:
    """Build the backbone of a folder with released names (config.json and safetensors or torch shards).

    Names and shapes are compared before any tensor is read; the model is built on the meta device and takes the read
    tensors over, so that no weight is held twice.

    Args:
        folder: checkpoint folder.
        dtype: of all weights; None keeps the stored dtypes.
        attention: "eager" or "sdpa".
        device: where the weights go.

    Returns:
        (model in eval mode, report).

    Raises:
        ValueError: config.json is missing or unsupported.
        TensorFileError: a file is missing, damaged or would run code; or names and shapes do not fit (all listed).
    """
    config = VideoLlama2Config.from_folder(folder)
    with torch.device("meta"):
        model = VideoLlama2(config, attention)
    checkpoint, expected = Checkpoint(folder, device), _released_shapes(model)
    checks = check_keys(checkpoint.shapes, expected)
    refuse(checks, folder)
    ignored = tuple(check.name for check in checks if check.expected is None)
    absent = tuple(check.name for check in checks if check.note == ZEROS)
    state: dict[str, Tensor] = {}
    for name in (name for name in checkpoint if name not in ignored):
        tensor, ours = checkpoint.get(name).to(dtype=dtype), from_released(name)
        if ours in state and not torch.equal(state[ours], tensor):
            raise TensorFileError(
                f"{folder}: {name} differs from the copy under another layer; the position table must be shared"
            )
        state.setdefault(ours, tensor)
    state |= {from_released(name): torch.zeros(expected[name], dtype=dtype, device=device) for name in absent}
    model.load_state_dict(state, strict=True, assign=True)
    model.reset_buffers(device)
    count = sum(p.numel() for p in model.parameters())
    return model.eval(), LoadReport(tuple(path.name for path in checkpoint.files), count, ignored, absent)


def export_state(config: VideoLlama2Config, state: dict[str, Tensor], folder: str | Path, dtype: str) -> list[Path]:
    """As `save_state`, noting the type of the weights in config.json."""
    return save_state(replace(config, extra=config.extra | {"torch_dtype": dtype}), state, folder)


def save_backbone(model: VideoLlama2, folder: str | Path, max_shard_bytes: int = 5_000_000_000) -> list[Path]:
    """`save_state` of the plain backbone (adapters merged, parameters gathered)."""
    return save_state(model.config, model.state_dict(), folder, max_shard_bytes)


def save_state(
    config: VideoLlama2Config, state: dict[str, Tensor], folder: str | Path, max_shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write config.json and safetensors shards of a backbone's state dict under the released names.

    A reader never sees half a file; files of an earlier save in the same folder that no longer belong go last.

    Args:
        config: sizes.
        state: our names, complete, without adapters.
        folder: made if needed.
        max_shard_bytes: largest shard; one file `model.safetensors` if everything fits.

    Returns:
        The written files.

    Raises:
        ValueError: if names or shapes are not exactly those of the config (all listed).
    """
    folder, layers = Path(folder), config.beats.encoder_layers
    tensors = {released: tensor for name, tensor in state.items() for released in to_released(name, layers)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    refuse(check_keys(shapes, expected_keys(config), complete=True), folder)
    # safetensors refuses tensors that share memory, as the repeated table does
    tensors |= {name: tensor.clone() for name, tensor in tensors.items() if from_released(name) == TABLE}
    return write_shards(tensors, config.to_dict(), folder, max_shard_bytes)


def write_shards(
    tensors: dict[str, Tensor], config: dict[str, Any], folder: Path, max_shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write config.json and safetensors shards under the given names; see `save_state`."""
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in plan.filename_to_tensors.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    written = [*plan.filename_to_tensors, CONFIG_NAME]
    if plan.is_sharded:
        written.append("model.safetensors.index.json")
        write_json(folder / written[-1], {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    write_json(folder / CONFIG_NAME, config)
    for stale in folder.iterdir():
        own = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json", stale.name)
        if own and stale.name not in written:
            stale.unlink()
    return [folder / name for name in written]
