"""A finished run that is named again: its report, and nothing that only training needs."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from company import company_recipe, listener, make_company
from console import Querl

from querl.cli.own import TINY_RECIPE, with_warm_model
from querl.config import load_recipe
from querl.durable import read_lines
from querl.launch.training import train_locally
from querl.run import Run, is_finished
from querl.trainer.checkpoint import Checkpoints

NUM_STEPS = 2
SHORT = f"run.num_steps={NUM_STEPS}"
VALIDATED = {
    "accuracy": 0.5,
    "suite_accuracy": None,
    "accuracy_interval": [0.3, 0.7],
    "wins_used_tool": None,
}


@pytest.fixture
def company(tmp_path: Path) -> Path:
    return make_company(tmp_path / "company")


@pytest.fixture
def run(company: Path, tmp_path: Path) -> Path:
    """Its folder, with a checkpoint, a validation and a rating of the last step."""
    folder = tmp_path / "run"
    recipe = company_recipe(company, SHORT)
    with Run(folder, recipe, listener(), fresh=False) as made:
        asyncio.run(train_locally(recipe, made, print))
    return folder


def leave_only_the_recipe(company: Path) -> None:
    """Whatever is prepared for training fails now."""
    shutil.rmtree(company / "model")
    for path in company.glob("*"):
        if path.name != "recipe.toml":
            path.unlink()


def test_it_is_reported_where_neither_model_nor_data_is_left(
    company: Path, run: Path, querl: Querl
) -> None:
    leave_only_the_recipe(company)
    code, out, err = querl("train", company / "recipe.toml", SHORT, "--out", run)
    assert (code, err) == (0, "")
    assert f"{run} holds a finished run: to start over, add --fresh" in out
    assert f"after {NUM_STEPS} steps" in out
    assert f"the model: {run}/checkpoints/best/model" in out


def test_a_longer_one_is_prepared_and_so_is_one_to_start_over(
    company: Path, run: Path, querl: Querl
) -> None:
    leave_only_the_recipe(company)
    kept = (run / "recipe.toml").read_text(encoding="utf-8")
    for more in (("run.num_steps=3",), (SHORT, "--fresh")):
        code, _, err = querl("train", company / "recipe.toml", *more, "--out", run)
        assert (code, err.count("\n")) == (2, 1)
        assert str(company) in err
    assert (run / "recipe.toml").read_text(encoding="utf-8") == kept


def test_another_recipe_is_refused(company: Path, run: Path, querl: Querl) -> None:
    other = (SHORT, "optimizer.lr=0.5")
    code, _, err = querl("train", company / "recipe.toml", *other, "--out", run)
    assert code == 2
    assert "holds a run with optimizer.lr = 0.01, not 0.5" in err


def test_a_damaged_checkpoint_is_named(company: Path, run: Path, querl: Querl) -> None:
    (run / "checkpoints" / "last" / "state.json").write_text("{", encoding="utf-8")
    code, _, err = querl("train", company / "recipe.toml", SHORT, "--out", run)
    assert code == 2
    assert "state.json is missing or damaged" in err


def test_without_its_last_validation_it_is_not_finished(
    company: Path, run: Path, querl: Querl
) -> None:
    recipe = company_recipe(company, SHORT)
    assert is_finished(run, recipe)
    lines = (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "evaluations.jsonl").write_text(lines[0], encoding="utf-8")
    assert not is_finished(run, recipe)
    code, _, err = querl("train", company / "recipe.toml", SHORT, "--out", run)
    assert (code, err) == (0, "")
    assert [line["step"] for line in read_lines(run / "evaluations.jsonl")] == [0, NUM_STEPS]


def test_what_a_kill_left_is_put_right(company: Path, run: Path, querl: Querl) -> None:
    """One came before the last rating, another in a step of a run that was to be longer."""
    for name in ("best", "scores.json"):
        (run / "checkpoints" / name).unlink()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": NUM_STEPS + 1}) + "\n")
    assert querl("train", company / "recipe.toml", SHORT, "--out", run)[0] == 0
    best = Checkpoints(run / "checkpoints").best()
    assert best is not None
    assert best.score == read_lines(run / "evaluations.jsonl")[-1]["accuracy"]
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, NUM_STEPS]


def test_on_your_own_database_no_warm_start_is_made_for_it(tmp_path: Path, querl: Querl) -> None:
    named = {"db": tmp_path / "gone.sqlite", "questions": tmp_path / "gone.csv"}
    folder = tmp_path / "run"
    recipe = load_recipe(TINY_RECIPE, [f'data.{key}="{path}"' for key, path in named.items()])
    last = folder / "checkpoints" / "step-000060"
    last.mkdir(parents=True)
    state = {"step": recipe.run.num_steps, "cursor": {"learns_from": "?"}, "num_threads": 1}
    (last / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (last.parent / "last").symlink_to(last.name)
    recipe = with_warm_model(recipe, folder)
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    line = VALIDATED | {"step": recipe.run.num_steps}
    (folder / "evaluations.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    options = [word for key, path in named.items() for word in (f"--{key}", path)]
    code, out, err = querl("train", *options, "--out", folder)
    assert (code, err) == (0, "")
    assert "validation accuracy 50.0%" in out
    assert not folder.with_name("run-warm").exists()
