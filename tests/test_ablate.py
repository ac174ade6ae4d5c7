"""scripts/ablate.py: what runs, what is kept, what a change or a kill makes anew, and what the tables say."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataset.avsbench import AvsBenchIndex
from dataset.media import read_audio, read_frames
from dataset.truth import read_truth
from scripts.ablate import main
from scripts.ablation.cost import cost_table, estimates
from scripts.ablation.graph import COMMANDS, STUDY_TRAININGS, TRAININGS, Graph, Setting, ancestors
from scripts.ablation.render import document, html, markdown
from scripts.ablation.results import Difference, Mean, mean_of, outcome
from scripts.ablation.tables import TABLES
from scripts.make_mini_s4 import main as make_s4
from tests.ablation_case import ROOT, log, make_project
from utils.config import load_config
from utils.errors import DataError
from utils.paper import ABLATIONS
from utils.report.breakdown import Estimate


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command changes folder and the handler of SIGTERM; both are put back."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which Table 3 has been made with two seeds."""
    project = make_project(tmp_path_factory.mktemp("done"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(signal, "signal", lambda *_: None)
        assert main(["--table", "3", "--seeds", "2"], project) == 0
    return project


@pytest.fixture
def project(done: Path, tmp_path: Path) -> Path:
    """A copy of it, its log forgotten."""
    copy = tmp_path / "project"
    shutil.copytree(done, copy)
    log(copy)
    return copy


def graph(scale: str, *tables: int, seeds: int = 1, root: Path = ROOT) -> Graph:
    made = Graph(Setting(root, Path("runs/ablations") / scale, Path("configs/ablations") / scale, scale,
                         {"mini": 1, "paper": 2}[scale]))  # fmt: skip
    for table in tables:
        for seed in range(seeds):
            for row in TABLES[table].rows:
                made.add(row.evaluation, seed)
    return made


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_every_row_of_every_table_has_its_runs(scale: str) -> None:
    made = graph(scale, *TABLES)
    names = {node.name for node in made.nodes.values()}
    # At paper scale the teacher reads classes, so that of the fixed paths is the teacher of all rows.
    assert set(TRAININGS) - names == ({"fixed_teacher"} if scale == "paper" else set())
    assert (scale == "mini") == (names >= set(COMMANDS))
    assert {int(t) for t in TABLES} == {2, 3, 4, 5, 6, 7, 8}
    for name, node in made.nodes.items():
        order = list(ancestors(made, name))
        assert order[-1] == name and set(node.needs) < set(order)
    files = {p.stem for p in (ROOT / "configs/ablations" / scale).glob("*.yaml")}
    own = {"mine", "eval_seen", *STUDY_TRAININGS} if scale == "mini" else set()
    assert files == set(TRAININGS) | {"eval", "eval_s4"} | own


def test_rows_differ_from_the_paper_s_method_in_what_they_say() -> None:
    def config(name: str, scale: str = "paper"):
        return load_config(ROOT / f"configs/ablations/{scale}/{name}.yaml")

    for scale in ("paper", "mini"):
        assert config("wo_cot", scale).data.answer == "plain" and config("wo_distill", scale).loss.distill == 0
        # Its teacher reads the true class; the study `teacher` has the one that does not.
        assert config("wo_cot", scale).sft.teacher_answer in ("class", "conclusion")
        assert config("ct", scale).reflective.target == "corrected_only"
        assert config("format_iou", scale).grpo.reward_weights == {"format": 1.0, "iou": 1.0, "class": 0.0}
        assert config("s4", scale).data.benchmark == "avsbench_s4"
        seg, mllm = config("seg", scale), config("mllm", scale)
        assert seg.loss.ce == 0 < seg.loss.bce and mllm.loss.bce + mllm.loss.dice == 0 < mllm.loss.ce
        assert config("mllm_seg", scale).loss == seg.loss and config("seg_mllm", scale).loss == mllm.loss
        assert config("wo_mllm", scale).model.prompter == "text_encoder"
        assert config("cot", scale).data.cot, "its rows are those with a reasoning"
        for name in ("wo_cot", "wo_mllm"):
            rows = {"answer": "reasoning"}
            assert config(name, scale).data.model_copy(update=rows) == config("cot", scale).data, "the same rows"
    plain = config("wo_cot_plain", "mini")
    assert plain.sft.teacher_answer == config("plain_teacher", "mini").data.answer == plain.data.answer == "plain"
    for table in (2, 7):
        assert "reads the true class" in TABLES[table].remark
    assert config("wo_mllm").model.text_encoder and config("wo_mllm", "mini").model.text_encoder is None
    sft = load_config(ROOT / "configs/sft.yaml", ["output_dir=x"])
    assert config("cot").model_copy(update={"output_dir": "x"}) == sft


def test_the_paper_s_lines_are_complete() -> None:
    assert sorted(ABLATIONS) == [2, 3, 4, 5, 7, 8]
    for lines in ABLATIONS.values():
        for line in lines:
            assert set(line.scores) == {"test_s", "test_u"}
            for j, f, both in line.scores.values():
                assert abs((j + f) / 2 - both) <= 0.1001  # the paper rounds


def test_shared_runs_are_made_once(done: Path) -> None:
    made = log(done) or (done / "first.txt").read_text().split()
    (done / "first.txt").write_text("\n".join(made))
    assert sorted(made) == sorted(
        ["make_mini_world", *["teacher", "wo_distill", "cot", "eval_wo_distill", "eval_cot"] * 2]
    )
    assert made.index("teacher") < made.index("cot") < made.index("eval_cot")
    keys = {n.name: n.key for n in graph("mini", 3).nodes.values()}
    assert keys["cot"] == {n.name: n.key for n in graph("mini", 2).nodes.values()}["cot"]


def test_nothing_is_made_twice_and_other_tables_add_their_own(project: Path) -> None:
    assert main(["--table", "3", "--seeds", "2"], project) == 0 and log(project) == []
    assert main(["--table", "8"], project) == 0
    assert log(project) == ["generate_cot", "fixed_teacher", "fixed", "eval_fixed"]


def test_a_changed_config_makes_exactly_what_depends_on_it(project: Path) -> None:
    path = project / "configs/ablations/mini/wo_distill.yaml"
    text = path.read_text()
    path.write_text(f"{text}log:\n  every: 1\n")  # nothing depends on it
    assert main(["--table", "3", "--seeds", "2"], project) == 0 and log(project) == []
    path.write_text(f"{text}optim:\n  steps: 77\n")
    assert main(["--table", "3", "--seeds", "2"], project) == 0
    assert log(project) == ["wo_distill", "eval_wo_distill"] * 2
    path.write_text(text)  # back again: the first runs are still there
    assert main(["--table", "3", "--seeds", "2"], project) == 0 and log(project) == []
    teacher = project / "configs/ablations/mini/teacher.yaml"
    teacher.write_text(teacher.read_text() + "optim:\n  steps: 77\n")
    assert main(["--table", "3"], project) == 0
    assert sorted(log(project)) == ["cot", "eval_cot", "eval_wo_distill", "teacher", "wo_distill"]


def test_changed_code_counts_unless_it_is_told_not_to(project: Path) -> None:
    with (project / "train_ds_test.py").open("a") as file:
        file.write("\n")
    assert main(["--table", "3", "--any-code"], project) == 0 and log(project) == []
    assert main(["--table", "3"], project) == 0
    assert sorted(log(project)) == ["eval_cot", "eval_wo_distill"]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    (project / "hold-cot").write_text("")
    code = f"from pathlib import Path; from scripts.ablate import main; main(['--table', '3'], Path({str(project)!r}))"
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.monotonic() + 120
    path = project / "log.txt"
    while not path.exists() or "cot" not in path.read_text().splitlines():
        assert runner.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    (project / "hold-cot").unlink()
    before = log(project)
    assert before[-1] == "cot" and "eval_cot" not in before
    assert main(["--table", "3"], project) == 0
    after = log(project)
    assert after[0] == "cot" and not {*before[:-1]} & {*after}
    (folder,) = (project / "runs/ablations/mini").glob("cot-s0-*")
    assert (folder / "attempts").read_text() == "xx"  # the folder was kept, so the real command continues


def test_one_run_as_a_job_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(tmp_path / "project")
    assert main(["--table", "6", "--print-commands"], project) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(lines) == 2 * len(commands) == 2 * len(graph("mini", 6).nodes) and log(project) == []
    late = [line for line in commands if line.split()[-1].startswith("cot-")][0].split()[2:]
    assert main(late, project) == 1
    assert "needs world, teacher-s0-" in capsys.readouterr().err
    for line in commands[:2]:
        assert main(line.split()[2:], project) == 0
    assert log(project) == ["make_mini_world", "teacher"]
    assert main(["--table", "6"], project) == 0 and len(log(project)) == len(commands) - 2
    assert main(["--table", "6", "--only", "nothing"], project) == 1
    text = (project / "runs/ablations/mini/table_6.md").read_text()
    assert "| fine-tuned, 3 epochs | S4 test | 12 | 77.3 | 86.7 | - |" in text and "Protocol s4" in text
    assert "| before fine-tuning - fine-tuned, 3 epochs | S4 test | - |" in text


def test_tables_of_finished_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table", "3", "--seeds", "3", "--report"], project) == 0
    assert log(project) == []
    folder = project / "runs/ablations/mini"
    text = (folder / "table_3.md").read_text()
    assert "Not finished: w/o distillation, seed 2; with distillation, seed 2." in text
    assert text in capsys.readouterr().out and "Mini world, synthetic data" in text
    with open(folder / "table_3.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    first = rows[0]
    assert (first["row"], first["split"], first["score"], first["paper"]) == ("w/o distillation", "test_s", "J", "60.2")
    assert (first["seeds"], first["n"], first["mini"]) == ("2", "12", "1")
    assert float(first["deviation"]) == pytest.approx(0.5**0.5)  # the seeds score x and x + 1
    facts = json.loads((folder / "table_3.json").read_text())
    seen = facts["differences"][0]
    # Made-up scores: without distillation 4 points better in every row and seed, against the paper.
    assert (seen["paper"], round(seen["ours"], 6)) == (-0.8, 4.0)
    assert (seen["agrees"], seen["significant"]) == (False, True)
    assert "w/o distillation on seen (not the paper's sign, significant)" in text
    page = (folder / "table_3.html").read_text()
    assert page.count("<table>") == 2 and "<script" not in page and "±" in page


def test_document_keeps_notes_and_names_open_questions(project: Path) -> None:
    docs = project / "all.md"
    assert main(["--table", "3", "--seeds", "2", "--report", "--docs", str(docs)], project) == 0
    text = docs.read_text()
    assert "Open question: w/o distillation on seen" in text and "What the mini world cannot show" in text
    assert text.count("Open question: ") == 2
    docs.write_text(text.replace("Open question: w/o distillation on seen", "Explained: w/o distillation on seen"))
    assert main(["--table", "all", "--report", "--docs", str(docs)], project) == 0
    again = docs.read_text()
    assert "Explained: w/o distillation on seen" in again and "Open question: w/o distillation on seen" not in again
    assert "Open question: w/o distillation on unseen" in again
    assert "## Table 7" in again and again.count("No run has finished.") == 4
    assert "| with distillation | seen |" in again


def test_one_seed_is_never_significant(project: Path) -> None:
    made = graph("mini", 3, root=project)
    folders = {(r.evaluation, 0): project / made.add(r.evaluation, 0).step.folder for r in TABLES[3].rows}
    found = outcome(TABLES[3], folders, (0,), 60.0)
    assert all(d.significant is None and d.over_seeds.interval is None for d in found.differences)
    assert "one seed" in markdown(found) and "one seed" in html(found)
    assert found.lines[0].scores["J"].deviation is None and "±" not in markdown(found)
    half = outcome(TABLES[3], {k: v for k, v in folders.items() if "wo" in k[0]}, (0,), 60.0)
    assert len(half.lines) == 2 and not half.differences and half.missing == ("with distillation, seed 0",)
    nothing = outcome(TABLES[2], {}, (0,), 0.0)
    assert "No run has finished." in markdown(nothing) and document([nothing], 0.0).count("## Table 2") == 1
    broken = folders["eval_cot", 0] / "test_s/metrics.json"
    facts = json.loads(broken.read_text())
    broken.write_text(json.dumps({**facts, "scores": {}}))
    with pytest.raises(DataError, match="no scores of split test_s under protocol official"):
        outcome(TABLES[3], folders, (0,), 60.0)


def test_no_difference_has_no_sign() -> None:
    rows = TABLES[3].rows
    signs = [
        Difference(rows[0], rows[1], "test_s", paper, mean_of([ours]), Estimate(ours, None, None, 1, 1)).agrees
        for paper, ours in ((-0.8, 0.0), (-0.8, -1.0), (-0.8, 1.0), (None, 1.0), (0.0, 1.0))
    ]
    assert signs == [False, True, False, None, None]


def test_means_and_their_intervals() -> None:
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.value, mean.deviation, mean.seeds) == (2.0, 1.0, 3)
    low, high = mean.interval
    assert high - 2 == pytest.approx(2 - low) == pytest.approx(4.303 / 3**0.5)  # Student, two degrees of freedom
    assert mean_of([5.0]) == Mean(5.0, None, 1)


def test_cost_is_measured_where_it_can_be() -> None:
    made = graph("paper", *TABLES)
    guess = estimates(made.nodes, {}, "paper", 2)
    by_name = {made.nodes[name].name: e for name, e in guess.items()}
    assert by_name["wo_mllm"].hours is None and by_name["cot"].source == "arithmetic"
    assert by_name["teacher"].hours == pytest.approx(2 * by_name["cot"].hours)
    assert by_name["eval_wo_cot"].hours < by_name["eval_cot"].hours < 20
    cot = next(name for name, node in made.nodes.items() if node.name == "cot")
    known = estimates(made.nodes, {cot: 3600.0}, "paper", 2)
    assert (known[cot].hours, known[cot].source) == (2.0, "finished")
    fixed = next(name for name, node in made.nodes.items() if node.name == "fixed")
    assert (known[fixed].hours, known[fixed].source) == (2.0, "mean of 1 like it")
    assert f"{len(made.nodes)} runs, 1 finished" in cost_table(made.nodes, known)


def test_missing_files_are_named_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(tmp_path / "project")
    assert main(["--table", "2", "--scale", "paper"], project) == 1
    error = capsys.readouterr().err
    assert "model.text_encoder = 'weights/clip-vit-large-patch14'" in error and "data.root = 'data/refavs'" in error
    assert "init_from" not in error and "teacher_checkpoint" not in error and log(project) == []
    assert main(["--table", "2", "--num_gpus", "7"], project) == 1 and "must divide" in capsys.readouterr().err
    assert main(["--table", "2", "--scale", "paper", "--num_gpus", "4", "--dry-run"], project) == 0
    with pytest.raises(SystemExit):
        main(["--table", "2", "--seeds", "0"], project)


def test_mini_s4_has_the_layout_of_s4(tmp_path: Path) -> None:
    root = tmp_path / "s4"
    assert make_s4(["--out", str(root), "--train", "2", "--val", "1", "--test", "2"]) == 0
    index = AvsBenchIndex(root, "s4")
    assert index.layout == "v2" and [len(index.rows(s)) for s in ("train", "val", "test")] == [2, 1, 2]
    for split, annotated in (("train", 1), ("test", 5)):
        for row in index.rows(split):
            frames = read_frames(index.frames_folder(row.clip))
            assert frames.shape == (5, 96, 96, 3) and row.class_name
            masks, labelled = read_truth(index, row, (96, 96), None, None)
            assert (labelled or tuple(range(5))) == tuple(range(annotated)) and masks[:annotated].any(axis=(1, 2)).all()
            assert len(read_audio(index.audio_path(row.clip), 16_000)) == 5 * 16_000
    table = (root / "metadata.csv").read_bytes()
    assert make_s4(["--out", str(root), "--train", "2", "--val", "1", "--test", "2"]) == 0
    assert (root / "metadata.csv").read_bytes() == table and len(list(root.glob("v1s/*"))) == 5
