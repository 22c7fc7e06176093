from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest

from querl.env.rewards import (
    REWARDS,
    Weight,
    binary,
    composite,
    judge_trajectory,
    name_overlap,
    skyrl,
    weighted,
)
from querl.env.wire import parse_action
from querl.types import (
    Completion,
    FinishReason,
    Judgement,
    Outcome,
    QueryResult,
    SqlValue,
    StopReason,
    Task,
    Trajectory,
    Turn,
    Verdict,
)

TASK = Task(id="t", question="", database="x", gold_sql="SELECT name FROM city WHERE id = 1")


def answered(sql: str, *, thought: str = "so") -> Trajectory:
    text = f"<think>{thought}</think><solution>{sql}</solution>"
    completion = Completion(token_ids=(), logprobs=(), versions=(), finish_reason=FinishReason.STOP)
    turn = Turn(prompt_ids=(), completion=completion, text=text, action=parse_action(text))
    return Trajectory(task_id="t", turns=(turn,), stop=StopReason.ANSWERED)


UNFINISHED = Trajectory(task_id="t", turns=(), stop=StopReason.CONTEXT_FULL)


@dataclass
class Says:
    """A judge that always says the same, and notes what it was asked."""

    verdict: Verdict
    asked: str | None = "nothing"

    async def judge_sql(self, task: Task, sql: str | None) -> Judgement:
        self.asked = sql
        return Judgement(verdict=self.verdict if sql is not None else Verdict.NO_ANSWER)


def judge(trajectory: Trajectory, verdict: Verdict = Verdict.MATCH) -> Judgement:
    return asyncio.run(judge_trajectory(Says(verdict), TASK, trajectory))


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (
            Verdict.MATCH,
            {"binary": 1, "skyrl": 1, "sqlr1": 6, "composite": 1.2, "arctic": 1, "suite": 1},
        ),
        (Verdict.MISMATCH, {"skyrl": 0, "sqlr1": 0, "composite": 0.6, "arctic": 0.1}),
        (Verdict.NOT_RUN, {"skyrl": 0, "sqlr1": -1, "composite": -0.3}),
        (Verdict.NO_ANSWER, {"skyrl": -1, "sqlr1": -1, "composite": -0.5}),
        (Verdict.BAD_FORMAT, {"skyrl": -1, "sqlr1": -1, "composite": -0.5}),
    ],
)
def test_rewards_of_each_verdict(verdict: Verdict, expected: dict[str, float]) -> None:
    trajectory, judgement = answered(TASK.gold_sql or ""), Judgement(verdict=verdict)
    for name in ("binary", "skyrl", "sqlr1", "composite", "arctic", "suite"):
        reward = REWARDS[name](trajectory, judgement, TASK)
        if name == "sqlr1" and verdict is Verdict.MATCH:
            reward -= sqlr1_length(trajectory)
        assert reward == pytest.approx(expected.get(name, 0)), name


def sqlr1_length(trajectory: Trajectory) -> float:
    """No token; the SQL's share of the answer."""
    sql = trajectory.solution or ""
    return len(sql) / len(f"<solution>{sql}</solution>")


def test_sqlr1_pays_for_length_only_up_to_a_point_and_a_half() -> None:
    short = answered("SELECT name FROM city")
    (turn,) = short.turns
    tokens = (0,) * 5000
    long_completion = replace(
        turn.completion, token_ids=tokens, logprobs=(0.0,) * 5000, versions=tokens
    )
    long = replace(short, turns=(replace(turn, completion=long_completion),))
    right = Judgement(verdict=Verdict.MATCH)
    assert REWARDS["sqlr1"](long, right, TASK) - REWARDS["sqlr1"](short, right, TASK) == 0.5
    assert 6 < REWARDS["sqlr1"](long, right, TASK) <= 7.5
    assert REWARDS["sqlr1"](long, Judgement(verdict=Verdict.MISMATCH), TASK) == 0


@pytest.mark.parametrize("name", REWARDS)
def test_a_match_that_the_suite_refutes_is_a_mismatch_for_every_reward(name: str) -> None:
    trajectory, results = answered("SELECT id FROM city"), {"predicted": FOUR, "gold": FOUR}
    lucky = Judgement(
        verdict=Verdict.MATCH, suite=(Verdict.MATCH, Verdict.MISMATCH), reproduced=0.5, **results
    )
    wrong = Judgement(verdict=Verdict.MISMATCH, reproduced=0.5, **results)
    right = Judgement(verdict=Verdict.MATCH, suite=(Verdict.MATCH, Verdict.GOLD_FAILED), **results)
    assert REWARDS[name](trajectory, lucky, TASK) == REWARDS[name](trajectory, wrong, TASK)
    assert REWARDS[name](trajectory, lucky, TASK) != REWARDS[name](trajectory, right, TASK)


def test_suite_pays_less_for_every_further_turn() -> None:
    one = answered("SELECT name FROM city")
    three = replace(one, turns=one.turns * 3)
    right = Judgement(verdict=Verdict.MATCH)
    assert REWARDS["suite"](one, right, TASK) == 1.0
    assert REWARDS["suite"](three, right, TASK) == pytest.approx(0.95**2)


def rows(*rows: tuple[SqlValue, ...]) -> QueryResult:
    return QueryResult(outcome=Outcome.ROWS, columns=("a",), rows=rows)


FOUR = rows((4,))


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        (rows((4,)), rows((4,)), 0.3),
        (rows((4,)), rows((5,)), 0.1),
        (rows((4,), (5,)), rows((5,), (6,)), 0.2),
        (rows((4,), (4,), (4,)), rows((4,)), 0.2),  # 2 * 1 / (3 + 1) of the cells
        (rows(), rows((5,)), 0.1),
        (rows(), rows(), 0.1),
    ],
)
def test_the_dense_part_is_between_a_tenth_and_three(
    predicted: QueryResult, gold: QueryResult, expected: float
) -> None:
    wrong = Judgement(verdict=Verdict.MISMATCH, predicted=predicted, gold=gold)
    shown = answered("SELECT name FROM city")
    assert REWARDS["suite_dense"](shown, wrong, TASK) == pytest.approx(expected)


def test_the_dense_part_pays_nothing_where_a_result_was_not_kept() -> None:
    for kept in ({"predicted": FOUR}, {"gold": FOUR}, {}):
        wrong = Judgement(verdict=Verdict.MISMATCH, **kept)
        assert REWARDS["suite_dense"](answered("SELECT name FROM city"), wrong, TASK) == 0.0


@pytest.mark.parametrize("sql", ["SELECT 4", "VALUES (4)", "SELECT 4 FROM city LIMIT 1"])
def test_the_dense_part_pays_nothing_for_a_constant(sql: str) -> None:
    refuted = Judgement(verdict=Verdict.MATCH, suite=(Verdict.MISMATCH,), predicted=FOUR, gold=FOUR)
    assert REWARDS["suite_dense"](answered(sql), refuted, TASK) == 0.0
    assert REWARDS["suite_dense"](answered("SELECT id FROM city"), refuted, TASK) > 0.0


def test_the_dense_part_pays_for_likeness_at_home_only_what_the_suite_confirms() -> None:
    dressed = answered("SELECT 4 + 0 * max(id) FROM city")
    lucky = Judgement(verdict=Verdict.MATCH, suite=(Verdict.MISMATCH,), predicted=FOUR, gold=FOUR)
    for likeness, expected in ((0.0, 0.1), (0.5, 0.2), (1.0, 0.3)):
        judged = replace(lucky, suite_likeness=likeness)
        assert REWARDS["suite_dense"](dressed, judged, TASK) == pytest.approx(expected)


def test_the_dense_part_pays_nothing_for_what_is_right_or_does_not_run() -> None:
    for verdict in (Verdict.MATCH, Verdict.NOT_RUN, Verdict.NO_ANSWER, Verdict.BAD_FORMAT):
        judgement = Judgement(verdict=verdict, predicted=FOUR, gold=FOUR)
        assert REWARDS["suite_dense"](answered("x"), judgement, TASK) == 0.0


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict.MATCH, 1.0),
        (Verdict.MISMATCH, 0.5),
        (Verdict.NOT_RUN, 0.0),
        (Verdict.BAD_FORMAT, 0.0),
    ],
)
def test_cte_is_the_share_that_the_judge_found(verdict: Verdict, expected: float) -> None:
    judgement = Judgement(verdict=verdict, reproduced=0.5)
    assert REWARDS["cte"](answered("x"), judgement, TASK) == expected


def test_cte_pays_nothing_for_a_wrong_answer_that_was_not_looked_into() -> None:
    assert REWARDS["cte"](answered("x"), Judgement(verdict=Verdict.MISMATCH), TASK) == 0.0


def test_the_overlap_counts_tables_and_columns_without_case() -> None:
    assert name_overlap("SELECT NAME FROM City", "SELECT name, id FROM city", "sqlite") == 2 / 3
    assert name_overlap("SELECT (", "SELECT a FROM b", "sqlite") == 0.0
    assert name_overlap("SELECT 1", "SELECT 2", "sqlite") == 0.0


def test_a_wrong_query_of_other_columns_earns_less_than_one_of_the_same() -> None:
    wrong = Judgement(verdict=Verdict.MISMATCH)
    near = composite(answered("SELECT name FROM city"), wrong, TASK)
    far = composite(answered("SELECT 42"), wrong, TASK)
    assert far == pytest.approx(0.1 + 0.2)
    assert near > far


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_running_past_the_context_never_pays_better_than_bad_format(reward: object) -> None:
    assert callable(reward)
    unfinished = reward(UNFINISHED, judge(UNFINISHED), TASK)
    forged = answered("SELECT 1", thought="<observation>1</observation>")
    assert unfinished <= reward(forged, judge(forged), TASK)


def test_a_forged_observation_is_bad_format_though_the_answer_matches() -> None:
    judgement = judge(answered("SELECT 1", thought="<observation>1</observation>"))
    assert judgement.verdict is Verdict.BAD_FORMAT
    assert not judgement.well_formed


def test_a_failed_gold_is_told_whatever_the_format() -> None:
    forged = answered("SELECT 1", thought="<observation>1</observation>")
    assert judge(forged, Verdict.GOLD_FAILED).verdict is Verdict.GOLD_FAILED


def test_an_unfinished_episode_has_no_answer() -> None:
    assert judge(UNFINISHED).verdict is Verdict.NO_ANSWER


def test_rewards_add_up_by_weight() -> None:
    both = weighted([(binary, Weight(value=2.0)), (skyrl, Weight(value=0.5))], num_steps=10)
    right = Judgement(verdict=Verdict.MATCH)
    assert both(7)(answered("x"), right, TASK) == 2.5
    late = replace(answered("x"), turns=answered("x").turns * 3)
    assert both(7)(late, right, TASK) == 2.5, "nothing is discounted unless asked for"


def test_a_weight_may_fall_to_nothing() -> None:
    weight = Weight(value=0.2, until=0.4)
    assert [weight.at(step / 10) for step in (0, 2, 4, 9)] == pytest.approx([0.2, 0.1, 0, 0])
    fading = weighted([(binary, Weight()), (skyrl, weight)], num_steps=10)
    right = Judgement(verdict=Verdict.MATCH)
    rewards = [fading(step)(answered("x"), right, TASK) for step in (0, 2, 4, 9)]
    assert rewards == pytest.approx([1.2, 1.1, 1, 1])
