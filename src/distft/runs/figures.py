"""Every key of `summary.json` and every figure of a report, defined once: label, unit, format, and how it may be
compared.

`runs.folder` writes the keys in this order, `reports` takes its columns from here. To add a figure, add it to FIGURES
and have the training or an evaluation task measure it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One key of `summary.json`, or a figure that a report derives."""

    key: str
    label: str = ""
    """What a table calls it; empty if no table shows it."""
    unit: str = ""
    format: str = ""
    """A format specification, such as `,.2f`."""
    in_summary: bool = True
    """Whether it is a key of `summary.json`; if not, `path`, `task`, `logged` or `until_loss` says where it is from."""
    path: tuple[str, str] | None = None
    """The keys that lead to it in `summary.json`."""
    task: tuple[str, str] | None = None
    """The evaluation task and the name of the figure in its result."""
    logged: str = ""
    """The key of `metrics.jsonl` whose last value a report uses while the summary has none."""
    until_loss: bool = False
    """Whether it counts up to the evaluation that first reached the `target_loss` of an experiment."""
    fact: bool = False
    """Whether it says how the run was executed; reports list it if runs differ in it."""
    timing: bool = False
    """Whether it is a part of the run's time; reports show these in a separate table."""
    compared: bool = False
    """Whether reports compare variants by it."""
    speed: bool = False
    """Whether it depends on how fast the run was: not compared where the runs did different work."""
    quality: bool = False
    """Whether it says how well a task is solved: its interval is over the task's items or the held-out pairs, not over
    repeats."""
    per_token: bool = False
    """Whether it counts per token, and so cannot be compared across tokenizers."""
    higher_is_better: bool | None = None

    @property
    def title(self) -> str:
        """The label with the unit, as in the head of a table."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


def _key(key: str, *, fact: bool = False) -> Figure:
    return Figure(key=key, fact=fact)


def _loss(key: str, label: str, form: str, *, path: tuple[str, str] | None = None, compared: bool = True) -> Figure:
    return Figure(
        key=key,
        label=label,
        format=form,
        in_summary=path is None,
        path=path,
        compared=compared,
        per_token=True,
        higher_is_better=False,
    )


def _count(key: str, label: str, *, logged: str = "", fact: bool = False) -> Figure:
    return Figure(key=key, label=label, format=",.0f", logged=logged, fact=fact)


def _speed(key: str, label: str, form: str, unit: str = "", *, per_token: bool = False, lower: bool = False) -> Figure:
    return Figure(
        key=key,
        label=label,
        unit=unit,
        format=form,
        compared=True,
        speed=True,
        per_token=per_token,
        higher_is_better=not lower,
    )


def _score(key: str, label: str, task: str, name: str, form: str = ",.3f", unit: str = "") -> Figure:
    return Figure(
        key=key,
        label=label,
        unit=unit,
        format=form,
        in_summary=False,
        task=(task, name),
        compared=True,
        quality=True,
        higher_is_better=True,
    )


def _time(key: str, label: str, form: str) -> Figure:
    return Figure(key=key, label=label, unit="s", format=form, timing=True, higher_is_better=False)


FIGURES = (
    _key("status"),
    _key("cause"),
    _key("recipe"),
    _key("strategy", fact=True),
    _key("requested_strategy"),
    _key("world_size", fact=True),
    _key("global_batch_size", fact=True),
    _key("global_batch_tokens", fact=True),
    _key("micro_batch", fact=True),
    _key("micro_batch_tokens", fact=True),
    _key("checkpointed_layers", fact=True),
    _key("gradient_accumulation_steps", fact=True),
    _count("steps", "steps", logged="step", fact=True),
    _key("skipped_steps", fact=True),
    _key("best"),
    _key("stopped_early"),
    _count("samples", "samples", logged="samples", fact=True),
    _count("tokens", "tokens", logged="tokens", fact=True),
    _key("data_digest"),
    _key("held_out_digest"),
    _key("held_out_overlap"),
    _key("data_sources"),
    _key("data_inferred"),
    _key("trained_tokens_by_role"),
    _key("data_order"),
    _key("data_order_digest", fact=True),
    _key("weights_digest"),
    _key("start_digest"),
    _key("trainable_parameters", fact=True),
    _key("parameters", fact=True),
    _key("quantized_share", fact=True),
    _key("attn_implementation", fact=True),
    _key("share_prompts", fact=True),
    _key("fused_linears", fact=True),
    _key("adapted_linears"),
    _key("fused_expert_layers"),
    _key("expert_layers"),
    _key("isolation_errors"),
    _key("isolation_check_s"),
    _loss("train_loss", "mean train loss", ",.4f"),
    dataclasses.replace(_loss("final_loss", "last train loss", ",.4f"), in_summary=False, logged="loss"),
    _key("eval_before"),
    _key("eval_after"),
    _loss("eval_loss_before", "eval loss before", ",.4f", path=("eval_before", "loss"), compared=False),
    _loss("eval_loss_after", "eval loss after", ",.4f", path=("eval_after", "loss")),
    _loss("perplexity_before", "perplexity before", ",.2f", path=("eval_before", "perplexity"), compared=False),
    _loss("perplexity_after", "perplexity after", ",.2f", path=("eval_after", "perplexity")),
    Figure(
        key="reward_accuracy",
        label="held-out reward accuracy",
        format=",.3f",
        in_summary=False,
        path=("eval_after", "rewards/accuracies"),
        compared=True,
        quality=True,
        higher_is_better=True,
    ),
    _score("imdb_accuracy", "IMDB accuracy", "imdb", "accuracy"),
    _score("imdb_f1", "IMDB F1", "imdb", "f1"),
    _score("mt_bench_score", "MT-Bench score", "mt_bench", "score", ",.2f", "of 10"),
    _score("alpaca_win_rate", "AlpacaEval win rate by grades", "alpaca", "win_rate"),
    _score("alpaca_preferred_rate", "AlpacaEval win rate by preference", "alpaca", "preferred_rate"),
    Figure(
        key="steps_to_loss",
        label="steps to loss",
        format=",.0f",
        in_summary=False,
        until_loss=True,
        compared=True,
        per_token=True,
        higher_is_better=False,
    ),
    dataclasses.replace(
        _speed("time_to_loss_s", "time to loss", ",.1f", "s", per_token=True, lower=True),
        in_summary=False,
        until_loss=True,
    ),
    _speed("train_time_s", "train time", ",.1f", "s", lower=True),
    _speed("samples_per_second", "samples/s", ",.2f"),
    _speed("tokens_per_second", "tokens/s", ",.0f", per_token=True),
    _key("tokens_per_second_per_gpu"),
    _speed("mfu", "MFU", ",.3f"),
    _speed("hfu", "HFU", ",.3f"),
    _count("measured_steps", "measured steps"),
    _time("step_time_s", "step time", ",.3f"),
    _time("data_wait_s", "data wait", ",.2f"),
    _time("evaluation_time_s", "evaluation", ",.1f"),
    _time("saving_time_s", "saving", ",.1f"),
    _time("scoring_time_s", "scoring for the order", ",.1f"),
    _time("reference_time_s", "reference before step 1", ",.1f"),
    Figure(
        key="peak_memory_gib",
        label="peak memory",
        unit="GiB",
        format=",.2f",
        compared=True,
        higher_is_better=False,
    ),
    _key("peak_reserved_gib"),
    Figure(key="host_rss_gib", label="host memory", unit="GiB", format=",.2f", higher_is_better=False),
    _speed("energy_j", "energy", ",.0f", "J", lower=True),
    _speed("joules_per_sample", "energy per sample", ",.2f", "J", lower=True),
    Figure(key="joules_per_step", label="energy per step", unit="J", format=",.1f", higher_is_better=False),
    _key("idle_watts"),
    Figure(key="energy_idle_share", label="idle share of energy", format=".0%", higher_is_better=False),
    _count("restarts", "restarts"),
    _key("requeues"),
    _key("adapter"),
    _key("changed_for_you"),
    _key("evaluation"),
)
"""In the order of `summary.json` and of the columns of a report."""

SUMMARY_KEYS = tuple(figure.key for figure in FIGURES if figure.in_summary)
"""Every key of `summary.json`, in order; null where unknown."""
