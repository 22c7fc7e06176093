"""Models and tokenizers: from a plain Hugging Face folder or a GGUF file, and back to a folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from querl.errors import ModelError
from querl.trainer.checkpoint import atomic_folder
from querl.trainer.lora import attach_adapter, base_of, is_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama- or Qwen2-shaped decoder with grouped-query attention; input and output are tied."""

    family: Literal["llama", "qwen2"] = "qwen2"
    hidden_size: int = 160
    intermediate_size: int = 480
    num_layers: int = 4
    num_heads: int = 5
    num_kv_heads: int = 1
    max_positions: int = 2048


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is any. Raises ModelError if absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device=cuda, but this torch sees no CUDA device: use device=auto or cpu")
    has_cuda = torch.cuda.is_available()
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def choose_dtype(
    device: torch.device, name: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
) -> torch.dtype:
    """The dtype of that name; ``auto`` is float32 on the CPU.

    On a GPU it is bfloat16 from compute capability 8.0 on, and float16 below, as on a T4 (7.5),
    which has no bfloat16.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bf16 else torch.float16


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantise: Literal["none", "nf4"] = "none",
) -> PreTrainedModel:
    """The causal language model of a folder or ``.gguf`` file, in eval mode on the device.

    ``dtype`` is ``choose_dtype`` by default. ``nf4`` stores the matrices of the layers in 4 bits,
    with scales that are quantised again (arXiv 2305.14314), and computes in ``dtype``. A folder
    with an adapter gives its base model with the adapter in it. Raises ModelError, with the path
    and the remedy, when anything is missing: weights are never left at random values in silence.
    """
    from transformers import AutoModelForCausalLM

    dtype = dtype or choose_dtype(device)
    if is_adapter(path):
        base = load_model(base_of(path), device=device, dtype=dtype, quantise=quantise)
        attach_adapter(base, path)
        return base
    if path.suffix != ".gguf":
        _check_folder(path)
        _check_weights(path)
    _silence_libraries()
    auto: Any = AutoModelForCausalLM
    try:
        model, report = auto.from_pretrained(
            **_where(path),
            **_four_bits(dtype, device) if quantise == "nf4" else {},
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} is no model that transformers can load: {error}") from error
    except ImportError as error:
        extra = "qlora" if quantise == "nf4" else "gguf"
        raise ModelError(f"{path}: pip install 'querl[{extra}]' ({error})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{path} lacks {len(missing)} weights, the first is {missing[0]}")
    policy: PreTrainedModel = model.to(device).eval()
    _check_head(policy, path)
    if path.suffix == ".gguf":  # its numbers are plain by now; marked as quantised, none is saved
        model.hf_quantizer = None
        del model.config.quantization_config
    return policy


def _four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers loads a model in NF4 by, matrix by matrix on the device itself."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or ``.gguf`` file. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    if path.suffix != ".gguf":
        if not is_adapter(path):
            _check_folder(path)
        if not any((path / name).exists() for name in _TOKENIZER_FILES):
            raise ModelError(
                f"{path} has no tokenizer (tokenizer.json): copy the tokenizer files of its base "
                "model into the folder"
            )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            **_where(path), local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the tokenizer of {path} cannot be read: {error}") from error
    except ImportError as error:
        raise ModelError(f"{path} needs a package: pip install 'querl[gguf]' ({error})") from error
    return tokenizer


def new_model(
    shape: ModelShape, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PreTrainedModel:
    """A decoder of that shape with random weights, float32 on the CPU; a function of the seed."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    auto: Any = AutoModelForCausalLM
    family = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.family]
    config = family(
        # a multiple of 64 keeps the head's matrix products fast on a GPU
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    return model


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain Hugging Face folder that others can load, whole or not at all.

    Raises CheckpointError when it cannot be written.
    """
    with atomic_folder(folder) as unfinished:
        write_model(model, tokenizer, unfinished)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same without its atomicity, for a folder that is part of another. Raises OSError."""
    _silence_libraries()
    model.save_pretrained(folder)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # tokenizers, written in Rust, has no class for a full disk: it raises a bare Exception
        raise OSError(str(error)) from error


def _silence_libraries() -> None:
    """transformers draws bars on standard error for what takes a moment.

    bitsandbytes, which PEFT imports where it is installed, misses kernels for the CPU that we never
    ask for.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _where(path: Path) -> dict[str, Any]:
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": str(path)}


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"no model folder {path}: name a Hugging Face folder or a .gguf file")
    if not (path / "config.json").exists():
        raise ModelError(f"{path} has no config.json: it is no Hugging Face model folder")


def _check_weights(path: Path) -> None:
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no *.safetensors: download them, or convert its weights "
            "(pickled .bin files are not read)"
        )


def _check_head(model: PreTrainedModel, path: Path) -> None:
    """Refuse a model whose logits are more than hidden states times one matrix."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise ModelError(f"{path} has no language-model head")
    token_ids = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        output = model(input_ids=token_ids, output_hidden_states=True, use_cache=False)
        ours = output.hidden_states[-1] @ head.weight.T
    if not output.logits.isfinite().all():
        raise ModelError(f"{path}: {_no_numbers(model.dtype)}")
    if not torch.allclose(output.logits, ours, rtol=1e-2, atol=1e-2):
        raise ModelError(f"{path} scales, caps or shifts its logits: such models are not supported")


def _no_numbers(dtype: torch.dtype) -> str:
    """Why a model's logits are infinite or nan, and what helps."""
    if dtype == torch.float16:
        return (
            "its activations leave float16, which ends at 65,504: use a GPU that has bfloat16, or "
            "model.dtype='fp32'"
        )
    return "its logits are not numbers: its weights are damaged, copy them anew"
