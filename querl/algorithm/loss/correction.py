"""Weights for what the sampler's kernels computed otherwise than the learner's.

The ratio is old / sampled: the same weights, another engine; with ``run.max_lag`` also what the
weights have moved since. It is no part of new / old, which the losses clip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from querl.algorithm.loss.base import sum_over_sequence

if TYPE_CHECKING:
    from querl.algorithm.pack import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Each token's weight is multiplied by old / sampled, held to [low, high].

    ``cap`` sets what is outside to the nearer bound: truncated importance sampling, TIS
    (fengyao.notion.site/off-policy-rl, with low = 0). ``mask`` sets it to 0: MIS, and by token
    IcePop (ringtech.notion.site/icepop, 0.5 and 5). By ``sequence`` the ratio is the product over a
    sample's trained tokens, the same for all. ``none`` weighs nothing. A cap fails to see tokens
    that are plainly wrong, and keeps them; a mask by sequence loses the long samples, whose
    products stray the furthest, and so learns to be brief.
    """

    kind: Literal["cap", "mask", "none"] = "cap"
    level: Literal["token", "sequence"] = "token"
    low: float = 0.0
    high: float = 2.0

    def apply(self, batch: MicroBatch) -> MicroBatch:
        """The row with these weights multiplied into ``weights_T``."""
        if self.kind == "none":
            return batch
        return replace(batch, weights_T=batch.weights_T * self._weights(batch))

    def _weights(self, batch: MicroBatch) -> Tensor:
        difference_T = (batch.old_logprobs_T - batch.sampled_logprobs_T).detach()
        difference_T = difference_T.where(batch.loss_mask_T, 0)
        if self.level == "sequence":
            difference_T = sum_over_sequence(difference_T, batch)
        ratio_T = difference_T.exp()
        if self.kind == "cap":
            return ratio_T.clamp(self.low, self.high)
        return ratio_T.where((ratio_T >= self.low) & (ratio_T <= self.high), 0)
