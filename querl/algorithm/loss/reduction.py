"""From a minibatch's tokens to one number: what each counts, and what their sum is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from querl.algorithm.loss.base import sequence_lengths

if TYPE_CHECKING:
    from querl.algorithm.pack import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """``token_mean``: the sum over trained tokens / their number (DAPO, arXiv 2503.14476, eq. 12).

    ``constant``: that sum / ``normaliser`` (Dr. GRPO, arXiv 2503.20783). ``sequence_mean``: the
    mean over samples of each one's mean (GRPO, arXiv 2402.03300, eq. 3). With ``token_mean`` a
    minibatch of short samples moves the policy as far as one of long ones, so that a token's worth
    hangs on its neighbours; with ``constant`` the learning rate hangs on the usual length; with
    ``sequence_mean`` a token of a long sample counts less, and so long wrong answers are hardly
    punished. A sample is an episode, or where prompts are rendered anew a part of one.
    """

    name: Literal["token_mean", "constant", "sequence_mean"] = "token_mean"
    normaliser: float = 1.0

    def weigh(self, batch: MicroBatch) -> MicroBatch:
        """The row with what each trained token counts in ``weights_T``."""
        if self.name != "sequence_mean":
            return batch
        return replace(batch, weights_T=1 / sequence_lengths(batch).clamp(min=1))

    def divisor(self, rows: Sequence[MicroBatch]) -> float:
        """What a minibatch's sum is divided by; each of its samples has trained tokens."""
        match self.name:
            case "token_mean":
                return sum(row.num_loss_tokens for row in rows)
            case "constant":
                return self.normaliser
            case "sequence_mean":
                return sum(len(row.members) for row in rows)
