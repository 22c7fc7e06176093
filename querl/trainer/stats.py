"""What one minibatch did, gathered on the device and read once: a read would stall a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from querl.algorithm.loss.kl import estimate_kl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from querl.algorithm.loss.objective import Derivatives
    from querl.algorithm.pack import MicroBatch
    from querl.metrics import Metrics

_MEANS = (
    "policy/ratio",
    "policy/clip_fraction",
    "policy/entropy",
    "sampler/abs_dlogprob",
    "sampler/masked",
    "policy/kl",
)
_MAXIMA = ("policy/ratio_max", "sampler/abs_dlogprob_max")


class TokenStats:
    """Means and maxima over trained tokens.

    ``policy/ratio`` is new/old; ``policy/clip_fraction`` the share of tokens with an advantage that
    the loss holds back, to less than half the gradient of ratio * advantage: those that a clip cuts
    or a gate has closed on; ``sampler/abs_dlogprob`` the distance in nats between the sampler's
    log-probs and the learner's, before the first optimizer step (``counts_sampler``), and
    ``sampler/masked`` the share of tokens that the correction takes out for it; ``policy/kl`` the
    divergence from the reference in nats a token, by k3 (``has_reference``).
    """

    def __init__(
        self, device: torch.device, *, counts_sampler: bool, has_reference: bool = False
    ) -> None:
        self._left_out = {"policy/kl"} if not has_reference else set()
        if not counts_sampler:
            self._left_out |= {"sampler/abs_dlogprob", "sampler/abs_dlogprob_max", "sampler/masked"}
        self._sums = torch.zeros(len(_MEANS), device=device, dtype=torch.float64)
        self._counts = torch.zeros_like(self._sums)
        self._maxima = torch.zeros(len(_MAXIMA), device=device)
        self._loss = torch.zeros((), device=device)

    @torch.no_grad()
    def add(
        self,
        logprobs_T: Tensor,
        entropies_T: Tensor,
        batch: MicroBatch,
        found: Derivatives,
        *,
        normaliser: float,
    ) -> None:
        """Count one settled row, by what the objective found at its tokens."""
        mask_T = batch.loss_mask_T
        ratio_M = (logprobs_T - batch.old_logprobs_T).exp()[mask_T]
        distance_M = (batch.old_logprobs_T - batch.sampled_logprobs_T).abs()[mask_T]
        kl_M = estimate_kl("k3", logprobs_T, batch.ref_logprobs_T)[mask_T]
        weights_M = batch.weights_T[mask_T]
        unheld_M = (ratio_M * batch.advantages_T[mask_T] * weights_M).abs() / normaliser
        has_advantage_M = unheld_M > 0
        is_held_M = has_advantage_M & (found.by_loss_T[mask_T].abs() < unheld_M / 2)
        is_masked_M = weights_M == 0
        columns = (ratio_M, is_held_M, entropies_T[mask_T], distance_M, is_masked_M, kl_M)
        self._sums += torch.stack([column.sum(dtype=torch.float64) for column in columns])
        self._counts += batch.num_loss_tokens
        self._counts[1] += has_advantage_M.sum() - batch.num_loss_tokens
        if batch.num_loss_tokens:
            self._maxima = torch.maximum(
                self._maxima, torch.stack([ratio_M.max(), distance_M.max()])
            )
        self._loss += found.value

    def report(self, metrics: Metrics) -> None:
        """Add everything counted to the metrics."""
        sums, counts, maxima = self._sums.tolist(), self._counts.tolist(), self._maxima.tolist()
        for name, total, count in zip(_MEANS, sums, counts, strict=True):
            if count and name not in self._left_out:
                metrics.add_mean(name, total, count)
        for name, value in zip(_MAXIMA, maxima, strict=True):
            if counts[0] and name not in self._left_out:
                metrics.add_max(name, value)
        if counts[0]:
            metrics.add_mean("policy/loss", float(self._loss))


def report_tokens(
    metrics: Metrics, rows: Sequence[MicroBatch], *, num_passes: int, seconds: float
) -> None:
    """What an update trained and read, counted once a token, and how fast ``num_passes`` went."""
    num_tokens = sum(row.num_tokens for row in rows)
    num_unshared = sum(row.num_unshared_tokens for row in rows)
    metrics.add_sum("tokens/trained", sum(row.num_loss_tokens for row in rows))
    metrics.add_sum("tokens/forward", num_tokens)
    metrics.add_sum("tokens/forward_unshared", num_unshared)
    metrics.add_mean("speed/update_tokens_per_s", num_passes * num_tokens, seconds)
    metrics.add_mean("speed/update_tokens_unshared_per_s", num_passes * num_unshared, seconds)
