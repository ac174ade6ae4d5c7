"""Pictures, curves and the page: sizes and colours, what is drawn, and that no text becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from utils.curves import Chart, Series, charts_of_runs, read_scalars, smooth, svg
from utils.report import Clip, render_page, sentences
from utils.tables import format_table, mix_scores, split_table
from utils.visualize import PREDICTION, TRUTH, jpeg, overlay, save_masks, strip

EVIL = "<script>alert('x')</script> & \"quotes\" <img src=x onerror=alert(1)>"


def scores(value, n=8):
    return {"J": value, "F": value + 2, "J&F": value + 1, "n": n, "class_accuracy": 90.0, "faithful": 50.0}


def summary():
    kinds = {"visual": scores(70.0), EVIL: scores(60.0)}
    stage = {
        "test_s": {**scores(80.0), "per_expression": scores(81.0)}, "test_u": scores(62.0), "mix": scores(71.0),
        "test_n": {"S": 7.25, "n": 4, "per_expression": {"S": 6.5, "n": 4}}, "kinds": kinds, "class_accuracy": 91.5,
        "faithful": 44.0,
    }
    probe = {"stage": "sft", "test_s": scores(50.0), "kinds": {"visual": scores(69.0), EVIL: scores(20.0)}}
    teacher = {"test_s": scores(85.0), "answers": "given"}
    return {"stages": {"teacher": teacher, "sft": stage}, "probes": {"shuffle_audio": probe},
            "seconds": {"train sft": 12.5}, "config": EVIL, "git": "abc"}


def clip(row=0, **changes):
    picture = jpeg(np.full((12, 20, 3), 90, np.uint8))
    values = dict(split="test_s", row=row, kind="visual", reference=EVIL, class_name="cat", answer_class="dog",
                  text=f"I see it. {EVIL}! The target is the dog. It is [SEG].", faithful=False,
                  scores={"J": 12.0, "F": 34.5}, picture=picture, audio=b"ID3")
    return Clip(**{**values, **changes})


def charts():
    return [Chart(EVIL, (Series(EVIL, (1, 2, 3), (3.0, 2.0, 1.5)), Series("sft", (1, 2), (1.0, 0.001))))]


class Reader(HTMLParser):
    """Collects tags, addresses and text of a page, and checks that elements are closed in order."""

    VOID = {"meta", "img", "line", "polyline", "br"}

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(*arguments):
    reader = Reader()
    reader.feed(render_page(*arguments))
    assert reader.open == []
    return reader


def test_text_never_becomes_markup():
    reader = read_page(EVIL, summary(), [clip(), clip(1, kind=EVIL, class_name=EVIL, answer_class=EVIL)], charts())
    assert reader.tags.count("script") == 1 and reader.tags.count("img") == 2
    assert "alert('x')" in " ".join(reader.text)  # shown, as text


def test_page_asks_for_nothing_outside_itself():
    reader = read_page("t", summary(), [clip()], charts())
    assert reader.addresses and all(address.startswith("data:") for address in reader.addresses)
    page = render_page("t", summary(), [clip()], charts())
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_page_holds_scores_probes_curves_clips_and_sentences():
    reader = read_page("Mini run", summary(), [clip(row) for row in range(13)], charts())
    text = " ".join(reader.text)
    for wanted in ("80.00", "7.25", "81.00", "91.50", "-30.00", "-40.00", "12.50", "class wrong", "unfaithful",
                   "teacher: reads the true class"):
        assert wanted in text, wanted
    assert reader.tags.count("article") == 13 and reader.tags.count("svg") == 1
    assert reader.tags.count("audio") == 13


def test_page_without_probes_clips_or_curves():
    reader = read_page("t", {"stages": {"sft": {"test_s": scores(1.0)}}}, [], [])
    assert "article" not in reader.tags and "svg" not in reader.tags


def test_sentences():
    assert sentences("I see a cat. It is loud! The target is the cat. It is [SEG].") == [
        "I see a cat.", "It is loud!", "The target is the cat.", "It is [SEG]."]
    assert sentences("  ") == []


def test_curves_skip_what_cannot_be_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "ce": 2.0, "note": "x"}, {"step": 2, "ce": float("nan")}, {"step": 3, "ce": 1.0, "lr": 1e-4}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ce"')
    assert read_scalars(path) == {"ce": Series("ce", (1.0, 3.0), (2.0, 1.0)), "lr": Series("lr", (3.0,), (1e-4,))}
    found = charts_of_runs([("sft", path), ("grpo", tmp_path / "none.jsonl")], ["lr", "ce", "kl"])
    assert [(c.title, [s.name for s in c.series]) for c in found] == [("lr", ["sft"]), ("ce", ["sft"])]
    path.write_text('{"ce": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:1"):
        read_scalars(path)


@pytest.mark.parametrize("values", [(1.0,), (0.0, 0.0), (5.0, 5.0, 5.0), (1e-6, 10.0), (-3.0, 4.0), (1e9, 2e9)])
def test_charts_of_awkward_ranges_stay_inside_the_frame(values):
    drawn = svg(Chart("x", (Series("a", tuple(range(len(values))), values),)), ["a"])
    points = re.search(r'points="([^"]*)"', drawn).group(1).split()
    assert len(points) == len(values)
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 360 and 0 <= y <= 200


def test_smooth():
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_overlay_tints_inside_and_keeps_outside():
    frame, mask = np.full((20, 30, 3), 100, np.uint8), np.zeros((20, 30), bool)
    mask[5:15, 5:15] = True
    drawn = overlay(frame, mask, TRUTH)
    assert np.array_equal(drawn[~mask], frame[~mask])
    assert np.array_equal(drawn[10, 10], (0.55 * 100 + 0.45 * np.array(TRUTH)).astype(np.uint8))
    assert tuple(drawn[5, 10]) == TRUTH
    assert np.array_equal(overlay(frame, np.zeros_like(mask), PREDICTION), frame)
    with pytest.raises(ValueError, match="frame's size"):
        overlay(frame, mask[:-1], TRUTH)


@pytest.mark.parametrize(("frames", "columns"), [(10, 5), (3, 3), (1, 1)])
def test_strip_shows_three_rows(frames, columns):
    clip_frames = np.random.default_rng(0).integers(0, 255, (frames, 40, 60, 3), dtype=np.uint8)
    masks = np.zeros((frames, 40, 60), bool)
    image = strip(clip_frames, masks, masks)
    assert image.shape == (3 * 40 + 2 * 3, columns * 60 + (columns - 1) * 3, 3)
    assert np.array_equal(image[:40, :60], clip_frames[0]) and np.array_equal(image[:40, -60:], clip_frames[-1])
    assert np.array_equal(image[-40:, -60:], clip_frames[-1] // 2)  # nothing predicted: all dimmed
    assert strip(clip_frames, masks, masks, max_width=30).shape[0] == 3 * 20 + 2 * 3


def test_masks_are_written_as_the_benchmark_names_them(tmp_path):
    masks = np.random.default_rng(0).random((2, 9, 11)) > 0.5
    save_masks(tmp_path / "m", masks)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["00000.png", "00001.png"]
    assert np.array_equal(cv2.imread(str(tmp_path / "m/00001.png"), cv2.IMREAD_GRAYSCALE) == 255, masks[1])


def test_jpeg_keeps_colours():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:] = (200, 50, 10)
    back = cv2.imdecode(np.frombuffer(jpeg(image), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(back.astype(int) - image).max() < 8


def test_tables_align_and_name_protocols():
    table = format_table(["split", "J"], [["test_s", 80.0], ["x", None]]).split("\n")
    assert table == ["split       J", "------  -----", "test_s  80.00", "x           -"]
    group = {"n": 4, "class_accuracy": 75.0, "format_share": 100.0, "faithful": None,
             "official": {"J": 1.0, "F": 2.0, "J&F": 1.5, "n": 4}, "per_expression": {"S": 3.0, "n": 4}}
    printed = split_table({"test_s": {**group, "kinds": {"visual": group, "audio": group}}},
                          ("official", "per_expression"))
    assert "J&F off" in printed and "S per" in printed and "  visual" in printed
    assert mix_scores(scores(60.0), scores(80.0)) == {"J": 70.0, "F": 72.0, "J&F": 71.0}
