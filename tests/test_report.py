"""The page, its pictures and sampled answers: what is shown, sizes, colours; no text becomes markup."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from PIL import Image

from scripts.report import main as report_command
from tests.report_case import (
    EVIL,
    ROWS,
    gallery,
    make_world,
    many_clips,
    read_page,
    report,
    section,
    write_evaluation,
    write_run,
)
from utils.draw import PREDICTION, TRUTH, jpeg, overlay, save_masks, strip
from utils.errors import DataError
from utils.report.media import mask_layer, sprite
from utils.report.page import SCRIPT, STYLE, render_page
from utils.report.runs import SAMPLED_GROUPS, read_groups
from utils.results import encode_masks
from utils.tables import format_table, mix_scores, split_table


def scores(value, n=8):
    return {"J": value, "F": value + 2, "J&F": value + 1, "n": n, "class_accuracy": 90.0, "faithful": 50.0}


def summary():
    kinds = {"visual": scores(70.0), EVIL: scores(60.0)}
    stage = {
        "test_s": {**scores(80.0), "per_expression": scores(81.0)}, "test_u": scores(62.0), "mix": scores(71.0),
        "test_n": {"S": 7.25, "n": 4, "per_expression": {"S": 6.5, "n": 4}}, "kinds": kinds, "class_accuracy": 91.5,
        "faithful": 44.0, "trained": "sft", "answer": "reasoning",
    }
    probe = {"stage": "sft", "test_s": scores(50.0), "kinds": {"visual": scores(69.0), EVIL: scores(20.0)}}
    teacher = {"test_s": scores(85.0), "answers": "given"}
    return {"stages": {"teacher": teacher, "sft": stage}, "probes": {"shuffle_audio": probe},
            "seconds": {"train sft": 12.5}, "config": EVIL, "git": "abc"}


def charts():
    return {EVIL: {EVIL: ([1.0, 2.0, 3.0], [3.0, 2.0, 1.5]), "sft": ([1.0, 2.0], [1.0, 0.001])}}


def pictures(reader):
    """The kinds of pictures inside a page, none of which comes from elsewhere."""
    found = [attributes["src"] for tag, attributes, _ in reader.elements if tag == "img"]
    assert all(address.startswith("data:image/") for address in found)
    return [address.removeprefix("data:image/").split(";")[0] for address in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with hostile texts and the page that scripts/report.py makes of it."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "run", make_world(folder / "data"))
    report(folder / "run", "--title", EVIL, out=folder / "run/report.html")
    return folder / "run"


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text(encoding="utf-8")


def test_text_never_becomes_markup(page):
    reader = read_page(page)
    assert reader.tags.count("script") == 2  # the data and the page's own
    assert pictures(reader) == ["svg+xml"]  # the curve of the loss
    assert "alert('x')" in " ".join(reader.text)  # shown, as text
    row = next(row for row in gallery(page)["rows"] if row["row"] == 1)
    assert "".join(gallery(page)["texts"][text] for _, text in row["said"]["sft"]["steps"]) == EVIL


def test_hostile_texts_of_the_summary_are_shown_as_text():
    reader = read_page(render_page(EVIL, summary(), charts=charts()))
    assert "script" not in reader.tags and "alert('x')" in " ".join(reader.text)
    assert pictures(reader) == ["svg+xml"]
    image = next(attributes for tag, attributes, _ in reader.elements if tag == "img")
    drawn = base64.b64decode(image["src"].split(",")[1]).decode()
    found = [element.tag.split("}")[1] for element in ElementTree.fromstring(drawn).iter()]
    assert "script" not in found and "image" not in found and "alert(&#x27;x&#x27;)" not in image["alt"]
    assert image["alt"].startswith(EVIL) and "sft 1 to 0.001" in image["alt"]


def test_no_script_but_its_own_may_run(page):
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = [attributes for tag, attributes, _ in read_page(page).elements if tag == "meta"]
    (policy,) = [a["content"] for a in found if a.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none'")
    assert not re.search(r"https?://|@import|url\(|innerHTML|eval\(", page)


def test_page_asks_for_nothing_outside_its_folder(run, page):
    data = gallery(page)
    addresses = read_page(page).addresses
    for row in data["rows"]:
        addresses += [row["frames"], row["truth"], *(v for s in row["said"].values() for k, v in s.items()
                                                     if k in ("masks", "sound"))]
    for address in addresses:
        assert address.startswith(("#", "report_files/", "data:image/svg+xml;base64,")), address
        assert address.startswith(("#", "data:")) or (run / unquote(address)).is_file(), address


def test_page_holds_every_part(page):
    text = " ".join(read_page(page).text)
    for wanted in ("AURORA (paper)", "SFT with reasoning and distillation", "Question kind", "Class",
                   "Null references", "sft against teacher", "Largest gains", "Largest losses", "Perceptual Failure",
                   "teacher", "sft_zero", "audio perception"):
        assert wanted in text, wanted
    data = gallery(page)
    assert [row["row"] for row in data["rows"]] == list(range(9)) and data["run"] == "sft"
    first = data["rows"][0]
    assert [step for step, _ in first["said"]["sft"]["steps"]] == ["video", "audio", "reference", "answer"]
    assert first["n"] == 10 and first["hw"] == [48, 64] and data["rows"][1]["failure"] == "audio perception"
    assert first["said"]["sft"]["sound"] == "report_files/sound/clip0_0_10000.mp3"
    probed = first["said"]["sft_zero"]
    assert "sound" not in probed and probed["note"] == "Probe: the model heard 0#silent."


def test_scores_stand_under_their_protocol_and_beside_the_paper():
    text = " ".join(read_page(render_page("t", summary())).text)
    for wanted in ("80.00", "7.25", "81.00", "91.50", "-30.00", "-40.00", "12.50", "66.0", "teacher: reads the true"):
        assert wanted in text, wanted


@pytest.mark.parametrize("mini_file", ["mini_truth.jsonl", "mini_s4.json"])
def test_only_runs_on_refavs_stand_beside_published_numbers(tmp_path, mini_file):
    """Whatever else the page shows: a run on the mini world has tables of its own, which say what it is."""
    synthetic = {"metadata.csv": "x", mini_file: "x"}
    write_evaluation(tmp_path / "eval_toy", tmp_path, files=synthetic, checkpoint_sha256="m")
    alone = report(tmp_path, "--no-media", out=tmp_path / "p.html")
    assert section(alone, "paper") == "" and "TSAM" not in alone and "paper:" not in section(alone, "stages")
    assert "Mini world: synthetic" in alone.split("<main>")[0]
    write_evaluation(tmp_path / "eval_real", tmp_path)
    both = report(tmp_path, "--no-media", out=tmp_path / "p.html")
    assert "real" in section(both, "paper") and "toy" not in section(both, "paper")
    real, toy = section(both, "stages").split("Mini world (synthetic clips)")
    assert "real" in real and "toy" not in real and "paper: SFT with reasoning" in real
    assert "toy" in toy and "real" not in toy and "paper:" not in toy and "say nothing about Ref-AVS" in toy
    assert "Mini world: synthetic" not in render_page("t", summary())


def test_page_without_probes_clips_or_curves():
    reader = read_page(render_page("t", {"stages": {"sft": {"test_s": scores(1.0)}}}))
    assert not {"article", "img", "script", "form"} & set(reader.tags)


def test_without_media_the_evaluations_own_pictures_are_shown(run, tmp_path):
    picture = run / "eval_sft/test_s/pictures/00001.jpg"
    picture.parent.mkdir()
    picture.write_bytes(jpeg(np.full((12, 20, 3), 90, np.uint8)))
    rows = gallery(report(run, "--no-media", out=tmp_path / "p.html"))["rows"]
    assert [row["row"] for row in rows] == [1]
    assert (tmp_path / unquote(rows[0]["said"]["sft"]["strip"])).resolve() == picture


def test_a_limit_spreads_clips_and_a_comparison_can_be_named(run, tmp_path, capsys):
    out = tmp_path / "p.html"
    arguments = ["--rows", "3", "--compare", "teacher", "sft_zero", "--json", tmp_path / "scores.json"]
    page = report(run, *arguments, out=out)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out) and printed[2].split() == ["teacher", "test_s", "55.00", "65.00", "60.00", "-", "4"]
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["stages"]["sft"]["mix"]["J&F"] == 60.0 and list(written["probes"]) == ["zero_audio"]
    assert [row["split"] for row in gallery(page)["rows"]] == ["test_s", "test_u", "test_n"]
    assert "sft_zero against teacher" in page and "sft against teacher" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder.*Remedy"),
        (["{run}/sft"], "holds no evaluation.*Remedy"),
        (["{run}", "--compare", "sft", "dpo"], "--compare dpo: no such evaluation.*teacher, sft, sft_zero"),
        (["a={run}/eval_sft", "a={run}/eval_sft"], "two evaluations are named 'a/'.*Remedy"),
        (["{run}", "--data", "nowhere"], r"metadata\.csv: not found.*Remedy"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_words(run, tmp_path, arguments, message, capsys):
    filled = [text.format(run=run) for text in arguments]
    assert report_command([*filled, "--out", str(tmp_path / "p.html")]) == 1
    assert re.search(message, capsys.readouterr().err)


def offered(page, name):
    """The values of one of the gallery's drop-down lists."""
    options = re.search(rf'<select name="{name}">(.*?)</select>', page, re.S)[1]
    return set(re.findall(r'<option value="([^"]*)"', options)) - {""}


def test_every_link_leads_somewhere(page):
    reader = read_page(page)
    names = {attributes.get("id") for _, attributes, _ in reader.elements}
    rows = {f"#row={row['row']}" for row in gallery(page)["rows"]}
    links = [attributes["href"] for tag, attributes, _ in reader.elements if tag == "a"]
    assert len(links) > 8
    for link in links:
        assert link[1:] in names or link in rows, link


def test_controls_have_names_and_tables_scroll_by_themselves(page):
    reader = read_page(page)
    assert 'name="viewport"' in page and "@media (max-width" in STYLE and "prefers-color-scheme: dark" in STYLE
    for tag, attributes, around in reader.elements:
        assert tag not in ("select", "input") or "label" in around, attributes
        assert tag != "table" or around[-1] == "div"
    boxes = [attributes for _, attributes, _ in reader.elements if attributes.get("class") == "scroll"]
    assert len(boxes) == reader.tags.count("table") and all(b.get("aria-label") and "tabindex" in b for b in boxes)


def test_filters_offer_the_values_that_rows_have_and_the_script_knows(page):
    data = gallery(page)
    assert len(data["rows"]) == len(ROWS)
    for name in ("split", "class"):
        field = data["fields"][name]
        assert offered(page, name) == {row[field] for row in data["rows"] if row[field]}
    tests, orders = (SCRIPT.split(f"const {name} = {{")[1].split("};")[0] for name in ("TESTS", "ORDERS"))
    assert offered(page, "result") == set(re.findall(r"(\w+): a =>", tests))
    assert offered(page, "order") == set(re.findall(r"(\w+): \(a, b\)", orders))


def test_a_page_of_thousands_of_clips_stays_small(tmp_path):
    data = many_clips(tmp_path)
    many = len(data["rows"])
    text = render_page("many", {"stages": {}}, gallery=data)
    assert len(gallery(text)["rows"]) == many and len(data["texts"]) < 40
    assert len(text) < 800 * many and "<article" not in text


def test_sprite_and_mask_layer_lie_over_each_other():
    frames = np.arange(7 * 4 * 6 * 3, dtype=np.uint8).reshape(7, 4, 6, 3)
    picture = sprite(frames)
    assert picture.shape == (8, 30, 3)
    for t in range(7):
        assert np.array_equal(picture[4 * (t // 5) : 4 * (t // 5) + 4, 6 * (t % 5) : 6 * (t % 5) + 6], frames[t])
    assert not picture[4:, 12:].any()
    assert sprite(frames[:2]).shape == (4, 12, 3)
    assert sprite(np.zeros((10, 100, 200, 3), np.uint8), 50).shape == (50, 250, 3)
    masks = np.zeros((7, 20, 30), bool)
    masks[6, 5:15, 5:15] = True
    layer = np.asarray(Image.open(io.BytesIO(mask_layer(masks, TRUTH))).convert("RGBA"))
    assert layer.shape == (40, 150, 4)
    assert tuple(layer[20 + 10, 30 + 10]) == (*TRUTH, 70) and tuple(layer[20 + 5, 30 + 10]) == (*TRUTH, 255)
    assert tuple(layer[0, 0]) == (0, 0, 0, 120)


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


def record(step: int, row: int, sample: int, **changes: Any) -> dict[str, Any]:
    masks = np.zeros((3, 12, 16), bool)
    masks[:, :6] = True
    return {
        "step": step, "row": row, "uid": "u", "reference": "the dog", "class_name": "dog", "sample": sample,
        "answer": "The target is dog. It is [SEG].", "has_seg": True, "tokens": 9, "truncated": False,
        "rewards": {"format": 1.0, "iou": 0.25}, "reward": 1.25, "advantage": -0.5, "iou": 0.25, "mask_trained": True,
        "masks": encode_masks(masks), **changes,
    }  # fmt: skip


def write_samples(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def test_groups_of_the_first_and_the_last_step(tmp_path) -> None:
    greedy = {"step": 1, "row": 0, "uid": "u", "reference": "the dog", "answer": "x", "has_seg": False}
    rows = [record(step, row, place) for step in (5, 10, 15) for row in range(SAMPLED_GROUPS + 2) for place in range(2)]
    groups = read_groups(write_samples(tmp_path, greedy, *rows))
    assert [(g[0]["step"], g[0]["row"], len(g)) for g in groups] == [
        (step, row, 2) for step in (5, 15) for row in range(SAMPLED_GROUPS)
    ]
    assert read_groups(write_samples(tmp_path, greedy)) == [] == read_groups(tmp_path / "nothing")


def test_a_broken_line_is_named(tmp_path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"row": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="samples.jsonl:1.*Remedy"):
        read_groups(tmp_path)


def test_page_shows_rewards_words_and_masks() -> None:
    cut = record(5, 0, 1, answer=EVIL, reference=EVIL, masks=[], has_seg=False, truncated=True, mask_trained=False)
    page = render_page("t", {"stages": {}}, samples={"grpo": [[record(5, 0, 0), cut]]})
    assert "Sampled answers" in page and "grpo, step 5: the dog (dog, row 0)" in page
    assert page.count('src="data:image/png;base64,') == 1 and "-0.50" in page and "9 (cut)" in page
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "Sampled answers" not in render_page("t", {"stages": {}})
