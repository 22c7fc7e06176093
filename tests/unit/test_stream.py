from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from querl.rollout.stream import COLLECT_AFTER, GroupStream, TaskOrder
from querl.types import Group, Judgement, StopReason, Task, Trajectory, Verdict

TASKS = [Task(id=str(i), question="", database="x.sqlite") for i in range(7)]


@dataclass
class Attendance:
    """The part of an engine that a stream uses: its version, and who is present."""

    version: int = 0
    present: int = 0

    def enter(self, num_episodes: int) -> None:
        self.present += num_episodes

    def leave(self, num_episodes: int) -> None:
        self.present -= num_episodes
        assert self.present >= 0


@dataclass
class Sampler:
    """Episodes that take an arbitrary time; a group has signal unless `dull` says otherwise."""

    delay: Callable[[], float]
    dull: Callable[[int], bool] = lambda group: False
    group_size: int = 2
    broken_group: int = -1
    sampled: list[tuple[int, str, int]] = field(default_factory=list)

    async def sample(
        self, task: Task, *, step: int, group: int, sample: int
    ) -> tuple[Trajectory, Judgement]:
        if sample == 0:
            self.sampled.append((group, task.id, step))
        await asyncio.sleep(self.delay())
        if group == self.broken_group:
            raise ValueError("a bug of ours")
        trajectory = Trajectory(task_id=task.id, turns=(), stop=StopReason.ANSWERED)
        return trajectory, Judgement(verdict=Verdict.MATCH)

    def assemble(
        self, task: Task, *, step: int, group: int, outcomes: Sequence[tuple[Trajectory, Judgement]]
    ) -> Group:
        return Group(
            id=group,
            step=step,
            task=task,
            trajectories=tuple(t for t, _ in outcomes),
            judgements=tuple(j for _, j in outcomes),
            rewards=(0.0, 0.0) if self.dull(group) else (0.0, 1.0),
        )


def has_signal(group: Group) -> bool:
    return len(set(group.rewards)) > 1


def run_steps(
    sampler: Sampler, *, num_steps: int, groups_per_step: int, max_lag: int, max_refill: float = 1.0
) -> tuple[list[list[Group]], Attendance, list[int]]:
    async def main() -> tuple[list[list[Group]], Attendance, list[int]]:
        engine = Attendance()
        steps: list[list[Group]] = []
        lags: list[int] = []
        async with GroupStream(
            TaskOrder(TASKS, seed=1),
            sampler,
            engine,  # type: ignore[arg-type]
            keep=has_signal,
            groups_per_step=groups_per_step,
            max_lag=max_lag,
            max_refill=max_refill,
        ) as stream:
            for step in range(1, num_steps + 1):
                groups = await stream.next_step()
                lags += [engine.version - group.step for group in groups]
                await asyncio.sleep(sampler.delay())
                engine.version = step
                stream.release_step()
                steps.append(groups)
        return steps, engine, lags

    return asyncio.run(main())


def jittery(seed: int) -> Callable[[], float]:
    generator = random.Random(seed)
    return lambda: generator.choice((0.0, 0.0, 0.001, 0.004))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), max_lag=st.integers(0, 3), groups_per_step=st.integers(1, 4))
def test_no_group_is_staler_than_max_lag_and_order_is_kept(
    seed: int, max_lag: int, groups_per_step: int
) -> None:
    sampler = Sampler(delay=jittery(seed))
    steps, _, lags = run_steps(
        sampler, num_steps=5, groups_per_step=groups_per_step, max_lag=max_lag
    )
    ids = [group.id for groups in steps for group in groups]
    assert ids == sorted(ids)
    assert all(len(groups) == groups_per_step for groups in steps)
    assert max(lags) <= max_lag


def test_what_is_sampled_does_not_depend_on_timing() -> None:
    def dull(group: int) -> bool:
        return group % 3 == 0

    runs = []
    for seed in range(4):
        sampler = Sampler(delay=jittery(seed), dull=dull)
        steps, _, _ = run_steps(sampler, num_steps=4, groups_per_step=3, max_lag=0)
        runs.append(([[g.id for g in groups] for groups in steps], sorted(sampler.sampled)))
    assert all(run == runs[0] for run in runs)


def test_groups_without_signal_are_replaced_within_the_budget() -> None:
    sampler = Sampler(delay=lambda: 0.0, dull=lambda group: True)
    steps, _, _ = run_steps(sampler, num_steps=2, groups_per_step=4, max_lag=0, max_refill=0.5)
    assert [len(groups) for groups in steps] == [4, 4]
    assert len(sampler.sampled) == 2 * (4 + 2), "four places and two replacements a step"


def test_everybody_has_left_the_engine_at_the_end() -> None:
    sampler = Sampler(delay=jittery(3), dull=lambda group: group % 2 == 0)
    _, engine, _ = run_steps(sampler, num_steps=3, groups_per_step=3, max_lag=2)
    assert engine.present == 0


def test_a_bug_in_an_episode_stops_the_run() -> None:
    with pytest.raises(ValueError, match="a bug of ours"):
        run_steps(
            Sampler(delay=jittery(0), broken_group=2), num_steps=3, groups_per_step=2, max_lag=0
        )


def test_a_bug_in_the_choice_of_groups_stops_the_run() -> None:
    """A credit may be anybody's own; the group that it fails on must not be waited for."""

    def keep(group: Group) -> bool:
        if group.id == 1:
            raise ValueError("a bug of yours")
        return True

    async def main() -> None:
        async with (
            GroupStream(
                TaskOrder(TASKS, seed=1),
                Sampler(delay=lambda: 0.001),
                Attendance(),  # type: ignore[arg-type]
                keep=keep,
                groups_per_step=2,
            ) as stream,
            asyncio.timeout(5),
        ):
            await stream.next_step()

    with pytest.raises(ValueError, match="a bug of yours"):
        asyncio.run(main())


def test_cycles_are_seldom_looked_for_while_episodes_run_and_as_before_afterwards() -> None:
    during: list[int] = []

    def delay() -> float:
        during.append(gc.get_threshold()[0])
        return 0.0

    before = gc.get_threshold()
    run_steps(Sampler(delay=delay), num_steps=2, groups_per_step=2, max_lag=0)
    assert during.count(COLLECT_AFTER) == 2 * 2 * 2, "each episode's; the others are between steps"
    assert gc.get_threshold() == before


def test_an_epoch_visits_every_task_once_and_epochs_differ() -> None:
    order = TaskOrder(TASKS, seed=0)
    epochs = [[order[7 * e + i].id for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == [t.id for t in TASKS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order[0].id == epochs[0][0], "the order does not depend on where one looks first"
