"""Rows by FlexAttention, whose kernels only a GPU has, beside plain attention on the CPU."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tiny_policy import VOCABULARY, make_samples, tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from querl.algorithm.loss import ClipLoss
from querl.algorithm.pack import pack
from querl.trainer import flex
from querl.trainer.attention import RowAttention
from querl.trainer.flex import FlexRow
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.optim import AdamWSettings
from querl.trainer.segments import SegmentAttention

pytestmark = pytest.mark.gpu
SAMPLES = make_samples(9)
HEADS, KEY_HEADS, WIDTH = 4, 2, 256


@pytest.fixture(params=["chosen", "small"])
def tiles(request, monkeypatch) -> None:
    """Those that the GPU gets by itself, and those that GPUs of little shared memory get."""
    if request.param == "small":
        monkeypatch.setattr(flex, "has_small_tiles", lambda head_bytes, device: True)


def attended(row: RowAttention, states: list[torch.Tensor], window: int | None):
    """What a row [heads, T, D] attends to, [T, heads, D], and the slopes at its three inputs."""
    leaves = [state.clone().requires_grad_() for state in states]
    padded = [torch.nn.functional.pad(leaf, (0, 0, 0, row.num_padding))[None] for leaf in leaves]
    result = row.attend(*padded, scale=None, window=window)[0, : states[0].shape[1]]
    (result.float() * torch.linspace(-1, 1, WIDTH, device=result.device)).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"]
)
def test_heads_of_256_numbers_attend_as_on_the_cpu(window, dtype, tolerance):
    (row,) = pack(SAMPLES, 10**6)
    torch.manual_seed(0)
    shapes = [(heads, row.num_tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    states = [torch.randn(shape).to(dtype) for shape in shapes]
    plain = SegmentAttention(row.segments, torch.device("cpu"))
    fused = FlexRow(row.segments, torch.device("cuda"))
    expected = attended(plain, [state.float() for state in states], window)
    found = attended(fused, [state.cuda() for state in states], window)
    for mine, theirs in zip(found, expected, strict=True):
        assert ((mine.cpu().float() - theirs).norm() / theirs.norm()).item() < tolerance


def gemma():
    """A Gemma-3 with heads as wide as its real ones; the first of its layers has a window."""
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(
        Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            head_dim=WIDTH,
            sliding_window=20,
            layer_types=["sliding_attention", "full_attention"],
            initializer_range=0.1,
        )
    ).eval()


@pytest.mark.usefixtures("tiles")
def test_a_gemma_learns_on_the_gpu_what_it_learns_on_the_cpu():
    numbers = []
    for device in ("cpu", "cuda"):
        policy = FullLearner(
            gemma().to(device),
            tiny_tokenizer(),
            loss=ClipLoss(),
            optimizer=AdamWSettings(lr=1e-3),
            update=UpdateSettings(),
        )
        with policy:
            numbers.append([asyncio.run(policy.update(SAMPLES)) for _ in range(2)])
    for on_cpu, on_gpu in zip(*numbers, strict=True):
        for name in ("policy/loss", "optimizer/grad_norm", "policy/entropy"):
            assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-2, abs=1e-4), name
