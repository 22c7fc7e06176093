"""Evaluate a policy: the same episodes as in training, judged, and told in numbers.

Training, ``querl eval`` and the viewer call these two functions; how an episode is run (engine,
history, limits, sampling) is the caller's ``run_episode``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from querl.eval.report import execution_shares, interval_of_mean, interval_over_databases, mean
from querl.sql.gather import gather
from querl.types import ActionKind, Group, Judgement, StopReason, Task, Trajectory, Verdict

RunEpisode = Callable[[Task, int], Awaitable[tuple[Trajectory, Judgement]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One sample of one task, finished and judged."""

    task: Task
    sample_index: int
    trajectory: Trajectory
    judgement: Judgement

    @property
    def is_right(self) -> bool:
        """Only a match is right: an undecided or failed judgement counts as wrong."""
        return self.judgement.verdict is Verdict.MATCH

    @property
    def used_tool(self) -> bool:
        """Whether any turn ran SQL before the answer."""
        return any(turn.action.kind is ActionKind.SQL for turn in self.trajectory.turns)

    @property
    def had_no_turn(self) -> bool:
        """Whether its prompt was too long for the model to be asked."""
        return not self.trajectory.turns and self.trajectory.stop is StopReason.CONTEXT_FULL

    @property
    def num_tokens(self) -> int:
        """How many tokens were sampled."""
        return sum(len(turn.completion.token_ids) for turn in self.trajectory.turns)


async def evaluate(
    tasks: Sequence[Task],
    run_episode: RunEpisode,
    *,
    num_samples: int = 1,
    max_live: int | None = None,
    announce: Callable[[int], None] = lambda _: None,
    on_done: Callable[[Episode], None] = lambda _: None,
) -> list[Episode]:
    """Run ``num_samples`` episodes of every task; the list is ordered by task, then sample.

    ``max_live`` episodes run at a time, in waves, so that an engine of static batches meets the
    same batches each time; None runs all at once. ``announce`` hears the size of a wave before it
    starts (an engine's ``enter``, which ``run_episode`` takes back); ``on_done`` hears of each
    episode as it finishes. What ``run_episode`` raises ends the evaluation: a bad rollout is a
    Trajectory, not an exception.
    """

    async def one(task: Task, sample_index: int) -> Episode:
        trajectory, judgement = await run_episode(task, sample_index)
        episode = Episode(
            task=task, sample_index=sample_index, trajectory=trajectory, judgement=judgement
        )
        on_done(episode)
        return episode

    pairs = [(task, sample) for task in tasks for sample in range(num_samples)]
    wave = max_live or max(len(pairs), 1)
    episodes: list[Episode] = []
    for start in range(0, len(pairs), wave):
        live = pairs[start : start + wave]
        announce(len(live))
        episodes += await gather(one(*pair) for pair in live)
    return episodes


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """The numbers of one evaluation, ready for JSON; shares are fractions in [0, 1].

    ``accuracy`` is the mean over tasks of the share of right samples (pass@1), with 95 % intervals
    over tasks and over databases (None of one database); ``suite_accuracy`` counts only what is
    right on the suite too, None where no answer was judged on one. ``truncated`` counts episodes
    that hit a token limit, ``long_prompts`` (a number) those of which not even the prompt was in
    it, ``void_turns`` turns with neither SQL nor solution, ``wins_used_tool`` the right episodes
    that ran SQL; ``runs``, ``over_budget`` and ``empty`` tell of the final
    queries. ``pass_at`` is empty for one sample a task. Raises ValueError without episodes.
    """
    by_task: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        by_task[episode.task.id].append(episode)
    tasks = [samples[0].task for samples in by_task.values()]
    accuracies = [_accuracy(samples) for samples in by_task.values()]
    on_suite = _on_suite(list(by_task.values()))
    turns = [turn for episode in episodes for turn in episode.trajectory.turns]
    wins = [episode for episode in episodes if episode.is_right]
    limits = (StopReason.TRUNCATED, StopReason.CONTEXT_FULL)
    return {
        "n": len(tasks),
        "num_episodes": len(episodes),
        "accuracy": mean(accuracies),
        "suite_accuracy": None if on_suite is None else mean(on_suite),
        "accuracy_interval": interval_of_mean(accuracies),
        "accuracy_interval_databases": interval_over_databases(
            accuracies, [task.database for task in tasks]
        ),
        "suite_accuracy_interval": None if on_suite is None else interval_of_mean(on_suite),
        "by_kind": _by(lambda task: task.kind, list(by_task.values())),
        "by_difficulty": _by(lambda task: task.difficulty, list(by_task.values())),
        "verdicts": dict(Counter(episode.judgement.verdict.value for episode in episodes)),
        "stops": dict(Counter(episode.trajectory.stop.value for episode in episodes)),
        "used_tool": mean([episode.used_tool for episode in episodes]),
        "wins_used_tool": mean([episode.used_tool for episode in wins]),
        **execution_shares([episode.judgement.predicted for episode in episodes]),
        "truncated": mean([episode.trajectory.stop in limits for episode in episodes]),
        "long_prompts": sum(episode.had_no_turn for episode in episodes),
        "void_turns": mean([turn.action.kind is ActionKind.VOID for turn in turns]),
        "mean_turns": len(turns) / len(episodes),
        "mean_tokens": sum(episode.num_tokens for episode in episodes) / len(episodes),
        "pass_at": _pass_at(list(by_task.values())),
    }


def rating(summary: dict[str, Any]) -> float:
    """What checkpoints are compared by: luck counts for nothing where suites can tell it."""
    on_suite: float | None = summary["suite_accuracy"]
    accuracy: float = summary["accuracy"]
    return accuracy if on_suite is None else on_suite


def detail_lines(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """A line an episode; with one sample a task ``querl score`` reads them as predictions.

    ``index`` counts the tasks in their order. ``on_suite`` is None where no suite database tells,
    and of an answer that is wrong on its own.
    """
    indices: dict[str, int] = {}
    return [
        {
            "index": indices.setdefault(one.task.id, len(indices)),
            "sample": one.sample_index,
            "task": one.task.id,
            "db_id": one.task.db_id,
            "kind": one.task.kind,
            "difficulty": one.task.difficulty,
            "sql": one.trajectory.solution,
            "verdict": one.judgement.verdict.value,
            "right": one.is_right,
            "on_suite": one.judgement.holds_on_suite if one.is_right else None,
            "stop": one.trajectory.stop.value,
            "turns": len(one.trajectory.turns),
            "tokens": one.num_tokens,
        }
        for one in episodes
    ]


def to_groups(episodes: Sequence[Episode]) -> list[Group]:
    """The episodes of each task as a group with reward 1 or 0, for ``querl.records``."""
    by_task: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        by_task[episode.task.id].append(episode)
    return [
        Group(
            id=number,
            step=0,
            task=samples[0].task,
            trajectories=tuple(one.trajectory for one in samples),
            judgements=tuple(one.judgement for one in samples),
            rewards=tuple(float(one.is_right) for one in samples),
        )
        for number, samples in enumerate(by_task.values())
    ]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased probability that one of ``k`` samples is right (Chen et al. 2021, eq. 1)."""
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def _pass_at(samples_of_tasks: list[list[Episode]]) -> dict[str, float | None]:
    """For k = 1, 2, 4, ... and the number of samples itself; empty for one sample a task."""
    num_samples = min(len(samples) for samples in samples_of_tasks)
    if num_samples == 1:
        return {}
    powers = {2**power for power in range(num_samples.bit_length())}
    return {
        str(k): mean(
            [
                pass_at_k(len(samples), sum(episode.is_right for episode in samples), k)
                for samples in samples_of_tasks
            ]
        )
        for k in sorted({*powers, num_samples})
    }


def _accuracy(samples: Sequence[Episode]) -> float:
    return sum(episode.is_right for episode in samples) / len(samples)


def _on_suite(samples_of_tasks: Sequence[Sequence[Episode]]) -> list[float] | None:
    """Each task's share of samples that are right on the suite too; None without a suite."""
    if not any(one.judgement.suite for samples in samples_of_tasks for one in samples):
        return None
    return [
        sum(one.judgement.is_right for one in samples) / len(samples)
        for samples in samples_of_tasks
    ]


def _by(
    label: Callable[[Task], str | None], samples_of_tasks: Sequence[Sequence[Episode]]
) -> dict[str, dict[str, float | None]]:
    """Accuracy within each label, and the wins' share of tool use; without label: left out."""
    groups: dict[str, list[Sequence[Episode]]] = defaultdict(list)
    for samples in samples_of_tasks:
        name = label(samples[0].task)
        if name is not None:
            groups[name].append(samples)
    return {
        name: {
            "n": len(groups[name]),
            "accuracy": mean([_accuracy(samples) for samples in groups[name]]),
            "wins_used_tool": mean(
                [one.used_tool for samples in groups[name] for one in samples if one.is_right]
            ),
        }
        for name in sorted(groups)
    }
