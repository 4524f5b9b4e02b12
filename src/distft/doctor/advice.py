"""`distft doctor`: what this machine is, whether training can run on it, and what to mend or to choose.

`advice` is a pure function of the facts, so that what it says of machines that are not at hand can be tested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from distft.doctor.facts import NEEDED, Disk, Facts, Gpu, Pair, gather

Level = Literal["error", "warning", "note"]

_LLAMA_7B_GB = 13.5
"""Parameters of Llama-2-7B in bf16."""


@dataclass(frozen=True)
class Finding:
    """`error`: training cannot run as it is. `warning`: it can, and some of it fails or is slow. `note`: good to know."""

    level: Level
    what: str
    remedy: str = ""


def advice(facts: Facts) -> list[Finding]:
    """What follows from the facts: errors first, causes before what they cause."""
    findings = [*_packages(facts), *_gpus(facts), *_room(facts), *_variables(facts), *_collectives(facts),
                *_links(facts), *_quantisation(facts), *_services(facts)]  # fmt: skip
    order: Sequence[Level] = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def first_error(findings: Sequence[Finding]) -> Finding | None:
    """The first thing to mend; None where training can run."""
    return next((finding for finding in findings if finding.level == "error"), None)


def _packages(facts: Facts) -> Iterator[Finding]:
    for name, why in facts.broken.items():
        if name in NEEDED:
            yield Finding("error", f"{name} cannot be imported ({why})", f"install it again: {_install(facts, name)}")
    for name, specifier in facts.requirements.items():
        if name not in facts.packages:
            continue
        from packaging.specifiers import SpecifierSet

        asked, version = SpecifierSet(specifier, prereleases=True), facts.packages[name]
        if version in asked:
            continue
        old = not all(version in SpecifierSet(str(one), prereleases=True) for one in asked if one.operator == ">=")
        yield Finding(
            "error" if old else "warning",
            f"{name} {version} is {'too old' if old else 'newer than distft was tried with'} ({specifier})",
            f"install another: {_install(facts, name)}",
        )
    for name, remedy in _WITHOUT.items():
        if name in facts.broken:
            yield Finding("warning", f"{name} is installed and cannot be imported ({facts.broken[name]})", remedy)
    if facts.compiler is None:
        yield Finding(
            "note", "there is no C++ compiler: DeepSpeed's strategies need one on CPU",
            "install g++, or name one in CXX",
        )  # fmt: skip


_WITHOUT = {
    "deepspeed": "take DDP or FSDP2 (ddp_qlora, fsdp_bf16) instead of zero2_bf16 and zero3_bf16, or install it again",
    "wandb": "install it again, or train with tracking.report_to=[]",
    "triton": "install the one that this torch wants: pip install --force-reinstall torch",
    "liger-kernel": "install it again, or uninstall it",
    "flash-attn": "build it again for this torch, or uninstall it",
}


def _install(facts: Facts, name: str) -> str:
    return f"pip install --force-reinstall '{name}{facts.requirements.get(name, '')}'"


def _gpus(facts: Facts) -> Iterator[Finding]:
    if facts.driver_error is not None:
        yield Finding(
            "error", f"the NVIDIA driver does not answer ({facts.driver_error})",
            "after an upgrade of the driver, reboot; in a container, take the host's driver libraries",
        )  # fmt: skip
    if "torch" in facts.packages and not facts.gpus:
        yield from _no_gpu(facts)
    unsupported = [gpu for gpu in facts.gpus if not gpu.supported]
    if unsupported:
        yield Finding(
            "error", f"this torch ({facts.packages['torch']}) has no code for {_named(unsupported)}",
            "install a build of torch for it, or leave it out with CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    kinds = sorted({(gpu.name, round(gpu.memory_gib)) for gpu in facts.gpus})
    if len(kinds) > 1:
        yield Finding(
            "warning", f"the GPUs differ ({', '.join(f'{name} with {size} GiB' for name, size in kinds)}): every step waits for the "
            "slowest, and the smallest bounds the micro-batch", "choose equal ones with CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    taken = [gpu for gpu in facts.gpus if gpu.free_gib is not None and gpu.free_gib < 0.9 * gpu.memory_gib]
    if taken:
        yield Finding(
            "warning", "memory is in use by others: " + ", ".join(
                f"GPU {gpu.index} has {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free" for gpu in taken
            ), "end what runs there, or choose other GPUs with CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    old = [gpu for gpu in facts.gpus if gpu.capability < (8, 0)]
    if old:
        yield Finding(
            "warning", f"{_named(old)} computes bf16 slowly: it came before compute capability 8.0",
            "train in fp16: model.dtype=float16 training.bf16=false training.fp16=true",
        )  # fmt: skip
    if 0 < facts.cpus < len(facts.gpus):
        yield Finding(
            "warning", f"{facts.cpus} CPUs for {len(facts.gpus)} GPUs: every process wants one at least",
            "ask the scheduler or the container for more",
        )  # fmt: skip


def _no_gpu(facts: Facts) -> Iterator[Finding]:
    """Why torch sees none."""
    if facts.driver_gpus == 0:
        if facts.driver_error is None:
            yield Finding(
                "note", "there is no GPU here: tiny models train on CPU", "try it: distft train recipe=tiny --nproc 2"
            )
        return
    many = f"the driver sees {facts.driver_gpus} GPU{'s' if facts.driver_gpus > 1 else ''}, and torch none"
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES")
    if facts.cuda is None:
        yield Finding(
            "error", f"{many}: torch {facts.packages['torch']} is a build without CUDA",
            f"install a CUDA build: {_install(facts, 'torch')}, with no index of CPU builds in pip's settings",
        )  # fmt: skip
    elif hidden is not None:
        yield Finding(
            "warning", f"{many}: CUDA_VISIBLE_DEVICES is {hidden!r}, so training runs on CPU",
            "unset it, or list GPUs that are there: 0,1",
        )  # fmt: skip
    elif facts.driver_cuda is not None and _major(facts.driver_cuda) < _major(facts.cuda):
        yield Finding(
            "error", f"{many}: driver {facts.driver} knows CUDA {facts.driver_cuda} at most, torch is built for {facts.cuda}",
            f"install a newer driver, or a torch that is built for CUDA {_major(facts.driver_cuda)}",
        )  # fmt: skip
    else:
        yield Finding(
            "error", f"{many}: {facts.cuda_error or 'CUDA does not start'}",
            "see that /dev/nvidia* are there for this user (in a container: --gpus all) and that the driver is whole: nvidia-smi",
        )  # fmt: skip


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _named(gpus: Sequence[Gpu]) -> str:
    return " and ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in gpus)


def _room(facts: Facts) -> Iterator[Finding]:
    told = set()  # one disk may hold them all
    for disk in facts.disks:
        working = disk.use == "working folder"
        if not disk.writable:
            yield Finding(
                "error" if working else "warning", f"the {disk.use} {disk.path} cannot be written",
                "work in another folder" if working else "name another: HF_HOME for the hub's, DISTFT_CACHE for distft's",
            )  # fmt: skip
        elif disk.free_gib < 20 and _free(disk) not in told:
            told.add(_free(disk))
            yield Finding(
                "error" if working and disk.free_gib < 0.5 else "warning",
                f"{_free(disk)} are free for the {disk.use} {disk.path}: "
                + ("a checkpoint of an adapter takes 1 GiB, of a full 7B model 80" if working else "a 7B model takes 13 GiB"),
                "make room, or take another folder: "
                + ("run.dir=…" if working else "HF_HOME=…" if disk.use == "hub cache" else "DISTFT_CACHE=…"),
            )  # fmt: skip
    processes = max(len(facts.gpus), 1)
    least = min(facts.available_gib, facts.memory_limit_gib or facts.available_gib)
    if least < 2 * processes:
        yield Finding(
            "warning", f"{least:.1f} GiB of memory for {processes} process{'es' if processes > 1 else ''}: each takes about 2 before "
            "the model, and Linux kills what takes more than there is", "ask the scheduler or the container for more",
        )  # fmt: skip
    if facts.shm_gib is not None and facts.shm_gib < 1 and len(facts.gpus) != 1:
        yield Finding(
            "warning", f"shared memory is {facts.shm_gib * 1024:.0f} MiB: NCCL and data loaders pass through it and fail when it is full",
            "start the container with --shm-size=8g or --ipc=host (Kubernetes: a memory volume at /dev/shm)",
        )  # fmt: skip


def _free(disk: Disk) -> str:
    return f"{disk.free_gib:.1f} GiB of {disk.total_gib:.0f}"


def _variables(facts: Facts) -> Iterator[Finding]:
    name = "NCCL_SOCKET_IFNAME" if facts.gpus else "GLOO_SOCKET_IFNAME"
    asked = facts.variables.get(name, "")
    if asked and not asked.startswith("^") and facts.interfaces and len(facts.gpus) != 1:
        # NCCL takes prefixes, or with = whole names; gloo takes whole names.
        whole = asked.startswith("=") or not facts.gpus
        words = [word for word in asked.removeprefix("=").split(",") if word]
        if not any(here == word if whole else here.startswith(word) for word in words for here in facts.interfaces):
            yield Finding(
                "error", f"{name} is {asked!r}, and no network interface here has that name ({', '.join(facts.interfaces)})",
                f"unset it, or name one of these: {name}={facts.interfaces[-1]}",
            )  # fmt: skip
    if facts.variables.get("NCCL_P2P_DISABLE") == "1" and any(pair.peer_to_peer for pair in facts.pairs):
        yield Finding("warning", "NCCL_P2P_DISABLE=1 is set, though peer-to-peer is there", "unset it")


def _collectives(facts: Facts) -> Iterator[Finding]:
    test = facts.bandwidth
    if test is None or test.failed is None:
        return
    how = f"{test.processes} process{'es' if test.processes > 1 else ''} over {test.backend}"
    if test.backend == "gloo":
        remedy = "let processes of this machine talk over the loopback interface (firewall, container)"
    elif facts.shm_gib is not None and facts.shm_gib < 1 and test.processes > 1:
        remedy = "give the container more shared memory (--shm-size=8g); NCCL_DEBUG=INFO says more"
    elif test.hung or "wrong numbers" in test.failed:
        remedy = ("try NCCL_P2P_DISABLE=1: if that helps, peer-to-peer is broken (switch off IOMMU and PCIe ACS in the "
                  "firmware); NCCL_DEBUG=INFO says more")  # fmt: skip
    else:
        remedy = "run again with NCCL_DEBUG=INFO; nvidia-smi shows what else uses the GPUs"
    yield Finding("error", f"collectives {'hang' if test.hung else 'fail'} ({how}: {test.failed})", remedy)


def _links(facts: Facts) -> Iterator[Finding]:
    off = [pair for pair in facts.pairs if not pair.peer_to_peer]
    test = facts.bandwidth
    gathering = test.all_gather_gb_per_s if test is not None and test.backend == "nccl" else None
    if off:
        why = sorted({pair.why_off for pair in off if pair.why_off})
        yield Finding(
            "warning", f"peer-to-peer is off between {_pairs(off, len(facts.pairs))}{f' ({why[0]})' if why else ''}: sharded training "
            "gathers every layer through host memory",
            "prefer ddp_qlora or zero2_bf16, or a larger micro-batch",
        )  # fmt: skip
    elif gathering is not None and gathering < 15:
        linked = any(pair.path == "NVLink" for pair in facts.pairs)
        yield Finding(
            "warning", f"all-gather runs at {gathering:.1f} GB/s{', though there is NVLink' if linked else ''}: sharded training takes "
            f"{_LLAMA_7B_GB / gathering:.1f} s to gather a 7B model in bf16, twice a micro-batch",
            "see NCCL_DEBUG=INFO for the way that it takes" if linked else "prefer ddp_qlora or zero2_bf16, or a larger micro-batch",
        )  # fmt: skip


def _pairs(pairs: Sequence[Pair], of: int) -> str:
    if len(pairs) == of > 1:
        return "all GPUs"
    shown = ", ".join(f"GPU {pair.first} and {pair.second}" for pair in pairs[:4])
    return shown + (f" and {len(pairs) - 4} more pairs" if len(pairs) > 4 else "")


def _quantisation(facts: Facts) -> Iterator[Finding]:
    if "bitsandbytes" not in facts.packages:
        return
    if facts.gpus and "cuda" not in (facts.bitsandbytes or ""):
        why = facts.bitsandbytes_error or f"it loaded {facts.bitsandbytes}"
        yield Finding(
            "warning", f"bitsandbytes has no library for CUDA {facts.cuda} ({' '.join(why.split())[:200]}): recipes with 4-bit or "
            "8-bit weights fail", f"take a bf16 recipe (ddp_bf16, fsdp_bf16), or {_install(facts, 'bitsandbytes')}",
        )  # fmt: skip
    if facts.gpus and "liger-kernel" not in facts.packages and "liger-kernel" not in facts.broken:
        yield Finding(
            "note", "liger's kernels are not installed: training is a little slower", "pip install 'distft[gpu]'"
        )


def _services(facts: Facts) -> Iterator[Finding]:
    if facts.slurm is not None and not facts.slurm.answers:
        yield Finding(
            "warning", f"SLURM's commands are here, and its controller does not answer ({facts.slurm.said})",
            "ask its administrators; distft train works without it",
        )  # fmt: skip
    if facts.hub_offline:
        yield Finding(
            "note", "the hub is offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE): models and data come from the cache or from folders",
            "unset it to download",
        )  # fmt: skip
    elif facts.hub_token is False:
        yield Finding("note", "no log-in to the hub: gated models such as Llama cannot be downloaded", "hf auth login")
    if facts.wandb_key is False:
        yield Finding("note", "no log-in to W&B: its runs are kept offline, to be uploaded later", "wandb login")


# The report -----------------------------------------------------------------------------------------------------------


def table(facts: Facts) -> str:
    """The facts as aligned lines, `name  value`."""
    rows = [
        ("python", f"{facts.python}, {facts.platform}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in facts.packages.items())),
        ("CPUs", str(facts.cpus)),
        ("memory", f"{facts.memory_gib:.1f} GiB, {facts.available_gib:.1f} available"
         + (f", limited to {facts.memory_limit_gib:.1f}" if facts.memory_limit_gib is not None else "")),
        ("shared memory", "none" if facts.shm_gib is None else f"{facts.shm_gib:.2f} GiB"),
        *((disk.use, f"{disk.path}: {_free(disk)} free{'' if disk.writable else ', not writable'}") for disk in facts.disks),
        ("driver", "none" if facts.driver is None
         else f"{facts.driver}, for CUDA {facts.driver_cuda}, {facts.driver_gpus} GPU{'s' if facts.driver_gpus != 1 else ''}"),
        ("torch's CUDA", facts.cuda or "none"),
        ("NCCL", facts.nccl or "none"),
        *((f"GPU {gpu.index}", _gpu_row(gpu)) for gpu in facts.gpus),
        *((f"GPU {pair.first} – {pair.second}", f"{pair.path or 'path unknown'}, peer-to-peer {'on' if pair.peer_to_peer else 'off'}")
          for pair in facts.pairs),
        ("bitsandbytes", facts.bitsandbytes or "no library"),
        ("attention", ", ".join(facts.attention) or "unknown"),
        ("C++ compiler", facts.compiler or "none"),
        ("scheduler", "none" if facts.slurm is None else f"{facts.slurm.version or 'SLURM'}: "
         + (facts.slurm.said if facts.slurm.answers else "no answer") + (f"; in job {facts.slurm.job}" if facts.slurm.job else "")),
        ("W&B", _login(facts.wandb_key)),
        ("hub", f"{_login(facts.hub_token)}{', offline' if facts.hub_offline else ''}"),
        ("variables", ", ".join(f"{name}={value}" for name, value in facts.variables.items()) or "none of NCCL, gloo or CUDA"),
        ("bandwidth", _bandwidth_row(facts)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _login(known: bool | None) -> str:
    return "unknown" if known is None else "logged in" if known else "no log-in"


def _gpu_row(gpu: Gpu) -> str:
    free = "" if gpu.free_gib is None else f", {gpu.free_gib:.1f} free"
    links = "" if gpu.nvlinks is None else f", {gpu.nvlinks} NVLinks"
    return f"{gpu.name}, {gpu.memory_gib:.1f} GiB{free}, compute capability {'.'.join(map(str, gpu.capability))}{links}"


def _bandwidth_row(facts: Facts) -> str:
    test = facts.bandwidth
    if test is None:
        return "not measured"
    if test.failed is not None:
        return f"failed ({test.backend})"
    if test.all_reduce_gb_per_s is None:
        return f"one process, {test.backend} works"
    return (f"all-reduce {test.all_reduce_gb_per_s:.1f} GB/s, all-gather {test.all_gather_gb_per_s:.1f} GB/s "
            f"(bus, {test.processes} processes, {test.backend})")  # fmt: skip


def verdict(findings: Sequence[Finding]) -> str:
    """One line: training can run, or the first thing to mend."""
    error = first_error(findings)
    return "training can run" if error is None else f"training cannot run: {error.what}"


def doctor(*, bandwidth: bool, as_json: bool) -> int:
    """Examine this machine and print the report; 0 where training can run, 1 where it cannot."""
    facts = gather(bandwidth=bandwidth)
    findings = advice(facts)
    error = first_error(findings)
    if as_json:
        report = {
            "can_train": error is None, "first_to_mend": None if error is None else asdict(error),
            "findings": [asdict(finding) for finding in findings], "facts": asdict(facts),
        }  # fmt: skip
        print(json.dumps(report, indent=2))
    else:
        lines = [
            f"{finding.level}: {finding.what}" + (f"\n  → {finding.remedy}" if finding.remedy else "")
            for finding in findings
        ]
        print("\n".join([table(facts), "", verdict(findings), *lines]))
    return 0 if error is None else 1
