"""Imports every heavy package once and names the remedy for each that fails: python scripts/check_environment.py"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

MODULES = """torch torchvision.ops cv2 segment_anything transformers peft utils.ds decord librosa av pycocotools.mask
torch.utils.tensorboard matplotlib pydantic""".split()
"""Packages that others need come first; `utils.ds` imports DeepSpeed."""

REMEDIES = {
    "CUDA_HOME": "set CUDA_HOME to a CUDA toolkit of torch's version, or export DS_SKIP_CUDA_CHECK=1 DS_BUILD_OPS=0",
    "torchvision::": "torch and torchvision are different builds (CPU, CUDA): install both from one index",
    "No module named": "source scripts/setup.sh",
    "": "remove the environment's folder and source scripts/setup.sh again, or install the library that it misses",
}
"""Words of an error -> what to do about it; the first that fits counts."""


def failures(modules: list[str]) -> list[str]:
    """One message with its remedy per module that cannot be imported."""
    messages = []
    for name in modules:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
            text = f"{name}: {type(error).__name__}: {error}"
            messages.append(f"{text}\n    Remedy: {next(do for word, do in REMEDIES.items() if word in text)}")
    return messages


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit("\n".join(failures(MODULES)) or None)
