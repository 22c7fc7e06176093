"""The shape of a decoder, and what of it is known before its folder is here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from querl.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """A Llama-, Qwen- or Gemma-shaped decoder: gated feed-forward, grouped key and value heads."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool  # the head is the embedding
    num_norms: int = 2  # of a layer's inputs and outputs
    has_qk_norm: bool = False  # queries and keys have norms of their own, head by head
    norm_in_float32: bool = False  # norms scale before they round, not after

    @property
    def query_width(self) -> int:
        """Of a token's queries, and of what attention gives."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of a token's keys, and of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer, as (inputs, outputs), by their usual names."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, self.query_width),
            "k_proj": (hidden, self.kv_width),
            "v_proj": (hidden, self.kv_width),
            "o_proj": (self.query_width, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def num_layer_parameters(self) -> int:
        """Of one layer's matrices; norms and biases, a thousandth of them, are left out."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def num_head_parameters(self) -> int:
        """Of the output matrix, tied or not."""
        return self.vocab_size * self.hidden_size

    @property
    def num_embedding_parameters(self) -> int:
        """Of the input and output matrices together, counted once where they are tied."""
        return self.num_head_parameters * (1 if self.is_tied else 2)

    @property
    def num_parameters(self) -> int:
        """Of all matrices."""
        return self.num_layers * self.num_layer_parameters + self.num_embedding_parameters


# What transformers' classes do beyond two norms a layer; by ``model_type``.
_NORMS: dict[str, dict[str, Any]] = {
    "qwen3": {"has_qk_norm": True},
    "gemma3_text": {"num_norms": 4, "has_qk_norm": True, "norm_in_float32": True},
}
# From each model's config.json on huggingface.co. In this order: the fields of DecoderShape up to
# ``is_tied``, and the ``model_type``.
_PUBLISHED = {
    "Qwen/Qwen2.5-Coder-0.5B": (896, 4864, 24, 14, 2, 64, 151936, True, "qwen2"),
    "Qwen/Qwen2.5-Coder-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True, "qwen2"),
    "Qwen/Qwen2.5-Coder-3B": (2048, 11008, 36, 16, 2, 128, 151936, True, "qwen2"),
    "Qwen/Qwen2.5-Coder-7B": (3584, 18944, 28, 28, 4, 128, 152064, False, "qwen2"),
    "Qwen/Qwen2.5-Coder-14B": (5120, 13824, 48, 40, 8, 128, 152064, False, "qwen2"),
    "Qwen/Qwen2.5-Coder-32B": (5120, 27648, 64, 40, 8, 128, 152064, False, "qwen2"),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936, True, "qwen3"),
    "HuggingFaceTB/SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152, True, "llama"),
    "google/gemma-3-270m": (640, 2048, 18, 4, 1, 256, 262144, True, "gemma3_text"),
}
PUBLISHED = {
    name: DecoderShape(
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        is_tied=is_tied,
        **_NORMS.get(family, {}),
    )
    for name, (hidden, inner, layers, heads, kv_heads, head_dim, vocabulary, is_tied, family) in (
        _PUBLISHED.items()
    )
}


def published_name(path: Path) -> str | None:
    """The published model, such as ``Qwen/Qwen3-4B``, that a folder of that name should hold."""
    folder = path.name.lower()
    matches = [name for name in PUBLISHED if folder.startswith(name.split("/")[1].lower())]
    return max(matches, key=len, default=None)


def shape_of(path: Path) -> DecoderShape | None:
    """From the folder's config.json; else of the published model of that name, or of that size.

    None where nothing is known. Raises ModelError for a config.json that is damaged.
    """
    file = path / "config.json"
    if file.exists():
        return _from_config(file)
    known = published_name(path)
    if known is not None:
        return PUBLISHED[known]
    size = _SIZE.search(path.name.lower())
    if size is None:
        return None
    return _of_size(float(size[1]) * {"b": 1e9, "m": 1e6}[size[2]])


def positions_of(path: Path) -> int | None:
    """How many tokens the model of a folder was made for; None where its config.json tells none."""
    file = path / "config.json"
    if not file.exists():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    positions = (config | config.get("text_config", {})).get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def _from_config(file: Path) -> DecoderShape:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config = config | config.get("text_config", {})
        heads = config["num_attention_heads"]
        return DecoderShape(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            is_tied=config.get("tie_word_embeddings", True),
            **_NORMS.get(config.get("model_type", ""), {}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} describes no decoder ({error!r}): download it again") from error


def _of_size(num_parameters: float) -> DecoderShape:
    """The published shape nearest in size, with as many layers as make up the rest."""
    nearest = min(
        PUBLISHED.values(),
        key=lambda shape: max(
            num_parameters / shape.num_parameters, shape.num_parameters / num_parameters
        ),
    )
    in_layers = num_parameters - nearest.num_embedding_parameters
    return replace(nearest, num_layers=max(round(in_layers / nearest.num_layer_parameters), 1))
