"""Evaluate at a chat endpoint: the same episodes and judge, without a model or tokenizer here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from querl.launch.engines import player_of
from querl.launch.needs import KEY_VARIABLE, check_endpoint
from querl.rollout.messages import MessageIds, message_history

if TYPE_CHECKING:
    from querl.config import Recipe
    from querl.rollout.sampler import Player


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
