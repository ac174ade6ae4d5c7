"""The door for mask models: what one must offer to be prompted by a [SEG] feature. A new segmenter is one subclass.

It is chosen by `model.segmenter` (`model.aurora.build.SEGMENTERS`); what it reads is prepared by `dataset.processor`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Segmenter(nn.Module, ABC):
    """An image encoder that is never trained, and a decoder that turns a prompt into the masks of a clip."""

    components: tuple[str, ...]
    """Modules whose names begin every parameter; the decoder that `trainable.mask_decoder` trains is
    `sam.mask_decoder`."""
    no_gradient: tuple[str, ...]
    """Modules in them that run without gradient, so that training them would do nothing; first the image encoder."""
    image_size: int
    """Z: side of the square input, in pixels."""
    prompt_width: int
    """C: width of a prompt."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """Modules that `encode` runs: features that are kept are those of their weights."""
        return self.no_gradient[:1]

    @abstractmethod
    def encode(self, sam_pixels: Tensor) -> Tensor:
        """Frames [B,T,3,Z,Z], normalised and laid into the square -> image embeddings [B,T,...], without gradient.

        Raises:
            ValueError: the frames are not squares of `image_size` pixels.
        """

    @abstractmethod
    def decode(
        self,
        image_embeddings: Tensor,
        prompts: Tensor,
        clip_of_query: Tensor | None = None,
        frame_index: Tensor | None = None,
    ) -> Tensor:
        """Masks of Q prompts, each on the frames of its clip.

        Args:
            image_embeddings: from `encode`, of B clips.
            prompts: [Q,C].
            clip_of_query: int64 [Q]; None = one prompt a clip, in their order.
            frame_index: int64 [Q,k] frames to decode; None = all T.

        Returns:
            [Q,T or k,h',w'] low-resolution mask logits of the square.

        Raises:
            ValueError: the prompts have another number or width.
        """

    def check_frames(self, sam_pixels: Tensor) -> None:
        """Raises ValueError where the pixels are no [B,T,3,Z,Z]."""
        if sam_pixels.dim() != 5 or sam_pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"sam_pixels has shape {tuple(sam_pixels.shape)}; this segmenter reads [B, T, 3, {self.image_size}, "
                f"{self.image_size}]: preprocess with the image size that model.sam_image_size gives"
            )

    def clips_of(self, prompts: Tensor, clip_of_query: Tensor | None, clips: int) -> Tensor:
        """int64 [Q]: the clip of each prompt [Q,C]. Raises ValueError: another number or width of prompts."""
        found = torch.arange(clips, device=prompts.device) if clip_of_query is None else clip_of_query
        if prompts.shape != (len(found), self.prompt_width):
            raise ValueError(f"prompts has shape {tuple(prompts.shape)}, expected {(len(found), self.prompt_width)}")
        return found

    @abstractmethod
    def upscale(self, logits: Tensor, sam_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
        """Low-resolution logits [T,h',w'] of one clip -> float32 logits [T,*out_size].

        `sam_size` is the (height, width) of the frames inside the square.
        """
