"""Groups of samples, started in order, delivered in order, never staler than ``max_lag``.

``(max_lag + 1) * groups_per_step`` slots exist. A group takes one when it starts and gives it
back when the weights trained on it are live, so ``max_lag = 0`` is exact on-policy training and
the same code is the asynchronous trainer. Groups are delivered in the order in which they
*started*: whatever finishes first would let slow groups grow old without bound.

A group without signal frees its slot at once and another starts (DAPO's dynamic sampling), at most
``max_refill * groups_per_step`` times a step, so that an all-zero start cannot spin for ever. All
decisions are taken inside the finishing group's own task, while it still holds its place in the
engine: a static batch therefore never starts between two of them, and what is sampled is a function
of the step and not of timing.
"""

from __future__ import annotations

import asyncio
import gc
import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from querl.rollout.engine import Engine
    from querl.types import Group, Judgement, Task, Trajectory

COLLECT_AFTER = 50_000  # objects; Python does after 700


class TaskOrder:
    """An endless, seeded order over tasks: each epoch is a fresh permutation."""

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        self._tasks = tasks
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, index: int) -> Task:
        epoch, position = divmod(index, len(self._tasks))
        if epoch != self._epoch:
            self._permutation = list(range(len(self._tasks)))
            random.Random(f"order {self._seed} {epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._tasks[self._permutation[position]]


class GroupSampler(Protocol):
    """Makes the samples of a group and puts them together."""

    @property
    def group_size(self) -> int:
        """``G``."""
        ...

    async def sample(
        self, task: Task, *, step: int, group: int, sample: int
    ) -> tuple[Trajectory, Judgement]:
        """Play and judge one episode."""
        ...

    def assemble(
        self, task: Task, *, step: int, group: int, outcomes: Sequence[tuple[Trajectory, Judgement]]
    ) -> Group:
        """Reward the group's episodes. Called once all of them are over."""
        ...


@dataclass(slots=True)
class _Entry:
    """One started group."""

    id: int
    task: Task
    step: int
    present: int  # episodes announced to the engine and not yet taken back
    running: asyncio.Task[None] | None = None
    group: Group | None = None


class GroupStream:
    """An asynchronous source of groups; as a context manager it cancels what still runs."""

    def __init__(
        self,
        order: TaskOrder,
        sampler: GroupSampler,
        engine: Engine,
        *,
        keep: Callable[[Group], bool],
        groups_per_step: int,
        max_lag: int = 0,
        max_refill: float = 1.0,
        first_group: int = 0,
    ) -> None:
        self._order = order
        self._sampler = sampler
        self._engine = engine
        self._keep = keep
        self._groups_per_step = groups_per_step
        self._num_slots = (max_lag + 1) * groups_per_step
        self._refill_budget = round(max_refill * groups_per_step)
        self._next_id = first_group
        self._entries: list[_Entry] = []  # started and not yet delivered, in order
        self._ready: list[Group] = []  # delivered and not yet handed out
        self._taken_slots = 0
        self._num_replaced = 0
        self._changed = asyncio.Event()

    async def __aenter__(self) -> GroupStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        running = [e.running for e in self._entries if e.running is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for entry in self._entries:  # a task cancelled before its first line leaves nothing
            self._leave(entry, entry.present)

    @property
    def cursor(self) -> int:
        """The first group that has not been handed out: where a resumed run begins."""
        undelivered = [group.id for group in self._ready]
        undelivered += [entry.id for entry in self._entries]
        return min(undelivered, default=self._next_id)

    @property
    def num_replaced(self) -> int:
        """Groups replaced since the last ``release_step``."""
        return self._num_replaced

    async def next_step(self) -> list[Group]:
        """The next ``groups_per_step`` groups in their order. Raises what a group's task raised."""
        with _seldom_collected():
            self._fill()
            while len(self._ready) < self._groups_per_step:
                self._changed.clear()
                await self._changed.wait()
                self._raise_failures()
        size = self._groups_per_step
        step, self._ready = self._ready[:size], self._ready[size:]
        return step

    def release_step(self) -> None:
        """The weights trained on the last step are live: its slots are free for ``next_step``."""
        self._taken_slots -= self._groups_per_step
        self._num_replaced = 0

    def _fill(self) -> None:
        while self._taken_slots < self._num_slots:
            self._taken_slots += 1
            self._start()

    def _start(self) -> None:
        entry = _Entry(
            id=self._next_id,
            task=self._order[self._next_id],
            step=self._engine.version,
            present=self._sampler.group_size,
        )
        self._next_id += 1
        self._entries.append(entry)
        self._engine.enter(entry.present)
        entry.running = asyncio.create_task(self._run(entry))

    def _leave(self, entry: _Entry, num_episodes: int) -> None:
        entry.present -= num_episodes
        self._engine.leave(num_episodes)

    async def _run(self, entry: _Entry) -> None:
        async def one(sample: int) -> tuple[Trajectory, Judgement]:
            try:
                return await self._sampler.sample(
                    entry.task, step=entry.step, group=entry.id, sample=sample
                )
            finally:
                if entry.present > 1:  # the last one's place is given back after the decisions
                    self._leave(entry, 1)

        try:
            outcomes = await asyncio.gather(*(one(i) for i in range(self._sampler.group_size)))
            entry.group = self._sampler.assemble(
                entry.task, step=entry.step, group=entry.id, outcomes=outcomes
            )
            self._deliver()
        finally:
            self._leave(entry, entry.present)
            self._changed.set()

    def _deliver(self) -> None:
        """Take finished groups off the front of the line; replace those without signal."""
        while self._entries and (group := self._entries[0].group) is not None:
            # before it leaves the line, where a failure of its task would be looked for
            is_kept = self._keep(group)
            self._entries.pop(0)
            if is_kept or self._num_replaced >= self._refill_budget:
                self._ready.append(group)
            else:
                self._num_replaced += 1
                self._start()

    def _raise_failures(self) -> None:
        for entry in self._entries:
            task = entry.running
            if task is not None and task.done() and not task.cancelled():
                error = task.exception()
                if error is not None:
                    raise error


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look for cycles seldom: a server's answers are many objects and no cycles.

    Not during an update, where a cycle may hold a GPU's memory.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
