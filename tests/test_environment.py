"""The lock against the requirements, and what the set-up does and says; every tool and failure is simulated."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts.check_environment import MODULES, failures

ROOT = Path(__file__).resolve().parent.parent
CUDA_BUILD, CPU_BUILD = "2.14.1", "2.14.1+cpu"


def read(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_lock_has_one_version_in_range_for_every_requirement(python: str) -> None:
    machine = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
               "platform_machine": "x86_64", "implementation_name": "cpython"}  # fmt: skip
    pins = [pin for pin in read("requirements.lock") if pin.marker is None or pin.marker.evaluate(machine)]
    locked = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(locked) == len(pins) > 100
    assert (locked["torch"], locked["torchvision"]) == ("2.14.1", "0.29.1")
    for wanted in read("requirements.txt"):
        assert wanted.specifier.contains(locked[wanted.name]), wanted


def test_every_requirement_has_a_lower_bound() -> None:
    assert all(any(bound.operator == ">=" for bound in wanted.specifier) for wanted in read("requirements.txt"))


def test_every_broken_module_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_toolkit.py").write_text("raise RuntimeError('CUDA_HOME does not exist, unable to compile')")
    (tmp_path / "half_a_file.py").write_text("raise OSError('libavformat.so.58: file too short')")
    monkeypatch.syspath_prepend(str(tmp_path))
    toolkit, file, absent = failures(["no_toolkit", "json", "half_a_file", "absent_module"])
    assert re.search(r"no_toolkit: RuntimeError: .*\n    Remedy: set CUDA_HOME", toolkit)
    assert re.search(r"half_a_file: OSError: libavformat.*\n    Remedy: remove the environment", file)
    assert re.search(r"absent_module: ModuleNotFoundError: .*\n    Remedy: source scripts/setup.sh", absent)
    assert {"torch", "cv2", "transformers", "peft", "utils.ds", "decord", "librosa"} <= set(MODULES)


INSTALLER = """
case "$*" in
    "pip install "* | *"-m pip install "*)
        echo "${0##*/} $* | index $UV_DEFAULT_INDEX $UV_INDEX wheels $UV_FIND_LINKS cap $UV_CONSTRAINT" >>"$LOG"
        if [ -e "${!#}" ]; then cat "${!#}" >>"$LOG"; fi ;;
    "-m pip config list") echo "global.constraint='/etc/caps.txt'"
        echo ":env:.find-links='/one /two'"; echo "global.extra-index-url='\\nhttps://a/simple\\nhttps://b/simple'" ;;
    *urlopen*) exit 1 ;;
    *metadata*) [[ $BUILD = *+* ]] ;;
esac
"""
"""What uv and the environment's Python do in these tests: note how they were called, and answer."""

MAKES_VENV = """
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"; cp "$INSTALLER" "$3/bin/python"; echo : >"$3/bin/activate"
fi
"""


def fake_setup(folder: Path, python: str, *tools: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Source scripts/setup.sh in a copy of the tree; `python3` is the given shell script, `tools` are the installer."""
    (folder / "scripts").mkdir(exist_ok=True)
    for name in ("requirements.txt", "requirements.lock", "scripts/setup.sh"):
        (folder / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    used = "awk bash cat cksum cp date df dirname grep mkdir mktemp rm sed sleep touch tr"
    for tool in used.split():
        if not (bin_ / tool).exists():
            (bin_ / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    for name, text in {"python3": python, "installer": INSTALLER, **dict.fromkeys(tools, INSTALLER)}.items():
        (bin_ / name).write_text(f"#!{bin_}/bash\n{text}\n", encoding="utf-8")
        (bin_ / name).chmod(0o755)
    return subprocess.run(
        [str(bin_ / "bash"), "-c", "source scripts/setup.sh"],
        cwd=folder,
        env={"PATH": str(bin_), "LOG": str(folder / "log"), "INSTALLER": str(bin_ / "installer"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def called(folder: Path) -> tuple[list[str], set[str]]:
    """How the installer was called, and the names of the packages listed in the files it was given."""
    lines = (folder / "log").read_text(encoding="utf-8").splitlines()
    return [x for x in lines if " pip install " in x], {re.split("[=>]", x)[0] for x in lines if " pip " not in x}


@pytest.mark.parametrize("tool", ["uv", "pip"])
@pytest.mark.parametrize("build", [CUDA_BUILD, CPU_BUILD])
def test_the_lock_fits_both_builds_of_torch(tmp_path: Path, tool: str, build: str) -> None:
    tools = ["uv"] if tool == "uv" else []
    done = fake_setup(tmp_path, MAKES_VENV, *tools, BUILD=build)
    assert done.returncode == 0, done.stderr
    (first, second), packages = called(tmp_path)
    assert first.startswith("uv pip install" if tool == "uv" else "python -m pip install")
    assert "--no-deps torch==2.14.1 torchvision==0.29.1 |" in first and " -r " in second
    cuda = {name for name in packages if re.match("nvidia|cuda|triton", name)}
    assert len(cuda) == (0 if build == CPU_BUILD else 19) and {"torch", "numpy", "transformers"} <= packages
    again = fake_setup(tmp_path, MAKES_VENV, *tools, BUILD=build)
    assert again.returncode == 0 and again.stdout == "" and len(called(tmp_path)[0]) == 2


def test_uv_is_told_what_pip_was_told(tmp_path: Path) -> None:
    assert fake_setup(tmp_path, MAKES_VENV, "uv", BUILD=CUDA_BUILD, UV_DEFAULT_INDEX="https://mine").returncode == 0
    for line in called(tmp_path)[0]:
        assert "| index https://mine https://a/simple https://b/simple wheels /one,/two cap /etc/caps.txt" in line


@pytest.mark.parametrize("mode", ["latest", "oldest"])
def test_the_range_has_an_environment_of_its_own(tmp_path: Path, mode: str) -> None:
    done = fake_setup(tmp_path, MAKES_VENV, "uv", BUILD=CUDA_BUILD, AURORA_DEPS=mode)
    assert done.returncode == 0, done.stderr
    lines, packages = called(tmp_path)
    assert (tmp_path / f".venv-{mode}").is_dir() and not (tmp_path / ".venv").exists()
    assert "torch>=" in lines[0] and packages == {wanted.name for wanted in read("requirements.txt")}
    assert all(("--resolution lowest-direct" in line) == (mode == "oldest") for line in lines)


def test_unknown_mode_is_refused(tmp_path: Path) -> None:
    done = fake_setup(tmp_path, MAKES_VENV, AURORA_DEPS="newest")
    assert done.returncode == 1 and "AURORA_DEPS is 'newest'. Remedy: locked, latest or oldest" in done.stderr


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    done = fake_setup(tmp_path, 'if [ "$1" = --version ]; then echo "Python 3.8.10"; else exit 1; fi')
    assert done.returncode != 0
    assert "Python 3.10 or newer was not found (python3 is Python 3.8.10)" in done.stderr and "Remedy" in done.stderr


def test_setup_names_the_package_that_brings_venv(tmp_path: Path) -> None:
    done = fake_setup(tmp_path, 'if [ "$1" = -m ]; then echo "ensurepip is not available"; exit 1; fi')
    assert done.returncode != 0
    assert "ensurepip is not available" in done.stderr and "apt-get install python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


TEST_RUN = """
export TMPDIR={folder}
cp {root}/scripts/test.sh scripts/test.sh
echo 'python() {{ if [ "$1" = -m ]; then echo "pytest $*"; {tests}; fi; }}; ruff() {{ :; }}' >scripts/setup.sh
bash scripts/test.sh --smoke -k name
"""


@pytest.mark.parametrize("tests, status", [("touch $XDG_CACHE_HOME/x", 0), ("sleep 600 & disown", 1), ("return 3", 3)])
def test_a_test_run_leaves_nothing(tmp_path: Path, tests: str, status: int) -> None:
    (tmp_path / "scripts").mkdir()
    done = subprocess.run(
        ["bash", "-c", TEST_RUN.format(folder=tmp_path, root=ROOT, tests=tests)],
        cwd=tmp_path, env={**os.environ}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    assert "pytest -m pytest -n 2 --dist worksteal --maxfail=20 -m smoke -k name" in done.stdout
    assert ("left behind" in done.stdout and "sleep 600" in done.stdout) == (status == 1)
    assert not list(tmp_path.glob("aurora-test.*"))
