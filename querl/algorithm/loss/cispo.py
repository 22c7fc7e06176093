"""CISPO: the weight is capped, the gradient is not cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor

from querl.algorithm.loss.base import token_ratio, total

if TYPE_CHECKING:
    from querl.algorithm.pack import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class CispoLoss:
    """-min(r, cap) A log(new), where no gradient goes through min(r, cap); r = new / old.

    MiniMax-M1 (arXiv 2506.13585, eq. 4 and 5; its 1 + high is ``cap``, its lower bound unused as
    there). Every token keeps a gradient, also those that a clip would cut for good. Fails where
    the policy has run far from the old one: nothing stops it, and tokens with negative advantages
    go on being pushed down.
    """

    cap: Annotated[float, Field(gt=0.0)] = 5.0

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch, normaliser: float) -> Tensor:
        """Sum over trained tokens / ``normaliser``."""
        weight_T = token_ratio(logprobs_T.detach(), batch).clamp(max=self.cap)
        return total(-weight_T * batch.advantages_T * logprobs_T, batch, normaliser)
