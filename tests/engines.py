"""Engines over HTTP whose servers are small, real, and on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import tiny_tokenizer
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from querl.rollout.http_engine import HttpEngine
from querl.rollout.server import ServerProcess
from querl.rollout.sglang import Sglang, SglangSettings
from querl.rollout.vllm import Vllm, VllmSettings

CONTEXT = 256


class SmallVllm(Vllm):
    """vLLM's own flags and routes, for ``engine_server.py``."""

    def command(self, *, python: str, port: int) -> Sequence[str]:
        server = Path(__file__).with_name("engine_server.py")
        return [python, str(server), *super().command(python=python, port=port)[3:]]


class SmallSglang(Sglang):
    """SGLang's own flags and routes, for ``engine_server_sglang.py``."""

    def command(self, *, python: str, port: int) -> Sequence[str]:
        server = Path(__file__).with_name("engine_server_sglang.py")
        return [python, str(server), *super().command(python=python, port=port)[3:]]


def install(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM or SGLang were installed here: for the small servers, which need neither."""
    monkeypatch.setitem(sys.modules, kind, module_from_spec(ModuleSpec(kind, None)))


class Lasting(ServerProcess):
    """Survives the engines that use it, until ``end``."""

    async def close(self) -> None:
        pass

    async def end(self) -> None:
        await super().close()


def save_policy(model: PreTrainedModel, folder: Path) -> Path:
    """The model and the tokenizer of the tests as a Hugging Face folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def small_vllm(folder: Path, **options: Any) -> SmallVllm:
    """For the model in a folder; ``options`` are the small server's flags."""
    return SmallVllm(
        VllmSettings(model=str(folder), dtype="float32", context=CONTEXT, options=options)
    )


def small_sglang(folder: Path) -> SmallSglang:
    """For the model in a folder."""
    return SmallSglang(SglangSettings(model=str(folder), dtype="float32", context=CONTEXT))


def vllm_engine(
    folder: Path, *, start_timeout_s: float = 120.0, heartbeat_s: float = 60.0, **options: Any
) -> HttpEngine:
    """With a server of its own, which starts when it is first needed."""
    dialect = small_vllm(folder, **options)
    server = ServerProcess(
        dialect, python=sys.executable, log=folder / "engine.log", start_timeout_s=start_timeout_s
    )
    return HttpEngine(dialect, server, tiny_tokenizer(), context=CONTEXT, heartbeat_s=heartbeat_s)


def processes(folder: Path, *, of_server: bool = False) -> list[int]:
    """Ids of living processes that were started with this folder; of the server's own alone."""
    listed = subprocess.run(
        ["ps", "-wweo", "pid=,args="], capture_output=True, text=True, check=True
    )
    lines = [line for line in listed.stdout.splitlines() if f"{folder}" in line]
    return [int(line.split()[0]) for line in lines if not of_server or "keeper.py" not in line]


def small_decoder(seed: int, *, context: int) -> PreTrainedModel:
    """Of random weights that make no two tokens alike, over the tests' vocabulary."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()
