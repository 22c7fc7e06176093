"""``querl train --replay RUN STEP``: a stored step again, and where its numbers came from."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from querl.errors import ConfigError
from querl.types import StopReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from querl.launch.replay import Part, Replay

QUESTION_CHARS = 60
# Numbers that differ by less, of their own size, differ by rounding.
SAME = 1e-3


def refuse_options(options: Mapping[str, object]) -> None:
    """Raise ConfigError where one is given: a replay has all from the run's folder."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"--replay reads the run's folder and writes nothing: leave out {', '.join(given)}"
        )


def show_replay(console: Console, run: Path, step: int, overrides: Sequence[str]) -> None:
    """Train on the step again and print what came of it; nothing is written."""
    from querl.launch.replay import replay

    recipes = [word for word in overrides if "=" not in word]
    if recipes:
        raise ConfigError(
            f"--replay takes the recipe from the run's folder, not {recipes[0]}: leave it out, or "
            "change it by section.key=value"
        )
    again = asyncio.run(replay(run, step, tuple(overrides)))
    console.print(_source(again, run, overrides), soft_wrap=True, markup=False)
    for number, group in enumerate(again.groups):
        question = escape(group.task.question[:QUESTION_CHARS])
        console.print(f"\n[bold]group {group.id}[/bold]  {question}", soft_wrap=True)
        console.print(_trajectories(again.parts_PG[number]))
    reasons = ", ".join(f"{reason} {count}" for reason, count in again.left_out.most_common())
    console.print(f"\nleft out: {reasons or 'nothing'}")
    for fault in again.faults:
        told = f"skipped: minibatch {fault.minibatch}, since {fault.refused.told}"
        console.print(told, soft_wrap=True, markup=False)
    console.print(_numbers(again))


def _source(again: Replay, run: Path, overrides: Sequence[str]) -> str:
    """Which weights these are, and whether the numbers can be the run's."""
    line = f"step {again.step} of {run} again, from the weights of update {again.weights_step}"
    if not again.has_its_weights:
        line += (
            f": those of {again.step - 1} are not kept (run.keep_checkpoints, run.save_every), "
            "so that log-probabilities, and all that hangs on them, are other than the run's"
        )
    if overrides:
        line += f"; changed: {' '.join(overrides)}"
    return line


def _trajectories(parts: Sequence[Part]) -> Table:
    """A row a trajectory; the last five columns are those of ``querl.launch.replay.Share``."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("", "ended", "reward"):
        table.add_column(name, no_wrap=True)
    table.add_column("of parts", overflow="fold")
    for name in ("turns", "tokens", "credit", "|Δlogp|", "loss", "grad", "after", "held"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, part in enumerate(parts):
        earned = "\n".join(f"{name} {value:g}" for name, value in part.reward_parts.items())
        has_answer = part.trajectory.stop is StopReason.ANSWERED
        num_tokens = sum(len(turn.completion.token_ids) for turn in part.trajectory.turns)
        table.add_row(
            str(number),
            part.judgement.verdict if has_answer else part.trajectory.stop,
            f"{part.reward:+.3f}",
            escape(earned),
            str(len(part.trajectory.turns)),
            str(num_tokens),
            f"{part.advantage:+.3f}",
            *_share(part),
        )
    return table


def _share(part: Part) -> tuple[str, ...]:
    if part.share is None:
        return (f"({part.left_out or 'no tokens'})",)
    share = part.share
    return (
        f"{share.abs_dlogprob:.2g}",
        f"{share.loss:+.4f}",
        f"{share.grad_norm:.3g}",
        f"{share.ratio:.4f}",
        f"{share.clip_fraction:.0%}",
    )


def _numbers(again: Replay) -> Table:
    """The run's numbers beside those of the replay."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, title_justify="left")
    compared = again.compared()
    if not compared:
        table.title = "the run's own numbers of this step are gone"
        return table
    num_equal = sum(recorded == number for _, recorded, number in compared)
    table.title = f"{num_equal} of {len(compared)} numbers equal to the last digit kept"
    for name, justify in (
        ("number", "left"),
        ("the run", "right"),
        ("again", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, recorded, number in compared:
        table.add_row(name, f"{recorded:g}", f"{number:g}", _likeness(recorded, number))
    return table


def _likeness(recorded: float, number: float) -> str:
    if recorded == number:
        return "equal"
    is_close = abs(recorded - number) <= SAME * max(abs(recorded), abs(number))
    return "close" if is_close else "differs"
