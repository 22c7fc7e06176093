"""Engines from a recipe: in this process, in a server that it starts, or in one elsewhere."""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
import sys
import tempfile
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from querl.config import SERVERS
from querl.errors import ConfigError
from querl.launch.local import (
    Policy,
    check_base,
    load_policy,
    load_speaker,
    make_env,
    make_judge,
    make_turn_judge,
    model_path,
    open_databases,
    sql_limits,
)
from querl.launch.needs import check_server, context, server_cache, server_share
from querl.rollout.engine import Sampling
from querl.rollout.episode import EpisodeLimits
from querl.rollout.hf import HfEngine
from querl.rollout.sampler import Player
from querl.sql.gold_cache import CachedGolds, GoldCache, default_cache_path
from querl.trainer.lora import adapter_rank, base_of, is_adapter
from querl.trainer.model import choose_device, choose_dtype

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from querl.config import Recipe
    from querl.launch.local import Speaker
    from querl.rollout.dialect import Dialect
    from querl.rollout.engine import Engine
    from querl.rollout.history import History
    from querl.rollout.http_engine import HttpEngine
    from querl.rollout.server import Server

HERE = ("localhost", "127.0.0.1", "::1")
SEVERAL_FRONTENDS = 4  # of vLLM
REQUESTS_OF_A_FRONTEND = 256  # at a time, with which a small model keeps it busy


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """Implements ``querl.rollout.dialect.Weights`` by a folder: an adapter to be evaluated."""

    folder: Path
    is_adapter: bool = True

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """None: its base is what the server was started with."""
        return iter(())

    def save_adapter(self, folder: Path) -> None:
        """Copy it."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


@asynccontextmanager
async def open_player(
    recipe: Recipe, speaker: Speaker, *, engine: Engine | None = None
) -> AsyncIterator[Player]:
    """Everything that plays and judges episodes; closes engine and workers at the end.

    ``engine`` is one that has been made already, with a learner beside it; without it there is
    none. An adapter's folder is put into a server.
    """
    if engine is None:
        engine = make_engine(_without_learner(recipe), speaker)
    async with player_of(recipe, engine, speaker.history, speaker.tokenizer) as player:
        path = model_path(recipe)
        if recipe.engine.kind in SERVERS and is_adapter(path):
            await engine.load_weights(StoredAdapter(path), version=0)
        yield player


@asynccontextmanager
async def player_of(
    recipe: Recipe, engine: Engine, history: History, tokenizer: PreTrainedTokenizerBase | None
) -> AsyncIterator[Player]:
    """The recipe's environment and judge round an engine, which is closed at the end."""
    async with open_databases(recipe) as databases:
        cache = GoldCache(default_cache_path())
        golds = CachedGolds(databases, cache, sql_limits(recipe))
        try:
            yield Player(
                make_env=make_env(recipe, databases, tokenizer),
                engine=engine,
                history=history,
                judge=make_judge(recipe, databases, golds=golds),
                turn_judge=make_turn_judge(recipe, databases),
                sampling=Sampling(
                    max_tokens=recipe.env.max_turn_tokens,
                    temperature=recipe.engine.temperature,
                    top_p=recipe.engine.top_p,
                ),
                limits=episode_limits(recipe),
                places=episode_places(recipe),
            )
        finally:
            await engine.close()
            cache.close()


def load_asked(recipe: Recipe) -> Speaker:
    """The recipe's model, as far as its engine needs it here: a server loads the weights itself."""
    return load_speaker(recipe) if recipe.engine.kind in SERVERS else load_policy(recipe)


def episode_limits(recipe: Recipe) -> EpisodeLimits:
    """The recipe's limits in tokens and seconds."""
    return EpisodeLimits(
        max_prompt=recipe.env.max_prompt,
        max_turn_tokens=recipe.env.max_turn_tokens,
        max_input=recipe.env.max_input,
        timeout_s=recipe.env.timeout_s,
    )


def episode_places(recipe: Recipe) -> AbstractAsyncContextManager[None]:
    """As many as a server takes requests, and a fourth more, which run their SQL meanwhile.

    An engine of static batches waits for all episodes, so none of them may wait for a place.
    """
    if recipe.engine.kind not in SERVERS:
        return nullcontext()
    return asyncio.Semaphore(recipe.engine.max_batch + recipe.engine.max_batch // 4)


def make_engine(recipe: Recipe, speaker: Speaker) -> Engine:
    """The recipe's engine for training or evaluation; a server begins when it is first needed.

    Raises ConfigError for a policy that the engine cannot sample from.
    """
    if recipe.engine.kind in SERVERS:
        return make_server_engine(recipe, speaker)[0]
    assert isinstance(speaker, Policy), "the hf engine samples from a model in this process"
    is_own = recipe.engine.placement == "separate"
    return HfEngine(
        copy.deepcopy(speaker.model) if is_own else speaker.model,
        speaker.tokenizer,
        max_batch=recipe.engine.max_batch,
        end_ids=frozenset({speaker.history.end_id}),
    )


@contextmanager
def starting_engine(recipe: Recipe) -> Iterator[Engine | None]:
    """A server of the recipe's that begins to start now, while model and data are loaded.

    One whose learner leaves the GPU to it starts when that has left: both would not fit. None where
    the engine is no server. It is ended with the context, if nobody has closed it. Raises
    ConfigError for a model that cannot be trained, before anything is loaded or started.
    """
    check_base(recipe)
    if recipe.engine.kind not in SERVERS:
        yield None
        return
    engine, server = make_server_engine(recipe, load_speaker(recipe))
    if recipe.learner.offload != "all":
        server.launch()
    try:
        yield engine
    finally:
        asyncio.run(server.close())


def make_server_engine(recipe: Recipe, speaker: Speaker) -> tuple[HttpEngine, Server]:
    """An engine whose server has not been launched. Raises ConfigError where it could not be."""
    check_server(recipe)
    from querl.rollout.http_engine import HttpEngine
    from querl.rollout.server import RemoteServer, ServerProcess

    engine = recipe.engine
    ends = {speaker.history.end_id, speaker.tokenizer.eos_token_id}
    dialect = make_dialect(recipe, end_ids=tuple(end for end in ends if isinstance(end, int)))
    server: Server
    if engine.url is not None:
        key = os.environ.get(f"{engine.kind.upper()}_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        server = RemoteServer(engine.url, start_timeout_s=engine.start_timeout_s, headers=headers)
    else:
        # no folder of ours in between: it would be another user's, and closed to us
        descriptor, log = tempfile.mkstemp(prefix=f"querl-{engine.kind}-", suffix=".log")
        os.close(descriptor)
        server = ServerProcess(
            dialect,
            python=engine.python or sys.executable,
            log=Path(log),
            start_timeout_s=engine.start_timeout_s,
        )
    return (
        HttpEngine(
            dialect,
            server,
            speaker.tokenizer,
            context=context(recipe),
            max_batch=engine.max_batch,
            heartbeat_s=engine.heartbeat_s,
        ),
        server,
    )


def make_dialect(recipe: Recipe, *, end_ids: tuple[int, ...]) -> Dialect:
    """How the recipe's server is spoken to. Raises ConfigError for a model that it cannot load.

    ``end_ids`` end a completion beside those that the model's folder names.
    """
    path = model_path(recipe)
    if path.suffix == ".gguf":
        raise ConfigError(
            f"engine.kind={recipe.engine.kind} takes a Hugging Face folder, and model.path="
            f"{str(path)!r} is a GGUF file: make one of it by querl export {path} --out FOLDER"
        )
    base = base_of(path) if is_adapter(path) else path
    engine, lora = recipe.engine, recipe.lora
    dtype = choose_dtype(choose_device(recipe.model.device), recipe.model.dtype)
    settings: dict[str, Any] = {
        "model": str(base),
        "dtype": str(dtype).removeprefix("torch."),
        "context": context(recipe),
        "memory_share": engine.memory_share,
        "max_batch": engine.max_batch,
        "tensor_parallel": engine.tensor_parallel,
        "rank": adapter_rank(path) if is_adapter(path) else lora.rank,
        "end_ids": end_ids,
        "seed": recipe.run.seed,
        "sleeps": engine.placement == "colocated",
        "options": engine.options,
    }
    if engine.kind == "sglang":
        from querl.rollout.sglang import Sglang, SglangSettings

        if engine.url is None and torch.cuda.is_available():
            settings["memory_share"] = server_share(recipe)
        return Sglang(SglangSettings(**settings, shares_memory=engine.url is None))
    from querl.rollout.vllm import Vllm, VllmSettings

    if engine.frontends > 1 and settings["rank"]:
        raise ConfigError(
            f"engine.frontends={engine.frontends} serve no adapter, and model.path={str(path)!r} "
            "is one: set engine.frontends=1"
        )
    settings |= {
        "is_elsewhere": engine.url is not None,
        "cache_bytes": _cache_bytes(recipe),
        "frontends": engine.frontends or _frontends(recipe, serves_adapter=settings["rank"] > 0),
    }
    if engine.url is not None and urlsplit(engine.url).hostname not in HERE:
        # the one folder that we know of which a cluster's machines usually all see
        settings["adapter_folder"] = Path.cwd()
    return Vllm(VllmSettings(**settings))


def _frontends(recipe: Recipe, *, serves_adapter: bool) -> int:
    """Several where there are requests for them and cores, beside the engine's and the judge's."""
    has_many_requests = recipe.engine.max_batch > REQUESTS_OF_A_FRONTEND
    has_cores = (os.cpu_count() or 1) >= 3 * SEVERAL_FRONTENDS
    return SEVERAL_FRONTENDS if has_many_requests and has_cores and not serves_adapter else 1


def _cache_bytes(recipe: Recipe) -> int | None:
    """The planned key-value cache; None where nothing is known of model or GPU.

    vLLM would measure what is free, while the learner is loading on the same GPU.
    """
    if recipe.engine.url is not None or not torch.cuda.is_available():
        return None
    return server_cache(recipe)


def _without_learner(recipe: Recipe) -> Recipe:
    """The recipe for an evaluation: nobody's state stays beside the engine."""
    learner = recipe.learner.model_copy(update={"offload": "all"})
    return recipe.model_copy(update={"learner": learner})
