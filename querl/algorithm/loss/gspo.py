"""GSPO: one ratio a sample, clipped as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from querl.algorithm.loss.base import sequence_lengths, sum_over_sequence, total
from querl.algorithm.loss.clip import Distance, clipped_gain

if TYPE_CHECKING:
    from querl.algorithm.pack import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class GspoLoss:
    """-min(s A, clip(s, 1 - low, 1 + high) A), s = the geometric mean of a sample's new / old.

    GSPO (arXiv 2507.18071, eq. 5 to 7), in its token form (eq. 13 and 14): the value is s, the
    gradient s A_t for token t. With one advantage a sample and ``reduction = "sequence_mean"`` it
    is eq. 5; turns with advantages of their own keep them. s hardly leaves 1, hence the narrow
    bounds. Fails where they were chosen for token ratios (nothing is ever clipped), and on samples
    of several turns, which are held or let go as one.
    """

    low: Distance = 3e-4
    high: Distance = 4e-4

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch, normaliser: float) -> Tensor:
        """Sum over trained tokens / ``normaliser``."""
        held_T = logprobs_T.detach()
        log_ratio_T = (held_T - batch.old_logprobs_T).where(batch.loss_mask_T, 0)
        lengths_T = sequence_lengths(batch).clamp(min=1)
        sequence_ratio_T = (sum_over_sequence(log_ratio_T, batch) / lengths_T).exp()
        # the factor is 1; it carries the gradient to this token alone
        ratio_T = sequence_ratio_T * (logprobs_T - held_T).exp()
        gain_T = clipped_gain(ratio_T, batch.advantages_T, low=self.low, high=self.high)
        return total(-gain_T, batch, normaliser)
