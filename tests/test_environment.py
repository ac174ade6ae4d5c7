"""What the set-up says when something is missing or broken; every failure is simulated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_environment import CHECKS, failures, remedy

ROOT = Path(__file__).resolve().parent.parent

BROKEN = {
    "libGL": ("cv2", ImportError("libGL.so.1: cannot open shared object file"), r"apt-get install libgl1; .*headless"),
    "libxcb": (
        "cv2",
        ImportError("libxcb.so.1: cannot open shared object file"),
        r"apt-get install libxcb1; .*headless",
    ),
    "libglib": ("cv2", ImportError("libgthread-2.0.so.0: cannot open shared object file"), r"libglib2.0-0"),
    "a torchvision of another torch": (
        "torchvision",
        RuntimeError("operator torchvision::nms does not exist"),
        r"torch \S+ and torchvision \S+ do not match: pip uninstall -y torch torchvision && pip install torch",
    ),
    "half a torchvision": (
        "segment_anything",
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
        r"do not match",
    ),
    "a CUDA torch without its libraries": (
        "torch",
        OSError("libcudart.so.13: cannot open shared object file"),
        "misses",
    ),
    "no CUDA toolkit": ("deepspeed", RuntimeError("CUDA_HOME does not exist, unable to compile"), "DS_SKIP_CUDA_CHECK"),
    "not installed": ("decord", ModuleNotFoundError("No module named 'decord'"), r"pip install -r requirements.txt"),
    "anything else": ("librosa", ImportError("cannot import name 'x'"), r"force-reinstall"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_remedy(name: str) -> None:
    package, error, expected = BROKEN[name]

    def check() -> None:
        raise error

    (message,) = failures({package: check})
    assert message.startswith(f"{package}: {type(error).__name__}: ")
    assert re.search(f"Remedy: .*{expected}", message)
    assert remedy(package, error) in message


def test_script_reports_all_and_fails(tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    (tmp_path / "decord.py").write_text("raise OSError('libavformat.so.58: file too short')")
    code = (
        "from scripts import check_environment as c; import sys;"
        "[c.CHECKS.pop(k) for k in list(c.CHECKS) if k not in ('cv2', 'decord')]; sys.exit(c.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "cv2: ImportError" in done.stderr and "decord: OSError" in done.stderr
    assert "2 of 2 packages cannot be used" in done.stderr


def test_checks_cover_the_requirements() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"[a-z-]+>=\d+(\.\d+)*( +#|$)", line) for line in required)
    names = {line.split(">=")[0] for line in required}
    wanted = {
        "torch",
        "torchvision",
        "opencv-python",
        "segment-anything",
        "transformers",
        "peft",
        "deepspeed",
        "decord",
    }
    assert wanted | {"librosa", "pycocotools", "tensorboard"} <= names
    assert len(CHECKS) == 11


def fake_setup(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Source scripts/setup.sh in a copy of the tree where `python3` is the given shell script."""
    (tmp_path / "scripts").mkdir()
    for name in ("requirements.txt", "scripts/setup.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "tr", "rm", "mktemp", "sed", "grep", "touch", "dirname", "sleep"):
        (tools / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    (tools / "python3").write_text(f"#!{tools}/bash\n{python}\n", encoding="utf-8")
    (tools / "python3").chmod(0o755)
    return subprocess.run(
        [str(tools / "bash"), "-c", "source scripts/setup.sh"],
        cwd=tmp_path,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    done = fake_setup(tmp_path, 'if [ "$1" = --version ]; then echo "Python 3.8.10"; else exit 1; fi')
    assert done.returncode != 0
    assert "Python 3.10 or newer was not found (python3 is Python 3.8.10)" in done.stderr and "Remedy" in done.stderr


def test_setup_names_the_package_that_brings_venv(tmp_path: Path) -> None:
    done = fake_setup(tmp_path, 'if [ "$1" = -m ]; then echo "ensurepip is not available"; exit 1; fi')
    assert done.returncode != 0
    assert "ensurepip is not available" in done.stderr and "apt-get install python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()
