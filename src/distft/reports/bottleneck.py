"""What holds a run up, and what would help: from the profile of a few steps and the run's own figures. No torch.

bound(Split.of_profile(json.loads(folder.profile.read_text())), Facts(gpu="NVIDIA H200", mfu=0.55))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.hardware import peak_rates

NAMED = 0.1
"""A part of a step that takes at least this share of it is named beside the largest, with what would help against it."""
PARTS = {
    "compute": "compute_s", "exposed communication": "communication_s", "copies": "copy_s", "data wait": "data_wait_s",
    "host": "host_s",
}  # fmt: skip
"""The parts of a step, by their names in words; they add up to it."""


@dataclass(frozen=True)
class Split:
    """Seconds of one optimizer step on the rank that waits least for the others, for it is the one that they all wait for.

    `communication_s` and `copy_s` are what computation does not hide. Of the time in which the device was idle `data_wait_s` is at most what
    the process waited for batches, `host_s` the rest: Python and the launching of kernels. `products_s` is the part of `compute_s` in
    which matrix products ran (None: not recorded), `waiting_s` how much longer than this rank another one communicated.
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
        """Of a `profile.json`."""
        pace = min(profile["ranks"], key=lambda rank: rank["communication_exposed_s"])
        idle = float(pace["idle_s"])
        data = min(float(pace.get("data_wait_s") or 0.0), idle)
        longest = max(rank["communication_exposed_s"] for rank in profile["ranks"])
        return cls(
            float(pace["step_time_s"]), float(pace["compute_s"]), float(pace["communication_exposed_s"]),
            float(pace["copy_exposed_s"]), data, idle - data, pace.get("products_s"), longest - pace["communication_exposed_s"],
            profile.get("device", "cuda") == "cuda",
        )  # fmt: skip

    @classmethod
    def mean(cls, splits: Sequence[Split]) -> Split | None:
        """Of repeats; None of none."""
        if not splits:
            return None

        def mean(key: str) -> float:
            return sum(float(getattr(split, key)) for split in splits) / len(splits)

        products = None if any(split.products_s is None for split in splits) else mean("products_s")
        return cls(
            mean("step_time_s"), mean("compute_s"), mean("communication_s"), mean("copy_s"), mean("data_wait_s"), mean("host_s"),
            products, mean("waiting_s"), all(split.on_gpu for split in splits),
        )  # fmt: skip

    def seconds(self) -> dict[str, float]:
        """The parts by PARTS' names."""
        return {name: float(getattr(self, key)) for name, key in PARTS.items()}

    def shares(self) -> dict[str, float]:
        """The parts by PARTS' names, each as a share of their sum."""
        parts = self.seconds()
        total = sum(parts.values())
        return {name: part / total if total else 0.0 for name, part in parts.items()}


@dataclass(frozen=True)
class Facts:
    """What is known of a run besides its profile; None: not known. `gpu` is the driver's name of its devices (None: it ran on CPUs),
    `step_time_s` that of the steps without the profiler, `tokens` how many a device takes at once, on average."""

    gpu: str | None = None
    mfu: float | None = None
    hfu: float | None = None
    step_time_s: float | None = None
    tokens: float | None = None
    processes: int = 1


@dataclass(frozen=True)
class Bound:
    """`kind`: arithmetic, memory bandwidth, interconnect, host, data or copies; on a CPU compute, whose profile cannot tell the first
    two apart, and communication. Then why that is said, and what would help, the first line against `kind`."""

    kind: str
    evidence: str
    advice: tuple[str, ...]


_ADVICE = {
    "interconnect": "fewer exchanges for each sample: a larger micro-batch and so fewer rounds of accumulation, or a larger global batch, or, where "
    "the model fits on one device, one that is not sharded (ddp)",
    "communication": "fewer processes, or fewer exchanges for each sample: a larger micro-batch and so fewer rounds of accumulation",
    "copies": "batching.offload_checkpoints=false where memory allows, or fewer checkpointed layers",
    "data": "training.dataloader_num_workers=2 or more, so that batches are made beside the training",
    "host": "more work for each kernel that the host launches: batching.micro_batch_tokens=auto for larger packs, and the fused kernels "
    "(model.kernels other than plain)",
    "memory bandwidth": "more tokens for each time that weights are read: batching.micro_batch_tokens=auto, quantization.dequantize_at_load=true where "
    "memory allows, the fused kernels (model.kernels other than plain)",
    "arithmetic": "less arithmetic or more devices: packs in place of padding, and as few checkpointed layers as fit "
    "(batching.checkpoint_layers=auto)",
    "compute": "less work: packs in place of padding (batching.micro_batch_tokens), or a GPU",
}
_OF_PART = {"exposed communication": "interconnect", "copies": "copies", "data wait": "data", "host": "host"}


def bound(split: Split, facts: Facts) -> Bound:
    """What the run's steps are bound by: the part of them that takes longest; computation is told apart further on a GPU."""
    shares = split.shares()
    kind, told = _compute(split, facts, shares["compute"])
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
        evidence.append(f"without it a step took {facts.step_time_s * 1e3:,.0f} ms")
    evidence += told
    if split.waiting_s >= NAMED * split.step_time_s:
        evidence.append(
            f"another rank waited {split.waiting_s / split.step_time_s:.0%} of the step longer in its exchanges, for this one"
        )
    if not split.on_gpu and facts.processes > 1:
        evidence.append("the processes share one machine's cores and exchange through its memory")
    advice = [_ADVICE[kinds[part]] for part in ordered if part == ordered[0] or shares[part] >= NAMED]
    return Bound(kinds[ordered[0]], "; ".join(evidence), tuple(dict.fromkeys(advice)))


def _compute(split: Split, facts: Facts, share: float) -> tuple[str, list[str]]:
    """What bounds the computation, and why that is said. On a GPU: arithmetic where matrix products take most of it and a micro-batch
    gives them enough to do for each byte of weights, else memory bandwidth."""
    if not split.on_gpu:
        return "compute", ["whether arithmetic or memory bounds operators on a CPU their times do not say"]
    told = []
    kind = "arithmetic"
    if split.products_s is not None and split.compute_s > 0:
        products = split.products_s / split.compute_s
        told.append(f"matrix products run in {products:.0%} of the compute")
        if products < 0.5:
            kind = "memory bandwidth"
    known = peak_rates(facts.gpu) if facts.gpu else None
    if known is not None and facts.tokens is not None and facts.tokens < known.ridge_flops_per_byte:
        # A product with 16-bit weights does 2 FLOPs for each of its 2 bytes and each token.
        kind = "memory bandwidth"
        told.append(
            f"{facts.tokens:,.0f} tokens at once are {facts.tokens:,.0f} FLOPs for each byte of 16-bit weights, and the device can do "
            f"{known.ridge_flops_per_byte:,.0f} in the time that it reads one"
        )
    if facts.mfu is not None:
        hfu = facts.hfu if facts.hfu is not None else facts.mfu
        told.append(f"MFU {facts.mfu:.3f}" + (f", HFU {hfu:.3f} with recomputed layers" if hfu > facts.mfu else ""))
        if share > 0:
            told.append(f"while it computes the device reaches {hfu / share:.0%} of its rate")
    return kind, told


def whole_run(
    split: Split | None,
    steps: float | None,
    step_time_s: float | None,
    evaluation_time_s: float | None,
    saving_time_s: float | None,
) -> dict[str, float]:
    """Where the time of a run went, in seconds: its steps at their speed without the profiler, split as the profiled ones, and evaluation and
    saving. {} where the profile or a figure is missing."""
    if split is None or steps is None or step_time_s is None or evaluation_time_s is None or saving_time_s is None:
        return {}
    parts = {name: share * steps * step_time_s for name, share in split.shares().items()}
    return {**parts, "evaluation": evaluation_time_s, "saving": saving_time_s}
