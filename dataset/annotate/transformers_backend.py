"""Qwen2.5-Omni from a local folder, through transformers (paper section 3.1: Qwen-Omni writes the first paths).

Only the thinker is loaded: text is wanted, not speech. Several GPUs: one process each (torchrun), every process takes
its share of the rows. For tens of thousands of rows a vLLM server with the `openai` backend is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from dataset.annotate.backend import Reply, Request
from dataset.media import read_audio
from utils.errors import WeightsError

_SYSTEM = "You are a helpful assistant."
_IMAGE = "<|vision_bos|><|IMAGE|><|vision_eos|>"
_SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"


class TransformersBackend:
    """Batched generation on one device.

    Args:
        folder: of the model and its processor; nothing is downloaded.
        batch_size: requests per forward.
        device: torch device; None = the GPU of this process's LOCAL_RANK, else the CPU.
        max_tokens: longest reply.
        temperature: of sampling; 0 = greedy.
        seed: of sampling, with the rows of the batch.

    Raises:
        WeightsError: the folder does not hold the model.
    """

    remote = False

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 1,
        device: str | torch.device | None = None,
        max_tokens: int = 512,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.name = f"transformers:{Path(folder).name}"
        self.batch_size = batch_size
        self._max_tokens, self._temperature, self._seed = max_tokens, temperature, seed
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            self._processor = Qwen2_5OmniProcessor.from_pretrained(str(folder), local_files_only=True)
            model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
                str(folder), local_files_only=True, dtype=dtype
            )
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder}: no Qwen2.5-Omni ({error}). Remedy: name its downloaded folder.") from error
        self._model = model.to(device).eval()
        self._processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, generated together.

        Raises:
            DataError: a clip cannot be read.
        """
        rate = self._processor.feature_extractor.sampling_rate
        inputs = self._processor(
            text=[chat(request) for request in requests],
            images=[_image(path) for request in requests for path in request.frames],
            audio=[read_audio(request.audio, rate) for request in requests],
            padding=True,
            return_tensors="pt",
        )
        inputs = inputs.to(self._model.device)
        inputs = {k: v.to(self._model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        # the same rows and attempts draw the same text, whichever process has them and whatever came before
        torch.manual_seed(hash((self._seed, *((r.row.row, r.attempt) for r in requests))) % (1 << 63))
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        found = self._model.generate(**inputs, max_new_tokens=self._max_tokens, **sampling)
        length = inputs["input_ids"].shape[1]
        texts = self._processor.tokenizer.batch_decode(found[:, length:], skip_special_tokens=True)
        given = inputs["attention_mask"].sum(1).tolist()
        return [Reply(text.strip(), count, found.shape[1] - length) for text, count in zip(texts, given, strict=True)]


def chat(request: Request) -> str:
    """Qwen2.5-Omni's chat with its placeholders for images and sound."""
    media = _IMAGE * len(request.frames) + _SOUND
    return (
        f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{media}{request.prompt}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def _image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
