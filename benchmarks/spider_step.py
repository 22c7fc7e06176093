"""Seconds of a full GRPO step on Spider, where they go, and how far from the machine's limits.

querl's own loop trains as the recipe says, on the same questions in every step. What a step tells
of itself is written as one line of JSON when it ends, so that a run that is killed keeps its steps.

    python benchmarks/spider_step.py --steps 6 --out spider.jsonl --run /tmp/run \
        model.path=MODEL data.source=spider:FOLDER
    python benchmarks/spider_step.py --table spider.jsonl

No checkpoint is written. Seconds of the table are means over the steps after ``--warm-up``; the
parts of a step add up to it by ``other``. benchmarks/trl_step.py does the same work with TRL.

Without a GPU, to see that it runs, with the package's own model and data:

    python benchmarks/spider_step.py --steps 3 --warm-up 1 --out s.jsonl --run /tmp/run \
        model.path=tiny data.source=demo data.validation=val engine.kind=hf \
        engine.placement=shared memory.compile=false prompt.style=short prompt.values=none \
        run.groups_per_step=8 run.group_size=4
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from spider_work import first_tasks, read_recipe
from step_limits import Rates, Tokens, count_tokens, limits_s, measure_rates

from querl import records
from querl.launch.engines import starting_engine
from querl.launch.local import model_path
from querl.launch.training import prepare, train_prepared
from querl.run import Run
from querl.trainer.learner import Learner
from querl.trainer.model import choose_device
from querl.trainer.shapes import DecoderShape, shape_of

APART = "sampler/abs_dlogprob"
# what the loop times one after the other; ``other`` is the rest of the step
PARTS = ("rollout", "credit", "make_room", "update", "publish", "records")


class Lines:
    """A file of JSON lines, each flushed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **line: Any) -> None:
        """Append one, and show it."""
        text = json.dumps(line)
        print(text, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


class Watch:
    """Implements ``querl.run.Watcher``: a line a step."""

    def __init__(
        self, lines: Lines, run: Path, shape: DecoderShape, rates: Rates, started: float
    ) -> None:
        self._lines = lines
        self._started = started
        self._records = run / "records"
        self._shape = shape
        self._rates = rates

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """A step has ended; its records are there. What comes before the first has no seconds."""
        if "time/step_s" not in values:
            return
        tokens = count_tokens(records.read_step(self._records, step))
        self._lines.write(
            what="step",
            step=step,
            **describe_step(values, tokens),
            limits_s=limits_s(
                self._shape,
                tokens,
                self._rates,
                forward=values.get("tokens/forward", 0.0),
                trained=values.get("tokens/trained", 0.0),
            ),
            tokens=asdict(tokens),
            metrics=values,
        )

    def evaluated(self, step: int, summary: dict[str, Any]) -> None:  # noqa: ARG002
        """One question says nothing of the model; the first time, that the engine is up."""
        self._lines.write(what="validated", step=step, seconds=time.perf_counter() - self._started)

    def say(self, text: str) -> None:
        """What the run tells a person."""
        self._lines.write(what="said", text=text)


class WithoutCheckpoints(Run):
    """Writes no checkpoint: it is no part of a step, and of this model it is 6 GB."""

    def save(self, step: int, learner: Learner, cursor: int) -> None:
        """Nothing."""


def describe_step(values: dict[str, float], tokens: Tokens) -> dict[str, Any]:
    """A step's seconds by part, without the validation after the last, and its rates."""
    step_s = values["time/step_s"] - values.get("time/eval_s", 0.0)
    parts = {name: values.get(f"time/{name}_s", 0.0) for name in PARTS}
    parts["other"] = step_s - sum(parts.values())
    rollout_s, update_s = parts["rollout"], parts["update"]
    forward = values.get("tokens/forward", 0.0)
    unshared = values.get("tokens/forward_unshared", 0.0)
    trajectories = max(tokens.num_trajectories, 1)
    return {
        "seconds": step_s,
        "parts_s": parts,
        "generated_tokens_per_s": tokens.generated / rollout_s,
        "prompt_tokens_per_s": tokens.prefill_uncached / rollout_s,
        "update_tokens_per_s": forward / update_s,
        "update_tokens_unshared_per_s": unshared / update_s,
        "step_tokens_per_s": forward / step_s,
        "step_tokens_unshared_per_s": unshared / step_s,
        "a_trajectory": {
            "first_prompt": tokens.first_prompts / trajectories,
            "generated": tokens.generated / trajectories,
            "turns": tokens.num_turns / trajectories,
        },
        "s_per_1000_generated": 1000 * step_s / max(tokens.generated, 1),
        "ms_per_turn": 1000 * step_s / max(tokens.num_turns, 1),
    }


def measure(args: argparse.Namespace) -> None:
    """Train, and write what each step tells."""
    recipe = read_recipe(args.recipe, args.overrides, num_steps=args.steps)
    shape = shape_of(model_path(recipe))
    if shape is None:
        raise SystemExit(f"{model_path(recipe)}: the limits need a decoder whose shape is known")
    lines = Lines(args.out)
    device = choose_device(recipe.model.device)
    rates = measure_rates(device)
    lines.write(
        what="machine",
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else "none",
        torch=torch.__version__,
        product_tflops=rates.flops / 1e12,
        copy_gb_per_s=rates.bytes / 1e9,
        overrides=args.overrides,
    )
    started = time.perf_counter()
    with starting_engine(recipe) as engine:
        prepared = asyncio.run(prepare(recipe))
        prepared = replace(prepared, training=first_tasks(recipe, prepared.training))
        lines.write(what="prepared", seconds=time.perf_counter() - started)
        watch = Watch(lines, args.run, shape, rates, started)
        with WithoutCheckpoints(args.run, recipe, watch, fresh=True) as run:
            asyncio.run(train_prepared(recipe, prepared, run, watch.say, engine=engine))


def table(path: Path, *, warm_up: int) -> str:
    """Means over the steps after the first ones, as Markdown."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in found if line["what"] == "step" and line["step"] > warm_up]
    if not steps:
        raise SystemExit(f"{path} holds no step after the first {warm_up}")

    def mean(*keys: str) -> float:
        def value(line: Any) -> float:
            for key in keys:
                line = line[key]
            return float(line)

        return fmean(value(line) for line in steps)

    seconds = [line["seconds"] for line in steps]
    rows = [("a step", f"{fmean(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")]
    rows += [(f"- {name}", f"{mean('parts_s', name):.2f} s") for name in steps[0]["parts_s"]]
    for name in _within(steps[0]["metrics"]):
        told = [line["metrics"].get(name, 0.0) for line in steps]  # no SQL, no seconds of it
        rows.append((name, f"{fmean(told):.2f} s"))
    rows += [
        (f"{name} of a trajectory", f"{mean('a_trajectory', name):,.2f}")
        for name in steps[0]["a_trajectory"]
    ]
    rows.append(("groups with signal", f"{mean('metrics', 'groups/with_signal'):.0%}"))
    rates = [key for key in steps[0] if key.endswith("_per_s")]
    rows += [(key.removesuffix("_per_s").replace("_", " "), f"{mean(key):,.0f}/s") for key in rates]
    rows += [
        ("a step for 1,000 generated tokens", f"{mean('s_per_1000_generated') * 1000:,.0f} ms"),
        ("a step for one turn", f"{mean('ms_per_turn'):.2f} ms"),
    ]
    for name, part in (("decode", "rollout"), ("prefill", "rollout"), ("train", "update")):
        limit, spent = mean("limits_s", name), mean("parts_s", part)
        rows.append((f"limit of {name}", f"{limit:.2f} s, {limit / spent:.0%} of {part}"))
    rows.append(("engine against learner, nats a token", _drift(found)))
    lines = [f"| {name} | {text} |" for name, text in rows]
    return "\n".join([f"| {len(steps)} steps | |", "|---|---|", *lines])


def _drift(found: list[dict[str, Any]]) -> str:
    """How far sampler and learner were apart in the first and in the last steps that trained."""
    steps = [line["metrics"] for line in found if line["what"] == "step"]
    apart = [metrics[APART] for metrics in steps if metrics.get(APART) is not None]
    if not apart:
        return "nothing was trained"
    part = max(len(apart) // 5, 1)
    return f"{fmean(apart[:part]):.4f} in the first {part}, {fmean(apart[-part:]):.4f} in the last"


def _within(metrics: dict[str, float]) -> list[str]:
    """What is timed inside a step's parts, or beside them."""
    told = {"time/step_s", "time/eval_s", *(f"time/{name}_s" for name in PARTS)}
    return [name for name in metrics if name.startswith("time/") and name not in told]


def main() -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of the recipe: section.key=value")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/spider-qwen-0.5b.toml"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not averaged")
    parser.add_argument("--run", type=Path, help="the run's folder, begun anew")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--table", type=Path, help="only show the means of such a file")
    args = parser.parse_args()
    if args.table:
        print(table(args.table, warm_up=args.warm_up))
        return
    if not args.run or not args.out:
        parser.error("--run and --out are needed")
    measure(args)
    print(table(args.out, warm_up=args.warm_up))


if __name__ == "__main__":
    main()
