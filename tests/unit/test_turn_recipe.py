"""Turn rewards and credit as a recipe names them, down to the group that is trained on."""

from __future__ import annotations

import asyncio
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from tiny_policy import make_group

from querl.algorithm.credit import CREDITS
from querl.algorithm.credit.turn_index import TurnIndex
from querl.config import Recipe, load_recipe
from querl.env.turn_rewards import TURN_REWARDS
from querl.errors import ConfigError
from querl.launch.local import make_recipe_credit, make_turn_judge, make_turn_rewards
from querl.rollout.sampler import with_turn_rewards
from querl.sql.worker import SqlitePool
from querl.train import describe_turn_rewards
from querl.types import Action, ActionKind, Group, Outcome, QueryResult

PAGE = (Path(__file__).parents[2] / "docs" / "credit.md").read_text(encoding="utf-8")
PAID = "reward.turn_parts={runs={weight=0.5, until=0.5}, progress=1}"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ("run.num_steps=10", *overrides))


def looked() -> Group:
    """Two samples of one turn each; the first's SQL ran and gave the gold's rows."""
    group = make_group((0.0, 0.0))
    rows = QueryResult(outcome=Outcome.ROWS, columns=("a",), rows=((1,),))
    (turn,) = group.trajectories[0].turns
    action = Action(kind=ActionKind.SQL, sql="SELECT a FROM t")
    first = replace(group.trajectories[0], turns=(replace(turn, action=action, result=rows),))
    return replace(
        group,
        trajectories=(first, group.trajectories[1]),
        judgements=tuple(replace(judgement, gold=rows) for judgement in group.judgements),
    )


def test_a_group_is_given_what_its_turns_earn_at_its_step() -> None:
    rewards = make_turn_rewards(recipe(PAID))
    assert rewards is not None
    start = with_turn_rewards(looked(), rewards)
    assert start.turn_rewards == ((1.5,), (0.0,))
    assert start.turn_weight == 1
    between = with_turn_rewards(replace(looked(), step=2), rewards)
    assert between.turn_rewards[0] == pytest.approx((0.3 + 1.0,))  # 0.5 (1 - 2 / 5) is left
    late = with_turn_rewards(replace(looked(), step=5), rewards)
    assert late.turn_rewards == ((1.0,), (0.0,))
    assert late.turn_weight == pytest.approx(1 / 1.5)
    assert late.turn_parts == {"runs": ((1.0,), (0.0,)), "progress": ((1.0,), (0.0,))}


def test_what_turns_earn_is_told_by_part_and_turn_before_weights() -> None:
    rewards = make_turn_rewards(recipe(PAID))
    assert rewards is not None
    told = describe_turn_rewards(with_turn_rewards(looked(), rewards)).values()
    assert told == {"turn_reward/progress_turn_1": 0.5, "turn_reward/runs_turn_1": 0.5}


def test_nothing_is_paid_by_default() -> None:
    assert make_turn_rewards(recipe()) is None
    assert describe_turn_rewards(looked()).values() == {}


def test_a_credit_is_a_name_or_a_name_with_settings(tmp_path: Path) -> None:
    settings = recipe("algorithm.credit={name='turn_index', gamma=0.5}", PAID)
    assert make_recipe_credit(settings) == TurnIndex(gamma=0.5)
    assert make_recipe_credit(recipe("algorithm.credit=turn_index")) == TurnIndex()
    file = tmp_path / "again.toml"
    file.write_text(settings.to_toml(), encoding="utf-8")
    assert load_recipe(file) == settings
    with pytest.raises(ConfigError, match="is no text"):
        recipe("algorithm.credit={name=3}")


def test_turns_that_no_credit_reads_are_not_paid_in_silence() -> None:
    with pytest.raises(ConfigError, match="'grpo' reads no rewards of turns: use turn_index"):
        make_recipe_credit(recipe("algorithm.credit=grpo", PAID))
    assert make_recipe_credit(recipe("algorithm.credit=grpo", "reward.turn_parts={runs=0}"))


def test_inner_queries_are_run_a_turn_only_where_they_are_paid() -> None:
    async def is_made(*overrides: str) -> bool:
        async with SqlitePool(1) as pool:
            return make_turn_judge(recipe(*overrides), pool) is not None

    assert not asyncio.run(is_made(PAID))
    assert asyncio.run(is_made("reward.turn_parts={cte=1}"))


def test_the_page_on_credit_tells_of_every_estimator_and_part() -> None:
    rows = {line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")}
    assert rows == {*CREDITS, *TURN_REWARDS}


def test_the_page_on_credit_tells_of_every_setting_what_it_is_by_default() -> None:
    for name, credit in CREDITS.items():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        told = dict(re.findall(r"`(\w+)` (group|step|\d[\d.]*)", row))
        settings = fields(credit) if is_dataclass(credit) else ()
        assert told == {field.name: f"{field.default}".removesuffix(".0") for field in settings}


def test_the_three_recipes_of_the_comparison_differ_in_credit_alone() -> None:
    folder = Path(__file__).parents[2] / "recipes" / "ablations"
    outcome, dense, turns = (
        load_recipe(folder / f"demo-{name}.toml") for name in ("outcome", "dense", "turns")
    )
    assert dense.model_copy(update={"algorithm": turns.algorithm}) == turns
    as_paid = turns.model_copy(update={"algorithm": outcome.algorithm, "reward": outcome.reward})
    assert as_paid == outcome
    assert outcome.reward.turn_parts.keys() == turns.reward.turn_parts.keys()
    assert not any(part.weight for part in outcome.reward.turn_parts.values())
