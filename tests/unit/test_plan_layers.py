"""What a layer keeps for its backward pass, counted tensor by tensor, against the plan."""

from __future__ import annotations

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

from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.plan import Adapter, PlanSettings, activations_a_layer
from querl.trainer.shapes import PUBLISHED, DecoderShape, shape_of

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3_text": Gemma3TextConfig,
}
RANK = 8
NUM_TOKENS = 256


def config_of(family: str, num_layers: int) -> PreTrainedConfig:
    return CONFIGS[family](
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=64,
        sliding_window=2 * NUM_TOKENS,
        tie_word_embeddings=True,
    )


def bytes_saved(model: PreTrainedModel) -> int:
    """Of a forward pass, beside the weights; what several operations keep is counted once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor  # alive, so that its place is not given to another
        return tensor

    decoder: Any = model.get_decoder()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(input_ids=torch.zeros((1, NUM_TOKENS), dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measured_a_layer(family: str, dtype: torch.dtype, *, has_adapter: bool) -> float:
    """Bytes a token, by what two layers more keep: the ends of a model are no part of it."""
    sizes = []
    for num_layers in (1, 3):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config_of(family, num_layers), dtype=dtype).eval()
        if has_adapter:
            add_adapter(model, LoraSettings(rank=RANK), base=Path("nowhere"), seed=0)
        sizes.append(bytes_saved(model))
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
