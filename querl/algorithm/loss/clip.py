"""PPO's clipped surrogate: the default; with a higher bound above it is DAPO's clip-higher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from querl.algorithm.loss.base import token_ratio, total

if TYPE_CHECKING:
    from querl.algorithm.pack import MicroBatch

Distance = Annotated[float, Field(ge=0.0)]  # of a bound from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = new / old a token (arXiv 1707.06347, eq. 7).

    ``high`` above ``low`` is DAPO's clip-higher (arXiv 2503.14476, eq. 10): unlikely tokens may
    grow further before they are held. ``dual`` bounds the loss where the advantage is negative:
    the gain is at least dual * A (dual clip, arXiv 1912.09729, eq. 5; c = 3 there). Fails where
    many inner steps push most tokens past the clip, since their gradient is gone; and where one
    update follows one batch the ratio is 1, so that none of the bounds does anything.
    """

    low: Distance = 0.2
    high: Distance = 0.28
    dual: Annotated[float | None, Field(gt=1.0)] = None

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch, normaliser: float) -> Tensor:
        """Sum over trained tokens / ``normaliser``."""
        gain_T = clipped_gain(
            token_ratio(logprobs_T, batch), batch.advantages_T, low=self.low, high=self.high
        )
        if self.dual is not None:
            least_T = self.dual * batch.advantages_T
            gain_T = torch.where(batch.advantages_T < 0, torch.maximum(gain_T, least_T), gain_T)
        return total(-gain_T, batch, normaliser)


def clipped_gain(ratio_T: Tensor, advantages_T: Tensor, *, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A) for each token [T]."""
    clipped_T = ratio_T.clamp(1 - low, 1 + high)
    return torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
