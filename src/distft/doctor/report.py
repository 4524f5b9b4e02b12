"""`distft doctor`: examine this machine and print the facts, the verdict and the advice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from distft.doctor.advice import Finding, advice, first_error, free_text
from distft.doctor.facts import Disk, Facts, Gpu, Pair, Slurm, gather
from distft.doctor.network import Host
from distft.text import count


def doctor(*, bandwidth: bool, as_json: bool) -> int:
    """Examine this machine and print the report. Returns 0 if training can run, otherwise 1."""
    facts = gather(bandwidth=bandwidth)
    findings = advice(facts)
    error = first_error(findings)
    if as_json:
        report = {
            "can_train": error is None,
            "first_to_mend": None if error is None else asdict(error),
            "findings": [asdict(finding) for finding in findings],
            "facts": asdict(facts),
        }
        print(json.dumps(report, indent=2))
    else:
        print("\n".join([table(facts), "", verdict(findings), *map(_lines, findings)]))
    return 0 if error is None else 1


def verdict(findings: Sequence[Finding]) -> str:
    """One line: training can run, or the first reason why not."""
    error = first_error(findings)
    return "training can run" if error is None else f"training cannot run: {error.what}"


def table(facts: Facts) -> str:
    """The facts as aligned lines, `name  value`."""
    variables = ", ".join(f"{name}={value}" for name, value in facts.variables.items())
    rows = [
        ("python", f"{facts.python}, {facts.platform}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in facts.packages.items())),
        ("CPUs", str(facts.cpus)),
        ("memory", _memory(facts)),
        ("shared memory", "none" if facts.shm_gib is None else f"{facts.shm_gib:.2f} GiB"),
        *((disk.use, _disk(disk)) for disk in facts.disks),
        ("driver", _driver(facts)),
        ("torch's CUDA", facts.cuda or "none"),
        ("NCCL", facts.nccl or "none"),
        *((f"GPU {gpu.index}", _gpu(gpu)) for gpu in facts.gpus),
        *((f"GPU {pair.first} – {pair.second}", _pair(pair)) for pair in facts.pairs),
        ("bitsandbytes", facts.bitsandbytes or "no library"),
        ("attention", ", ".join(facts.attention) or "unknown"),
        ("C++ compiler", facts.compiler or "none"),
        ("scheduler", _scheduler(facts.slurm)),
        ("W&B", _login(facts.wandb_key)),
        ("hub", f"{_login(facts.hub_token)}{', offline' if facts.hub_offline else ''}"),
        ("host name", _host(facts.host)),
        ("variables", variables or "none of NCCL, gloo or CUDA"),
        ("bandwidth", _bandwidth(facts)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _lines(finding: Finding) -> str:
    return f"{finding.level}: {finding.what}" + (f"\n  → {finding.remedy}" if finding.remedy else "")


def _memory(facts: Facts) -> str:
    limit = "" if facts.memory_limit_gib is None else f", limited to {facts.memory_limit_gib:.1f}"
    return f"{facts.memory_gib:.1f} GiB, {facts.available_gib:.1f} available{limit}"


def _disk(disk: Disk) -> str:
    return f"{disk.path}: {free_text(disk)} free{'' if disk.writable else ', not writable'}"


def _driver(facts: Facts) -> str:
    if facts.driver is None:
        return "none"
    return f"{facts.driver}, for CUDA {facts.driver_cuda}, {count(facts.driver_gpus, 'GPU')}"


def _gpu(gpu: Gpu) -> str:
    free = "" if gpu.free_gib is None else f", {gpu.free_gib:.1f} free"
    links = "" if gpu.nvlinks is None else f", {gpu.nvlinks} NVLinks"
    capability = ".".join(map(str, gpu.capability))
    return f"{gpu.name}, {gpu.memory_gib:.1f} GiB{free}, compute capability {capability}{links}"


def _pair(pair: Pair) -> str:
    return f"{pair.path or 'unknown path'}, peer-to-peer {'on' if pair.peer_to_peer else 'off'}"


def _scheduler(slurm: Slurm | None) -> str:
    if slurm is None:
        return "none"
    job = f"; in job {slurm.job}" if slurm.job else ""
    return f"{slurm.version or 'SLURM'}: {slurm.said if slurm.answers else 'no response'}{job}"


def _host(host: Host | None) -> str:
    return "unknown" if host is None else f"{host.name}: {', '.join(host.addresses) or 'no address'}"


def _login(known: bool | None) -> str:
    return "unknown" if known is None else "logged in" if known else "not logged in"


def _bandwidth(facts: Facts) -> str:
    test = facts.bandwidth
    if test is None:
        return "not measured"
    if test.failed is not None:
        return f"failed ({test.backend})"
    if test.all_reduce_gb_per_s is None:
        return f"one process, {test.backend} works"
    rates = f"all-reduce {test.all_reduce_gb_per_s:.1f} GB/s, all-gather {test.all_gather_gb_per_s:.1f} GB/s"
    return f"{rates} (bus, {count(test.processes, 'process')}, {test.backend})"
