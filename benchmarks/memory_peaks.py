"""Peak memory of updates on one GPU against the plan of ``querl.trainer.plan``, case by case.

Random weights of published shapes, made on the GPU; nothing is downloaded. Each case runs in a
process of its own and prints one line of JSON. After its updates the learner leaves the GPU for the
host's memory and comes back, as beside a colocated engine: seconds, and what stays allocated.

    lora      7B, an adapter of rank 32 on all matrices, bf16, rows of 16,384 tokens
    full8     7B, all weights, moments in 8 bits
    offload   7B, all weights, masters and moments in the host's memory
    qlora     3B in NF4, an adapter of rank 16, fp16 and no bf16 anywhere, as if on a T4: four
              answers of 256 tokens to a prompt of 1,500, sampled by the hf engine, and an update on
              them, while the allocator may take 14.5 GB

    python benchmarks/memory_peaks.py --out results.jsonl
    python benchmarks/memory_peaks.py --shape tiny --device cpu      # does it run at all?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from querl.algorithm.loss import ClipLoss
from querl.launch.local import TINY_FOLDER
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.hf import HfEngine
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.model import load_model, load_tokenizer, save_model
from querl.trainer.offload import HostOffload
from querl.trainer.optim import AdamWSettings
from querl.trainer.plan import EIGHT_BIT_MOMENTS, Adapter, EnginePlan, PlanSettings, plan
from querl.trainer.shapes import PUBLISHED, DecoderShape
from querl.types import Completion, Sample

GIB = 2**30
CAP_BYTES = 14.5e9
TEMPERATURE = 0.7
TINY = DecoderShape(
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
    is_tied=True,
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """``groups`` prompts of ``prompt`` tokens, each with ``samples`` answers of ``answer``."""

    shape: DecoderShape
    groups: int
    prompt: int
    samples: int
    answer: int

    @property
    def row(self) -> int:
        """Tokens of a packed row: a group that shares its prompt."""
        return self.prompt + self.samples * self.answer


SIZES = {
    ("7b", "real"): Size(
        shape=PUBLISHED["Qwen/Qwen2.5-Coder-7B"], groups=2, prompt=2000, samples=8, answer=1798
    ),
    ("3b", "real"): Size(
        shape=PUBLISHED["Qwen/Qwen2.5-Coder-3B"], groups=1, prompt=1500, samples=4, answer=256
    ),
    ("7b", "tiny"): Size(shape=TINY, groups=2, prompt=20, samples=4, answer=16),
    ("3b", "tiny"): Size(shape=TINY, groups=1, prompt=20, samples=4, answer=16),
}


def _new_model(shape: DecoderShape, dtype: torch.dtype, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.is_tied,
        max_position_embeddings=32768,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _prompt(size: Size, group: int) -> tuple[int, ...]:
    dice = random.Random(group)
    return tuple(dice.randrange(size.shape.vocab_size) for _ in range(size.prompt))


def _sample(
    size: Size, group: int, number: int, answer: tuple[int, ...], found: tuple[float, ...]
) -> Sample:
    prompt = _prompt(size, group)
    length = len(prompt) + len(answer)
    return Sample(
        group_id=group,
        num_prompt_tokens=len(prompt),
        token_ids=prompt + answer,
        loss_mask=(False,) * len(prompt) + (True,) * len(answer),
        sampled_logprobs=(0.0,) * len(prompt) + found,
        advantages=(1.0 if number % 2 else -1.0,) * length,
        versions=(0,) * length,
    )


def _made_up(size: Size) -> list[Sample]:
    dice = random.Random(99)
    return [
        _sample(
            size,
            group,
            number,
            tuple(dice.randrange(size.shape.vocab_size) for _ in range(size.answer)),
            (-12.0,) * size.answer,
        )
        for group in range(size.groups)
        for number in range(size.samples)
    ]


def _learner(model: PreTrainedModel, size: Size, **optimizer: Any) -> FullLearner:
    return FullLearner(
        model,
        load_tokenizer(TINY_FOLDER),  # saves nothing, so any will do
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=1e-6, **optimizer),
        update=UpdateSettings(
            temperature=TEMPERATURE, tokens_per_microbatch=size.row, checkpoint_activations=True
        ),
        offload=HostOffload(model.device),
    )


class _Peak:
    """What the allocator held at most, and the process' own memory on the host."""

    def __init__(self, device: str) -> None:
        self._device = device

    @contextmanager
    def of(self, name: str, into: dict[str, Any]) -> Iterator[None]:
        """Peak and seconds of a block, as ``<name>_gib``, ``_reserved_gib`` and ``_s``."""
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if self._device == "cuda":
            torch.cuda.synchronize()
            into[f"{name}_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
            into[f"{name}_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        into[f"{name}_s"] = round(time.perf_counter() - start, 2)


def _two_updates(
    learner: FullLearner, samples: list[Sample], peak: _Peak, found: dict[str, Any]
) -> None:
    """The plan is of the second: the first makes the moments after its backward passes."""
    for name in ("first_update", "update"):
        with peak.of(name, found):
            metrics = asyncio.run(learner.update(samples))
    for key in ("optimizer/grad_norm", "optimizer/skipped_steps", "optimizer/loss_scale"):
        found[key.split("/")[1]] = metrics[key]
    found["abs_dlogprob"] = metrics["sampler/abs_dlogprob"]


def _rests(learner: FullLearner, device: str, found: dict[str, Any]) -> None:
    """To the host and back, twice: the first time pins its memory, and copies what is frozen."""
    for name in ("first", "second"):
        for what, move in (("sleep", learner.sleep), ("wake", learner.wake)):
            start = time.perf_counter()
            asyncio.run(move())
            found[f"{name}_{what}_s"] = round(time.perf_counter() - start, 2)
            if device == "cuda":
                allocated = torch.cuda.memory_allocated() / GIB
                found[f"{name}_{what}_gib"] = round(allocated, 2)


def _train_7b(case: str, size: Size, device: str, found: dict[str, Any]) -> PlanSettings:
    peak = _Peak(device)
    adapter = Adapter(rank=32) if case == "lora" else None
    settings: dict[str, Any] = {
        "lora": {},
        "full8": {"kind": "adamw8bit"},
        "offload": {"offload": True},
    }[case]
    with peak.of("making", found):
        model = _new_model(size.shape, torch.bfloat16, device)
        if adapter is not None:
            add_adapter(model, LoraSettings(rank=adapter.rank), base=TINY_FOLDER)
        learner = _learner(model, size, **settings)
    with learner:
        _two_updates(learner, _made_up(size), peak, found)
        _rests(learner, device, found)
    return PlanSettings(
        tokens_per_microbatch=size.row,
        is_recomputed=True,
        adapter=adapter,
        offload="optimizer" if case == "offload" else "none",
        moment_bytes=EIGHT_BIT_MOMENTS if case == "full8" else 8.0,
    )


def _train_3b(size: Size, device: str, found: dict[str, Any]) -> PlanSettings:
    peak = _Peak(device)
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / total)
        torch.cuda.get_device_capability = lambda *_: (7, 5)  # what querl asks, to decide as there
    else:
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # its fast path has no backward pass
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "model"
        with peak.of("making", found):
            made = _new_model(size.shape, torch.float16, device)
            save_model(made, load_tokenizer(TINY_FOLDER), base)
            del made
        with peak.of("loading", found):
            model = load_model(
                base, device=torch.device(device), dtype=torch.float16, quantise="nf4"
            )
            add_adapter(model, LoraSettings(rank=16), base=base)
    dtypes = _watch_dtypes(model)
    learner = _learner(model, size, anchor=0.05)
    with learner:
        with peak.of("sampling", found):
            answers = asyncio.run(_sample_answers(model, size))
        samples = [
            _sample(size, 0, number, answer.token_ids, answer.logprobs)
            for number, answer in enumerate(answers)
        ]
        found["answer_tokens"] = [len(answer.token_ids) for answer in answers]
        _two_updates(learner, samples, peak, found)
        _rests(learner, device, found)
    dtypes |= {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    found["dtypes"] = sorted(str(dtype) for dtype in dtypes)
    assert torch.bfloat16 not in dtypes
    engine = EnginePlan(num_sequences=size.samples, context=size.prompt + size.answer)
    return PlanSettings(
        tokens_per_microbatch=size.row,
        is_recomputed=True,
        adapter=Adapter(rank=16, is_quantised=True, is_anchored=True),
        engine=engine,
    )


def _watch_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    """Filled with the dtypes of all that modules give each other."""
    seen: set[torch.dtype] = set()

    def note(_module: object, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.add(output.dtype)

    for module in model.modules():
        module.register_forward_hook(note)
    return seen


async def _sample_answers(model: PreTrainedModel, size: Size) -> list[Completion]:
    engine = HfEngine(model, load_tokenizer(TINY_FOLDER), max_batch=size.samples)
    sampling = Sampling(max_tokens=size.answer, temperature=TEMPERATURE)
    engine.enter(size.samples)
    keys = [RequestKey(seed=0, step=1, group=0, sample=n, turn=0) for n in range(size.samples)]
    asked = (engine.generate(_prompt(size, 0), sampling, key) for key in keys)
    answers = await asyncio.gather(*asked)
    engine.leave(size.samples)
    await engine.close()
    return answers


def _run(case: str, scale: str, device: str, out: Path | None) -> None:
    size = SIZES["3b" if case == "qlora" else "7b", scale]
    found: dict[str, Any] = {}
    if case == "qlora":
        settings = _train_3b(size, device, found)
    else:
        settings = _train_7b(case, size, device, found)
    planned = plan(size.shape, settings)
    line = {
        "case": case,
        "shape": scale,
        "row_tokens": size.row,
        "rows": size.groups,
        "plan_gib": round(planned.peak / GIB, 2),
        "plan": {name: round(amount / GIB, 2) for name, amount in planned.lines()},
        "plan_host_gib": round(planned.offloaded / GIB, 2),
        **found,
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2),
        "torch": torch.__version__,
    }
    if device == "cuda":
        most = max(found["update_gib"], found.get("sampling_gib", 0.0))
        line["peak_over_plan"] = round(most * GIB / planned.peak, 3)
        line["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(line), flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


CASES = ("lora", "full8", "qlora", "offload")


def main() -> None:
    """Run the cases asked for, one process after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, help=f"of {', '.join(CASES)}")
    parser.add_argument("--shape", choices=("real", "tiny"), default="real")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for case in args.cases:
        process = multiprocessing.get_context("spawn").Process(
            target=_run, args=(case, args.shape, args.device, args.out)
        )
        process.start()
        process.join()
        if process.exitcode:
            print(json.dumps({"case": case, "exit_code": process.exitcode}), flush=True)


if __name__ == "__main__":
    main()
