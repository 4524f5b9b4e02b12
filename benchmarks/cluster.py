"""A model of training on many GPUs: computation and communication per step, bytes sent, checkpoints and start-up.

Pure functions over small types; `scaling.py` prints their results and compares them with measurements. Sources:

- A collective costs latency + bytes / bandwidth (Thakur, Rabenseifner and Gropp, "Optimization of collective
  communication operations in MPICH", IJHPCA 19, 2005).
- Bytes are those of NCCL's rings (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md), latencies those of NCCL's own
  model (github.com/NVIDIA/nccl, v2.20, src/graph/tuning.cc).
- FSDP's communication schedule: Zhao et al. 2023, arXiv:2304.11277. ZeRO's: Rajbhandari et al. 2020, arXiv:1910.02054.

The model ignores stragglers and jitter, other jobs on the network, in-network reduction (SHARP), and host time beyond
what one GPU showed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distft.training.memory_estimate import Shape

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """Nodes of GPUs. Bandwidths are in bytes/s, per GPU and direction, as reached by a large collective."""

    nvlink: float
    """Within a node; measured on two GPUs."""
    network: float = 0.8 * 400e9 / 8
    """Between nodes: one 400 Gb/s adapter per GPU (NVIDIA DGX H200 data sheet), assumed to reach 80%."""
    memory_bandwidth: float = 4.8e12
    """bytes/s (NVIDIA H200 data sheet)."""
    gpus_per_node: int = 8
    node_storage: float = 2 * GB
    """bytes/s between one node and the shared file system; an assumption, measure yours."""
    storage: float = 20 * GB
    """bytes/s of the shared file system to all nodes together; an assumption, measure yours."""
    hashing: float = 1 * GB
    """bytes/s of SHA-256 on one core; an assumption (an old core reached 0.6 GB/s)."""

    def nodes(self, gpus: int) -> int:
        return math.ceil(gpus / self.gpus_per_node)


@dataclass(frozen=True)
class Group:
    """The ranks of a collective, spread evenly over nodes."""

    ranks: int
    nodes: int

    def bandwidth(self, hardware: Hardware) -> float:
        """Bandwidth of a ring, in bytes/s: with k GPUs per node, it leaves the node through k adapters."""
        if self.nodes == 1:
            return hardware.nvlink
        return min(hardware.nvlink, hardware.network * self.ranks / self.nodes)


# Protocol: seconds per hop within a node and between nodes, fraction of the bandwidth. NCCL chooses the fastest.
_RING = {"Simple": (3.4e-6, 14e-6, 1.0), "LL128": (1.9e-6, 4.0e-6, 0.92)}
_TREE = {"Simple": (28e-6, 28e-6, 0.92), "LL128": (1.25e-6, 8.5e-6, 0.86)}


def ring(size: float, group: Group, hardware: Hardware) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes in total: n - 1 hops, (n - 1) / n of the bytes."""
    between = group.nodes - 1
    within = group.ranks - 1 - between
    wire = size * (group.ranks - 1) / group.ranks / group.bandwidth(hardware)
    return min(within * near + between * far + wire / share for near, far, share in _RING.values())


def tree(size: float, group: Group, hardware: Hardware) -> float:
    """Seconds of an all-reduce of `size` bytes over a double binary tree of nodes, with a chain within each."""
    if group.ranks == 1:
        return 0.0
    within, between = group.ranks / group.nodes - 1, math.log2(group.nodes)
    wire = size / group.bandwidth(hardware)
    return min(2 * (within * near + between * far + wire / share) for near, far, share in _TREE.values())


def all_reduce(size: float, group: Group, hardware: Hardware) -> float:
    """Seconds of an all-reduce: the faster of a ring (reduce-scatter, then all-gather) and a tree."""
    return min(2 * ring(size, group, hardware), tree(size, group, hardware))


Sharded = Literal["nothing", "optimizer", "world", "node"]


@dataclass(frozen=True)
class Scheme:
    """A recipe and what it shards: DDP nothing; ZeRO-2 gradients and optimizer states over the world; FSDP2 and ZeRO-3
    the weights as well; HSDP all of these over the GPUs of a node, replicated across nodes."""

    name: str
    recipe: str
    sharded: Sharded
    reshard: bool = True
    """Whether weights are freed after the forward pass and gathered again for the backward pass."""

    def shards(self, gpus: int, hardware: Hardware) -> int:
        """Number of ranks that share one copy of the base model."""
        return {"nothing": 1, "optimizer": 1, "world": gpus, "node": min(gpus, hardware.gpus_per_node)}[self.sharded]


@dataclass(frozen=True)
class Traffic:
    """Communication of one GPU in a step: bytes sent, those of them that leave the node, and seconds."""

    sent: float = 0.0
    leaving: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.leaving + other.leaving, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.sent * times, self.leaving * times, self.seconds * times)


def _traffic(size: float, group: Group, seconds: float, passes: int) -> Traffic:
    sent = passes * size * (group.ranks - 1) / group.ranks
    return Traffic(sent, sent * group.nodes / group.ranks if group.nodes > 1 else 0.0, seconds)


_BUCKET = 25 * 2**20
"""Bytes per all-reduce of DDP (torch's bucket_cap_mb)."""


def traffic(scheme: Scheme, shape: Shape, trained: int, gpus: int, rounds: float, hardware: Hardware) -> Traffic:
    """Communication of a step with `rounds` micro-batches and `trained` trainable parameters.

    Gradients are fp32, gathered weights bf16. FSDP2 gathers layer by layer in every micro-batch, copies the gathered
    weights once, and averages gradients once per step.
    """
    if gpus == 1:
        return Traffic()
    world = Group(gpus, hardware.nodes(gpus))
    gradients = 4.0 * trained
    if scheme.sharded == "nothing":
        buckets = math.ceil(gradients / _BUCKET)
        return _traffic(gradients / buckets, world, all_reduce(gradients / buckets, world, hardware), 2) * buckets
    if scheme.sharded == "optimizer":
        one = _traffic(gradients, world, ring(gradients, world, hardware), 1)
        return one * (rounds + 1)  # DeepSpeed reduces in every micro-batch and gathers the updated weights
    shards = scheme.shards(gpus, hardware)
    group = world if shards == gpus else Group(shards, 1)
    units = shape.layers + 2  # plus the embeddings, and the last norm with the head
    weights = 2.0 * (shape.parameters + (0 if trained == shape.parameters else trained)) / units
    gathered = _traffic(weights, group, ring(weights, group, hardware) + 2 * weights / hardware.memory_bandwidth, 1)
    averaged = _traffic(gradients / units, group, ring(gradients / units, group, hardware), 1)
    if shards < gpus:
        copies, part = Group(gpus // shards, gpus // shards), gradients / units / shards
        averaged += _traffic(part, copies, all_reduce(part, copies, hardware), 2)
    return (gathered * (rounds * (2 if scheme.reshard else 1)) + averaged) * units


@dataclass(frozen=True)
class Compute:
    """Time of a pack on one GPU: a constant per pack, and a part per token."""

    pack_s: float
    token_s: float

    def of(self, shape: Shape, reference: Shape, *, full: bool = False) -> Compute:
        """The same GPU with another model: the constant scales with the layers, the rest with the parameters.

        Training all parameters (`full`) takes 6 FLOPs per parameter and token instead of 4.
        """
        return Compute(
            self.pack_s * shape.layers / reference.layers,
            self.token_s * products(shape) / products(reference) * (1.5 if full else 1.0),
        )


def products(shape: Shape) -> float:
    """Parameters used in matrix products: the linear layers and the head, which is as large as the embeddings."""
    linear = sum(i * o for _, i, o in shape.linears)
    return linear + (shape.parameters - linear) / 2


@dataclass(frozen=True)
class Load:
    """The work of a step: number of micro-batches, tokens of the fullest rank (summed over micro-batches), fraction of
    packs that are empty, and number of samples."""

    rounds: float
    heaviest: float
    spare: float
    samples: float


@dataclass(frozen=True)
class Step:
    """Time of a step and its parts, in seconds."""

    compute: float
    traffic: Traffic
    overlap: float = 0.0
    """Fraction of the communication hidden behind computation, if there is enough of it. Two GPUs showed 0."""

    @property
    def seconds(self) -> float:
        return self.compute + self.traffic.seconds - self.overlap * min(self.compute, self.traffic.seconds)


def step(
    scheme: Scheme,
    shape: Shape,
    trained: int,
    compute: Compute,
    load: Load,
    gpus: int,
    hardware: Hardware,
    overlap: float = 0.0,
) -> Step:
    busy = compute.pack_s * load.rounds + compute.token_s * load.heaviest
    return Step(busy, traffic(scheme, shape, trained, gpus, load.rounds, hardware), overlap)


# ---- around the steps ------------------------------------------------------------------------------------------------


def checkpoint_bytes(trained: int) -> float:
    """fp32 weights of the trained parameters and AdamW's two fp32 states."""
    return 12.0 * trained


def write_seconds(size: float, nodes: int, hardware: Hardware) -> float:
    """Seconds until `nodes` nodes have written `size` bytes together."""
    return size / min(hardware.storage, nodes * hardware.node_storage)


def read_seconds(size: float, nodes: int, hardware: Hardware) -> float:
    """Seconds until each of `nodes` nodes has read all `size` bytes from the shared file system."""
    return max(size / hardware.node_storage, nodes * size / hardware.storage)


def between_failures_s(gpus: int) -> float:
    """Mean time between unexpected interruptions of a job, in seconds.

    Llama 3 had 419 in 54 days on 16,384 H100 (Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.4); scaled with
    the number of GPUs.
    """
    return 54 * 86_400 * 16_384 / 419 / gpus


def save_interval_s(save_s: float, failures_s: float) -> float:
    """Seconds between saves that minimise the sum of saving and lost work (Young, CACM 17, 1974)."""
    return math.sqrt(2 * save_s * failures_s)


def steps_needed(batch: float, critical: float, small: float) -> float:
    """Steps to the same loss with `batch` samples per step, relative to `small` samples per step.

    The number is proportional to 1 + critical / batch (McCandlish et al. 2018, arXiv:1812.06162).
    """
    return (1 + critical / batch) / (1 + critical / small)


def store_connections(gpus: int) -> int:
    """File descriptors that rank 0, the host of the process group's TCPStore, needs for clients: one per rank.

    The launcher's rendezvous is a store of its own, with one client per node.
    """
    return gpus
