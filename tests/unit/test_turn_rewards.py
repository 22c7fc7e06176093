"""What single turns earn, and what a policy may try to earn more: SQL run on a real database."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from querl.algorithm.credit.base import discounted_returns
from querl.config import load_recipe
from querl.env.rewards import Weight, judge_trajectory
from querl.env.turn_rewards import (
    TURN_REWARDS,
    TurnRewards,
    find_turn_reward,
    hidden_values,
    progress,
    runs,
)
from querl.env.wire import parse_action
from querl.errors import ConfigError
from querl.sql.inner import InnerSteps, TurnJudge
from querl.sql.judge import Judge
from querl.sql.worker import SqlitePool
from querl.types import (
    ActionKind,
    Completion,
    FinishReason,
    Judgement,
    Outcome,
    StopReason,
    Task,
    Trajectory,
    Turn,
    Verdict,
)

TABLES = """
CREATE TABLE fruit (id INTEGER PRIMARY KEY, name TEXT, colour TEXT, price INTEGER);
INSERT INTO fruit VALUES (1, 'apple', 'Red', 3), (2, 'cherry', 'Red', 9), (3, 'lime', 'Green', 2);
"""
GOLD = "SELECT name FROM fruit WHERE colour = 'Red'"  # apple, cherry
STEPPED = "SELECT name FROM fruit WHERE price < (SELECT avg(price) FROM fruit)"
RED_AT_NINE = f"{GOLD} AND price = 9"  # cherry
TWICE_STEPPED = f"{STEPPED} AND id > (SELECT min(id) FROM fruit)"  # lime
PRICES = "SELECT price FROM fruit"
COLOURS = "SELECT DISTINCT colour FROM fruit"
HALF = "SELECT name FROM fruit WHERE price > 5"  # one of two cells: 2 * 1 / 3
DEAR = "SELECT name FROM fruit WHERE price > 100"  # none: no cell to be alike
THOUGHT = "<think>so</think>"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("turns") / "shop.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLES)
    return path


def asks(sql: str) -> str:
    return f"{THOUGHT}<sql>{sql}</sql>"


def answers(sql: str) -> str:
    return f"{THOUGHT}<solution>{sql}</solution>"


def earned(database: Path, gold: str, *texts: str) -> dict[str, tuple[float, ...]]:
    """What each turn of an episode earns, by part; its SQL runs as the environment runs it."""
    task = Task(id="t", question="the sour ones", database=str(database), gold_sql=gold)

    async def run() -> tuple[Trajectory, Judgement]:
        async with SqlitePool(1) as pool:
            turns = [await turn(pool, text) for text in texts]
            is_answered = turns[-1].action.kind is ActionKind.SOLUTION
            stop = StopReason.ANSWERED if is_answered else StopReason.OUT_OF_TURNS
            trajectory = Trajectory(task_id="t", turns=tuple(turns), stop=stop)
            judgement = await judge_trajectory(Judge(pool), task, trajectory)
            judge = TurnJudge(InnerSteps(pool))
            return trajectory, await judge.judge_turns(task, trajectory, judgement)

    async def turn(pool: SqlitePool, text: str) -> Turn:
        action = parse_action(text)
        is_sql = action.kind is ActionKind.SQL
        result = await pool.execute(str(database), action.sql) if is_sql else None
        shown = "" if result is None else f"{result.message}{result.rows}"
        nothing = Completion(
            token_ids=(), logprobs=(), versions=(), finish_reason=FinishReason.STOP
        )
        return Turn(
            prompt_ids=(),
            completion=nothing,
            text=text,
            action=action,
            observation=shown,
            result=result,
        )

    trajectory, judgement = asyncio.run(run())
    return {name: part(trajectory, judgement, task) for name, part in TURN_REWARDS.items()}


@dataclass(frozen=True)
class Trick:
    """An episode, and all that its turns earn by each part; what is not named earns nothing."""

    name: str
    gold: str
    texts: tuple[str, ...]
    runs: tuple[float, ...] = ()
    progress: tuple[float, ...] = ()
    recovery: tuple[float, ...] = ()
    information: tuple[float, ...] = ()
    cte: tuple[float, ...] = ()


HONEST = [
    Trick(
        "a look, then the answer",
        GOLD,
        (asks(COLOURS), answers(GOLD)),
        runs=(1, 1),
        progress=(0, 1),
        information=(1, 0),
    ),
    Trick("nothing is right", DEAR, (answers(DEAR),), runs=(1,), progress=(1,)),
    Trick("half, then all", GOLD, (asks(HALF), answers(GOLD)), (1, 1), (2 / 3, 1 / 3)),
    Trick(
        "an error, then the answer", GOLD, (asks("SELEC"), answers(GOLD)), (0, 1), (0, 1), (0, 1)
    ),
    Trick(
        "the inner query first",
        STEPPED,
        (asks("SELECT avg(price) FROM fruit"), answers(STEPPED)),
        runs=(1, 1),
        progress=(0, 1),
        cte=(1, 0),
    ),
    Trick(
        "one of two hidden values, then the other",
        RED_AT_NINE,
        (asks(COLOURS), asks(PRICES), answers(RED_AT_NINE)),
        runs=(1, 1, 1),
        progress=(0, 0, 1),
        information=(1 / 2, 1 / 2, 0),
    ),
    Trick(
        "one of two inner queries, then the answer",
        TWICE_STEPPED,
        (asks("SELECT avg(price) FROM fruit"), answers(TWICE_STEPPED)),
        runs=(1, 1),
        progress=(0, 1),
        cte=(1 / 2, 1 / 2),
    ),
]
TRICKS = [
    Trick("the same again", GOLD, (asks(HALF), asks(HALF), answers(HALF)), (1, 0, 1), (2 / 3,)),
    Trick("asking on for ever", GOLD, (asks("SELEC"), asks("SELECT id FROM fruit"), asks(PRICES))),
    Trick(
        "back and forth",
        GOLD,
        (asks(HALF), asks(COLOURS), asks(HALF), answers(HALF)),
        runs=(1, 1, 0, 1),
        progress=(2 / 3,),
        information=(0, 1),
    ),
    Trick("the gold's cells as constants", GOLD, (asks("VALUES ('apple'), ('cherry')"),)),
    Trick("a table for show", GOLD, (asks("SELECT 'apple' FROM fruit LIMIT 1"),)),
    Trick(
        "failing twice to recover twice",
        GOLD,
        (asks("SELEC"), asks(HALF), asks("SELEC"), answers(COLOURS)),
        runs=(0, 1, 0, 1),
        progress=(0, 2 / 3, 0, 0),
        recovery=(0, 1, 0, 0),
    ),
    Trick("recovery by a constant", GOLD, (asks("SELEC"), answers("SELECT 1"))),
    Trick(
        "a value that the query spells",
        GOLD,
        (asks("SELECT colour, name, price FROM fruit WHERE colour = 'Red'"),),
        progress=(2 * 2 / 8,),
    ),
    Trick("a value as a constant", GOLD, (asks("SELECT 'Red'"),)),
    Trick(
        "an observation made up",
        GOLD,
        (f"{asks(COLOURS)}<observation>Red apple cherry</observation>", asks("SELECT 1")),
    ),
    Trick("no thought", GOLD, (f"<sql>{HALF}</sql>", f"<solution>{COLOURS}</solution>")),
    Trick("a void turn", GOLD, ("apple, cherry, Red",)),
    Trick("a refused statement", GOLD, (asks("DELETE FROM fruit"),)),
    Trick(
        "an inner step twice",
        STEPPED,
        (asks("SELECT avg(price) FROM fruit"),) * 2,
        cte=(1, 0),
    ),
    Trick("an inner step as a constant", STEPPED, (asks("SELECT 14 / 3.0"),)),
]


@pytest.mark.parametrize("trick", [*HONEST, *TRICKS], ids=lambda trick: trick.name)
def test_turns_earn_by_each_part_what_they_are_worth(database: Path, trick: Trick) -> None:
    for name, paid in earned(database, trick.gold, *trick.texts).items():
        worth = getattr(trick, name)
        nothing_more = (0.0,) * (len(trick.texts) - len(worth))
        assert paid == pytest.approx((*worth, *nothing_more)), name


@pytest.mark.parametrize("trick", [*HONEST, *TRICKS], ids=lambda trick: trick.name)
def test_no_turn_earns_more_than_one_and_no_trajectory_more_where_it_says_so(
    database: Path, trick: Trick
) -> None:
    for name, paid in earned(database, trick.gold, *trick.texts).items():
        assert all(0 <= number <= 1 for number in paid)
        assert name == "runs" or sum(paid) <= 1 + 1e-9


def test_failing_on_purpose_earns_less_than_not_failing(database: Path) -> None:
    honest = earned(database, GOLD, asks(COLOURS), answers(HALF))
    feigned = earned(database, GOLD, asks("SELEC"), answers(HALF))
    for gamma in (0.5, 0.9):

        def value(paid: dict[str, tuple[float, ...]], gamma: float = gamma) -> float:
            return sum(
                gamma**turn * (paid["runs"][turn] + paid["recovery"][turn]) for turn in range(2)
            )

        assert value(feigned) < value(honest)


def first_return(database: Path, *texts: str) -> float:
    """What an episode is worth at its start to the turns' track of the shipped recipe."""
    folder = Path(__file__).parents[2] / "recipes" / "ablations"
    settings = load_recipe(folder / "demo-turns.toml")
    paid = earned(database, GOLD, *texts)
    parts = settings.reward.turn_parts.items()
    rewards_t = [
        sum(part.weight * paid[name][turn] for name, part in parts) for turn in range(len(texts))
    ]
    return discounted_returns(rewards_t, settings.algorithm.credit["gamma"])[0]


@pytest.mark.parametrize("looks", [1, 2])
def test_looks_that_nobody_needs_do_not_pay_at_the_weights_of_the_recipe(
    database: Path, looks: int
) -> None:
    idle = [asks(f"SELECT id FROM fruit LIMIT {number + 1}") for number in range(looks)]
    right = first_return(database, answers(GOLD))
    assert first_return(database, *idle, answers(GOLD)) < right
    wrong = first_return(database, answers("SELECT id FROM fruit"))
    assert first_return(database, *idle) < wrong
    assert first_return(database, asks("SELEC"), *idle) < wrong


def test_an_answer_right_by_another_way_has_the_steps_that_are_left(database: Path) -> None:
    assert earned(database, STEPPED, answers("SELECT name FROM fruit WHERE price < 4"))["cte"] == (
        1.0,
    )


def test_without_a_judge_of_turns_no_turn_reproduces_a_step() -> None:
    nothing = Completion(token_ids=(), logprobs=(), versions=(), finish_reason=FinishReason.STOP)
    ask = Turn(prompt_ids=(), completion=nothing, text="", action=parse_action(asks(HALF)))
    trajectory = Trajectory(task_id="t", turns=(ask, ask), stop=StopReason.OUT_OF_TURNS)
    task = Task(id="t", question="q", database="x", gold_sql=GOLD)
    wrong = Judgement(verdict=Verdict.NO_ANSWER)
    assert TURN_REWARDS["cte"](trajectory, wrong, task) == (0.0, 0.0)


def test_hidden_is_what_neither_question_nor_evidence_spells() -> None:
    task = Task(
        id="t",
        question="red ones over 5",
        database="x",
        gold_sql="SELECT 'a' FROM t WHERE c = 'Red' AND d = 'Lim' AND e LIKE 'x%' AND n > 5 "
        "GROUP BY g HAVING count(*) > 7 LIMIT 3",
    )
    assert hidden_values(task) == {"lim", "7"}
    assert hidden_values(replace(task, evidence="lim means lime")) == {"7"}
    assert hidden_values(replace(task, prompt=({"role": "user", "content": "Lim 7"},))) == set()
    assert hidden_values(replace(task, gold_sql="SELECT a FROM t WHERE c = ''")) == set()
    assert hidden_values(replace(task, gold_sql=None)) == set()


def test_a_value_that_was_cut_from_the_observation_is_not_shown(database: Path) -> None:
    task = Task(id="t", question="q", database=str(database), gold_sql=GOLD)

    async def run() -> Turn:
        async with SqlitePool(1) as pool:
            result = await pool.execute(str(database), COLOURS)
        assert result.outcome is Outcome.ROWS
        completion = Completion(
            token_ids=(), logprobs=(), versions=(), finish_reason=FinishReason.STOP
        )
        return Turn(
            prompt_ids=(),
            completion=completion,
            text="",
            action=parse_action(asks(COLOURS)),
            observation="(0 of 2 rows shown)",
            result=result,
        )

    trajectory = Trajectory(task_id="t", turns=(asyncio.run(run()),), stop=StopReason.OUT_OF_TURNS)
    judgement = Judgement(verdict=Verdict.NO_ANSWER)
    assert TURN_REWARDS["information"](trajectory, judgement, task) == (0.0,)


def test_weights_fall_by_their_schedules_and_the_rest_is_told() -> None:
    rewards = TurnRewards(
        parts={
            "runs": (runs, Weight(value=1.0, until=0.5)),
            "progress": (progress, Weight(value=3.0)),
        },
        num_steps=8,
    )
    assert [rewards.weight_left(step) for step in (0, 2, 4, 8)] == [1.0, 0.875, 0.75, 0.75]
    assert TurnRewards(parts={"runs": (runs, Weight(value=0.0))}, num_steps=8).weight_left(0) == 0


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown turn reward 'rans': use runs"):
        find_turn_reward("rans")
