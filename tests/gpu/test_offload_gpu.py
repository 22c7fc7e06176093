"""A learner that leaves the GPU while an engine samples, and comes back for the update."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer
from transformers import PreTrainedModel

from querl.algorithm.loss import ClipLoss
from querl.algorithm.loss.kl import KlPenalty
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.model import ModelShape, load_model, new_model, save_model
from querl.trainer.offload import HostOffload, NoOffload
from querl.trainer.optim import AdamWSettings
from querl.trainer.reference import FrozenCopy

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
# One sample a prompt: where samples share a token, a GPU adds their gradients in any order.
BATCHES = [make_samples(8, 1, seed=seed) for seed in range(3)]
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw8bit": {"kind": "adamw8bit"},
    "optimizer on the host": {"offload": True},
    "stochastic": {"kind": "adamw8bit", "masters": "stochastic"},
}


def learner(model: PreTrainedModel, *, moves: bool = True, **settings: Any) -> FullLearner:
    update = {
        name: settings.pop(name) for name in list(settings) if name in ("compile_layers", "kl")
    }
    return FullLearner(
        model,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=1e-3, **settings),
        update=UpdateSettings(**update),
        reference=FrozenCopy(model) if "kl" in update else None,
        offload=HostOffload(model.device) if moves else NoOffload(),
    )


def quantised(base: Path) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    model = load_model(base, device=CUDA, dtype=torch.float16, quantise="nf4")
    add_adapter(model, LoraSettings(rank=8, alpha=64), base=base)
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "base"
    save_model(tiny_policy(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 million parameters: enough that what else lies on a GPU is little beside them."""
    shape = ModelShape(
        hidden_size=2048, intermediate_size=8192, num_layers=4, num_heads=16, num_kv_heads=4
    )
    folder = tmp_path_factory.mktemp("large") / "base"
    model = new_model(shape, tiny_tokenizer(), seed=0).to(torch.float16)
    save_model(model, tiny_tokenizer(), folder)
    return folder


async def train(policy: FullLearner, *, rests: bool) -> None:
    for batch in BATCHES:
        await policy.update(batch)
        if rests:
            await policy.sleep()
            await policy.wake()


def assert_rest_changes_nothing(first: FullLearner, second: FullLearner) -> None:
    asyncio.run(train(first, rests=True))
    asyncio.run(train(second, rests=False))
    modules = first.weights().module, second.weights().module
    weights = zip(modules[0].named_parameters(), modules[1].parameters(), strict=True)
    for (name, mine), theirs in weights:
        assert mine.device == theirs.device == CUDA
        assert mine.equal(theirs), name


@pytest.mark.parametrize("kind", KINDS)
def test_updates_with_rests_between_them_are_those_without(kind: str) -> None:
    if "adamw8bit" in KINDS[kind].values():
        pytest.importorskip("bitsandbytes")
    models = [tiny_policy().to(CUDA, torch.bfloat16) for _ in range(2)]
    assert_rest_changes_nothing(
        learner(models[0], **KINDS[kind]), learner(models[1], moves=False, **KINDS[kind])
    )
    for model in models:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_adapter_over_four_bits_rests_too(small: Path) -> None:
    assert_rest_changes_nothing(
        learner(quantised(small), anchor=0.05), learner(quantised(small), anchor=0.05, moves=False)
    )


def test_compiled_layers_survive_a_rest() -> None:
    models = [tiny_policy().to(CUDA) for _ in range(2)]
    assert_rest_changes_nothing(
        learner(models[0], compile_layers=True),
        learner(models[1], compile_layers=True, moves=False),
    )


def allocated() -> int:
    """Bytes on the GPU, without what cuBLAS keeps to compute in."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def awake_and_asleep(make: Callable[[], FullLearner]) -> tuple[int, int]:
    """Bytes that a learner adds to the GPU after an update, and after the sleep that follows it."""
    before = allocated()
    policy = make()

    async def measure() -> tuple[int, int]:
        await policy.update(BATCHES[0])
        awake = allocated()
        await policy.sleep()
        return awake - before, allocated() - before

    return asyncio.run(measure())


@pytest.mark.parametrize("kind", KINDS)
def test_next_to_nothing_stays_on_the_gpu(kind: str, large: Path) -> None:
    if "adamw8bit" in KINDS[kind].values():
        pytest.importorskip("bitsandbytes")

    def make() -> FullLearner:
        model = load_model(large, device=CUDA, dtype=torch.bfloat16)
        return learner(model, kl=KlPenalty(coefficient=0.1), **KINDS[kind])

    awake, asleep = awake_and_asleep(make)
    # with the reference; the file has a header, too
    assert awake > 1.99 * (large / "model.safetensors").stat().st_size
    assert asleep < 0.05 * awake


def test_next_to_nothing_stays_of_a_model_in_four_bits(large: Path) -> None:
    awake, asleep = awake_and_asleep(lambda: learner(quantised(large)))
    assert asleep < 0.05 * awake


def test_what_is_saved_asleep_is_what_is_saved_awake(small: Path, tmp_path: Path) -> None:
    for number, policy in enumerate(
        (learner(tiny_policy().to(CUDA, torch.bfloat16)), learner(quantised(small)))
    ):
        asyncio.run(policy.update(BATCHES[0]))
        folders = [tmp_path / f"{number}-{name}" for name in ("awake", "asleep")]
        for folder in folders:
            folder.mkdir()
            policy.save(folder)
            asyncio.run(policy.sleep())
        for path in folders[0].rglob("*.safetensors"):
            other = folders[1] / path.relative_to(folders[0])
            assert path.read_bytes() == other.read_bytes(), path
