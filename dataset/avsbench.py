"""AVSBench's single-source (S4) and multi-source (MS3) subsets, in both released layouts, as rows for `ClipDataset`.

Layout v1 (AVSBench-object, OpenNLPLab/AVSBench avs_scripts/*/dataloader.py; numbers from 1, frames and masks 224 px):

    <root>/Single-source/s4_meta_data.csv         name, start, category, split
    <root>/Single-source/s4_data/visual_frames/<split>/<category>/<name>/<name>_{1..5}.png
                                 gt_masks/<split>/<category>/<name>/<name>_{1..5}.png    train: _1 alone
                                 audio_wav/<split>/<category>/<name>.wav
    <root>/Multi-sources/ms3_meta_data.csv        name, split
    <root>/Multi-sources/ms3_data/visual_frames/<name>/<name>.mp4_{1..5}.png
                                  gt_masks/<split>/<name>/<name>_{1..5}.png
                                  audio_wav/<split>/<name>.wav

Layout v2 (AVSBench-semantic, avs_scripts/avss/color_dataloader.py; numbers from 0, native size; S4 is v1s, MS3 is v1m):

    <root>/metadata.csv                           vid, uid, ..., a_obj, split, label (v1s, v1m or v2)
    <root>/<label>/<uid>/frames/{0..4}.jpg        audio.wav
                        /labels_rgb/{0..4}.png    or labels_semantic/; v1s train: 0.png alone

There are no referring expressions: every row asks for `S4_REFERENCE` (paper section 4.4). A mask's foreground is every
pixel that is not black, whatever grey level or colour its class has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from dataset.media import ImageFolder
from dataset.prompt import S4_REFERENCE
from dataset.refavs import Row, is_folder_name, read_table, row_fault
from utils.errors import DataError

Subset = Literal["s4", "ms3"]
SPLITS = ("train", "val", "test")

_V1 = {
    "s4": ("Single-source", "s4_meta_data.csv", "s4_data"),
    "ms3": ("Multi-sources", "ms3_meta_data.csv", "ms3_data"),
}
_V2 = {"s4": "v1s", "ms3": "v1m"}

CATEGORY_OBJECTS = {
    "ambulance_siren": "emergency-car", "baby_laughter": "baby", "cap_gun_shooting": "gun", "cat_meowing": "cat",
    "chainsawing_trees": "saw", "coyote_howling": "coyote", "dog_barking": "dog", "driving_buses": "bus",
    "female_singing": "woman", "helicopter": "helicopter", "horse_clip-clop": "horse", "lawn_mowing": "mower",
    "lions_roaring": "lion", "male_speech": "man", "mynah_bird_singing": "bird", "playing_acoustic_guitar": "guitar",
    "playing_glockenspiel": "glockenspiel", "playing_piano": "piano", "playing_tabla": "tabla",
    "playing_ukulele": "ukulele", "playing_violin": "violin", "race_car": "car",
    "typing_on_computer_keyboard": "keyboard",
}  # fmt: skip
"""The 23 sound categories of S4 (layout v1) -> the thing that sounds, under Ref-AVS's name where it has one (our
choice: AVSBench names sounds, not things)."""


class _Media(NamedTuple):
    """Where one clip lies."""

    frames: ImageFolder
    masks: ImageFolder
    audio: Path


class AvsBenchIndex:
    """All rows of one subset of AVSBench; a row is a clip, its number the position in the CSV (header excluded).

    Args:
        root: folder of layout v1 or v2, see above; which one is told by the CSV that is there.
        subset: s4 or ms3.

    Raises:
        DataError: no known CSV, a missing column, an unknown split or category, or a clip named twice.
    """

    def __init__(self, root: str | Path, subset: Subset) -> None:
        self.root, self.subset = Path(root), subset
        folder, name, data = _V1[subset]
        candidates = {
            self.root / folder / name: self.root / folder / data,
            self.root / name: self.root / data,
            self.root / "metadata.csv": None,
        }
        self.table = next((path for path in candidates if path.is_file()), Path())
        if self.table == Path():
            raise DataError(
                f"{self.root}: none of {', '.join(str(p.relative_to(self.root)) for p in candidates)} is there. "
                "Remedy: set data.root to the folder of AVSBench-object (v1) or AVSBench-semantic (v2)."
            )
        self._media: dict[str, _Media] = {}
        self._rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        self.layout = "v2" if self.table.name == "metadata.csv" else "v1"
        read = self._v2_rows() if self.layout == "v2" else self._v1_rows(candidates[self.table] or self.root)
        for row, media in read:
            if row.clip in self._media:
                raise DataError(f"{self.table}, row {row.row}: {row.clip} is named twice. Remedy: remove one line.")
            self._media[row.clip] = media
            self._rows[row.split].append(row)

    def rows(self, split: str) -> list[Row]:
        """Rows of a split in file order. Raises DataError for a split that AVSBench does not have."""
        if split not in self._rows:
            raise DataError(f"split = {split!r}: AVSBench has {', '.join(SPLITS)}. Remedy: set eval.splits.")
        return list(self._rows[split])

    def clips(self, split: str) -> list[str]:
        """Clips of a split in file order."""
        return [row.clip for row in self.rows(split)]

    def frames_folder(self, clip: str) -> ImageFolder:
        return self._media[clip].frames

    def audio_path(self, clip: str) -> Path:
        return self._media[clip].audio

    def mask_folder(self, row: Row) -> ImageFolder:
        return self._media[row.clip].masks

    def _v1_rows(self, data: Path) -> Iterator[tuple[Row, _Media]]:
        needed = ("split", "category") if self.subset == "s4" else ("split",)
        for number, cells in self._lines(needed):
            name, split = next(iter(cells.values())), cells["split"]  # the first column is the clip, whatever its title
            if self.subset == "s4":
                category = self._folder_name(number, "category", cells["category"])
                if category not in CATEGORY_OBJECTS:
                    rule = "is none of the 23 categories of S4"
                    raise row_fault(self.table, number, "category", category, rule)
                class_name, inner = CATEGORY_OBJECTS[category], f"{split}/{category}/{name}"
                frames = ImageFolder(data / "visual_frames" / inner, f"{name}_", 1)
            else:
                class_name, inner = "", f"{split}/{name}"
                frames = ImageFolder(data / "visual_frames" / name, f"{name}.mp4_", 1)
            masks = ImageFolder(data / "gt_masks" / inner, f"{name}_", 1, True, self._partly(split))
            yield self._row(number, name, split, class_name), _Media(frames, masks, data / "audio_wav" / f"{inner}.wav")

    def _v2_rows(self) -> Iterator[tuple[Row, _Media]]:
        for number, cells in self._lines(("uid", "split", "label")):
            if cells["label"] != _V2[self.subset]:
                continue
            folder = self.root / cells["label"] / cells["uid"]
            coloured, numbered = folder / "labels_rgb", folder / "labels_semantic"
            labels = numbered if numbered.is_dir() and not coloured.is_dir() else coloured
            masks = ImageFolder(labels, any_value=True, partly=self._partly(cells["split"]))
            class_name = cells.get("a_obj", "") if self.subset == "s4" else ""
            media = _Media(ImageFolder(folder / "frames"), masks, folder / "audio.wav")
            yield self._row(number, cells["uid"], cells["split"], class_name), media

    def _partly(self, split: str) -> bool:
        return self.subset == "s4" and split == "train"

    def _row(self, number: int, name: str, split: str, class_name: str) -> Row:
        clip = self._folder_name(number, "clip", name)
        return Row(number, clip, clip, clip, split, 0, S4_REFERENCE, class_name, 0)

    def _lines(self, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
        """(row number, column -> cell) of every line; cells that are missing at its end are empty."""
        header, *lines = read_table(self.table) or [[]]
        missing = [name for name in needed if name not in header]
        if missing:
            raise DataError(
                f"{self.table}: columns are {header}, without {missing}. Remedy: restore the official table."
            )
        for number, values in enumerate(lines):
            cells = dict(zip(header, [*values, *[""] * len(header)], strict=False))
            if cells["split"] not in SPLITS:
                rule = f"a split is one of {', '.join(SPLITS)}"
                raise row_fault(self.table, number, "split", cells["split"], rule)
            yield number, cells

    def _folder_name(self, number: int, field: str, value: str) -> str:
        if not is_folder_name(value):
            raise row_fault(self.table, number, field, value, "is not the name of one folder")
        return value
