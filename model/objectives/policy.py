"""Group-relative policy optimisation as pure functions: advantages, clipped surrogate, KL, token log-probabilities.

Paper section 3.3, eq. 4 and 5. Notation: R = B * G answers of at most L tokens, answer a belongs to clip a // G; `mask`
is True at the tokens of an answer. Everything is float32. The released code has neither ratio nor clipping nor KL
(LISA_grpo.py:571-575) and reads log-probabilities at positions of another sequence (LISA_grpo.py:252-263).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Advantage = Literal["std", "mean", "leave_one_out"]
Normalisation = Literal["sequence", "token"]

CHUNK = 256
"""Tokens whose logits exist at a time: 156 MB in float32 at 152,064 words."""


class GroupAdvantages(NamedTuple):
    """What a group of answers says of each of its members."""

    values: Tensor  # float32 [R]
    std: Tensor  # float32 [B]: unbiased standard deviation of each group's rewards (Figure 9)
    zero_variance: Tensor  # bool [B]: all answers of the group have the same reward, so that it teaches nothing


def group_advantages(rewards: Tensor, group: int, kind: Advantage = "std", eps: float = 1e-4) -> GroupAdvantages:
    """Advantages of R answers within their groups.

        std            (r - mean) / (std + eps)                   eq. 4; unbiased std, released code LISA_grpo.py:569
        mean           r - mean                                   no bias towards groups that nearly agree
        leave_one_out  r - mean of the other answers = G/(G-1) * (r - mean)

    They are exactly 0 in a group whose rewards are all equal, whatever the rounding of its mean.

    Raises:
        ValueError: a group of one, a number of rewards [R] that G does not divide, or an unknown kind.
    """
    if group < 2 or rewards.dim() != 1 or len(rewards) % group:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} in groups of {group}: G >= 2 must divide R")
    if kind not in ("std", "mean", "leave_one_out"):
        raise ValueError(f"advantage = {kind!r}: must be std, mean or leave_one_out")
    grouped = rewards.float().view(-1, group)
    # Found by comparison, not by a std of 0: the rounding of a mean leaves a residue, which eps would not drown.
    equal = (grouped == grouped[:, :1]).all(1)
    centred = (grouped - grouped.mean(1, keepdim=True)).masked_fill(equal[:, None], 0)
    std = grouped.std(1).masked_fill(equal, 0)
    if kind == "std":
        centred = centred / (std[:, None] + eps)
    elif kind == "leave_one_out":
        centred = centred * (group / (group - 1))
    return GroupAdvantages(centred.flatten(), std, equal)


class Surrogate(NamedTuple):
    """The clipped objective per token, as a loss."""

    loss: Tensor  # float32 [R,L]: -min(r A, clip(r, 1 - eps, 1 + eps_high) A)
    clipped: Tensor  # bool [R,L]: the clipped branch is the smaller one, so that the token gets no gradient


def clipped_surrogate(log_probs: Tensor, old: Tensor, advantages: Tensor, eps: float, eps_high: float) -> Surrogate:
    """Eq. 5 without its means and its KL.

    Args:
        log_probs, old: [R,L] under the policy that is trained, and under the one that drew, without gradient.
        advantages: [R], the same for all tokens of an answer.
        eps, eps_high: the ratio r = exp(log_probs - old) is clipped to [1 - eps, 1 + eps_high] (DAPO: eps_high > eps).

    Raises:
        ValueError: shapes disagree (gather and broadcasting would accept some).
    """
    if log_probs.shape != old.shape or advantages.shape != log_probs.shape[:1]:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)}, old {tuple(old.shape)}, advantages {tuple(advantages.shape)}: "
            "[R,L], [R,L] and [R] are needed"
        )
    # Exactly 1 in the first update, where this is REINFORCE with a baseline; the gradient is that of log_probs.
    ratio = (log_probs - old).exp()
    weight = advantages[:, None]
    free = ratio * weight
    bound = ratio.clamp(1 - eps, 1 + eps_high) * weight
    # The smaller one: a step is never rewarded for leaving the range, but is always pulled back into it.
    return Surrogate(-torch.minimum(free, bound), bound < free)


def k3_divergence(log_probs: Tensor, reference: Tensor) -> Tensor:
    """[R,L] unbiased, never negative estimate of KL(policy || reference): exp(d) - d - 1, d = reference - log_probs.

    Schulman's third estimator, as in GRPO's original (DeepSeekMath, eq. 4); the D_KL of paper eq. 5.
    """
    difference = reference - log_probs
    return difference.exp() - difference - 1


def policy_mean(per_token: Tensor, mask: Tensor, kind: Normalisation) -> Tensor:
    """[R,L] token losses -> scalar.

        sequence  mean over the tokens of each answer, then over all R answers (eq. 5). An answer whose tokens are all
                  left out counts as 0 and still divides, so that leaving it out does not raise the others' weight.
        token     sum over all tokens / number of tokens (DAPO): long answers weigh more.

    No token at all gives 0, with a gradient of 0.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("sequence", "token"):
        raise ValueError(f"normalisation = {kind!r}: must be sequence or token")
    kept = per_token.masked_fill(~mask, 0)  # not times the mask: 0 * inf at padding would be NaN
    if kind == "token":
        return kept.sum() / mask.sum().clamp(min=1)
    return (kept.sum(1) / mask.sum(1).clamp(min=1)).mean()


def token_log_probs(
    head: Callable[[Tensor], Tensor], hidden: Tensor, token_ids: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens, and the entropy of the distributions they come from, chunk by chunk.

    No [N,V] tensor exists beyond `chunk` rows, in backward neither: each chunk's logits are computed again there, which
    costs one more product with lm_head and gives the same gradients. `head` is called as a module, so that adapters,
    a [SEG] row of its own and ZeRO-3 work.

    Args:
        head: [n,D] -> [n,V] logits, which are divided by `temperature`, as in sampling.
        hidden, token_ids: [N,D] the states that predict int64 [N].

    Returns:
        float32 [N] log-probabilities with gradient, float32 [N] entropies in nats without.

    Raises:
        ValueError: another number of states than of tokens.
    """
    if hidden.dim() != 2 or hidden.shape[:1] != token_ids.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} against token_ids {tuple(token_ids.shape)}: [N,D] and [N]")

    def score(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        scores = (head(states).float() / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(-1)
        return scores.gather(-1, ids[:, None])[:, 0], entropy

    parts = []
    for states, ids in zip(hidden.split(chunk), token_ids.split(chunk), strict=True):
        if torch.is_grad_enabled():
            # Recomputed in backward: 156 MB a chunk are less than lm_head's output for every token of every answer.
            parts.append(checkpoint(score, states, ids, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(score(states, ids))
    return torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts])
