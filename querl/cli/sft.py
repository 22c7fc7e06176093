"""``querl sft``: supervised training on traces, the warm start before reinforcement learning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from querl.cli.again import command_again
from querl.cli.paths import Overrides, folder_to_be
from querl.cli.progress import progress
from querl.config import load_recipe

if TYPE_CHECKING:
    from querl.config import Recipe
    from querl.launch.warm import Report


def sft(
    recipe: Annotated[Path, typer.Argument(help="A .toml file; its section sft is used.")],
    overrides: Overrides = None,
    traces: Annotated[Path, typer.Option(help="What `querl data traces` wrote.")] = Path(
        "traces.jsonl"
    ),
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; by default runs/<recipe's name>-sft.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the folder holds.")] = False,
) -> None:
    """Train the recipe's model on traces; the same command again resumes.

    Ctrl-C finishes the step and saves.

    The model is then in OUT/checkpoints/last/model: set model.path to it for `querl train`. With
    lora.rank it is an adapter, of which `querl export` makes a model.

    Example: querl sft recipes/spider-smollm2.toml --traces runs/traces.jsonl
    """
    settings = load_recipe(recipe, tuple(overrides or ()))
    folder = folder_to_be(out or Path("runs") / f"{recipe.stem}-sft")
    console = Console(highlight=False)
    from querl.launch.warm import is_warmed_up
    from querl.run import finished
    from querl.run_check import check_folder

    say = partial(console.print, markup=False, soft_wrap=True)
    check_folder(folder, settings, fresh=fresh)
    if not fresh and is_warmed_up(folder, traces):
        say(finished(folder))
    else:
        _train(console, settings, traces, folder, fresh=fresh)
    model = folder / "checkpoints" / "last" / "model"
    if settings.lora.rank:
        say(f"the adapter: {model}; to train on from it: querl export {model} --out FOLDER")
    else:
        say(f"the model: {model}")


def _train(console: Console, settings: Recipe, traces: Path, folder: Path, *, fresh: bool) -> None:
    """Prepare and train."""
    from querl.launch.warm import prepare_warm_up, warm_up
    from querl.run import RunFolder

    say = partial(console.print, markup=False, soft_wrap=True)
    prepared = prepare_warm_up(settings, traces)  # first, so that a mistake leaves no trace
    console.print("  ".join(f"{name} {n:,}" for name, n in prepared.derived.items()))
    with RunFolder(folder, settings, say, derived=prepared.derived, fresh=fresh) as run:
        with progress(console, "sft step") as show:

            def report(done: Report) -> None:
                step, num_steps, metrics, loss = done
                speed = metrics["speed/update_tokens_per_s"]
                show(step, num_steps, f"loss {metrics['sft/loss']:.4f}  {speed:,.0f} tokens/s")
                if loss is not None:
                    say(f"step {step}: validation loss {loss:.4f}")

            warm_up(prepared, run, report)
        if run.wants_to_stop:
            say(f"stopped. To go on: {command_again()}")
