"""Evaluate at a chat endpoint: the same episodes and judge, without a model or tokenizer here."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from querl.errors import ConfigError
from querl.launch.engines import player_of
from querl.launch.local import TINY
from querl.rollout.messages import MessageIds, message_history

if TYPE_CHECKING:
    from querl.config import Recipe
    from querl.rollout.sampler import Player

KEY_VARIABLE = "OPENAI_API_KEY"  # never in a recipe: recipes are written into folders of runs


def check_endpoint(recipe: Recipe) -> str:
    """The endpoint's URL. Raises ConfigError for a recipe that cannot be played at one."""
    url = recipe.engine.url
    if url is None:
        raise ConfigError(
            "engine.kind=openai needs an endpoint: set engine.url, such as http://127.0.0.1:8000/v1"
        )
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"engine.url holds a password: take it out, and set {KEY_VARIABLE}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"engine.url={url!r} is no http:// or https:// URL of an endpoint")
    if recipe.model.path == TINY:
        raise ConfigError(
            f"engine.kind=openai plays a model of the endpoint at {url}: set model.path to its name"
        )
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError("engine.kind=openai needs aiohttp: pip install 'querl[openai]'")
    return url


@asynccontextmanager
async def open_endpoint(recipe: Recipe, say: Callable[[str], None]) -> AsyncIterator[Player]:
    """Everything that plays and judges episodes at ``engine.url``; closes it all at the end.

    ``engine.max_batch`` episodes play at a time. An answer may take ``start_timeout_s``, since
    some endpoints load their model at the first question. ``say`` hears what the endpoint refuses.
    Raises ConfigError for a recipe that cannot be played at an endpoint.
    """
    url = check_endpoint(recipe)
    from querl.rollout.openai import OpenAiEngine

    ids = MessageIds()
    history = message_history(recipe.env.history, ids, keep_thoughts=recipe.env.keep_thoughts)
    engine = OpenAiEngine(
        url,
        recipe.model.path,
        ids,
        api_key=os.environ.get(KEY_VARIABLE),
        timeout_s=recipe.engine.start_timeout_s,
        say=say,
    )
    async with player_of(recipe, engine, history, None) as player:
        yield replace(player, places=asyncio.Semaphore(recipe.engine.max_batch))
