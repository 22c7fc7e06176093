"""Rewards as a recipe names them: weights, schedules, and the suite they are given on."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from company import GOLDS, SCHEMA, company_recipe, make_company, make_database, tasks

from querl.config import Recipe, load_recipe
from querl.errors import ConfigError, DataError
from querl.eval.run import Episode, rating, summarise
from querl.launch.local import check_suite, make_judge, make_reward
from querl.launch.training import prepare
from querl.sql.suite import SuiteHead, SuiteQuestion, write_suite
from querl.sql.worker import SqlitePool
from querl.types import (
    Action,
    ActionKind,
    Completion,
    FinishReason,
    Judgement,
    StopReason,
    Trajectory,
    Turn,
    Verdict,
)

NOBODY = Trajectory(task_id="t", turns=(), stop=StopReason.OUT_OF_TURNS)
RIGHT = Judgement(verdict=Verdict.MATCH)


def make_suite(folder: Path, db_id: str = "company") -> Path:
    """A suite of one database for every gold of the company: everybody earns ten more."""
    folder.mkdir()
    changed = folder.parent / "changed.sqlite"
    with closing(sqlite3.connect(changed)) as connection:
        connection.executescript(SCHEMA + "UPDATE employee SET salary = salary + 10;")
    questions = [
        SuiteQuestion(db_id=db_id, gold_sql=sql, databases=("more",), num_mutants=0, killed=(0,))
        for sql in GOLDS.values()
    ]
    head = SuiteHead(seed=0, databases_per_question=1, sqlite="any", sqlglot="any", querl="any")
    write_suite(folder, head, questions, {(db_id, "more"): changed.read_bytes()})
    return folder


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, overrides)


def test_a_part_is_a_weight_or_a_weight_that_falls() -> None:
    reward_at = make_reward(
        recipe("run.num_steps=10", "reward.parts={binary=1, arctic={weight=0.5, until=0.4}}")
    )
    task = tasks(Path("x.sqlite"))[0]
    paid = [reward_at(step)(NOBODY, RIGHT, task) for step in (0, 2, 4, 9)]
    assert paid == pytest.approx([1.5, 1.25, 1.0, 1.0])


def in_turns(number: int) -> Trajectory:
    completion = Completion(token_ids=(), logprobs=(), versions=(), finish_reason=FinishReason.END)
    action = Action(kind=ActionKind.VOID)
    turn = Turn(prompt_ids=(), completion=completion, text="", action=action)
    return Trajectory(task_id="t", turns=(turn,) * number, stop=StopReason.ANSWERED)


def test_a_right_answer_is_worth_less_the_later_it_comes_and_no_other_is() -> None:
    task = tasks(Path("x.sqlite"))[0]
    wrong = Judgement(verdict=Verdict.MISMATCH)
    lucky = replace(RIGHT, suite=(Verdict.MISMATCH,))
    for parts, verdict, paid in (
        ("{binary=2}", RIGHT, [2.0, 1.0, 0.5]),
        ("{skyrl=1}", RIGHT, [1.0, 0.5, 0.25]),
        ("{skyrl=-1}", RIGHT, [-1.0] * 3),
        ("{skyrl=1}", Judgement(verdict=Verdict.NO_ANSWER), [-1.0] * 3),
        ("{arctic=1}", wrong, [0.1] * 3),
        ("{arctic=1}", lucky, [0.1] * 3),
    ):
        reward = make_reward(recipe(f"reward.parts={parts}", "reward.discount=0.5"))(0)
        assert [reward(in_turns(turns), verdict, task) for turns in (1, 2, 3)] == paid


def test_a_discount_beside_the_suites_own_is_refused() -> None:
    settings = recipe("reward.suite=x", "reward.parts={suite=1}", "reward.discount=0.9")
    with pytest.raises(ConfigError, match=r"discounts turns by 0\.95 itself"):
        make_reward(settings)
    plain = make_reward(recipe("reward.suite=x", "reward.parts={suite=1}"))(0)
    assert plain(in_turns(3), RIGHT, tasks(Path("x.sqlite"))[0]) == 0.95**2


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("{suite=1}", "set reward.suite"),
        ("{binary={weight=1, until=0}}", "reward.parts.binary.until"),
        ("{binary={weight=1, until=2}}", "reward.parts.binary.until"),
        ("{binary={wait=1}}", "reward.parts.binary.wait"),
        ("{binary='much'}", "reward.parts.binary"),
        ("{}", "reward.parts"),
    ],
)
def test_a_wrong_part_is_one_line_that_names_it(parts: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(f"reward.parts={parts}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_part_is_refused_before_a_run() -> None:
    with pytest.raises(ConfigError, match="unknown reward 'binry'"):
        make_reward(recipe("reward.parts={binry=1}"))


def judge(settings: Recipe, database: Path, sql: str) -> Judgement:
    async def run() -> Judgement:
        async with SqlitePool(1) as pool:
            return await make_judge(settings, pool).judge_sql(tasks(database)[0], sql)

    return asyncio.run(run())


def test_the_recipes_suite_finds_the_lucky_answer(tmp_path: Path) -> None:
    database = make_database(tmp_path / "company.sqlite")
    settings = recipe(f"reward.suite={make_suite(tmp_path / 'suite')}", "reward.parts={suite=1}")
    lucky = judge(settings, database, "SELECT name FROM employee WHERE salary >= 70")
    assert lucky.verdict is Verdict.MATCH
    assert lucky.suite == (Verdict.MISMATCH,)
    right = judge(settings, database, "SELECT name FROM employee WHERE salary >= 61")
    assert right.suite == (Verdict.MATCH,)


def test_inner_queries_are_run_only_where_they_are_paid(tmp_path: Path) -> None:
    database = make_database(tmp_path / "company.sqlite")
    wrong = "SELECT name FROM employee"
    assert judge(recipe(), database, wrong).reproduced is None
    assert judge(recipe("reward.parts={cte=1}"), database, wrong).reproduced == 0.0


def test_a_suite_of_other_data_is_refused(tmp_path: Path) -> None:
    settings = recipe(f"reward.suite={make_suite(tmp_path / 'suite', 'elsewhere')}")
    with pytest.raises(DataError, match="querl suite build"):
        check_suite(settings, tasks(make_database(tmp_path / "company.sqlite")))
    with pytest.raises(DataError, match="does not exist"):
        check_suite(recipe(f"reward.suite={tmp_path / 'none'}"), [])


def test_a_run_prepares_with_a_suite(tmp_path: Path) -> None:
    folder = make_company(tmp_path / "company")
    suite = make_suite(tmp_path / "suite")
    settings = company_recipe(folder, f"reward.suite={suite}", "reward.parts={suite=1}")
    prepared = asyncio.run(prepare(settings))
    assert len(prepared.training) == len(GOLDS)
    assert prepared.left_out == "left out: golds none; prompts too long 0"


def test_an_evaluation_tells_what_is_right_on_the_suite_too() -> None:
    task = tasks(Path("x.sqlite"))[0]
    right = replace(RIGHT, suite=(Verdict.MATCH,))
    lucky = replace(RIGHT, suite=(Verdict.MISMATCH,))
    wrong = Judgement(verdict=Verdict.MISMATCH)

    def summary(*judgements: Judgement) -> dict[str, object]:
        return summarise(
            [
                Episode(task=task, sample_index=i, trajectory=NOBODY, judgement=judgement)
                for i, judgement in enumerate(judgements)
            ]
        )

    assert summary(right, lucky, wrong, wrong)["accuracy"] == 0.5
    assert summary(right, lucky, wrong, wrong)["suite_accuracy"] == 0.25
    assert summary(RIGHT, wrong)["suite_accuracy"] is None
    assert summary(RIGHT, wrong)["suite_accuracy_interval"] is None
    low, high = summary(right, lucky, wrong, wrong)["suite_accuracy_interval"]
    assert 0 < low < 0.25 < high < 1  # one task: Wilson's
    assert rating(summary(right, lucky, wrong, wrong)) == 0.25  # luck keeps no checkpoint
    assert rating(summary(RIGHT, wrong)) == 0.5
