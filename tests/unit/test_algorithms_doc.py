"""docs/algorithms.md and recipes/ablations against the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from querl.algorithm.credit import CREDITS, make_credit
from querl.algorithm.loss import LOSSES, make_loss
from querl.config import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
ABLATIONS = ROOT / "recipes" / "ablations"
ONES = sorted([*ABLATIONS.glob("losses/*.toml"), *ABLATIONS.glob("estimators/*.toml")])


def test_the_page_tells_of_every_loss_its_failure_and_its_settings() -> None:
    for name, loss in LOSSES.items():
        formula, failure = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert failure
        told = set(re.findall(r"`(\w+)`", formula)) - {name, "clip"}
        assert told == {field.name for field in fields(loss)}


def test_the_page_tells_of_every_setting_what_it_is_by_default() -> None:
    for name, loss in LOSSES.items():
        formula = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        told: dict[str, float | None] = {}
        for names, value in re.findall(r"(`\w+`(?:, `\w+`)*) (none|\d[\de.-]*)", formula):
            number = None if value == "none" else float(value)
            told |= dict.fromkeys(re.findall(r"\w+", names), number)
        assert told == {field.name: field.default for field in fields(loss)}


@pytest.mark.parametrize("path", ONES, ids=lambda path: path.stem)
def test_an_ablation_changes_its_section_alone_and_names_what_there_is(path: Path) -> None:
    base = load_recipe(ABLATIONS / "inner.toml")
    recipe = load_recipe(path)
    recipe.check_training()
    loss, credit = dict(recipe.algorithm.loss), dict(recipe.algorithm.credit)
    make_loss(loss.pop("name"), **loss)
    make_credit(credit.pop("name"), **credit)
    changed = {name for name, section in recipe if section != vars(base)[name]}
    assert changed <= {"algorithm", "reward", "run"}
    assert recipe.run.model_copy(update={"max_refill": base.run.max_refill}) == base.run


def test_every_loss_and_every_estimator_of_outcomes_or_turns_has_a_recipe() -> None:
    recipes = [load_recipe(path).algorithm for path in ONES]
    assert {recipe.loss["name"] for recipe in recipes} == set(LOSSES)
    controls = {"dense_naive", "last_step"}
    assert {recipe.credit["name"] for recipe in recipes} == set(CREDITS) - controls
