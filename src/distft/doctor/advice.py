"""What follows from the facts about a machine: what prevents training, what slows it down, and what to do about it.

`advice` is a pure function of the facts, so its findings can be tested for machines we do not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from distft.doctor.facts import NEEDED, Disk, Facts, Gpu, Pair
from distft.text import count, shorten

Level = Literal["error", "warning", "note"]

_LLAMA_7B_GB = 13.5
"""Parameters of Llama-2-7B in bf16."""
_LEAST_FREE_GIB = 20
_LEAST_GIB_PER_PROCESS = 2
_SLOW_GB_PER_S = 15
_UNSHARDED = "prefer ddp_qlora or zero2_bf16, or a larger micro-batch"


@dataclass(frozen=True)
class Finding:
    """`error`: training cannot run. `warning`: it can, but part of it fails or is slow. `note`: good to know."""

    level: Level
    what: str
    remedy: str = ""


def advice(facts: Facts) -> list[Finding]:
    """The findings: errors first, and causes before their consequences."""
    parts = (_packages, _gpus, _storage, _memory, _host, _variables, _collectives, _links, _quantisation, _services)
    order: Sequence[Level] = ("error", "warning", "note")
    return sorted((found for part in parts for found in part(facts)), key=lambda found: order.index(found.level))


def first_error(findings: Sequence[Finding]) -> Finding | None:
    """The first thing to fix; None if training can run."""
    return next((finding for finding in findings if finding.level == "error"), None)


# ---- packages --------------------------------------------------------------------------------------------------------

_REMEDIES = {
    "deepspeed": "reinstall it, or use DDP or FSDP2 (ddp_qlora, fsdp_bf16) instead of zero2_bf16 and zero3_bf16",
    "wandb": "reinstall it, or train with tracking.report_to=[]",
    "triton": "install the version that torch needs: pip install --force-reinstall torch",
    "liger-kernel": "reinstall or uninstall it",
    "flash-attn": "rebuild it for this torch, or uninstall it",
}


def _packages(facts: Facts) -> Iterator[Finding]:
    for name, why in facts.broken.items():
        if name in NEEDED:
            yield Finding("error", f"{name} cannot be imported ({why})", f"reinstall it: {_install(facts, name)}")
    yield from _versions(facts)
    for name, remedy in _REMEDIES.items():
        if name in facts.broken:
            yield Finding("warning", f"{name} is installed but cannot be imported ({facts.broken[name]})", remedy)
    if facts.compiler is None:
        what = "there is no C++ compiler, which DeepSpeed's strategies need on a CPU"
        yield Finding("note", what, "install g++, or set CXX")


def _versions(facts: Facts) -> Iterator[Finding]:
    for name, specifier in facts.requirements.items():
        if name not in facts.packages:
            continue
        from packaging.specifiers import SpecifierSet

        wanted, version = SpecifierSet(specifier, prereleases=True), facts.packages[name]
        if version in wanted:
            continue
        minimums = [one for one in wanted if one.operator == ">="]
        old = not all(version in SpecifierSet(str(one), prereleases=True) for one in minimums)
        problem = "is too old" if old else "is newer than the versions that distft was tested with"
        remedy = f"install another version: {_install(facts, name)}"
        yield Finding("error" if old else "warning", f"{name} {version} {problem} ({specifier})", remedy)


def _install(facts: Facts, name: str) -> str:
    return f"pip install --force-reinstall '{name}{facts.requirements.get(name, '')}'"


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def _gpus(facts: Facts) -> Iterator[Finding]:
    if facts.driver_error is not None:
        remedy = "after a driver upgrade, reboot; in a container, mount the host's driver libraries"
        yield Finding("error", f"the NVIDIA driver does not respond ({facts.driver_error})", remedy)
    if "torch" in facts.packages and not facts.gpus:
        yield from _no_gpu(facts)
    unsupported = [gpu for gpu in facts.gpus if not gpu.supported]
    if unsupported:
        what = f"this build of torch ({facts.packages['torch']}) does not support {_named(unsupported)}"
        remedy = "install a build of torch that does, or exclude the GPU with CUDA_VISIBLE_DEVICES"
        yield Finding("error", what, remedy)
    yield from _gpu_differences(facts)
    old = [gpu for gpu in facts.gpus if gpu.capability < (8, 0)]
    if old:
        what = f"bf16 is slow on {_named(old)}, whose compute capability is below 8.0"
        yield Finding("warning", what, "train in fp16: model.dtype=float16 training.bf16=false training.fp16=true")
    if 0 < facts.cpus < len(facts.gpus):
        what = f"{count(facts.cpus, 'CPU')} for {len(facts.gpus)} GPUs: every process needs at least one"
        yield Finding("warning", what, "request more from the scheduler or for the container")


def _gpu_differences(facts: Facts) -> Iterator[Finding]:
    kinds = sorted({(gpu.name, round(gpu.memory_gib)) for gpu in facts.gpus})
    if len(kinds) > 1:
        listed = ", ".join(f"{name} with {size} GiB" for name, size in kinds)
        what = f"the GPUs differ ({listed}): every step waits for the slowest, and the smallest limits the micro-batch"
        yield Finding("warning", what, "select equal ones with CUDA_VISIBLE_DEVICES")
    taken = [gpu for gpu in facts.gpus if gpu.free_gib is not None and gpu.free_gib < 0.9 * gpu.memory_gib]
    if taken:
        free = (f"GPU {gpu.index} has {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free" for gpu in taken)
        remedy = "stop them, or select other GPUs with CUDA_VISIBLE_DEVICES"
        yield Finding("warning", f"other processes use GPU memory: {', '.join(free)}", remedy)


def _no_gpu(facts: Facts) -> Iterator[Finding]:
    """Why torch sees no GPU."""
    if facts.driver_gpus == 0:
        if facts.driver_error is None:
            what = "there is no GPU; tiny models train on the CPU"
            yield Finding("note", what, "try it: distft train recipe=tiny --nproc 2")
        return
    seen = f"the driver sees {count(facts.driver_gpus, 'GPU')}, but torch sees none"
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES")
    if facts.cuda is None:
        remedy = f"install a CUDA build: {_install(facts, 'torch')}, without a CPU index in pip's configuration"
        yield Finding("error", f"{seen}: torch {facts.packages['torch']} is a build without CUDA", remedy)
    elif hidden is not None:
        what = f"{seen}: CUDA_VISIBLE_DEVICES is {hidden!r}, so training runs on the CPU"
        yield Finding("warning", what, "unset it, or list existing GPUs: 0,1")
    elif facts.driver_cuda is not None and _major(facts.driver_cuda) < _major(facts.cuda):
        supported = (
            f"driver {facts.driver} supports CUDA up to {facts.driver_cuda}, and torch is built for {facts.cuda}"
        )
        remedy = f"install a newer driver, or a torch built for CUDA {_major(facts.driver_cuda)}"
        yield Finding("error", f"{seen}: {supported}", remedy)
    else:
        remedy = (
            "check that this user can access /dev/nvidia* (in a container: --gpus all) and that nvidia-smi works, "
            "which shows that the driver does"
        )
        yield Finding("error", f"{seen}: {facts.cuda_error or 'CUDA does not start'}", remedy)


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _named(gpus: Sequence[Gpu]) -> str:
    return " and ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in gpus)


# ---- disks and memory ------------------------------------------------------------------------------------------------


def _storage(facts: Facts) -> Iterator[Finding]:
    reported = set()  # one disk may hold several of the folders
    for disk in facts.disks:
        working = disk.use == "working folder"
        if not disk.writable:
            cache = "set another: HF_HOME for the hub's cache, DISTFT_CACHE for distft's"
            remedy = "work in another folder" if working else cache
            level: Level = "error" if working else "warning"
            yield Finding(level, f"the {disk.use} {disk.path} is not writable", remedy)
        elif disk.free_gib < _LEAST_FREE_GIB and free_text(disk) not in reported:
            reported.add(free_text(disk))
            yield _little_space(disk, working)


def _little_space(disk: Disk, working: bool) -> Finding:
    checkpoint = "a checkpoint takes 1 GiB for an adapter, 80 GiB for a full 7B model"
    needed = checkpoint if working else "a 7B model takes 13 GiB"
    setting = "run.dir=…" if working else "HF_HOME=…" if disk.use == "hub cache" else "DISTFT_CACHE=…"
    level: Level = "error" if working and disk.free_gib < 0.5 else "warning"
    free = f"{disk.free_gib:.1f} of {disk.total_gib:.0f} GiB"
    what = f"the {disk.use} {disk.path} has {free} free; {needed}"
    return Finding(level, what, f"free some space, or use another folder: {setting}")


def free_text(disk: Disk) -> str:
    return f"{disk.free_gib:.1f} GiB of {disk.total_gib:.0f}"


def _memory(facts: Facts) -> Iterator[Finding]:
    processes = max(len(facts.gpus), 1)
    least = min(facts.available_gib, facts.memory_limit_gib or facts.available_gib)
    if least < _LEAST_GIB_PER_PROCESS * processes:
        what = (
            f"{least:.1f} GiB of memory for {count(processes, 'process')}: each takes about "
            f"{_LEAST_GIB_PER_PROCESS} GiB before it loads the model, and Linux kills processes that need more"
        )
        yield Finding("warning", what, "request more from the scheduler or for the container")
    if facts.shm_gib is not None and facts.shm_gib < 1 and len(facts.gpus) != 1:
        what = (
            f"shared memory is {facts.shm_gib * 1024:.0f} MiB: NCCL and data loaders use it, and fail when it is full"
        )
        remedy = "start the container with --shm-size=8g or --ipc=host (Kubernetes: a memory volume at /dev/shm)"
        yield Finding("warning", what, remedy)


# ---- communication ---------------------------------------------------------------------------------------------------


def _host(facts: Facts) -> Iterator[Finding]:
    host = facts.host
    if host is None or host.here:
        return
    problem = f"the address {', '.join(host.addresses)}, which is another machine's" if host.addresses else "no address"
    what = (
        f"the host name {host.name} has {problem}: with several processes, torchrun and accelerate launch wait for it "
        "until they time out; distft train and distft submit do not need it"
    )
    yield Finding("warning", what, f"add `127.0.1.1 {host.name}` to /etc/hosts, or set PET_LOCAL_ADDR=127.0.0.1")


def _variables(facts: Facts) -> Iterator[Finding]:
    name = "NCCL_SOCKET_IFNAME" if facts.gpus else "GLOO_SOCKET_IFNAME"
    value = facts.variables.get(name, "")
    if value and not value.startswith("^") and facts.interfaces and len(facts.gpus) != 1:
        # NCCL matches prefixes or, after "=", whole names; gloo matches whole names.
        whole = value.startswith("=") or not facts.gpus
        words = [word for word in value.removeprefix("=").split(",") if word]
        if not any(here == word if whole else here.startswith(word) for word in words for here in facts.interfaces):
            what = f"{name} is {value!r}, but the network interfaces here are {', '.join(facts.interfaces)}"
            yield Finding("error", what, f"unset it, or name one of them: {name}={facts.interfaces[-1]}")
    if facts.variables.get("NCCL_P2P_DISABLE") == "1" and any(pair.peer_to_peer for pair in facts.pairs):
        yield Finding("warning", "NCCL_P2P_DISABLE=1 is set, although peer-to-peer access works", "unset it")


def _collectives(facts: Facts) -> Iterator[Finding]:
    test = facts.bandwidth
    if test is None or test.failed is None:
        return
    if test.backend == "gloo":
        remedy = "let processes of this machine communicate over the loopback interface (firewall, container)"
    elif facts.shm_gib is not None and facts.shm_gib < 1 and test.processes > 1:
        remedy = "give the container more shared memory (--shm-size=8g); NCCL_DEBUG=INFO shows details"
    elif test.hung or "wrong numbers" in test.failed:
        remedy = (
            "try NCCL_P2P_DISABLE=1: if that helps, peer-to-peer access is broken (disable IOMMU and PCIe ACS in the "
            "firmware); NCCL_DEBUG=INFO shows details"
        )
    else:
        remedy = "run again with NCCL_DEBUG=INFO; nvidia-smi shows what else uses the GPUs"
    how = f"{count(test.processes, 'process')} over {test.backend}"
    yield Finding("error", f"collectives {'hang' if test.hung else 'fail'} ({how}: {test.failed})", remedy)


def _links(facts: Facts) -> Iterator[Finding]:
    off = [pair for pair in facts.pairs if not pair.peer_to_peer]
    test = facts.bandwidth
    gathering = test.all_gather_gb_per_s if test is not None and test.backend == "nccl" else None
    if off:
        reasons = sorted({pair.why_off for pair in off if pair.why_off})
        between = f"{_pairs(off, len(facts.pairs))}{f' ({reasons[0]})' if reasons else ''}"
        what = f"peer-to-peer is off between {between}: sharded training gathers every layer through host memory"
        yield Finding("warning", what, _UNSHARDED)
    elif gathering is not None and gathering < _SLOW_GB_PER_S:
        linked = any(pair.path == "NVLink" for pair in facts.pairs)
        despite = ", although there is NVLink" if linked else ""
        what = (
            f"all-gather runs at {gathering:.1f} GB/s{despite}: sharded training "
            f"takes {_LLAMA_7B_GB / gathering:.1f} s to gather a 7B model in bf16, twice per micro-batch"
        )
        yield Finding("warning", what, "NCCL_DEBUG=INFO shows the path it takes" if linked else _UNSHARDED)


def _pairs(pairs: Sequence[Pair], total: int) -> str:
    if len(pairs) == total > 1:
        return "all GPUs"
    return shorten((f"GPU {pair.first} and {pair.second}" for pair in pairs), 4)


# ---- quantisation and services ---------------------------------------------------------------------------------------


def _quantisation(facts: Facts) -> Iterator[Finding]:
    if "bitsandbytes" not in facts.packages:
        return
    if facts.gpus and "cuda" not in (facts.bitsandbytes or ""):
        why = " ".join((facts.bitsandbytes_error or f"it loaded {facts.bitsandbytes}").split())[:200]
        what = f"bitsandbytes has no library for CUDA {facts.cuda} ({why}): recipes with 4-bit or 8-bit weights fail"
        remedy = f"use a bf16 recipe (ddp_bf16, fsdp_bf16), or {_install(facts, 'bitsandbytes')}"
        yield Finding("warning", what, remedy)
    if facts.gpus and "liger-kernel" not in facts.packages and "liger-kernel" not in facts.broken:
        what = "liger-kernel is not installed: training is slightly slower"
        yield Finding("note", what, "pip install 'distft[gpu]'")


def _services(facts: Facts) -> Iterator[Finding]:
    if facts.slurm is not None and not facts.slurm.answers:
        what = f"SLURM is installed, but its controller does not respond ({facts.slurm.said})"
        yield Finding("warning", what, "ask its administrators; distft train works without it")
    if facts.hub_offline:
        offline = "the hub is offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
        yield Finding("note", f"{offline}: models and data come from the cache or from folders", "unset it to download")
    elif facts.hub_token is False:
        what = "not logged in to the hub: gated models such as Llama cannot be downloaded"
        yield Finding("note", what, "hf auth login")
    if facts.wandb_key is False:
        what = "not logged in to W&B: its runs stay offline and can be uploaded later"
        yield Finding("note", what, "wandb login")
