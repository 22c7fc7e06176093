"""Adapters, 4-bit weights and every kind of optimizer, on a CUDA device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer
from transformers import PreTrainedModel

from querl.algorithm.loss import ClipLoss
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.lora import LoraSettings, add_adapter, has_adapter, merge_adapter
from querl.trainer.model import load_model, save_model
from querl.trainer.optim import AdamWSettings

pytestmark = pytest.mark.gpu
SAMPLES = make_samples(8, 8)
CUDA = torch.device("cuda")
LR = 3e-3
KINDS: dict[str, dict[str, Any]] = {
    "adamw8bit": {"kind": "adamw8bit"},
    "stochastic": {"masters": "stochastic"},
    "offload": {"offload": True},
    "all": {"kind": "adamw8bit", "masters": "stochastic", "offload": True},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tiny_policy(), tiny_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, dtype: torch.dtype, *, quantise: Any = "none") -> PreTrainedModel:
    model = load_model(base, device=CUDA, dtype=dtype, quantise=quantise)
    add_adapter(model, LoraSettings(rank=8, alpha=64), base=base)
    return model


def learner(model: PreTrainedModel, *, lr: float = LR, **settings: Any) -> FullLearner:
    update = {name: settings.pop(name) for name in list(settings) if name == "compile_layers"}
    return FullLearner(
        model,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=lr, **settings),
        update=UpdateSettings(**update),
    )


def gain_of(policy: FullLearner, num_steps: int = 5) -> float:
    """How much likelier the praised tokens are after some updates, weighed by the praise."""
    before = asyncio.run(policy.logprobs(SAMPLES))
    first = asyncio.run(policy.update(SAMPLES))
    assert first["policy/ratio_max"] == 1
    for _ in range(num_steps - 1):
        metrics = asyncio.run(policy.update(SAMPLES))
        assert metrics["optimizer/skipped_steps"] == 0
    after = asyncio.run(policy.logprobs(SAMPLES))
    return sum(
        sample.advantages[0] * (sum(new) - sum(old))
        for sample, old, new in zip(SAMPLES, before, after, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_an_adapter_learns_and_its_base_stays(
    base: Path, dtype: torch.dtype, quantise: str
) -> None:
    if quantise == "nf4":
        pytest.importorskip("bitsandbytes")
    model = adapted(base, dtype, quantise=quantise)
    frozen = {n: w.clone() for n, w in model.named_parameters() if not w.requires_grad}
    assert gain_of(learner(model)) > 0
    assert all(model.get_parameter(name).equal(weight) for name, weight in frozen.items())
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    assert other not in {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_optimizer_learns(kind: str) -> None:
    if "adamw8bit" in KINDS[kind].values():
        pytest.importorskip("bitsandbytes")
    model = tiny_policy().to(CUDA, torch.bfloat16)
    assert gain_of(learner(model, lr=1e-3, **KINDS[kind])) > 0


def test_the_host_takes_about_the_same_steps() -> None:
    models = [tiny_policy().to(CUDA, torch.bfloat16) for _ in range(2)]
    for model, offload in zip(models, (False, True), strict=True):
        asyncio.run(learner(model, offload=offload).update(SAMPLES))
    # a first step of Adam is as long as lr whatever the gradient; where that is rounding, the sign
    # is chance: few weights, each at most two steps apart
    apart = torch.cat(
        [
            (mine - theirs).detach().float().abs().flatten()
            for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True)
        ]
    )
    assert float(apart.max()) <= 2.1 * LR
    assert float((apart > 0.1 * LR).float().mean()) < 0.02


def test_compiled_layers_change_no_update_of_an_adapter(base: Path) -> None:
    models = [adapted(base, torch.float32) for _ in range(2)]
    for model, compile_layers in zip(models, (False, True), strict=True):
        policy = learner(model, compile_layers=compile_layers)
        for _ in range(2):
            asyncio.run(policy.update(SAMPLES))
    for (name, mine), theirs in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_an_adapter_over_four_bits_is_saved_taken_over_and_merged(
    base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    first = learner(adapted(base, torch.float16, quantise="nf4"))
    gain_of(first, num_steps=2)
    first.save(tmp_path)
    second = learner(adapted(base, torch.float16, quantise="nf4"))
    second.load(tmp_path)
    assert asyncio.run(second.logprobs(SAMPLES)) == asyncio.run(first.logprobs(SAMPLES))
    merged = load_model(tmp_path / "model", device=CUDA, dtype=torch.float16)
    ids = torch.arange(20, device=CUDA)[None]
    unmerged = merged(ids).logits
    merge_adapter(merged)
    assert not has_adapter(merged)
    torch.testing.assert_close(merged(ids).logits, unmerged, rtol=0, atol=0.05)
