"""From judged trajectories to token sequences with a loss mask: what is trained, and what is not.

Only sampled tokens are trained. Prompts, observations and end tokens that we appended carry no
loss; neither does a trajectory that broke, or a trajectory or turn that a recipe leaves out.

Turns whose prompts only grow are one sequence, which gives each token the probability it was
sampled with, and holds nothing twice. A prompt that rewrites what came before starts another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from querl.algorithm.credit import StepCredit, TurnCredit, has_advantage, is_usable
from querl.types import ActionKind, Sample, StopReason

if TYPE_CHECKING:
    from querl.types import Group, Judgement, Trajectory, Turn


class LeftOut(StrEnum):
    """Why a trajectory, or only a turn of it, is not trained on.

    The first two always hold, the others where asked for.
    """

    UNUSABLE = "unusable"  # the rollout failed, or its verdict is undecided, or its gold failed
    EMPTY = "empty"  # nothing was sampled
    VOID = "void"  # a turn with neither SQL nor solution
    TRUNCATED = "truncated"  # a turn or the context ran out of tokens
    NO_SIGNAL = "no_signal"  # every advantage of its group is 0
    VOID_TURNS = "void_turns"  # the turn has neither SQL nor solution
    TRUNCATED_TURNS = "truncated_turns"  # the turn ran out of tokens before it acted


def to_samples(
    groups: Sequence[Group],
    advantages_PGt: StepCredit,
    *,
    leave_out: frozenset[LeftOut] = frozenset(),
) -> tuple[list[Sample], Counter[LeftOut]]:
    """The samples of all trajectories that are trained, in order, and how many are not, by reason.

    A trajectory gives one sample for each run of turns whose prompts only grow: one in append-only
    histories, up to one a turn where prompts are rendered anew. What is left out is counted in
    trajectories, by the reasons ``..._turns`` in turns.
    """
    samples: list[Sample] = []
    left_out: Counter[LeftOut] = Counter()
    for group, advantages_Gt in zip(groups, advantages_PGt, strict=True):
        is_silent = LeftOut.NO_SIGNAL in leave_out and not has_advantage(advantages_Gt)
        for trajectory, judgement, advantages_t in zip(
            group.trajectories, group.judgements, advantages_Gt, strict=True
        ):
            reason = why_left_out(trajectory, judgement, leave_out)
            if reason is None and is_silent:
                reason = LeftOut.NO_SIGNAL
            if reason is not None:
                left_out[reason] += 1
                continue
            reasons_t = _turns_left_out(trajectory, leave_out)
            left_out.update(reason for reason in reasons_t if reason is not None)
            is_trained_t = [reason is None for reason in reasons_t]
            samples += _to_samples(group.id, trajectory, advantages_t, is_trained_t)
    return samples, left_out


def why_left_out(
    trajectory: Trajectory, judgement: Judgement, leave_out: frozenset[LeftOut]
) -> LeftOut | None:
    """The first reason of its own not to train on a trajectory, or None."""
    if not is_usable(trajectory, judgement):
        return LeftOut.UNUSABLE
    if not any(turn.completion.token_ids for turn in trajectory.turns):
        return LeftOut.EMPTY
    is_truncated = trajectory.stop in (StopReason.TRUNCATED, StopReason.CONTEXT_FULL)
    if is_truncated and LeftOut.TRUNCATED in leave_out:
        return LeftOut.TRUNCATED
    if LeftOut.VOID in leave_out and any(_is_void(trajectory, turn) for turn in trajectory.turns):
        return LeftOut.VOID
    return None


def _turns_left_out(trajectory: Trajectory, leave_out: frozenset[LeftOut]) -> list[LeftOut | None]:
    """For each turn why it is not trained on, or None."""
    reasons: list[LeftOut | None] = []
    for turn in trajectory.turns:
        if LeftOut.TRUNCATED_TURNS in leave_out and _is_cut(trajectory, turn):
            reasons.append(LeftOut.TRUNCATED_TURNS)
        elif LeftOut.VOID_TURNS in leave_out and _is_void(trajectory, turn):
            reasons.append(LeftOut.VOID_TURNS)
        else:
            reasons.append(None)
    return reasons


def _is_cut(trajectory: Trajectory, turn: Turn) -> bool:
    """Whether the turn ran out of tokens."""
    return turn is trajectory.turns[-1] and trajectory.stop is StopReason.TRUNCATED


def _is_void(trajectory: Trajectory, turn: Turn) -> bool:
    """Whether the turn said neither SQL nor solution, though it had room to."""
    # An episode records the action of a turn that was cut as void; what it lacked was room.
    return turn.action.kind is ActionKind.VOID and not _is_cut(trajectory, turn)


def append_only_runs(turns: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[range]:
    """Turns, each (what it read, what it wrote) as ids, cut before each that does not go on.

    A turn goes on where what it read begins with all that the turn before read and wrote.
    """
    runs: list[range] = []
    so_far: tuple[int, ...] = ()
    for n, (prompt_ids, said) in enumerate(turns):
        if runs and prompt_ids[: len(so_far)] == so_far:
            runs[-1] = range(runs[-1].start, n + 1)
        else:
            runs.append(range(n, n + 1))
        so_far = prompt_ids + said
    return runs


def _to_samples(
    group_id: int,
    trajectory: Trajectory,
    advantages_t: Sequence[TurnCredit],
    is_trained_t: Sequence[bool],
) -> list[Sample]:
    """A sample for each run of turns in which anything is trained."""
    turns = trajectory.turns
    credits = list(zip(turns, advantages_t, is_trained_t, strict=True))
    samples = []
    for run in append_only_runs([(turn.prompt_ids, turn.completion.token_ids) for turn in turns]):
        part = credits[run.start : run.stop]
        # what nothing trained comes after teaches nothing
        while part and not (part[-1][2] and part[-1][0].completion.token_ids):
            part.pop()
        if part:
            samples.append(_to_sample(group_id, part))
    return samples


def _to_sample(group_id: int, turns: Sequence[tuple[Turn, TurnCredit, bool]]) -> Sample:
    """One run."""
    mask: list[bool] = []
    logprobs: list[float] = []
    advantages: list[float] = []
    versions: list[int] = []
    for turn, credit, is_trained in turns:
        unsampled = len(turn.prompt_ids) - len(mask)
        completion = turn.completion
        mask += [False] * unsampled + [is_trained] * len(completion.token_ids)
        logprobs += [0.0] * unsampled + list(completion.logprobs)
        advantages += [0.0] * unsampled + _per_token(credit, len(completion.token_ids))
        versions += [-1] * unsampled + list(completion.versions)
    last = turns[-1][0]
    return Sample(
        group_id=group_id,
        num_prompt_tokens=len(turns[0][0].prompt_ids),
        token_ids=last.prompt_ids + last.completion.token_ids,
        loss_mask=tuple(mask),
        sampled_logprobs=tuple(logprobs),
        advantages=tuple(advantages),
        versions=tuple(versions),
    )


def _per_token(credit: TurnCredit, num_tokens: int) -> list[float]:
    if isinstance(credit, Sequence):
        if len(credit) != num_tokens:
            raise ValueError(f"{len(credit)} token advantages for {num_tokens} sampled tokens")
        return list(credit)
    return [credit] * num_tokens
