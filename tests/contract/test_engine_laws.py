"""The laws of engines with a model: Hugging Face's in this process, the others over HTTP.

Their servers are small, on the CPU, and get what vLLM and SGLang would get. ``tests/gpu`` holds the
real ones to the same laws.
"""

from __future__ import annotations

import asyncio
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_laws import LAWS, Subject
from engines import CONTEXT, Lasting, save_policy, small_decoder, small_sglang, small_vllm
from tiny_policy import tiny_tokenizer
from transformers import PreTrainedModel

from querl.rollout.dialect import Dialect
from querl.rollout.engine import Engine
from querl.rollout.hf import HfEngine
from querl.rollout.http_engine import HttpEngine
from querl.trainer.weights import PublishedWeights

TOKENIZER = tiny_tokenizer()


def decoder(seed: int) -> PreTrainedModel:
    return small_decoder(seed, context=CONTEXT)


@contextmanager
def served(dialect: Dialect, log: Path) -> Iterator[Callable[[], Engine]]:
    """Engines over one server, which lasts as long as the tests of this file."""
    server = Lasting(dialect, python=sys.executable, log=log)
    yield lambda: HttpEngine(dialect, server, TOKENIZER, context=CONTEXT)
    asyncio.run(server.end())


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Engine]]:
    folder = save_policy(decoder(0), tmp_path_factory.mktemp("model"))
    # long enough a token that weights come in the middle of a completion
    with served(small_vllm(folder, seconds_a_token=0.003), folder / "engine.log") as engines:
        yield engines


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Engine]]:
    folder = save_policy(decoder(0), tmp_path_factory.mktemp("model"))
    with served(small_sglang(folder), folder / "engine.log") as engines:
        yield engines


@pytest.fixture
def hf() -> Callable[[], Engine]:
    return lambda: HfEngine(copy.deepcopy(decoder(0)), TOKENIZER)


@pytest.fixture(params=["hf", "vllm", "sglang"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(
        open=request.getfixturevalue(request.param),
        publish=PublishedWeights,
        model=decoder(0),
        other=decoder(1),
        tokenizer=TOKENIZER,
        context=CONTEXT,
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_engines_obey(law: Callable[[Subject], None], subject: Subject) -> None:
    law(subject)
