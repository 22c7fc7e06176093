"""Plain policy gradient: no ratio, no bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from querl.algorithm.loss.base import total

if TYPE_CHECKING:
    from querl.algorithm.pack import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """-A log(new): REINFORCE (Williams 1992) with whatever baseline the credit has in it.

    Right for the first inner step, where it has the gradient of every other loss here, but for what
    ``clip_cov`` cuts. Fails with several: what the policy has become since it sampled is not
    weighed, and nothing holds it back.
    """

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch, normaliser: float) -> Tensor:
        """Sum over trained tokens / ``normaliser``."""
        return total(-batch.advantages_T * logprobs_T, batch, normaliser)
