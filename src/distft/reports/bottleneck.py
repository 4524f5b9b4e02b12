"""What limits the speed of a run, and what would help: from the profile of a few steps and the run's figures. No torch.

bound(Split.of_profile(json.loads(folder.profile.read_text())), Facts(gpu="NVIDIA H200", mfu=0.55))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.hardware import peak_rates

NAMED = 0.1
"""Besides the largest part of a step, those that take at least this share of it get advice too."""
PARTS = {
    "compute": "compute_s",
    "exposed communication": "communication_s",
    "copies": "copy_s",
    "data wait": "data_wait_s",
    "host": "host_s",
}
"""The parts of a step, which add up to it: the name in a report and the field of Split."""


@dataclass(frozen=True)
class Split:
    """How one optimizer step spends its time, in seconds, on the rank that waits least for the others: it sets the
    pace.

    `communication_s` and `copy_s` are not hidden by computation. The time in which the device was idle is split into
    `data_wait_s`, at most what the process waited for batches, and `host_s`, the rest: Python and kernel launches.
    `products_s` is the part of `compute_s` spent in matrix products (None if not recorded), `waiting_s` how much longer
    the slowest rank spent in communication than this one.
    """

    step_time_s: float
    compute_s: float
    communication_s: float
    copy_s: float
    data_wait_s: float
    host_s: float
    products_s: float | None = None
    waiting_s: float = 0.0
    on_gpu: bool = True

    @classmethod
    def of_profile(cls, profile: Mapping[str, Any]) -> Split:
        """From a `profile.json`."""
        pace = min(profile["ranks"], key=lambda rank: rank["communication_exposed_s"])
        idle = float(pace["idle_s"])
        data = min(float(pace.get("data_wait_s") or 0.0), idle)
        longest = max(rank["communication_exposed_s"] for rank in profile["ranks"])
        return cls(
            step_time_s=float(pace["step_time_s"]),
            compute_s=float(pace["compute_s"]),
            communication_s=float(pace["communication_exposed_s"]),
            copy_s=float(pace["copy_exposed_s"]),
            data_wait_s=data,
            host_s=idle - data,
            products_s=pace.get("products_s"),
            waiting_s=longest - pace["communication_exposed_s"],
            on_gpu=profile.get("device", "cuda") == "cuda",
        )

    @classmethod
    def mean(cls, splits: Sequence[Split]) -> Split | None:
        """The mean of repeats; None if there are none."""
        if not splits:
            return None

        def mean(key: str) -> float:
            return sum(float(getattr(split, key)) for split in splits) / len(splits)

        products = None if any(split.products_s is None for split in splits) else mean("products_s")
        return cls(
            step_time_s=mean("step_time_s"),
            **{key: mean(key) for key in PARTS.values()},
            products_s=products,
            waiting_s=mean("waiting_s"),
            on_gpu=all(split.on_gpu for split in splits),
        )

    def seconds(self) -> dict[str, float]:
        """The parts by their names in PARTS."""
        return {name: float(getattr(self, key)) for name, key in PARTS.items()}

    def shares(self) -> dict[str, float]:
        """The parts by their names in PARTS, each as a share of their sum."""
        parts = self.seconds()
        total = sum(parts.values())
        return {name: part / total if total else 0.0 for name, part in parts.items()}


@dataclass(frozen=True)
class Facts:
    """What is known about a run besides its profile; None if unknown.

    `gpu` is the driver's name of its devices (None on CPUs), `step_time_s` the time of a step without the profiler, and
    `tokens` how many tokens a device processes at once, on average.
    """

    gpu: str | None = None
    mfu: float | None = None
    hfu: float | None = None
    step_time_s: float | None = None
    tokens: float | None = None
    processes: int = 1


@dataclass(frozen=True)
class Bound:
    """What limits the speed: arithmetic, memory bandwidth, interconnect, host, data or copies.

    On a CPU, it is compute (the profile cannot tell the first two apart) or communication. `evidence` says why,
    `advice` what would help, first against `kind`.
    """

    kind: str
    evidence: str
    advice: tuple[str, ...]


_ADVICE = {
    "interconnect": (
        "exchange less often per sample, with a larger micro-batch (fewer accumulation rounds) or a larger global "
        "batch, or do not shard a model that fits on one device (ddp)"
    ),
    "communication": (
        "fewer processes, or exchange less often per sample, with a larger micro-batch (fewer accumulation rounds)"
    ),
    "copies": "batching.offload_checkpoints=false if memory allows, or fewer checkpointed layers",
    "data": "training.dataloader_num_workers=2 or more, so that batches are prepared during training",
    "host": (
        "more work per kernel launch: batching.micro_batch_tokens=auto for larger packs, and the fused kernels "
        "(model.kernels other than plain)"
    ),
    "memory bandwidth": (
        "more tokens each time the weights are read: batching.micro_batch_tokens=auto, "
        "quantization.dequantize_at_load=true if memory allows, the fused kernels (model.kernels other than plain)"
    ),
    "arithmetic": (
        "less arithmetic or more devices: packs instead of padding, and as few checkpointed layers as fit "
        "(batching.checkpoint_layers=auto)"
    ),
    "compute": "less work: packs instead of padding (batching.micro_batch_tokens), or a GPU",
}
"""What would help against each kind of bound."""
_OF_PART = {"exposed communication": "interconnect", "copies": "copies", "data wait": "data", "host": "host"}


def bound(split: Split, facts: Facts) -> Bound:
    """What the steps of a run are bound by: their largest part. On a GPU, computation is broken down further."""
    shares = split.shares()
    kind, evidence_on_compute = _compute(split, facts, shares["compute"])
    kinds = {
        part: "communication" if name == "interconnect" and not split.on_gpu else name
        for part, name in _OF_PART.items()
    }
    kinds["compute"] = kind
    ordered = sorted(shares, key=lambda part: -shares[part])
    listed = ", ".join(f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005)
    where = facts.gpu or ("a GPU" if split.on_gpu else "a CPU")
    evidence = [f"{listed} of a step of {split.step_time_s * 1e3:,.0f} ms under the profiler, on {where}"]
    if facts.step_time_s:
        evidence.append(f"a step takes {facts.step_time_s * 1e3:,.0f} ms without it")
    evidence += evidence_on_compute
    if split.waiting_s >= NAMED * split.step_time_s:
        evidence.append(
            f"another rank waits for this one in its exchanges, {split.waiting_s / split.step_time_s:.0%} of the step"
        )
    if not split.on_gpu and facts.processes > 1:
        evidence.append("the processes share the cores of one machine and exchange through its memory")
    advice = [_ADVICE[kinds[part]] for part in ordered if part == ordered[0] or shares[part] >= NAMED]
    return Bound(kinds[ordered[0]], "; ".join(evidence), tuple(dict.fromkeys(advice)))


def _compute(split: Split, facts: Facts, share: float) -> tuple[str, list[str]]:
    """What bounds the computation, and why.

    On a GPU it is arithmetic if matrix products take most of the time and a micro-batch gives them enough work per byte
    of weights, otherwise memory bandwidth.
    """
    if not split.on_gpu:
        return "compute", ["times on a CPU do not tell arithmetic from memory bandwidth"]
    reasons = []
    kind = "arithmetic"
    if split.products_s is not None and split.compute_s > 0:
        products = split.products_s / split.compute_s
        reasons.append(f"matrix products take {products:.0%} of the compute time")
        if products < 0.5:
            kind = "memory bandwidth"
    known = peak_rates(facts.gpu) if facts.gpu else None
    if known is not None and facts.tokens is not None and facts.tokens < known.ridge_flops_per_byte:
        # A matrix product with 16-bit weights does 2 FLOPs for each token and each 2-byte weight.
        kind = "memory bandwidth"
        reasons.append(
            f"{facts.tokens:,.0f} tokens at once do {facts.tokens:,.0f} FLOPs per byte of 16-bit weights, and the "
            f"device can do {known.ridge_flops_per_byte:,.0f} in the time it takes to read one"
        )
    if facts.mfu is not None:
        hfu = facts.hfu if facts.hfu is not None else facts.mfu
        reasons.append(
            f"MFU {facts.mfu:.3f}" + (f", HFU {hfu:.3f} including recomputed layers" if hfu > facts.mfu else "")
        )
        if share > 0:
            reasons.append(f"while computing, the device reaches {hfu / share:.0%} of its peak rate")
    return kind, reasons


def whole_run(
    split: Split | None,
    steps: float | None,
    step_time_s: float | None,
    evaluation_time_s: float | None,
    saving_time_s: float | None,
) -> dict[str, float]:
    """How a whole run spends its time, in seconds; {} if the profile or a figure is missing.

    Its steps, at their speed without the profiler, are split like the profiled ones; evaluation and saving come on top.
    """
    if split is None or steps is None or step_time_s is None or evaluation_time_s is None or saving_time_s is None:
        return {}
    parts = {name: share * steps * step_time_s for name, share in split.shares().items()}
    return {**parts, "evaluation": evaluation_time_s, "saving": saving_time_s}
