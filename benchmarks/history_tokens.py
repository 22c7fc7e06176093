"""Tokens that an update computes for one group of episodes, by history.

    python benchmarks/history_tokens.py MODEL [ROW]      # a folder with a tokenizer and template

The episodes are made up of words: each has its own, so that only what a template repeats is shared.
A row of ROW tokens (32,768) holds a group here.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from querl.algorithm.pack import pack
from querl.rollout.chat import ChatFormat
from querl.rollout.history import Conversation, History, Single, Stepwise, encode_exchange
from querl.trainer.model import load_tokenizer
from querl.types import Sample

NUM_EPISODES, NUM_TURNS = 8, 5
PROMPT_WORDS, THOUGHT_WORDS, SQL_WORDS, OBSERVATION_WORDS = 1470, 100, 80, 120
WORDS = ("table", "column", "name", "year", "city", "price", "order", "count", "player", "school")


def words(rng: random.Random, number: int) -> str:
    """So many words of the list."""
    return " ".join(rng.choices(WORDS, k=number))


def group(history: History) -> tuple[list[Sample], int]:
    """The samples of a group whose episodes begin alike, and the tokens of the longest prompt."""
    rng = random.Random(0)
    messages = [{"role": "user", "content": words(rng, PROMPT_WORDS)}]
    samples, longest = [], 0
    for _ in range(NUM_EPISODES):
        turns = [
            (
                f"<think>{words(rng, THOUGHT_WORDS)}</think>\n<sql>{words(rng, SQL_WORDS)}</sql>",
                f"<observation>\n{words(rng, OBSERVATION_WORDS)}\n</observation>",
                True,
            )
            for _ in range(NUM_TURNS)
        ]
        for ids, mask, num_prompt_tokens in encode_exchange(history, messages, turns):
            nothing = (0.0,) * len(ids)
            samples.append(
                Sample(
                    group_id=0,
                    num_prompt_tokens=num_prompt_tokens,
                    token_ids=ids,
                    loss_mask=mask,
                    sampled_logprobs=nothing,
                    advantages=nothing,
                    versions=(0,) * len(ids),
                )
            )
            longest = max(longest, len(mask) - mask[::-1].index(False))
    return samples, longest


def main(model: Path, row: int) -> None:
    """Print a line a history."""
    chat = ChatFormat(load_tokenizer(model))
    histories = {
        "conversation": Conversation(chat),
        "single": Single(chat),
        "stepwise, without thoughts": Stepwise(chat, keep_thoughts=False),
    }
    print("| history | samples | tokens through the model in an update | unshared | last prompt |")
    print("|---|---|---|---|---|")
    for name, history in histories.items():
        samples, longest = group(history)
        shared = sum(packed.num_tokens for packed in pack(samples, row))
        unshared = sum(len(sample.token_ids) for sample in samples)
        print(f"| {name} | {len(samples)} | {shared:,} | {unshared:,} | {longest:,} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 32768)
