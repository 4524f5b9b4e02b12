"""The plan of a run's steps, in the order that its recipe asks for."""

from __future__ import annotations

import hashlib
from typing import Any

from distft.config.recipe import Recipe
from distft.console import say
from distft.data.batch_plan import Lengths, Plan
from distft.data.curriculum import known_stages, order_line, stage_numbers
from distft.data.prepare import Splits
from distft.distributed.world import World
from distft.runs.record import Record
from distft.text import count
from distft.training.schedule import order_notes
from distft.training.scores import Scores, base_scores


def plan_in_order(recipe: Recipe, splits: Splits, lengths: Lengths, record: Record, world: World) -> Plan:
    """Plan the steps of a run, and record their order. Scores the samples first if the order needs it. All ranks
    enter."""
    data, facts = recipe.data, dict[str, Any]()
    if data.order == "loss":
        scores = base_scores(recipe, splits.train, record.folder, world)
        stages: Lengths | None = stage_numbers(scores.nats, data.stages)
        facts = {"scored": scores.scored, "cached": scores.cached}
        record.note(scoring_time_s=scores.seconds)
        if world.is_main:
            say(f"{order_line(data, scores.nats, 'nats per token')}; {_origin(scores)}")
    else:
        stages = known_stages(data, lengths, splits.difficulties)
    if stages is not None:
        digest = hashlib.sha256(stages.tobytes()).hexdigest()[:16]
        record.note(data_order={"by": data.order, "stages": data.stages, **facts}, data_order_digest=digest)
    plan = splits.plan(recipe.run.seed, recipe.batching, stages)
    for note in order_notes(recipe, plan.steps):
        record.changed(note)
    return plan


def _origin(scores: Scores) -> str:
    scored = f"{count(scores.scored, 'sample')} scored in {scores.seconds:,.1f} s" if scores.scored else ""
    cached = f"{scores.cached:,} known from the cache" if scores.cached else ""
    return ", ".join(filter(None, [scored, cached]))
