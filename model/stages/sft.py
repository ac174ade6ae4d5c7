"""Stage 1: supervised reasoning with segmentation feature distillation.

| paper | released code | here | why |
|---|---|---|---|
| eq. 1, 6: CE + BCE + Dice + MSE, weights 1 | CE + 2 BCE + 0.5 Dice; the MSE is commented out (train_ds.py:245-273, 522-529) | all four, weights by config | the term is in the paper; its weight is nowhere else |
| eq. 2: MSE(f_t, f_s) between [SEG] features | 256-wide outputs of text_hidden_fcs, teacher's context "It is {class} [SEG]." | the same; mean over width and over the student's answers with [SEG] | eq. 2 does not say which answer the teacher reads: `sft.teacher_answer` |
| 3.1: the teacher is trained before | a second 7B model in memory | the teacher's trained tensors alone, swapped into the student for its pass | they are all that differs: megabytes with adapters |
| 3.1 does not say where the student starts | the teacher's weights go into teacher and student (train_ds.py:245-273, commented) | `sft.student_start`: teacher or init_from | behind the frozen decoder a random [SEG] head would have to be learned anew |
| 3.1: the student uses the teacher's SAM decoder, frozen | decoder trained in the trainer of the release (train_ds.py:280) | `sft.freeze_mask_decoder`, see `model.aurora.build` | the paper is explicit |
| - | f_t computed at every step | kept by metadata row after the first time | teacher and media never change |
| - | each model encodes video and sound | encoded once where no tower differs between the two | frozen towers and projectors are one |
| eq. 1: sum over tokens | mean over the batch's answer tokens | mean | a sum would weigh long answers and outweigh the masks |
| no learning rate, no warm-up (4.1) | 1e-4, warm-up 100, accumulation 10 in the only trainer with a cross entropy (train_ds_test.py:87, :315, :472); 1e-5 and 30 in the GRPO trainer (train_ds.py:88, :342) | 1e-4, warm-up 100; accumulation 4 | the rate belongs to its loss; the paper names the accumulation |
"""  # noqa: E501 (a table)

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from configs.schema import RunConfig
from model.aurora.model import AuroraModel
from model.aurora.swapped import SwappedWeights
from model.aurora.trained import check_fit, read_trained
from model.stages.base import Prepared, SupervisedStage
from utils.errors import ConfigError, Problem
from utils.types import AuroraOutput, Batch, MediaFeatures


class SftStage(SupervisedStage):
    """Cross entropy of the reasoning, mask losses, and the distance to the teacher's [SEG] feature.

    Raises:
        ConfigError: distillation without a teacher, or under ZeRO-3.
        WeightsError: the teacher does not fit the student.
    """

    def __init__(self, config: RunConfig, engine: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(config, engine, tokenizer)
        self.teacher: SwappedWeights | None = None
        self._known: dict[int, Tensor] = {}
        """Metadata row -> f_t [C] on the CPU."""
        if config.loss.distill > 0:
            if not config.sft.teacher_checkpoint:
                raise ConfigError([Problem("sft.teacher_checkpoint", None, "distillation needs a teacher", "name one")])
            trained = read_trained(config.sft.teacher_checkpoint)
            check_fit(trained, self.model)
            self.teacher = SwappedWeights(self.model, trained.tensors)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Lay the batch out, and ask the teacher about clips that it has not seen.

        Raises:
            ValueError: a sample without `teacher_ids` that hold a [SEG].
        """
        prepared = super().prepare(batch)
        if self.teacher is None:
            return prepared
        clips = [batch.clip(i) for i in range(len(batch))]
        media: list[MediaFeatures | None] = [None] * len(clips)
        if self.teacher.shares_towers:
            # What is encoded for the teacher serves the student too. Clip by clip, so that not even the last bits of
            # f_t depend on which clips a run happened to meet together.
            media = [self.model.encode(clip, masks=False) for clip in clips]
            video, audio = (torch.cat([getattr(m, kind) for m in media]) for kind in ("video", "audio"))
            prepared.media = MediaFeatures(video, audio)
        new = {s.row: i for i, s in enumerate(batch.samples) if s.row not in self._known}
        if new:
            # One exchange for all of them: for a small model it costs as much as the pass.
            found = self.teacher(teacher_features, [(clips[i], media[i]) for i in new.values()])
            self._known.update(zip(new, found, strict=True))
        prepared.teacher_features = torch.stack([self._known[s.row] for s in batch.samples]).to(self.model.device)
        return prepared

    def distillation(self, prepared: Prepared, output: AuroraOutput) -> Tensor | None:
        """Paper eq. 2, at the queries of the student's answers."""
        if self.teacher is None:
            return None
        return feature_distillation(prepared.teacher_features[prepared.packed.answer_of_query], output.seg_features)


def teacher_features(model: AuroraModel, clips: list[tuple[Batch, MediaFeatures | None]]) -> list[Tensor]:
    """f_t [C] on the CPU of each clip's `teacher_ids`; no lm_head, no masks.

    Args:
        model: under the teacher's weights.
        clips: batches of one, with their video and sound, or None to have them encoded by the teacher's own towers.
    """
    found = []
    for clip, media in clips:
        sample = clip.samples[0]
        packed = model.pack(clip, [sample.teacher_ids])
        if not len(packed.answer_of_query):
            raise ValueError(
                f"metadata rows {sample.row} have no teacher_ids with a [SEG]: stage sft needs the teacher's answer to "
                "each"
            )
        media = model.encode(clip, masks=False) if media is None else media
        found.append(model.seg_features(model.hidden_states(packed, media), packed)[-1].to("cpu", copy=True))
    return found


def feature_distillation(teacher: Tensor, student: Tensor) -> Tensor:
    """MSE(f_t, f_s) of [Q,C] features, float32: mean over the width and over queries (paper eq. 2); 0 without a query.

    Raises:
        ValueError: the two features differ in shape.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher features {tuple(teacher.shape)} against student features {tuple(student.shape)}: "
            "both must be built for the same SAM (prompt width) and the same batch"
        )
    if not len(student):
        return student.float().sum()
    return F.mse_loss(student.float(), teacher.detach().float())
