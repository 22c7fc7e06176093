"""Steps of real training with turns of all kinds: histories, environments, credit, resume."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path

import pytest
import torch
from company import listener
from safetensors.torch import load_file

from querl import records
from querl.algorithm.credit import CREDITS, make_credit, reads_turn_rewards
from querl.config import load_recipe
from querl.launch.local import TINY_FOLDER
from querl.launch.training import prepare, train_prepared
from querl.run import Run

DEMO = Path(__file__).parents[2] / "recipes" / "demo.toml"
HISTORIES = {
    "conversation": ("env.history=conversation",),
    "single": ("env.history=single",),
    "stepwise": ("env.history=stepwise",),
    "without thoughts": ("env.history=stepwise", "env.keep_thoughts=false"),
}
KINDS = ("text2sql", "explore")
SHORT = (
    "run.groups_per_step=3",
    "run.group_size=3",
    "run.max_refill=0",
    "run.save_every=1",
    "data.max_samples=24",
    "env.max_turns=4",
    "env.max_input=1400",
    "env.final_answer=true",
    "env.early_exit=2",
    "engine.temperature=1.3",
    "reward.parts={'company:vowels'=1.0}",  # differs in each sample, whatever the model can do
    "algorithm.leave_out=['void_turns', 'truncated_turns']",
)
TURNS_PAID = "reward.turn_parts={runs=0.1, progress=1, recovery=0.1, information=0.1, cte=0.2}"


def train(folder: Path, credit: str, history: str, kind: str, num_steps: int) -> None:
    pay = (TURNS_PAID,) if reads_turn_rewards(make_credit(credit)) else ()
    chosen = (f"env.kind={kind}", f"algorithm.credit={credit}", f"run.num_steps={num_steps}")
    recipe = load_recipe(DEMO, (*SHORT, *chosen, *HISTORIES[history], *pay))

    async def go(run: Run) -> None:
        prepared = await prepare(recipe)
        few = replace(prepared, validation=prepared.validation[:2])
        await train_prepared(recipe, few, run, print)

    with Run(folder, recipe, listener(), fresh=False) as run:
        asyncio.run(go(run))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model" / "model.safetensors")


PLACES = list(product(HISTORIES, KINDS))
# every credit once at least, and every history in every environment, not all of their products
CASES = islice(zip(cycle(CREDITS), cycle(PLACES)), max(len(CREDITS), len(PLACES)))


@pytest.mark.parametrize(
    ("credit", "history", "kind"),
    [
        pytest.param(credit, *place, marks=[pytest.mark.slow] if number % 3 else [])
        for number, (credit, place) in enumerate(CASES)
    ],
)
def test_every_credit_history_and_environment_make_a_step(
    tmp_path: Path, credit: str, history: str, kind: str
) -> None:
    train(tmp_path / "run", credit, history, kind, num_steps=1)
    after, before = weights(tmp_path / "run"), load_file(TINY_FOLDER / "model.safetensors")
    assert any(not after[name].equal(before[name]) for name in before)


@pytest.mark.slow
def test_rewritten_prompts_and_paid_turns_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, num_steps in ((whole, 2), (halves, 1), (halves, 2)):
        train(folder, "turn_state", "without thoughts", "explore", num_steps)
    ours, theirs = weights(halves), weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    for step in records.steps(whole / "records"):
        one = records.read_tokens(halves / "records", step)
        other = records.read_tokens(whole / "records", step)
        assert all((one[name] == other[name]).all() for name in other)
