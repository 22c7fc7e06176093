"""Rewards of single turns: pure functions of what happened, the judgement, and the task.

Each gives a number in [0, 1] for every turn of a trajectory. What a turn did is read from what the
database gave (``turn.result``, and ``judgement.predicted`` for the answer's SQL), never from the
model's text; a turn in bad format, such as one with an observation of its own making, earns nothing
in any part. docs/credit.md tells what each pays for, and what it can be made to pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from querl.lookup import look_up
from querl.sql.compare import cell_overlap
from querl.sql.inner import reads_data
from querl.sql.parse import parse_or_none
from querl.types import ActionKind, Outcome, StopReason

if TYPE_CHECKING:
    from querl.env.rewards import Weight
    from querl.types import Judgement, QueryResult, SqlValue, Task, Trajectory, Turn

TurnReward = Callable[["Trajectory", "Judgement", "Task"], tuple[float, ...]]  # [turns]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPayment:
    """What the turns of one trajectory earn: in sum, and by part before weights."""

    sums: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRewards:
    """Weighted turn rewards, each weight on its schedule over ``num_steps``."""

    parts: Mapping[str, tuple[TurnReward, Weight]]
    num_steps: int

    def pay(
        self, trajectory: Trajectory, judgement: Judgement, task: Task, *, step: int
    ) -> TurnPayment:
        """What each turn earns at a step, from 0."""
        parts = {
            name: reward(trajectory, judgement, task) for name, (reward, _) in self.parts.items()
        }
        weights = {
            name: weight.at(step / self.num_steps) for name, (_, weight) in self.parts.items()
        }
        sums = tuple(
            sum(weights[name] * earned[turn] for name, earned in parts.items())
            for turn in range(len(trajectory.turns))
        )
        return TurnPayment(sums=sums, parts=parts)

    def weight_left(self, step: int) -> float:
        """The share in [0, 1] of the weights' sizes at step 0 that their schedules have left."""
        weights = [weight for _, weight in self.parts.values()]
        whole = sum(abs(weight.value) for weight in weights)
        return (
            sum(abs(weight.at(step / self.num_steps)) for weight in weights) / whole
            if whole
            else 0.0
        )


def runs(trajectory: Trajectory, judgement: Judgement, task: Task) -> tuple[float, ...]:
    """1 for a turn whose SQL runs, reads data, and shows what no turn before it has shown.

    An answer need show nothing new, or answering would earn less than asking on; for the same
    reason an episode that never answers earns nothing. What it sums up to grows with the turns:
    compare turn by turn (``turn_index``), do not add to an outcome.
    """
    if trajectory.stop is not StopReason.ANSWERED:
        return (0.0,) * len(trajectory.turns)
    seen: list[QueryResult] = []
    earned = []
    for turn, result in _results(trajectory, judgement, task):
        is_new = result is not None and not any(_same(result, other) for other in seen)
        is_answer = result is not None and turn.action.kind is ActionKind.SOLUTION
        earned.append(float(is_new or is_answer))
        if result is not None:
            seen.append(result)
    return tuple(earned)


def progress(trajectory: Trajectory, judgement: Judgement, task: Task) -> tuple[float, ...]:
    """How much more like the gold's result a turn's result is than the best before it.

    Likeness is ``cell_overlap``, 1 for a right answer. Sums up to at most 1 over a trajectory;
    repeating, going back and constants earn nothing.
    """
    best = 0.0
    earned = []
    for turn, result in _results(trajectory, judgement, task):
        likeness = 0.0
        if result is not None and judgement.gold is not None:
            likeness = cell_overlap(result, judgement.gold)
        if turn.action.kind is ActionKind.SOLUTION and turn.action.well_formed:
            likeness = 1.0 if judgement.is_right else likeness
        earned.append(max(0.0, likeness - best))
        best = max(best, likeness)
    return tuple(earned)


def recovery(trajectory: Trajectory, judgement: Judgement, task: Task) -> tuple[float, ...]:
    """1 for the first turn whose SQL runs and reads data right after one whose SQL failed.

    Once a trajectory, and not in one that never answers, as ``runs``. Failing on purpose pays where
    this weighs more than ``runs``: the turn that fails forgoes that. A fault of the machine is no
    failure of the model's.
    """
    earned = [0.0] * len(trajectory.turns)
    if trajectory.stop is not StopReason.ANSWERED:
        return tuple(earned)
    results = [result for _, result in _results(trajectory, judgement, task)]
    for index in range(1, len(results)):
        if results[index] is not None and _failed(trajectory.turns[index - 1]):
            earned[index] = 1.0
            break
    return tuple(earned)


def information(trajectory: Trajectory, judgement: Judgement, task: Task) -> tuple[float, ...]:
    """The share of the gold's hidden values that a turn's observation is the first to show.

    A hidden value is a constant of the gold's WHERE or HAVING that neither question nor evidence
    nor a prompt of the task's own spells. Shown means: a cell of a result that reads data, in what
    the model was given to read, before any SQL of the model spelled it. Sums up to at most 1; zeros
    where nothing is hidden. What the prompt's schema shows of the data counts as hidden.
    """
    hidden = hidden_values(task)
    missing = set(hidden)
    earned = []
    for turn, result in _results(trajectory, judgement, task):
        missing = {value for value in missing if value not in turn.action.sql.casefold()}
        found = set()
        if result is not None and missing:
            cells = {_spelled(cell) for row in result.rows for cell in row}
            observed = turn.observation.casefold()
            found = {value for value in missing & cells if value in observed}
        earned.append(len(found) / len(hidden) if hidden else 0.0)
        missing -= found
    return tuple(earned)


def cte(trajectory: Trajectory, judgement: Judgement, task: Task) -> tuple[float, ...]:  # noqa: ARG001
    """The share of the gold's inner queries that a turn is the first to reproduce the results of.

    After Graph-Reward-SQL (arXiv 2505.12380). The judge runs them; zeros where the gold has none.
    Sums up to at most 1.
    """
    return judgement.turn_steps or (0.0,) * len(trajectory.turns)


def hidden_values(task: Task) -> frozenset[str]:
    """The constants of the gold's conditions that the task does not tell, in lower case.

    Patterns of LIKE are none: no cell is one.
    """
    from sqlglot import exp

    tree = parse_or_none(task.gold_sql, task.dialect) if task.gold_sql else None
    if tree is None:
        return frozenset()
    told = "\n".join(
        (task.question, task.evidence, *(message["content"] for message in task.prompt or ()))
    ).casefold()
    values = {
        literal.this.casefold()
        for clause in tree.find_all(exp.Where, exp.Having)
        for literal in clause.find_all(exp.Literal)
        if not isinstance(literal.parent, exp.Like | exp.ILike | exp.Limit)
    }
    # the empty text is part of any, and so never hidden
    return frozenset(value for value in values if value not in told)


def _results(
    trajectory: Trajectory, judgement: Judgement, task: Task
) -> list[tuple[Turn, QueryResult | None]]:
    """Each turn with the rows that it can be paid for: of SQL that ran, reads data, in form."""
    pairs = []
    for turn in trajectory.turns:
        result = judgement.result_of(turn)
        is_paid = (
            result is not None
            and result.outcome is Outcome.ROWS
            and turn.action.well_formed
            and reads_data(turn.action.sql, task.dialect)
        )
        pairs.append((turn, result if is_paid else None))
    return pairs


def _same(result: QueryResult, other: QueryResult) -> bool:
    return result.columns == other.columns and result.rows == other.rows


def _failed(turn: Turn) -> bool:
    return turn.result is not None and turn.result.outcome not in (Outcome.ROWS, Outcome.UNDECIDED)


def _spelled(cell: SqlValue) -> str:
    """A cell as SQL spells it, in lower case."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).casefold()


def find_turn_reward(name: str) -> TurnReward:
    """The turn reward of that name, or of ``module:function``; ConfigError when there is none."""
    reward: TurnReward = look_up(name, TURN_REWARDS, what="turn reward")
    return reward


TURN_REWARDS: dict[str, TurnReward] = {
    reward.__name__: reward for reward in (runs, progress, recovery, information, cte)
}
