"""Episodes by the group, for training, and one by one, for evaluation: played, judged, rewarded."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from querl.env.rewards import judge_trajectory
from querl.rollout.engine import RequestKey
from querl.rollout.episode import run_episode
from querl.types import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from querl.env.env import Environment
    from querl.env.rewards import Reward, SqlJudge
    from querl.env.turn_rewards import TurnRewards
    from querl.rollout.engine import Engine, Sampling
    from querl.rollout.episode import EpisodeLimits
    from querl.rollout.history import History
    from querl.sql.inner import TurnJudge
    from querl.types import Judgement, Task, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """Everything that one episode needs; ``make_env`` gives a fresh environment for each.

    An episode begins when it has entered ``places``; a semaphore lets few play at a time, so that
    no deadline of theirs runs while they wait for those before them.
    """

    make_env: Callable[[], Environment]
    engine: Engine
    history: History
    judge: SqlJudge
    sampling: Sampling
    limits: EpisodeLimits
    turn_judge: TurnJudge | None = None  # where turns are paid for what only executions tell
    places: AbstractAsyncContextManager[None] = field(default_factory=nullcontext)

    async def play(self, task: Task, key: RequestKey) -> tuple[Trajectory, Judgement]:
        """One episode and what the judge made of it."""
        async with self.places:
            trajectory = await run_episode(
                self.make_env(),
                self.engine,
                self.history,
                task=task,
                sampling=self.sampling,
                limits=self.limits,
                key=key,
            )
        return trajectory, await judge_trajectory(self.judge, task, trajectory)

    def greedy(self) -> Player:
        """The same, without chance."""
        return replace(self, sampling=replace(self.sampling, temperature=0.0, top_p=1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardedGroups:
    """Implements ``querl.rollout.stream.GroupSampler``; ``reward_at`` gives a step's reward.

    ``reward_parts`` are noted beside it, so that a person can read what a reward is made of.
    """

    player: Player
    reward_at: Callable[[int], Reward]
    reward_parts: Mapping[str, Reward] = field(default_factory=dict)
    turn_rewards: TurnRewards | None = None
    group_size: int
    seed: int

    async def sample(
        self, task: Task, *, step: int, group: int, sample: int
    ) -> tuple[Trajectory, Judgement]:
        """Play and judge one episode; the stream announces it to the engine."""
        key = RequestKey(self.seed, step, group, sample, 0)
        trajectory, judgement = await self.player.play(task, key)
        if self.player.turn_judge is not None:
            judgement = await self.player.turn_judge.judge_turns(task, trajectory, judgement)
        return trajectory, judgement

    def assemble(
        self, task: Task, *, step: int, group: int, outcomes: Sequence[tuple[Trajectory, Judgement]]
    ) -> Group:
        """The group with its rewards."""
        reward = self.reward_at(step)
        group_of_outcomes = Group(
            id=group,
            step=step,
            task=task,
            trajectories=tuple(trajectory for trajectory, _ in outcomes),
            judgements=tuple(judgement for _, judgement in outcomes),
            rewards=tuple(
                reward(trajectory, judgement, task) for trajectory, judgement in outcomes
            ),
            reward_parts={
                name: tuple(part(trajectory, judgement, task) for trajectory, judgement in outcomes)
                for name, part in self.reward_parts.items()
            },
        )
        if self.turn_rewards is None:
            return group_of_outcomes
        return with_turn_rewards(group_of_outcomes, self.turn_rewards)


def with_turn_rewards(group: Group, turn_rewards: TurnRewards) -> Group:
    """The group with what its turns earn at its step."""
    payments = [
        turn_rewards.pay(trajectory, judgement, group.task, step=group.step)
        for trajectory, judgement in zip(group.trajectories, group.judgements, strict=True)
    ]
    return replace(
        group,
        turn_rewards=tuple(payment.sums for payment in payments),
        turn_parts={
            name: tuple(payment.parts[name] for payment in payments) for name in turn_rewards.parts
        },
        turn_weight=turn_rewards.weight_left(group.step),
    )
