"""The step of benchmarks/spider_step.py by TRL's GRPOTrainer, with vLLM in its process and a tool.

The same questions, prompts, samples, limits of turns and tokens, observations, judge and reward as
querl's: the recipe says them. TRL (1.16) finds tool calls in what the model writes by a response
template of our tags, so that its model reads and writes what querl's does; a chat template's own
form of calls would be other work, since a model of this size hardly ever uses it. SQL runs in TRL's
process on the same files. Where a turn neither calls nor answers, TRL ends the episode, and querl
asks again: compare turns and tokens, which both scripts tell, and seconds for 1,000 tokens.

    HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 \
    python benchmarks/trl_step.py --steps 4 --per-pass 16 --out trl.jsonl \
        model.path=MODEL data.source=spider:FOLDER

One optimizer step a batch of groups x samples, in passes of ``--per-pass``; bf16 weights, and
gradient checkpointing unless ``--no-recompute``. A line of JSON when a step ends, so that a run
that is killed keeps its steps; ``--table trl.jsonl`` shows their means. Needs trl and datasets.

Without a GPU, to see that it runs, transformers samples instead of vLLM:

    python benchmarks/trl_step.py --steps 2 --per-pass 4 --out t.jsonl --without-vllm \
        model.path=MODEL data.source=spider:FOLDER run.groups_per_step=2 run.group_size=2 \
        env.max_turn_tokens=24
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from spider_step import Lines
from spider_work import read_recipe, read_work
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_tool import CHAT_TEMPLATE, RESPONSE_TEMPLATE, Judged, SqlTool, texts

from querl.config import Recipe
from querl.env.wire import Tags
from querl.launch.local import model_path
from querl.trainer.model import load_tokenizer

PARTS = ("generate", "reward", "old_logprobs", "update")


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer that notes seconds by part, and tokens, of the step under way."""

    noted: defaultdict[str, float]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.noted[name] += time.perf_counter() - start

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self._timed("score"):
            batch = super()._generate_and_score_completions(inputs)
        self.noted["padded"] = float(batch["prompt_ids"].numel() + batch["completion_ids"].numel())
        return batch

    def _generate(self, prompts: Any) -> Any:
        with self._timed("generate"):
            found = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, completions = found[:4]
        self.noted["trajectories"] = len(prompt_ids)
        self.noted["first_prompts"] = sum(map(len, prompt_ids))
        self.noted["read"] = self.noted["first_prompts"] + sum(map(len, completion_ids))
        self.noted["generated"] = sum(map(sum, tool_mask))
        self.noted["turns"] = sum(len(texts(messages)) for messages in completions)
        return found

    def _calculate_rewards(self, *args: Any) -> Any:
        with self._timed("reward"):
            return super()._calculate_rewards(*args)


class WriteSteps(TrainerCallback):  # type: ignore[misc]
    """A line a step; seconds from the end of the one before, or from the beginning of training."""

    def __init__(self, lines: Lines, noted: defaultdict[str, float]) -> None:
        self._lines = lines
        self._noted = noted
        self._since = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step begins."""
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A step has ended: the optimizer has stepped."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        noted = dict(self._noted)
        self._noted.clear()
        step_s, self._since = now - self._since, now
        score_s = noted.pop("score")
        generate_s, reward_s = noted.pop("generate"), noted.pop("reward")
        self._lines.write(
            what="step",
            step=state.global_step,
            seconds=step_s,
            parts_s={
                "generate": generate_s,
                "reward": reward_s,
                "old_logprobs": score_s - generate_s - reward_s,
                "update": step_s - score_s,
            },
            tokens=noted,
            generated_tokens_per_s=noted["generated"] / generate_s,
            s_per_1000_generated=1000 * step_s / max(noted["generated"], 1),
            ms_per_turn=1000 * step_s / max(noted["turns"], 1),
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0,
        )


def settings(recipe: Recipe, args: argparse.Namespace, folder: str) -> GRPOConfig:
    """TRL's settings for the recipe's work."""
    env, run = recipe.env, recipe.run
    batch = run.groups_per_step * run.group_size
    completion = env.max_turns * env.max_turn_tokens + (env.max_turns - 1) * env.observation_chars
    stops = {"stop": list(Tags().stops), "include_stop_str_in_output": True}
    turn = {"max_tokens": env.max_turn_tokens} | stops
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.per_pass,
        gradient_accumulation_steps=batch // args.per_pass,
        num_generations=run.group_size,
        max_completion_length=completion,
        max_tool_calling_iterations=env.max_turns - 1,
        max_steps=args.steps,
        learning_rate=recipe.optimizer.lr,
        lr_scheduler_type="constant",
        adam_beta1=recipe.optimizer.betas[0],
        adam_beta2=recipe.optimizer.betas[1],
        max_grad_norm=recipe.optimizer.max_grad_norm,
        temperature=recipe.engine.temperature,
        top_p=recipe.engine.top_p,
        beta=0.0,
        bf16=not args.without_vllm,
        model_init_kwargs={"dtype": "float32" if args.without_vllm else "bfloat16"},
        gradient_checkpointing=not args.no_recompute,
        use_vllm=not args.without_vllm,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=not args.without_vllm,
        vllm_gpu_memory_utilization=recipe.engine.memory_share,
        vllm_max_model_length=env.max_prompt + completion,
        generation_kwargs={"max_new_tokens": env.max_turn_tokens} if args.without_vllm else turn,
        use_cpu=args.without_vllm,
        seed=run.seed,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


def measure(args: argparse.Namespace) -> None:
    """Train, and write what each step tells."""
    recipe = read_recipe(args.recipe, args.overrides, num_steps=args.steps)
    work = asyncio.run(read_work(recipe))
    lines = Lines(args.out)
    tokenizer = load_tokenizer(model_path(recipe))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.padding_side = "left"
    rows = [{"prompt": list(m), "task": number} for number, m in enumerate(work.messages)]
    judged = Judged(recipe, work)
    noted: defaultdict[str, float] = defaultdict(float)
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        trainer = TimedTrainer(
            model=str(model_path(recipe)),
            reward_funcs=judged,
            args=settings(recipe, args, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            environment_factory=partial(SqlTool, work.tasks, recipe),
            callbacks=[WriteSteps(lines, noted)],
        )
        trainer.noted = noted
        lines.write(
            what="machine",
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            torch=torch.__version__,
            start_s=time.perf_counter() - started,
            per_pass=args.per_pass,
            recompute=not args.no_recompute,
            overrides=args.overrides,
        )
        trainer.train()
        asyncio.run_coroutine_threadsafe(judged.close(), trainer.async_loop).result(timeout=30)


def table(path: Path, *, warm_up: int) -> str:
    """Means over the steps after the first ones, as Markdown."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in found if line["what"] == "step" and line["step"] > warm_up]
    if not steps:
        raise SystemExit(f"{path} holds no step after the first {warm_up}")
    seconds = [line["seconds"] for line in steps]
    rows = [("a step", f"{fmean(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")]
    rows += [(f"- {part}", f"{fmean(s['parts_s'][part] for s in steps):.2f} s") for part in PARTS]
    for name in ("first_prompts", "generated", "turns", "padded"):
        mean = fmean(line["tokens"][name] / line["tokens"]["trajectories"] for line in steps)
        rows.append((f"{name} of a trajectory", f"{mean:,.2f}"))
    per_1000 = fmean(line["s_per_1000_generated"] for line in steps)
    rows += [
        ("generated tokens", f"{fmean(s['generated_tokens_per_s'] for s in steps):,.0f}/s"),
        ("a step for 1,000 generated tokens", f"{per_1000 * 1000:,.0f} ms"),
        ("a step for one turn", f"{fmean(line['ms_per_turn'] for line in steps):.2f} ms"),
    ]
    lines = [f"| {name} | {text} |" for name, text in rows]
    return "\n".join([f"| {len(steps)} steps | |", "|---|---|", *lines])


def main() -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of the recipe: section.key=value")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/spider-qwen-0.5b.toml"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=1, help="steps that are not averaged")
    parser.add_argument("--per-pass", type=int, default=16, help="trajectories a pass")
    parser.add_argument("--no-recompute", action="store_true", help="keep all activations")
    parser.add_argument("--without-vllm", action="store_true", help="on a CPU")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--table", type=Path, help="only show the means of such a file")
    args = parser.parse_args()
    if args.table:
        print(table(args.table, warm_up=args.warm_up))
        return
    if not args.out:
        parser.error("--out is needed")
    measure(args)
    print(table(args.out, warm_up=args.warm_up))


if __name__ == "__main__":
    main()
