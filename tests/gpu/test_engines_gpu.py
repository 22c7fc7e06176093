"""vLLM and SGLang themselves, held to the laws of engines, struck and frozen, on a CUDA device.

QUERL_VLLM_PYTHON and QUERL_SGLANG_PYTHON may name interpreters that have them, and QUERL_TEST_MODEL
a folder of a model to use instead of a small random one.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from engine_laws import KEY, LAWS, Subject, expected_logprobs
from engines import Lasting
from tiny_policy import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from querl.rollout.dialect import Dialect, Weights
from querl.rollout.engine import Engine, Sampling
from querl.rollout.http_engine import HttpEngine
from querl.rollout.server import ServerProcess
from querl.rollout.sglang import Sglang, SglangSettings
from querl.rollout.vllm import Vllm, VllmSettings
from querl.trainer.model import ModelShape, new_model, save_model
from querl.trainer.weights import PublishedWeights
from querl.types import Completion

pytestmark = pytest.mark.gpu
CONTEXT = 256
SHAPE = ModelShape(
    hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2
)
# bf16 against float32 of the same weights; a real model had 0.045
TOLERANCE = 0.08


def python_with(kind: str) -> str:
    """The interpreter that has this engine; skips where none has."""
    named = os.environ.get(f"QUERL_{kind.upper()}_PYTHON")
    if named is None and find_spec(kind) is None:
        pytest.skip(f"no {kind} here; QUERL_{kind.upper()}_PYTHON may name one that has it")
    return named or sys.executable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16, and its tokenizer."""
    if "QUERL_TEST_MODEL" in os.environ:
        return Path(os.environ["QUERL_TEST_MODEL"])
    made = tmp_path_factory.mktemp("model") / "base"
    model = new_model(SHAPE, tiny_tokenizer(), seed=0)
    with torch.no_grad():  # far from uniform, so that other weights give other log-probs
        for weight in model.parameters():
            weight.mul_(3.0 if weight.dim() > 1 else 1.0)
    save_model(model.to(torch.bfloat16), tiny_tokenizer(), made)
    return made


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The folder's weights and others, as bf16 has them, to compute with in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + 0.3 * torch.randn_like(weight))
    return model.float().eval(), other.float().eval()


def publish(model: PreTrainedModel) -> Weights:
    """As a learner on the same GPU does."""
    return PublishedWeights(copy.deepcopy(model).to("cuda", torch.bfloat16))


def dialect_of(kind: str, folder: Path) -> Dialect:
    if kind == "vllm":
        return Vllm(
            VllmSettings(model=str(folder), dtype="bfloat16", context=CONTEXT, memory_share=0.2)
        )
    return Sglang(
        SglangSettings(model=str(folder), dtype="bfloat16", context=CONTEXT, memory_share=0.2)
    )


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def subject(
    request: pytest.FixtureRequest,
    folder: Path,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Subject]:
    """Engines over one server, which lasts as long as the tests of this file."""
    kind = request.param
    dialect = dialect_of(kind, folder)
    log = tmp_path_factory.mktemp("log") / "engine.log"
    server = Lasting(dialect, python=python_with(kind), log=log)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    yield Subject(
        open=lambda: HttpEngine(dialect, server, tokenizer, context=CONTEXT),
        publish=publish,
        model=models[0],
        other=models[1],
        tokenizer=tokenizer,
        context=CONTEXT,
        tolerance=TOLERANCE,
        repeats=kind == "vllm",
    )
    asyncio.run(server.end())


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_engines_obey(law: Callable[[Subject], None], subject: Subject) -> None:
    law(subject)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_engine_struck_in_mid_rollout_is_started_anew(
    kind: str,
    number: signal.Signals,
    folder: Path,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tmp_path: Path,
) -> None:
    """The process that computes, not the one that listens."""
    dialect = dialect_of(kind, folder)
    server = ServerProcess(dialect, python=python_with(kind), log=tmp_path / "engine.log")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine: Engine = HttpEngine(dialect, server, tokenizer, context=CONTEXT, heartbeat_s=5.0)
    prompt, sampling = tuple(tokenizer.encode("SELECT name")), Sampling(max_tokens=200)

    async def go() -> list[Completion]:
        try:
            await engine.load_weights(publish(models[1]), version=7)
            keys = [replace(KEY, sample=i) for i in range(64)]
            asked = [asyncio.create_task(engine.generate(prompt, sampling, key)) for key in keys]
            await asyncio.sleep(0.1)
            strike_deepest(number)
            return await asyncio.gather(*asked)
        finally:
            await engine.close()

    found = asyncio.run(go())
    assert engine.num_restarts == 1
    for completion in found:
        assert set(completion.versions) == {7}
    for completion in found[:4]:
        expected = expected_logprobs(models[1], prompt, completion, 1.0)
        pairs = zip(completion.logprobs, expected, strict=True)
        assert sum(abs(a - b) for a, b in pairs) / len(expected) <= TOLERANCE


def strike_deepest(number: signal.Signals) -> None:
    """Signal all processes below ours but the keeper and what it started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = {int(pid): int(ppid) for pid, ppid in map(str.split, listed.stdout.splitlines())}

    def depth(pid: int) -> int:
        """How far below this process; 0 for strangers."""
        steps = 0
        while pid not in (os.getpid(), 0, 1):
            pid, steps = parents.get(pid, 0), steps + 1
        return steps if pid == os.getpid() else 0

    struck = [pid for pid in parents if depth(pid) >= 3]
    assert struck
    for pid in struck:
        with contextlib.suppress(ProcessLookupError):  # it may have ended with another one
            os.kill(pid, number)
