"""Guards: updates that are not made, what is left of them to read, and when a run gives up.

Three things are looked at before an optimizer step, the fourth at a learner's first update and
wherever old log-probs come from a pass of their own:

    loss        a number that is not finite
    gradient    likewise, of any weight
    sampler     the mean distance in nats between what the engine and the learner say of the same
                tokens, above ``algorithm.max_dlogprob``: the engine samples from other weights, at
                another temperature, or from other tokens
    the ratio   of two passes over one row with the same weights: it must be one

The first three skip the step; the fourth stops the run, since no ratio would mean anything.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from querl import durable
from querl.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from querl.algorithm.loss.objective import Derivatives
    from querl.algorithm.pack import MicroBatch
    from querl.trainer.optim import StepReport
    from querl.types import Sample

MAX_DUMPS = 3  # of one run: the first ones tell, the rest only fill the disk
PATIENCE = 5  # steps in a row with something skipped, after which a run learns nothing more
# How far log-probs may move between two passes with the same weights: nats a token, their mean. A
# GPU may run other kernels without a graph, and round otherwise: in bf16 those that sample are
# 0.003 from those that train (docs/guards.md), single tokens up to 1. Dropout of a tenth moves 0.1.
CPU_TOLERANCE = 0.0
GPU_TOLERANCE = 0.02


class Reason(StrEnum):
    """What kept an optimizer step from being made."""

    LOSS = "loss"
    GRADIENT = "gradient"
    SAMPLER = "sampler"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why an optimizer step was not made; ``weights`` names those whose gradient is not finite."""

    reason: Reason
    told: str
    weights: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What the guards look at before an optimizer step.

    ``abs_dlogprob`` is the mean distance of the trained tokens' old log-probs from the sampler's,
    ``moved`` that of the new ones from the old. Both in nats.
    """

    loss: float
    abs_dlogprob: float
    moved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An optimizer step that was not made, and what it would have been made from.

    ``logprobs`` [N][loss tokens] are the learner's, ``is_bad`` [N][loss tokens] tells where a
    number, or what the loss did to it, is not finite.
    """

    refused: Refused
    checks: Checks
    minibatch: int  # of the step, from 0, over all its epochs
    samples: tuple[Sample, ...]
    logprobs: tuple[tuple[float, ...], ...]
    is_bad: tuple[tuple[bool, ...], ...]


class Seen(NamedTuple):
    """A row with its old log-probs, the learner's [T], and what the objective made of them."""

    row: MicroBatch
    logprobs_T: Tensor
    found: Derivatives


class Watch:
    """What one minibatch came to, kept on the device until a guard asks: a read stalls a GPU."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []

    def add(self, seen: Seen) -> None:
        """One of the minibatch's rows."""
        self._seen.append(seen)

    def checks(self) -> Checks:
        """What the guards look at, in one read."""
        num_tokens = sum(row.num_loss_tokens for row, _, _ in self._seen)
        values, distances, moves = [], [], []
        for row, logprobs_T, found in self._seen:
            mask_T = row.loss_mask_T
            values.append(found.value)
            distances.append((row.old_logprobs_T - row.sampled_logprobs_T).abs()[mask_T].sum())
            moves.append((logprobs_T - row.old_logprobs_T).abs()[mask_T].sum())
        totals = [torch.stack(each).double().sum() for each in (values, distances, moves)]
        loss, distance, moved = torch.stack(totals).tolist()
        return Checks(
            loss=loss,
            abs_dlogprob=distance / num_tokens,
            moved=moved / num_tokens,
        )

    def fault(self, refused: Refused, samples: Sequence[Sample], minibatch: int) -> Fault:
        """What the step would have been made from; ``samples`` are those of the rows."""
        logprobs: list[tuple[float, ...]] = [()] * len(samples)
        is_bad: list[tuple[bool, ...]] = [()] * len(samples)
        for row, logprobs_T, found in self._seen:
            columns = (logprobs_T, found.by_logprob_T, row.sampled_logprobs_T, row.advantages_T)
            is_finite_T = torch.stack([column_T.isfinite() for column_T in columns]).all(dim=0)
            values = logprobs_T[row.loss_mask_T].tolist()
            finite, start = is_finite_T[row.loss_mask_T].tolist(), 0
            for number in row.members:
                end = start + samples[number].num_loss_tokens
                logprobs[number] = tuple(values[start:end])
                is_bad[number] = tuple(not one for one in finite[start:end])
                start = end
        return Fault(
            refused=refused,
            checks=self.checks(),
            minibatch=minibatch,
            samples=tuple(samples),
            logprobs=tuple(logprobs),
            is_bad=tuple(is_bad),
        )


def refuse(checks: Checks, *, max_dlogprob: float) -> Refused | None:
    """Why not to make a step, as far as can be told before its gradient's norm.

    ``max_dlogprob`` in nats; 0 lets every distance pass.
    """
    if not math.isfinite(checks.loss):
        return Refused(reason=Reason.LOSS, told=f"the loss is {checks.loss}")
    if max_dlogprob and not checks.abs_dlogprob <= max_dlogprob:  # nor is what is no number
        told = (
            f"sampler and learner are {checks.abs_dlogprob:.3g} nats a token apart, "
            f"algorithm.max_dlogprob allows {max_dlogprob:g}"
        )
        return Refused(reason=Reason.SAMPLER, told=told)
    return None


def broken_gradient(report: StepReport) -> Refused | None:
    """Why the optimizer made no step. An overflow that a smaller loss scale mends is no fault."""
    if not report.was_skipped or report.loss_scale > 1:
        return None
    told = f"the gradient of {len(report.broken)} weights is not finite"
    return Refused(reason=Reason.GRADIENT, told=told, weights=report.broken)


def check_ratio(moved: float, *, is_exact: bool) -> None:
    """Refuse to go on where two passes with the same weights differ. Raises TrainingError.

    ``moved`` in nats; ``is_exact`` where both run the same kernels, as on the CPU.
    """
    tolerance = CPU_TOLERANCE if is_exact else GPU_TOLERANCE
    if moved > tolerance:  # nan is not: what is no number is skipped, with a dump
        raise TrainingError(
            f"two passes with the same weights gave log-probabilities {moved:.3g} nats a token "
            f"apart, {tolerance:g} is allowed: dropout that is on, a kernel that is wrong or not "
            "deterministic, or rows packed in another way; no ratio would mean anything"
        )


class FaultLog:
    """What a run skipped: the first batches in a folder, a line a step, and when to give up."""

    def __init__(self, folder: Path, recipe: str, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._recipe = recipe  # a digest
        self._say = say
        self._in_a_row = 0

    def note(self, step: int, faults: Sequence[Fault]) -> None:
        """Hear of a step, with or without faults. Raises TrainingError after ``PATIENCE`` with."""
        if not faults:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        dump = self._dump(step, faults)
        batch = f"; the batch: {dump}" if dump is not None else ""
        number = "an update was" if len(faults) == 1 else f"{len(faults)} updates were"
        told = faults[0].refused.told
        self._say(f"warning: step {step}: {number} skipped: {told}{batch}")
        if self._in_a_row == PATIENCE:
            raise TrainingError(
                f"stopped after step {step}: {PATIENCE} in a row had updates skipped, the last "
                f"since {told}; see {self._folder} and docs/guards.md"
            )

    def _dump(self, step: int, faults: Sequence[Fault]) -> Path | None:
        path = self._folder / f"step-{step:06d}.json"
        with durable.saving(path):
            self._folder.mkdir(exist_ok=True)
            others = [other for other in self._folder.glob("step-*.json") if other != path]
            if len(others) >= MAX_DUMPS:
                return None
            dump = {
                "format": 1,
                "step": step,
                "recipe": self._recipe,
                "faults": [_fault_text(fault) for fault in faults],
            }
            durable.replace_text(path, json.dumps(dump))
        return path


def _fault_text(fault: Fault) -> dict[str, Any]:
    numbers = (fault.checks.loss, fault.checks.abs_dlogprob)
    loss, abs_dlogprob = (_plain(number) for number in numbers)
    return {
        "reason": fault.refused.reason,
        "told": fault.refused.told,
        "minibatch": fault.minibatch,
        "loss": loss,
        "abs_dlogprob": abs_dlogprob,
        "weights": fault.refused.weights,
        "samples": [
            _sample_text(sample, logprobs, is_bad)
            for sample, logprobs, is_bad in zip(
                fault.samples, fault.logprobs, fault.is_bad, strict=True
            )
        ],
    }


def _sample_text(
    sample: Sample, logprobs: Sequence[float], is_bad: Sequence[bool]
) -> dict[str, Any]:
    """All tokens, and of the trained ones their places and numbers, column by column."""
    places = [place for place, is_trained in enumerate(sample.loss_mask) if is_trained]
    return {
        "group": sample.group_id,
        "token_ids": sample.token_ids,
        "trained": places,
        "bad": [place for place, bad in zip(places, is_bad, strict=True) if bad],
        "advantages": [_plain(sample.advantages[place]) for place in places],
        "sampled_logprobs": [_plain(sample.sampled_logprobs[place]) for place in places],
        "logprobs": [_plain(logprob) for logprob in logprobs],
        "versions": [sample.versions[place] for place in places],
    }


def _plain(number: float) -> float | str:
    """JSON knows no nan and no infinity: those as words."""
    return number if math.isfinite(number) else str(number)
