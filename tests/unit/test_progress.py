"""What a person sees while waiting: how far it is, and how long it still takes."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from company import company_recipe, listener, make_company
from rich.console import Console

from querl.cli import progress as progress_file
from querl.cli.panel import Progresses
from querl.launch.training import prepare, train_prepared
from querl.run import Run

STEP = {"time/step_s": 2.0, "rollout/reward": 0.5}
SUMMARY = {"accuracy": 0.5, "suite_accuracy": None, "accuracy_interval": (0.4, 0.6)}


def watch(*, is_terminal: bool) -> tuple[Progresses, io.StringIO]:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=is_terminal, width=100)
    return Progresses(num_steps=4, console=console), shown


def test_the_time_left_is_that_of_the_steps_and_not_of_what_came_before_them() -> None:
    watcher, shown = watch(is_terminal=False)
    with watcher:
        watcher.stepped(1, STEP)
        watcher.stepped(2, STEP | {"time/step_s": 6.0})
    assert [line.rpartition("  ")[2] for line in shown.getvalue().splitlines()] == [
        "6 s left",
        "8 s left",
    ]


def test_a_long_validation_tells_how_far_it_is_when_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "PLAIN_LINE_EVERY_S", 0.0)
    watcher, shown = watch(is_terminal=False)
    with watcher:
        for done in (1, 2, 3):
            watcher.validating(done, 3, "validation")
        watcher.evaluated(0, SUMMARY)
    assert shown.getvalue().splitlines() == [
        "validation 1/3",
        "validation 2/3",
        "validation after 0 steps: 50.0% [40.0%, 60.0%]",
    ]


def test_a_short_validation_says_only_its_result_when_piped() -> None:
    watcher, shown = watch(is_terminal=False)
    with watcher:
        for done in (1, 2, 3):
            watcher.validating(done, 3, "validation")
        watcher.evaluated(0, SUMMARY)
    assert shown.getvalue().startswith("validation after 0 steps")


def test_the_panel_shows_how_far_a_validation_is_and_then_its_result() -> None:
    watcher, shown = watch(is_terminal=True)
    with watcher:
        watcher.validating(2, 3, "validation")
    assert "2/3" in shown.getvalue()
    watcher, shown = watch(is_terminal=True)
    with watcher:
        watcher.validating(3, 3, "validation")
        watcher.evaluated(0, SUMMARY)
    last = shown.getvalue().rpartition("validation")[2]
    assert "50.0%" in last
    assert "3/3" not in last


def test_preparing_and_validating_are_heard_of_to_their_end(tmp_path: Path) -> None:
    recipe = company_recipe(make_company(tmp_path / "company"), "run.num_steps=1")
    heard: list[tuple[float, float, str]] = []

    def hear(done: float, total: float, what: str) -> None:
        heard.append((done, total, what))

    prepared = asyncio.run(prepare(recipe, hear))
    assert heard[0] == (4, 4, "golds")
    assert heard[1:5] == [(done, 4, "prompts") for done in (1, 2, 3, 4)]
    assert heard[5:] == [(1, 2, "validation prompts"), (2, 2, "validation prompts")]
    heard.clear()
    with Run(tmp_path / "run", recipe, listener(), fresh=False) as run:
        asyncio.run(train_prepared(recipe, prepared, run, print, hear))
    assert heard == [(1, 2, "validation"), (2, 2, "validation")] * 2


def test_a_step_that_taught_nothing_says_why() -> None:
    watcher, shown = watch(is_terminal=False)
    with watcher:
        watcher.stepped(1, STEP | {"tokens/trained": 9.0, "left_out/void": 2.0})
    assert "warning" not in shown.getvalue()
    left_out = {"left_out/no_signal": 1.0, "left_out/truncated": 7.0, "left_out/void": 0.0}
    with watcher:
        watcher.stepped(2, STEP | left_out | {"tokens/trained": 0.0})
    assert "warning: step 2 trained nothing; left out: truncated 7, no_signal 1\n" in (
        shown.getvalue()
    )
