"""Imports every heavy package once and names the remedy for each that fails: python scripts/check_environment.py"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path


def _torchvision_operators() -> None:
    """A torchvision built for another torch imports with luck, but its operators are missing."""
    import torch
    import torchvision

    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def _language_classes() -> None:
    from transformers import Qwen2ForCausalLM, SiglipVisionModel  # noqa: F401 - the import is the check


def _deepspeed() -> None:
    from utils.ds import deepspeed  # noqa: F401 - the import is the check


def _import(name: str) -> Callable[[], None]:
    return lambda: importlib.import_module(name) and None


CHECKS: dict[str, Callable[[], None]] = {
    "torch": _import("torch"),
    "torchvision": _torchvision_operators,
    "cv2": _import("cv2"),
    "segment_anything": _import("segment_anything"),
    "transformers": _language_classes,
    "peft": _import("peft"),
    "deepspeed": _deepspeed,
    "decord": _import("decord"),
    "librosa": _import("librosa"),
    "pycocotools": _import("pycocotools.mask"),
    "tensorboard": _import("torch.utils.tensorboard"),
}
"""Name -> what must run without an error; packages that others need come first."""

_HEADLESS = "pip uninstall -y opencv-python && pip install opencv-python-headless"
_REINSTALL = "pip uninstall -y torch torchvision && pip install torch torchvision"

SYSTEM_LIBRARIES = {
    r"libGL\.so": "libgl1",
    r"libxcb[^ ]*\.so": "libxcb1",
    r"lib(glib|gthread|gobject)[^ ]*\.so": "libglib2.0-0 (libglib2.0-0t64 on Debian 13, Ubuntu 24.04)",
    r"libSM\.so": "libsm6",
    r"libXext\.so": "libxext6",
    r"libXrender\.so": "libxrender1",
}
"""Missing shared library of OpenCV -> Debian/Ubuntu package."""


def remedy(name: str, error: BaseException) -> str:
    """What to do about an import of `name` that failed with `error`."""
    text = f"{type(error).__name__}: {error}"
    for pattern, package in SYSTEM_LIBRARIES.items():
        if re.search(pattern, text):
            return f"apt-get install {package}; without root rights: {_HEADLESS}"
    if re.search(r"torchvision::|partially initialized module 'torchvision'|torchvision.*undefined symbol", text):
        return f"torch {version('torch')} and torchvision {version('torchvision')} do not match: {_REINSTALL}"
    if re.search(r"lib(cuda|cublas|cudnn|nccl|cusparse|nvrtc|cupti)[^ ]*\.so|undefined symbol", text):
        return f"torch {version('torch')} misses libraries it was built with: {_REINSTALL}"
    if "MissingCUDAException" in text or "CUDA_HOME" in text:
        return "set CUDA_HOME to a CUDA toolkit of torch's version, or export DS_SKIP_CUDA_CHECK=1 DS_BUILD_OPS=0"
    if isinstance(error, ModuleNotFoundError):
        return "pip install -r requirements.txt"
    return "pip install --force-reinstall --no-deps the package named above, or remove .venv and set up again"


def version(package: str) -> str:
    """Installed version, or "(not installed)"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def failures(checks: dict[str, Callable[[], None]] = CHECKS) -> Iterator[str]:
    """One message per package that cannot be imported, with its remedy."""
    for name, check in checks.items():
        try:
            check()
        except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            yield f"{name}: {type(error).__name__}: {first}\n    Remedy: {remedy(name, error)}"


def main() -> int:
    """Print the failures; 0 if there are none."""
    found = list(failures())
    for message in found:
        print(message, file=sys.stderr)
    if found:
        print(f"check_environment: {len(found)} of {len(CHECKS)} packages cannot be used", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
