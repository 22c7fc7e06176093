"""Rewards: pure functions of what happened, what the judge made of it, and the task.

A rollout that failed, a verdict that is undecided and a gold that failed are not rewarded but left
out by the caller; they get the value of a missing answer here. Where the judge has a suite, right
means right on its databases too, for every reward: a match that they refute is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from querl.env.wire import is_well_formed
from querl.lookup import look_up
from querl.sql.compare import cell_overlap
from querl.sql.inner import reads_data
from querl.sql.parse import parse_or_none
from querl.types import Judgement, StopReason, Verdict

if TYPE_CHECKING:
    from querl.types import Task, Trajectory

Reward = Callable[["Trajectory", Judgement, "Task"], float]

SUITE_GAMMA = 0.95  # a turn more costs 5 %, so that a look at the data pays and idling does not
SQLR1_MAX_TOKENS = 2048  # the length from which on SQL-R1 pays no more for length


class SqlJudge(Protocol):
    """Judges one SQL text against a task; ``querl.sql.judge.Judge`` is the usual one."""

    async def judge_sql(self, task: Task, sql: str | None) -> Judgement:
        """Execute and compare; None is no answer."""
        ...


async def judge_trajectory(judge: SqlJudge, task: Task, trajectory: Trajectory) -> Judgement:
    """Judge an episode. An answer in bad format is ``bad_format`` and is not compared.

    A gold that failed or a fault of the machine is told first, since it removes the task whatever
    the model wrote.
    """
    well_formed = is_well_formed(trajectory)
    judgement = await judge.judge_sql(task, trajectory.solution)
    verdict = judgement.verdict
    is_bad = trajectory.stop is StopReason.ANSWERED and not well_formed
    if is_bad and verdict not in (Verdict.GOLD_FAILED, Verdict.UNDECIDED):
        verdict = Verdict.BAD_FORMAT
    return replace(judgement, verdict=verdict, well_formed=well_formed)


def settled(judgement: Judgement) -> Verdict:
    """The verdict, with a match that a suite database refutes as the mismatch that it is."""
    is_lucky = judgement.verdict is Verdict.MATCH and not judgement.is_right
    return Verdict.MISMATCH if is_lucky else judgement.verdict


def binary(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:  # noqa: ARG001
    """1 right, 0 otherwise."""
    return float(judgement.is_right)


def skyrl(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:  # noqa: ARG001
    """-1 bad format or no answer, 0 wrong, +1 right (SkyRL-SQL).

    Running out of turns or of context is no answer, so it never pays more than bad format.
    """
    match settled(judgement):
        case Verdict.MATCH:
            return 1.0
        case Verdict.MISMATCH | Verdict.NOT_RUN:
            return 0.0
        case _:
            return -1.0


def sqlr1(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:  # noqa: ARG001
    """Format +1 or -1, runs +2 or -2, match +3 or -3, and 0 to 1.5 for length on a match.

    SQL-R1 (arXiv 2504.08600): the nets are -1 broken, 0 wrong, 6 to 7.5 right. Bad format and a
    missing answer earn -1 and nothing else.
    """
    match settled(judgement):
        case Verdict.MATCH:
            return 1.0 + 2.0 + 3.0 + _sqlr1_length(trajectory)
        case Verdict.MISMATCH:
            return 1.0 + 2.0 - 3.0
        case Verdict.NOT_RUN:
            return 1.0 - 2.0
        case _:
            return -1.0


def _sqlr1_length(trajectory: Trajectory) -> float:
    """Half a point for using up to ``SQLR1_MAX_TOKENS``, and the share of SQL in the answer."""
    num_tokens = sum(len(turn.completion.token_ids) for turn in trajectory.turns)
    answer = trajectory.turns[-1].text.rpartition("</think>")[2].strip()
    share = len(trajectory.solution or "") / len(answer) if answer else 0.0
    return 0.5 * min(num_tokens / SQLR1_MAX_TOKENS, 1.0) + min(share, 1.0)


def composite(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:
    """Right +1.0; runs but wrong +0.1; does not run -0.5; tagged +0.2; overlap up to +0.3.

    The table of recipes/rl-text2sql-t4.toml's project, called SQL-R1's there. The overlap of table
    and column names counts when the query runs but is wrong. An answer that is missing or ill
    formed gets -0.5 alone: less than any tagged answer.
    """
    match settled(judgement):
        case Verdict.MATCH:
            return 1.0 + 0.2
        case Verdict.MISMATCH:
            overlap = name_overlap(trajectory.solution or "", task.gold_sql or "", task.dialect)
            return 0.1 + 0.2 + 0.3 * overlap
        case Verdict.NOT_RUN:
            return -0.5 + 0.2
        case _:
            return -0.5


def arctic(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:  # noqa: ARG001
    """1 right, 0.1 runs but wrong, 0 otherwise (Arctic-Text2SQL-R1, arXiv 2505.20315)."""
    return {Verdict.MATCH: 1.0, Verdict.MISMATCH: 0.1}.get(settled(judgement), 0.0)


def suite(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:  # noqa: ARG001
    """gamma^(turns - 1) if right on the task's own database and on its suite's; 0 otherwise.

    Ours. A task that the suite does not know counts as ``binary`` does, but for gamma.
    """
    return SUITE_GAMMA ** (len(trajectory.turns) - 1) if judgement.is_right else 0.0


def suite_dense(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:
    """For a wrong answer that runs: 0.1, and up to 0.2 for the likeness of its result.

    The dense part of ``suite``, at most 0.3, to be annealed away: it shows a policy that is never
    right yet which way is up, and pays for lucky answers if it stays. What reads no data gets
    nothing, or constants would be worth copying; and what is right at home must be alike on the
    suite's databases too, or a constant that dresses up as data would be.
    """
    predicted, gold = judgement.predicted, judgement.gold
    if settled(judgement) is not Verdict.MISMATCH or predicted is None or gold is None:
        return 0.0
    if not reads_data(trajectory.solution or "", task.dialect):
        return 0.0
    likeness = cell_overlap(predicted, gold)
    if judgement.suite_likeness is not None:
        likeness = min(likeness, judgement.suite_likeness)
    return 0.1 + 0.2 * likeness


def cte(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:  # noqa: ARG001
    """The share in [0, 1] of the gold's inner queries whose results the answer's reproduce.

    After Graph-Reward-SQL's stepwise idea (arXiv 2505.12380). A right answer gets 1 however it came
    about. A dense part, never an outcome: all the steps of a gold do not make an answer.
    """
    if judgement.is_right:
        return 1.0
    is_wrong = settled(judgement) is Verdict.MISMATCH
    return judgement.reproduced or 0.0 if is_wrong else 0.0


def name_overlap(sql: str, other_sql: str, dialect: str) -> float:
    """Jaccard overlap in [0, 1] of the table and column names of two queries; 0 for no SQL."""
    names, other_names = _names(sql, dialect), _names(other_sql, dialect)
    union = names | other_names
    return len(names & other_names) / len(union) if union else 0.0


def _names(sql: str, dialect: str) -> frozenset[tuple[str, str]]:
    from sqlglot import exp

    tree = parse_or_none(sql, dialect)
    if tree is None:
        return frozenset()
    tables = {("table", table.name.lower()) for table in tree.find_all(exp.Table)}
    columns = {("column", column.name.lower()) for column in tree.find_all(exp.Column)}
    return frozenset(tables | columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """How much a reward counts; with ``until``, linearly less, and nothing from there on."""

    value: float = 1.0
    until: float | None = None  # a share of the run's steps, in (0, 1]

    def at(self, progress: float) -> float:
        """The weight after that share of the steps."""
        if self.until is None:
            return self.value
        return self.value * max(0.0, 1.0 - progress / self.until)


def weighted(
    parts: Sequence[tuple[Reward, Weight]], *, num_steps: int, discount: float = 1.0
) -> Callable[[int], Reward]:
    """The sum of rewards times their weights, as the one reward of each step, from 0.

    ``discount`` pays for early success: a right answer's sum is multiplied by it for each turn
    after the first, where it is positive. No other is, or putting off a wrong answer would pay.
    """

    def reward_at(step: int) -> Reward:
        weights = [weight.at(step / num_steps) for _, weight in parts]

        def reward(trajectory: Trajectory, judgement: Judgement, task: Task) -> float:
            total = sum(
                weight * part(trajectory, judgement, task)
                for (part, _), weight in zip(parts, weights, strict=True)
            )
            is_discounted = judgement.is_right and total > 0
            return total * discount ** (len(trajectory.turns) - 1) if is_discounted else total

        return reward

    return reward_at


def find_reward(name: str) -> Reward:
    """The reward of that name, or of ``module:function``. Raises ConfigError when there is none."""
    reward: Reward = look_up(name, REWARDS, what="reward")
    return reward


REWARDS: dict[str, Reward] = {
    reward.__name__: reward
    for reward in (binary, skyrl, sqlr1, composite, arctic, suite, suite_dense, cte)
}
