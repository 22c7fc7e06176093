"""Clip-Cov and KL-Cov: hold back the few tokens on which entropy is lost.

A step of policy gradient lowers the entropy by the covariance of log-probability and advantage
(arXiv 2505.22617, section 3), and most of that comes from few tokens, on which the model was sure
and rewarded. A token's share is (log p - mean log p) (A - mean A), means over the minibatch.
The paper takes p under the policy being trained, at each inner step; here it is the old one, so
that the choice is made once, of the whole minibatch, however that is cut into rows: before the
first of several inner steps both are the same. With a single step the sampler's log-probs stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from querl.algorithm.loss.base import token_ratio, total
from querl.algorithm.loss.clip import Distance, clipped_gain

if TYPE_CHECKING:
    from querl.algorithm.pack import MicroBatch

Share = Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCovLoss:
    """The clip loss, less a ``share`` of all tokens: some whose covariance is in [least, most].

    arXiv 2505.22617, section 4. Those tokens are drawn at random (the same ones for the same
    minibatch) and have no gradient. Fails where ``least`` does not fit the scale of the advantages:
    with a step's deviation hardly any covariance reaches 1, so that nothing is held back.
    """

    low: Distance = 0.2
    high: Distance = 0.2
    share: Share = 2e-4
    least: float = 1.0
    most: float = 5.0

    def mark(self, rows: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Mark the drawn tokens."""
        shares_M = covariances(rows)
        candidates = ((shares_M >= self.least) & (shares_M <= self.most)).nonzero().squeeze(-1)
        dice = torch.Generator().manual_seed(len(shares_M))
        order = torch.randperm(len(candidates), generator=dice).to(candidates.device)
        return _marked(rows, candidates[order[: _count(self.share, shares_M)]])

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch, normaliser: float) -> Tensor:
        """Sum over trained tokens / ``normaliser``; a marked token counts and has no gradient."""
        logprobs_T = torch.where(batch.marked_T, logprobs_T.detach(), logprobs_T)
        gain_T = clipped_gain(
            token_ratio(logprobs_T, batch), batch.advantages_T, low=self.low, high=self.high
        )
        return total(-gain_T, batch, normaliser)


@dataclass(frozen=True, slots=True, kw_only=True)
class KlCovLoss:
    """-r A, and for the ``share`` of tokens of greatest covariance also ``penalty`` |log r|.

    arXiv 2505.22617, section 4; r = new / old. |log r| is what the authors' code takes for the
    divergence from the old policy. Nothing else is clipped. Fails at the first inner step, where
    |log r| is 0 with no slope, and so does nothing at all with one step a batch. Where two passes
    of one policy round differently, as in bf16 on a GPU, the slope there is of random sign.
    """

    share: Share = 2e-3
    penalty: Annotated[float, Field(ge=0.0)] = 1.0

    def mark(self, rows: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Mark the tokens of greatest covariance."""
        shares_M = covariances(rows)
        return _marked(rows, shares_M.topk(_count(self.share, shares_M)).indices)

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch, normaliser: float) -> Tensor:
        """Sum over trained tokens / ``normaliser``."""
        log_ratio_T = (logprobs_T - batch.old_logprobs_T).where(batch.loss_mask_T, 0)
        moved_T = log_ratio_T.abs().where(batch.marked_T, 0)
        values_T = self.penalty * moved_T - log_ratio_T.exp() * batch.advantages_T
        return total(values_T, batch, normaliser)


def covariances(rows: Sequence[MicroBatch]) -> Tensor:
    """(log p - mean log p) (A - mean A) of the minibatch's trained tokens, row by row. [M]."""
    logprobs_M = torch.cat([row.old_logprobs_T[row.loss_mask_T] for row in rows])
    advantages_M = torch.cat([row.advantages_T[row.loss_mask_T] for row in rows])
    return (logprobs_M - logprobs_M.mean()) * (advantages_M - advantages_M.mean())


def _count(share: float, values_M: Tensor) -> int:
    """That share of the tokens, and at least one of them, if there are any."""
    return min(max(int(share * len(values_M)), 1), len(values_M))


def _marked(rows: Sequence[MicroBatch], chosen: Tensor) -> list[MicroBatch]:
    """The rows with those of their trained tokens marked, counted through all of them."""
    marked = []
    first = 0
    for row in rows:
        places_M = row.loss_mask_T.nonzero().squeeze(-1)
        mine = chosen[(chosen >= first) & (chosen < first + len(places_M))] - first
        marked_T = torch.zeros_like(row.loss_mask_T).index_fill(0, places_M[mine], True)
        marked.append(replace(row, marked_T=marked_T))
        first += len(places_M)
    return marked
