"""THE loop: sample groups, score them, improve the policy, publish it, repeat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from querl.algorithm.credit import Credit, StepCredit, has_advantage
from querl.algorithm.sample import LeftOut, to_samples
from querl.errors import EngineError
from querl.metrics import Metrics
from querl.types import ActionKind, StopReason

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from querl.rollout.stream import GroupStream
    from querl.sections import RunConfig
    from querl.trainer.guards import Fault
    from querl.trainer.learner import Learner
    from querl.types import Group

Evaluate = Callable[[int], Awaitable[dict[str, Any]]]  # policy step -> a summary with `accuracy`


class Placement(Protocol):
    """Where engine and learner live, as far as the loop must know."""

    async def make_room(self) -> Metrics:
        """Let the learner work: colocated engines sleep, separate ones keep going.

        Raises EngineError where engine and learner are found to have other weights.
        """
        ...

    async def publish(self, version: int) -> Metrics:
        """Let the engine sample from the learner's weights as ``version``, and check that it does.

        Raises EngineError where it does not.
        """
        ...


class Log(Protocol):
    """What the loop tells of itself, and asks: ``querl.run.Run`` writes it all to a folder."""

    @property
    def wants_to_stop(self) -> bool:
        """Whether a person asked to stop after this step."""
        ...

    def groups(self, step: int, groups: Sequence[Group]) -> None:
        """The step's trajectories."""
        ...

    def has_evaluation(self, step: int) -> bool:
        """Whether the policy after ``step`` updates has been validated."""
        ...

    def evaluation(self, step: int, summary: dict[str, Any]) -> None:
        """A validation of the policy after ``step`` updates."""
        ...

    def end_step(self, step: int, metrics: Metrics) -> None:
        """The step's numbers."""
        ...

    def faults(self, step: int, faults: Sequence[Fault]) -> None:
        """The updates that were not made. Raises TrainingError where the run must end."""
        ...

    def save(self, step: int, learner: Learner, cursor: int) -> None:
        """Write a checkpoint from which group ``cursor`` is the next."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """How samples become an update: who gets credit, and who is left out."""

    credit: Credit
    leave_out: frozenset[LeftOut]


async def train(
    run: RunConfig,
    stream: GroupStream,
    learner: Learner,
    *,
    placement: Placement,
    teaching: Teaching,
    evaluate: Evaluate,
    log: Log,
) -> None:
    """Run from the learner's step to ``run.num_steps``, or until the log wants to stop.

    Everything that outlives a step is in ``learner`` and in ``stream.cursor``, so a run that is
    saved and started again goes on as if nothing had happened (ARCHITECTURE, invariant 8).
    The seconds that a checkpoint takes count to the step after it. Where the engine fails for good
    what was learnt is saved, and its EngineError goes on; a validation that it was lost in is made
    when the run is started again.
    """

    def is_due(step: int) -> bool:
        return step % run.eval_every == 0 or step == run.num_steps

    if is_due(learner.step) and not log.has_evaluation(learner.step):
        log.evaluation(learner.step, await evaluate(learner.step))
    metrics, saved = Metrics(), learner.step
    async with stream:
        for step in range(learner.step + 1, run.num_steps + 1):
            cursor = stream.cursor
            try:
                with metrics.time("step"):
                    await _improve(stream, learner, placement, teaching, log, metrics)
                    if is_due(step):
                        with metrics.time("eval"):
                            log.evaluation(step, await evaluate(step))
            except EngineError:
                # the engine is lost, what was learnt is not: at most this step is made again
                if learner.step == step:
                    cursor = stream.cursor
                    log.end_step(step, metrics)
                    log.faults(step, learner.faults)
                if learner.step > saved:
                    log.save(learner.step, learner, cursor)
                raise
            # before the checkpoint: a run killed between the two makes both again
            log.end_step(step, metrics)
            log.faults(step, learner.faults)
            metrics = Metrics()
            is_last = step == run.num_steps or log.wants_to_stop
            if step % run.save_every == 0 or is_last:
                with metrics.time("step"), metrics.time("save"):
                    log.save(step, learner, stream.cursor)
                saved = step
            if is_last:
                return


async def _improve(
    stream: GroupStream,
    learner: Learner,
    placement: Placement,
    teaching: Teaching,
    log: Log,
    metrics: Metrics,
) -> None:
    """One step, whose numbers join ``metrics``: sample, score, improve, publish."""
    with metrics.time("rollout"):
        groups = await stream.next_step()
    with metrics.time("credit"):
        advantages_PGt = teaching.credit(groups)
        samples, left_out = to_samples(groups, advantages_PGt, leave_out=teaching.leave_out)
    with metrics.time("make_room"):
        metrics.add(await placement.make_room())
    with metrics.time("update"):
        metrics.add(await learner.update(samples))
    step = learner.step
    # before anything else may fail: what was learnt from is kept with what was learnt
    metrics.add(describe(groups, advantages_PGt, left_out, version=step - 1))
    metrics.add_sum("groups/replaced", stream.num_replaced)
    with metrics.time("records"):
        log.groups(step, groups)
    with metrics.time("publish"):
        metrics.add(await placement.publish(step))
    stream.release_step()


def describe(
    groups: Sequence[Group],
    advantages_PGt: StepCredit,
    left_out: Counter[LeftOut],
    *,
    version: int,
) -> Metrics:
    """What happened in a step's episodes, as shares in [0, 1] and means; lag in policy steps."""
    metrics = Metrics()
    for group, advantages_Gt in zip(groups, advantages_PGt, strict=True):
        metrics.add_mean("groups/with_signal", has_advantage(advantages_Gt))
        metrics.add_max("groups/lag", version - group.step)
        metrics.add(describe_turn_rewards(group))
        for trajectory, judgement, reward in zip(
            group.trajectories, group.judgements, group.rewards, strict=True
        ):
            is_right = judgement.is_right
            used_tool = any(turn.action.kind is ActionKind.SQL for turn in trajectory.turns)
            metrics.add_mean("rollout/reward", reward)
            metrics.add_mean("rollout/right", is_right)
            metrics.add_mean("rollout/well_formed", judgement.well_formed)
            metrics.add_mean("rollout/used_tool", used_tool)
            if is_right:
                metrics.add_mean("rollout/wins_used_tool", used_tool)
            metrics.add_mean("rollout/turns", len(trajectory.turns))
            metrics.add_max("time/slowest_episode_s", trajectory.seconds)
            metrics.add_mean("rollout/failed", trajectory.stop is StopReason.FAILED)
            metrics.add_mean(
                "rollout/truncated",
                trajectory.stop in (StopReason.TRUNCATED, StopReason.CONTEXT_FULL),
            )
            metrics.add_mean("rollout/stalled", trajectory.stop is StopReason.STALLED)
            for turn in trajectory.turns:
                metrics.add_mean("rollout/void_turns", turn.action.kind is ActionKind.VOID)
                metrics.add_sum("rollout/generated_tokens", len(turn.completion.token_ids))
                metrics.add_sum("rollout/prompt_tokens", len(turn.prompt_ids))
                if turn.result is not None:
                    metrics.add_sum("time/sql_s", turn.result.seconds)
    for reason in LeftOut:
        metrics.add_sum(f"left_out/{reason}", left_out[reason])
    return metrics


def describe_turn_rewards(group: Group) -> Metrics:
    """What each turn earned by each part, in [0, 1] before weights; turns count from 1."""
    metrics = Metrics()
    for name, earned_Gt in group.turn_parts.items():
        for earned_t in earned_Gt:
            for turn, earned in enumerate(earned_t, 1):
                metrics.add_mean(f"turn_reward/{name}_turn_{turn}", earned)
    return metrics
