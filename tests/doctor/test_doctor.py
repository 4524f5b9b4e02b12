"""`distft doctor`: facts of this machine, measurements by real processes, and advice for other machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distft.doctor.advice import advice, first_error
from distft.doctor.bandwidth import Bandwidth
from distft.doctor.facts import Disk, Facts, Gpu, Pair, Slurm, gather, memory_limit, supports
from distft.doctor.network import Host
from distft.doctor.report import table, verdict

H200 = Gpu(0, "NVIDIA H200", 139.8, (9, 0), free_gib=139.2, nvlinks=18)
NODE = Facts(
    python="3.11.2",
    platform="Linux",
    cpus=64,
    memory_gib=512,
    available_gib=500,
    shm_gib=256,
    packages={"torch": "2.13.0+cu130", "transformers": "5.23.0", "bitsandbytes": "0.50.2", "liger-kernel": "0.8.5"},
    requirements={"torch": "<=2.13.0,>=2.9", "transformers": "<6,>=5.17"},
    disks=(Disk("working folder", "/scratch/me", 1000, 800, True), Disk("hub cache", "/scratch/hub", 1000, 800, True)),
    driver="580.65.06",
    driver_cuda="13.0",
    driver_gpus=2,
    cuda="13.0",
    nccl="2.27.5",
    gpus=(H200, replace(H200, index=1)),
    pairs=(Pair(0, 1, True, "NVLink"),),
    attention=("sdpa", "varlen"),
    bitsandbytes="libbitsandbytes_cuda130.so",
    compiler="/usr/bin/c++",
    interfaces=("lo", "eth0"),
    host=Host("node", ("127.0.1.1",), here=True),
    wandb_key=True,
    hub_token=True,
    hub_offline=False,
    bandwidth=Bandwidth("nccl", 2, all_reduce_gb_per_s=360.0, all_gather_gb_per_s=340.0),
)
"""A node with two GPUs and no problems."""
NO_TORCH_GPU: dict[str, Any] = {"gpus": (), "pairs": (), "bitsandbytes": "libbitsandbytes_cpu.so", "bandwidth": None}
OFF = Pair(0, 1, False, "SYS", "these GPUs do not support it")
FULL = Disk("working folder", "/scratch/me", 1000, 0.2, True)


def test_a_node_without_problems_gets_no_advice() -> None:
    assert advice(NODE) == []
    assert verdict([]) == "training can run"


@pytest.mark.parametrize(
    ("changes", "level", "what", "remedy"),
    [
        (
            {"pairs": (OFF,)},
            "warning",
            "peer-to-peer is off between GPU 0 and 1 (these GPUs do not support it)",
            "ddp_qlora or zero2_bf16",
        ),
        ({"shm_gib": 64 / 1024}, "warning", "shared memory is 64 MiB", "--shm-size"),
        (
            {"host": Host("node7")},
            "warning",
            "the host name node7 has no address",
            "add `127.0.1.1 node7` to /etc/hosts",
        ),
        (
            {"host": Host("node7", ("10.9.8.7",))},
            "warning",
            "the host name node7 has the address 10.9.8.7, which is another machine's",
            "PET_LOCAL_ADDR=127.0.0.1",
        ),
        (
            {**NO_TORCH_GPU, "driver": "535.104", "driver_cuda": "12.2", "cuda_error": "too old"},
            "error",
            "driver 535.104 supports CUDA up to 12.2, and torch is built for 13.0",
            "newer driver",
        ),
        (
            {**NO_TORCH_GPU, "cuda": None},
            "error",
            "the driver sees 2 GPUs, but torch sees none: torch 2.13.0+cu130 is a build without CUDA",
            "torch<=2.13.0,>=2.9",
        ),
        (
            {**NO_TORCH_GPU, "variables": {"CUDA_VISIBLE_DEVICES": ""}},
            "warning",
            "CUDA_VISIBLE_DEVICES is ''",
            "unset it",
        ),
        ({**NO_TORCH_GPU, "cuda_error": "CUDA unknown error"}, "error", "CUDA unknown error", "nvidia-smi"),
        (
            {**NO_TORCH_GPU, "driver_gpus": 0, "driver_error": "Driver/library version mismatch"},
            "error",
            "version mismatch",
            "reboot",
        ),
        ({**NO_TORCH_GPU, "driver_gpus": 0, "driver": None}, "note", "there is no GPU", "recipe=tiny"),
        (
            {"gpus": (H200, replace(H200, index=1, name="NVIDIA L4", memory_gib=22.0, free_gib=22.0))},
            "warning",
            "the GPUs differ (NVIDIA H200 with 140 GiB, NVIDIA L4 with 22 GiB)",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            {"gpus": (H200, replace(H200, index=1, free_gib=20.0))},
            "warning",
            "GPU 1 has 20.0 of 139.8 GiB free",
            "stop them",
        ),
        (
            {"gpus": (H200, replace(H200, index=1, supported=False))},
            "error",
            "does not support GPU 1 (NVIDIA H200)",
            "build of torch",
        ),
        (
            {"gpus": (replace(H200, capability=(7, 5)),), "pairs": ()},
            "warning",
            "bf16 is slow on GPU 0",
            "training.fp16=true",
        ),
        ({"cpus": 1}, "warning", "1 CPU for 2 GPUs", "scheduler"),
        ({"disks": (FULL,)}, "error", "working folder /scratch/me has 0.2 of 1000 GiB free", "run.dir="),
        (
            {"disks": (replace(FULL, free_gib=9), replace(FULL, free_gib=9, use="hub cache"))},
            "warning",
            "9.0 of 1000 GiB free",
            "free some space",
        ),
        (
            {"disks": (replace(FULL, use="hub cache", writable=False),)},
            "warning",
            "hub cache /scratch/me is not writable",
            "HF_HOME",
        ),
        (
            {"disks": (replace(FULL, writable=False),)},
            "error",
            "working folder /scratch/me is not writable",
            "another folder",
        ),
        ({"memory_limit_gib": 3.0}, "warning", "3.0 GiB of memory for 2 processes", "container"),
        (
            {"bitsandbytes": None, "bitsandbytes_error": "libcusparse.so.12: cannot open"},
            "warning",
            "bitsandbytes has no library for CUDA 13.0 (libcusparse.so.12: cannot open)",
            "ddp_bf16",
        ),
        ({"bitsandbytes": "libbitsandbytes_cpu.so"}, "warning", "it loaded libbitsandbytes_cpu.so", "ddp_bf16"),
        ({"packages": {"torch": "2.8.0"}}, "error", "torch 2.8.0 is too old (<=2.13.0,>=2.9)", "pip install"),
        ({"packages": {**NODE.packages, "torch": "2.14.0"}}, "warning", "torch 2.14.0 is newer", "pip install"),
        (
            {"broken": {"datasets": "ImportError: no pyarrow"}},
            "error",
            "datasets cannot be imported (ImportError: no pyarrow)",
            "pip",
        ),
        (
            {"broken": {"deepspeed": "MissingCUDAException"}},
            "warning",
            "deepspeed is installed but cannot be imported",
            "instead of zero2_bf16",
        ),
        (
            {"broken": {"flash-attn": "undefined symbol"}},
            "warning",
            "flash-attn is installed but cannot be imported",
            "uninstall",
        ),
        ({"compiler": None}, "note", "no C++ compiler", "g++"),
        (
            {"variables": {"NCCL_SOCKET_IFNAME": "ib0"}},
            "error",
            "NCCL_SOCKET_IFNAME is 'ib0'",
            "NCCL_SOCKET_IFNAME=eth0",
        ),
        ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "warning", "NCCL_P2P_DISABLE=1", "unset"),
        (
            {"bandwidth": Bandwidth("nccl", 2, failed="not finished after 180 s", hung=True)},
            "error",
            "collectives hang",
            "NCCL_P2P_DISABLE=1",
        ),
        (
            {"bandwidth": Bandwidth("nccl", 2, failed="rank 1: all-reduce gave wrong numbers")},
            "error",
            "wrong numbers",
            "IOMMU",
        ),
        (
            {"bandwidth": Bandwidth("nccl", 2, 4.0, 5.0)},
            "warning",
            "5.0 GB/s, although there is NVLink: sharded training takes 2.7 s",
            "DEBUG",
        ),
        (
            {"slurm": Slurm("slurm 22.05.8", False, "Unable to contact slurm controller")},
            "warning",
            "Unable to contact",
            "without it",
        ),
        ({"hub_offline": True}, "note", "the hub is offline", "unset"),
        ({"hub_token": False}, "note", "gated models", "hf auth login"),
        ({"wandb_key": False}, "note", "W&B", "wandb login"),
    ],
)
def test_one_problem_gives_one_finding(changes: dict[str, Any], level: str, what: str, remedy: str) -> None:
    facts = replace(NODE, **changes)
    (finding,) = advice(facts)
    assert finding.level == level
    assert what in finding.what
    assert remedy in finding.remedy
    assert (
        (first_error([finding]) is not None)
        == verdict([finding]).startswith("training cannot run: ")
        == (level == "error")
    )
    assert "\n" not in finding.what + finding.remedy


@pytest.mark.parametrize("name", ["eth", "=eth0", "^docker", "lo,eth0"])
def test_interface_names_match_as_nccl_matches_them(name: str) -> None:
    assert advice(replace(NODE, variables={"NCCL_SOCKET_IFNAME": name})) == []


def test_the_verdict_names_the_cause_not_its_consequences() -> None:
    failed = Bandwidth("nccl", 2, failed="rank 0: ncclSystemError")
    facts = replace(
        NODE,
        bandwidth=failed,
        disks=(FULL,),
        hub_token=False,
        shm_gib=0.0625,
        packages={**NODE.packages, "torch": "2.8.0"},
    )
    found = advice(facts)
    assert [finding.level for finding in found] == ["error"] * 3 + ["warning", "note"]
    assert verdict(found) == "training cannot run: torch 2.8.0 is too old (<=2.13.0,>=2.9)"
    assert "--shm-size" in found[2].remedy  # of the collectives' failure


def test_the_table_is_aligned_and_shows_the_links() -> None:
    rows = table(NODE).splitlines()
    assert len({len(row) - len(row.split("  ", 1)[1].lstrip()) for row in rows}) == 1
    assert "GPU 0 – 1       NVLink, peer-to-peer on" in rows
    assert "GPU 1           NVIDIA H200, 139.8 GiB, 139.2 free, compute capability 9.0, 18 NVLinks" in rows
    assert "bandwidth       all-reduce 360.0 GB/s, all-gather 340.0 GB/s (bus, 2 processes, nccl)" in rows


@pytest.mark.parametrize(
    ("architectures", "capability", "supported"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80", "sm_90"], (8, 9), True),  # machine code of a lower minor version
        (["sm_86"], (8, 0), False),
        (["sm_75", "sm_80", "sm_90a", "sm_120"], (7, 0), False),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),  # PTX is compiled on the spot
        ([], (9, 0), True),
    ],
)
def test_which_code_runs_on_which_gpu(architectures: list[str], capability: tuple[int, int], supported: bool) -> None:
    assert supports(architectures, capability) is supported


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/job/step\n", {"job/memory.max": "4096\n", "job/step/memory.max": "max\n"}, 4096),
        ("0::/../host/path\n", {"memory.max": "8192\n"}, 8192),  # in a container
        ("9:cpu:/\n4:memory:/docker\n", {"memory/memory.limit_in_bytes": "7000\n"}, 7000),  # version 1
        ("0::/\n", {}, None),
    ],
)
def test_the_smallest_limit_of_all_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{key}": value for key, value in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == limit


# Real processes -------------------------------------------------------------------------------------------------------


def doctor(*words: str, where: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distft.cli", "doctor", *words],
        cwd=where,
        env=os.environ | changes,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_it_examines_this_machine_and_prints_no_secret(tmp_path: Path) -> None:
    """Two processes measure over gloo; GPUs are hidden, as they have a test of their own."""
    secrets = {"WANDB_API_KEY": "s3cret" * 7, "HF_TOKEN": "hf_s3cret"}
    ended = doctor("--json", where=tmp_path, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", NCCL_DEBUG="WARN", **secrets)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "s3cret" not in ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    facts, test = report["facts"], report["facts"]["bandwidth"]
    assert report["can_train"]
    assert report["first_to_mend"] is None
    assert (test["backend"], test["processes"], test["failed"]) == ("gloo", 2, None)
    assert test["all_reduce_gb_per_s"] > 0
    assert test["all_gather_gb_per_s"] > 0
    assert facts["packages"].keys() >= {"torch", "trl", "deepspeed"}
    assert facts["variables"] == facts["variables"] | {"NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": ""}
    assert (facts["wandb_key"], facts["hub_token"], facts["hub_offline"]) == (True, True, True)
    assert facts["bitsandbytes"] == "libbitsandbytes_cpu.so"
    assert facts["disks"][0]["path"] == str(tmp_path)
    assert facts["memory_gib"] > facts["available_gib"] > 0


@pytest.mark.slow
def test_a_broken_package_is_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "trl.py").write_text("raise ImportError('built for another torch')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = doctor("--no-bandwidth", where=tmp_path, PYTHONPATH=path)
    rows, _, rest = ended.stdout.partition("\n\n")
    assert ended.returncode == 1, ended.stderr
    assert "bandwidth       not measured" in rows
    assert rest.splitlines()[:2] == [
        "training cannot run: trl cannot be imported (ImportError: built for another torch)",
        "error: trl cannot be imported (ImportError: built for another torch)",
    ]


@pytest.mark.gpu(2)
def test_gpus_their_links_and_their_bandwidth() -> None:
    facts = gather()
    assert facts.driver is not None
    assert facts.nccl is not None
    assert len(facts.gpus) == facts.bandwidth.processes  # type: ignore[union-attr]
    assert len(facts.pairs) == len(facts.gpus) * (len(facts.gpus) - 1) // 2
    assert facts.bandwidth.failed is None  # type: ignore[union-attr]
    assert facts.bandwidth.all_gather_gb_per_s > 1  # type: ignore[union-attr, operator]
    assert all(gpu.supported and gpu.free_gib is not None for gpu in facts.gpus)
