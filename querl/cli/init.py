"""``querl init``: a small new model, with a tokenizer made for the traces it will learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from querl.cli.paths import Overrides
from querl.config import load_recipe


def init(
    recipe: Annotated[Path, typer.Argument(help="A .toml file; its section init is used.")],
    overrides: Overrides = None,
    traces: Annotated[Path, typer.Option(help="What `querl data traces` wrote.")] = Path(
        "traces.jsonl"
    ),
    out: Annotated[Path, typer.Option(help="The new model's folder.")] = Path("runs/new-model"),
) -> None:
    """Train a tokenizer on traces, and make a model with random weights for it.

    Example: querl init recipes/tiny.toml --traces runs/traces.jsonl --out runs/tiny-init
    """
    settings = load_recipe(recipe, tuple(overrides or ()))
    from querl.data.traces import load_traces
    from querl.launch.warm import make_model
    from querl.trainer.model import save_model

    model, tokenizer = make_model(settings, list(load_traces(traces)))
    save_model(model, tokenizer, out)
    Console(highlight=False).print(
        f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens: {out}", soft_wrap=True
    )
