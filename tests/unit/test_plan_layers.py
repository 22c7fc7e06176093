"""What a layer keeps for its backward pass, counted tensor by tensor, against the plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from querl.algorithm.pack import pack
from querl.trainer.attention import hidden_states, tree_attention
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.plan import Adapter, PlanSettings, activations_a_layer
from querl.trainer.shapes import PUBLISHED, DecoderShape, shape_of
from querl.types import Sample

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3_text": Gemma3TextConfig,
}
RANK = 8
NUM_TOKENS = 256


def config_of(family: str, num_layers: int, *, num_key_value_heads: int = 2) -> PreTrainedConfig:
    return CONFIGS[family](
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=num_key_value_heads,
        head_dim=32,
        vocab_size=64,
        sliding_window=2 * NUM_TOKENS,
        tie_word_embeddings=True,
    )


def bytes_saved(model: PreTrainedModel, forward: Callable[[], object]) -> int:
    """Of a forward pass, beside the weights; what several operations keep is counted once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor  # alive, so that its place is not given to another
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measured_a_layer(family: str, dtype: torch.dtype, *, has_adapter: bool) -> float:
    """Bytes a token, by what two layers more keep: the ends of a model are no part of it."""
    sizes = []
    for num_layers in (1, 3):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config_of(family, num_layers), dtype=dtype).eval()
        if has_adapter:
            add_adapter(model, LoraSettings(rank=RANK), base=Path("nowhere"), seed=0)
        token_ids = torch.zeros((1, NUM_TOKENS), dtype=torch.long)
        sizes.append(bytes_saved(model, partial(model.get_decoder(), token_ids, use_cache=False)))
    return (sizes[1] - sizes[0]) / 2 / NUM_TOKENS


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_layer_keeps_what_is_planned(
    family: str, dtype: torch.dtype, has_adapter: bool, tmp_path: Path
) -> None:
    config_of(family, 1).save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    assert shape is not None
    settings = PlanSettings(
        tokens_per_microbatch=NUM_TOKENS,
        compute_bytes=dtype.itemsize,
        adapter=Adapter(rank=RANK) if has_adapter else None,
    )
    measured = measured_a_layer(family, dtype, has_adapter=has_adapter)
    assert activations_a_layer(shape, settings) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("is_shared", "keys"), [(True, (200 + 4 * 250) / 400), (False, 1.0)])
def test_gathered_keys_are_kept_once_a_sample(is_shared: bool, keys: float, tmp_path: Path) -> None:
    samples = [sample(number, num_prompt=200, num_answer=50) for number in range(4)]
    (row,) = pack(samples, 10_000, share_prefix=is_shared)
    sizes = []
    for num_layers in (1, 3):
        # as many heads of keys as of queries: the CPU's kernel would not repeat fewer of them
        config = config_of("qwen2", num_layers, num_key_value_heads=6)
        config.save_pretrained(tmp_path)
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
        with tree_attention(model):
            sizes.append(bytes_saved(model, partial(hidden_states, model, row)))
    shape = shape_of(tmp_path)
    assert shape is not None
    settings = PlanSettings(tokens_per_microbatch=row.num_tokens, gathered_keys=keys)
    measured = (sizes[1] - sizes[0]) / 2 / row.num_tokens
    assert activations_a_layer(shape, settings) == pytest.approx(measured, rel=0.05)


def sample(number: int, *, num_prompt: int, num_answer: int) -> Sample:
    length = num_prompt + num_answer
    return Sample(
        group_id=0,
        num_prompt_tokens=num_prompt,
        token_ids=(1,) * num_prompt + (2 + number,) * num_answer,
        loss_mask=(False,) * num_prompt + (True,) * num_answer,
        sampled_logprobs=(0.0,) * length,
        advantages=(1.0,) * length,
        versions=(0,) * length,
    )


def test_a_published_shape_has_the_norms_of_its_family(tmp_path: Path) -> None:
    families = {
        "Qwen/Qwen2.5-Coder-3B": "qwen2",
        "Qwen/Qwen3-4B": "qwen3",
        "HuggingFaceTB/SmolLM2-135M": "llama",
        "google/gemma-3-270m": "gemma3_text",
    }
    for name, family in families.items():
        config_of(family, 1).save_pretrained(tmp_path)
        read = shape_of(tmp_path)
        assert read is not None
        assert norms_of(read) == norms_of(PUBLISHED[name])


def norms_of(shape: DecoderShape) -> tuple[int, bool, bool]:
    return shape.num_norms, shape.has_qk_norm, shape.norm_in_float32
