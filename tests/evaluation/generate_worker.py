"""python generate_worker.py CACHE RESULT: write answers, alone or as one of several processes.

Every rank writes to RESULT.<rank> what the answers are and how many of them it had to write itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.distributed.world import World
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.generate import Answer, Item, Sampling, generate
from distft.models.tiny import tiny_model

SUBJECTS = (
    "rivers",
    "bread",
    "the moon",
    "old bridges and who built them",
    "bees",
    "a long walk through the hills in autumn",
)
ITEMS = [
    Item(({"role": "user", "content": f"Tell me {how} about {what}."},), Sampling(40))
    for how in ("something", "a story", "in a few words what you know")
    for what in SUBJECTS
]


class Counting(TransformersEngine):
    """Counts the items that it is asked to write."""

    asked = 0

    def write(self, items: Sequence[Item]) -> Iterable[tuple[int, Answer]]:  # type: ignore[override]
        self.asked += len(items)
        return super().write(items)


def main(cache: Path, result: Path) -> None:
    world = World.from_environment(os.environ)
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    engine = Counting(model, tokenizer, {"weights": "tiny"}, batch_tokens=200, template="instruction")
    answers = generate(engine, ITEMS, world, cache, "writing")
    record = {"asked": engine.asked, "answers": [asdict(answer) for answer in answers]}
    result.with_suffix(f".{world.rank}").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
