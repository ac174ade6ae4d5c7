"""A project whose commands are stand-ins that write what the real ones write, and note each time they run."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = '''
import json, pathlib, random, sys, time
arguments = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
def note(name):
    with open("log.txt", "a") as file:
        file.write(name + "\\n")
    while pathlib.Path("hold-" + name).exists():
        time.sleep(0.05)
'''
TRAIN = COMMON + '''
folder = pathlib.Path(arguments["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "attempts").open("a").write("x")
note(folder.name.split("-")[0])
for name in ("init_from", "sft.teacher_checkpoint"):
    assert arguments.get(name, "null") == "null" or (pathlib.Path(arguments[name]) / "config.yaml").exists(), arguments
(folder / "final").mkdir(exist_ok=True)
(folder / "final/config.yaml").write_text("")
(folder / "checkpoints/step_000090").mkdir(parents=True, exist_ok=True)
(folder / "checkpoints/step_000090/config.yaml").write_text("")
'''
EVALUATE = COMMON + '''
MADE = {"wo_mllm": 30, "wo_cot": 50, "wo_distill": 64, "cot": 60, "crt_grpo": 70, "s4": 75}
folder, checkpoint = pathlib.Path(arguments["eval.output_dir"]), pathlib.Path(arguments["eval.checkpoint"])
name, seed = checkpoint.parents["checkpoints" in checkpoint.parts].name.split("-")[:2]
note("eval_" + name)
s4 = arguments.get("data.benchmark") == "avsbench_s4"
for split in (("test",) if s4 else ("test_s", "test_u")):
    rows = []
    for row in range(12):
        j = MADE.get(name, 40) + int(seed[1:]) + random.Random(f"{row}").uniform(-5, 5)
        clip = f"clip{row // 2}"
        rows.append({"row": row + (100 if split == "test_u" else 0), "uid": clip + "_dog_1", "split": split,
            "reference": "the dog", "kind": "", "class_name": "dog", "reasoning": "", "answer_class": "dog",
            "has_seg": True, "well_formed": True, "faithful": None, "J": j, "F": j + 2, "video": clip, "audio": clip,
            "masks": []})
    mean = sum(r["J"] for r in rows) / len(rows)
    scores = {"J": mean, "F": mean + 2, "J&F": mean + 1, "n": len(rows)}
    path = folder / split
    path.mkdir(parents=True, exist_ok=True)
    (path / "predictions.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
    (path / "metrics.json").write_text(json.dumps({"split": split, "git": "abc", "files": {"mini_truth.jsonl": "x"},
        "scores": {("s4" if s4 else "official"): scores, "per_expression": scores, "class_accuracy": mean + 3,
        "faithful": mean - 3}}))
'''
OTHER = COMMON + '''
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
note(pathlib.Path(sys.argv[0]).stem)
if out.suffix == ".jsonl":
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
else:
    out.mkdir(parents=True, exist_ok=True)
    (out / "metadata.csv").write_text("")
'''
OTHERS = ("make_mini_world", "generate_cot", "mine_failures", "correct_paths", "build_reflective", "make_mini_s4")


def make_project(folder: Path) -> Path:
    """The shipped configurations, stand-ins for all commands, and empty files in place of weights."""
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "assets/mini_base").mkdir(parents=True)
    for name in ("sam.safetensors", "sam.json"):
        (folder / "assets/mini_base" / name).write_text("")
    (folder / "scripts").mkdir()
    (folder / "train_ds.py").write_text(TRAIN)
    (folder / "train_ds_test.py").write_text(EVALUATE)
    for name in OTHERS:
        (folder / f"scripts/{name}.py").write_text(OTHER)
    return folder


def log(project: Path) -> list[str]:
    """Names of the commands that ran, in order; forgotten afterwards."""
    path = project / "log.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines
