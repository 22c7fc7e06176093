"""The laws of engines with a model: Hugging Face's in this process, vLLM over HTTP, on the CPU.

The server is small, and what querl sends to it is what vLLM would get. ``tests/gpu`` holds the real
one to the same laws.
"""

from __future__ import annotations

import asyncio
import copy
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from engine_laws import LAWS, Subject
from engines import CONTEXT, Lasting, save_policy, small_vllm
from tiny_policy import tiny_tokenizer
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from querl.rollout.engine import Engine
from querl.rollout.hf import HfEngine
from querl.rollout.http_engine import HttpEngine
from querl.trainer.weights import PublishedWeights

TOKENIZER = tiny_tokenizer()


def decoder(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Engine]]:
    """Engines over one server, which lasts as long as the tests of this file."""
    folder = save_policy(decoder(0), tmp_path_factory.mktemp("model"))
    # long enough a token that weights come in the middle of a completion
    dialect = small_vllm(folder, seconds_a_token=0.003)
    server = Lasting(dialect, python=sys.executable, log=folder / "engine.log")
    yield lambda: HttpEngine(dialect, server, TOKENIZER, context=CONTEXT)
    asyncio.run(server.end())


def hf_engine() -> Engine:
    return HfEngine(copy.deepcopy(decoder(0)), TOKENIZER)


@pytest.fixture(params=["hf", "vllm"])
def subject(request: pytest.FixtureRequest) -> Subject:
    kind = request.param
    return Subject(
        open=hf_engine if kind == "hf" else request.getfixturevalue("vllm_server"),
        publish=PublishedWeights,
        model=decoder(0),
        other=decoder(1),
        tokenizer=TOKENIZER,
        context=CONTEXT,
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_engines_obey(law: Callable[[Subject], None], subject: Subject) -> None:
    law(subject)
