"""What this machine is, by asking it: packages, GPUs and how they reach each other, memory, disk, SLURM, log-ins.

Nothing of torch or Hugging Face is imported before it is known that it can be, and no value of a secret is kept.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from distft import upstream_api
from distft.doctor.bandwidth import Bandwidth, measure

_GIB = 2**30
NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "nvidia-ml-py")
_MODULES = {"nvidia-ml-py": "pynvml", "liger-kernel": "liger_kernel", "flash-attn": "flash_attn"}
OPTIONAL = ("deepspeed", "wandb", "triton", "liger-kernel", "flash-attn")
_SCHEDULER_LIMIT_S = 15


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees, under torch's number."""

    index: int
    name: str
    memory_gib: float
    capability: tuple[int, int]
    supported: bool = True
    """This build of torch has code for it."""
    free_gib: float | None = None
    nvlinks: int | None = None
    """Links that are up; None where the driver does not say."""


@dataclass(frozen=True)
class Pair:
    """How two GPUs reach each other. `path` is NVLink, or what `nvidia-smi topo -m` calls the way through PCIe."""

    first: int
    second: int
    peer_to_peer: bool
    path: str | None = None
    why_off: str | None = None


@dataclass(frozen=True)
class Disk:
    """Room where something is written; `path` may not exist yet."""

    use: str
    path: str
    total_gib: float
    free_gib: float
    writable: bool


@dataclass(frozen=True)
class Slurm:
    version: str | None
    answers: bool
    said: str
    """Partitions, nodes and their GPUs, or what went wrong."""
    job: str | None = None
    """The job that this process is in."""


@dataclass(frozen=True)
class Facts:
    """What is known of a machine; None for unknown or not there. Sizes in GiB (2**30 bytes)."""

    python: str
    platform: str
    cpus: int
    memory_gib: float
    available_gib: float
    packages: Mapping[str, str]
    """Versions of those that can be imported."""
    broken: Mapping[str, str] = field(default_factory=dict)
    """Installed or needed, and cannot be imported: why."""
    requirements: Mapping[str, str] = field(default_factory=dict)
    """The versions that distft asks for, as it says itself."""
    memory_limit_gib: float | None = None
    """The control group's, which a container or SLURM sets."""
    shm_gib: float | None = None
    disks: tuple[Disk, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    """The newest CUDA that the driver knows."""
    driver_gpus: int = 0
    """GPUs that the driver sees, whatever CUDA_VISIBLE_DEVICES says."""
    driver_error: str | None = None
    cuda: str | None = None
    """What torch was built for; None for a CPU build."""
    cuda_error: str | None = None
    nccl: str | None = None
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[Pair, ...] = ()
    attention: tuple[str, ...] = ()
    bitsandbytes: str | None = None
    """The library that it loaded."""
    bitsandbytes_error: str | None = None
    compiler: str | None = None
    slurm: Slurm | None = None
    interfaces: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    """Those of NCCL, gloo and CUDA that are set."""
    wandb_key: bool | None = None
    hub_token: bool | None = None
    hub_offline: bool | None = None
    bandwidth: Bandwidth | None = None


def gather(*, bandwidth: bool = True) -> Facts:
    """Ask this machine; takes half a minute or so, most of it imports. With `bandwidth`, processes are started to measure it."""
    found: dict[str, Any] = {}
    heard = io.StringIO()  # libraries greet on both; what matters of it is an exception, and that is kept
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        packages, broken = _packages()
        if bandwidth and "torch" in packages:  # first: a GPU that only one process may use at a time is then still free
            import torch

            found["bandwidth"] = measure(torch.cuda.device_count())
        if "nvidia-ml-py" in packages:
            found |= _driver()
            if "torch" in packages:
                found |= _torch()
        if "bitsandbytes" in packages:
            found |= _bitsandbytes()
        if not broken.keys() & set(NEEDED):
            found |= _hugging_face()
    memory, limit = psutil.virtual_memory(), memory_limit(Path("/"))
    shm = Path("/dev/shm")  # noqa: S108
    return Facts(
        python=platform.python_version(), platform=platform.platform(), cpus=len(os.sched_getaffinity(0)),
        memory_gib=memory.total / _GIB, available_gib=memory.available / _GIB,
        memory_limit_gib=limit / _GIB if limit is not None and limit < memory.total else None,
        packages=packages, broken=broken, requirements=_requirements(),
        shm_gib=shutil.disk_usage(shm).total / _GIB if shm.is_dir() else None,
        disks=(_disk("working folder", Path.cwd()), *found.pop("caches", ())),
        compiler=shutil.which(os.environ.get("CXX", "c++")), slurm=_slurm(), interfaces=tuple(psutil.net_if_addrs()),
        variables={
            name: value for name, value in sorted(os.environ.items())
            if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"))
        },
        **found,
    )  # fmt: skip


def _packages() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of what can be imported, and why the rest cannot: an optional one counts only where it is installed."""
    versions, broken = {}, {}
    for name in (*NEEDED, *OPTIONAL):
        module = _MODULES.get(name, name)
        if name in OPTIONAL and importlib.util.find_spec(module) is None:
            continue
        try:
            version = getattr(importlib.import_module(module), "__version__", None)
        except Exception as error:  # a broken installation raises anything
            broken[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            versions[name] = str(version or importlib.metadata.version(name))
    return versions, broken


def _requirements() -> dict[str, str]:
    """Package → version specifier, as in `pyproject.toml`; empty where distft runs without being installed."""
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(line) for line in importlib.metadata.requires("distft") or ()]
    except ImportError:  # PackageNotFoundError among them
        return {}
    return {one.name: str(one.specifier) for one in asked if one.marker is None and str(one.specifier)}


def _driver() -> dict[str, Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(), "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
            "driver_gpus": pynvml.nvmlDeviceGetCount(),
        }  # fmt: skip
    except pynvml.NVMLError_LibraryNotFound:
        return {}
    except pynvml.NVMLError as error:  # such as a driver that was upgraded under the running kernel module
        return {"driver_error": str(error)}


def _torch() -> dict[str, Any]:
    import torch
    from torch import distributed

    found: dict[str, Any] = {"cuda": torch.version.cuda}
    if distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if not torch.cuda.is_available():
        if torch.version.cuda is not None:
            try:
                torch.cuda.init()  # type: ignore[no-untyped-call]  # says why
            except RuntimeError as error:
                found["cuda_error"] = " ".join(str(error).split())
        return found
    gpus = range(torch.cuda.device_count())
    found["gpus"] = tuple(_gpu(index) for index in gpus)
    found["pairs"] = tuple(_pair(first, second) for first, second in itertools.combinations(gpus, 2))
    return found


def _gpu(index: int) -> Gpu:
    import pynvml
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability, free, links = (properties.major, properties.minor), None, None
    with contextlib.suppress(pynvml.NVMLError):
        handle = _handle(index)
        free = pynvml.nvmlDeviceGetMemoryInfo(handle).free / _GIB
        links = 0
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):  # the first that there is not raises
            links += pynvml.nvmlDeviceGetNvLinkState(handle, link)
    return Gpu(index, properties.name, properties.total_memory / _GIB, capability,
               supports(torch.cuda.get_arch_list(), capability), free, links)  # fmt: skip


def supports(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures (`sm_90`, `compute_120`) runs on a GPU: machine code within its major version, from
    its minor version down; PTX (compute) on every later one. True where the build does not say."""
    if not architectures:
        return True
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        version = divmod(int(number.rstrip("af")), 10)
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def _handle(index: int) -> Any:
    """NVML's handle of torch's device: they count differently under CUDA_VISIBLE_DEVICES."""
    import pynvml
    import torch

    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


_PATHS = {0: "one board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}  # NVML_TOPOLOGY_*
_WHY_OFF = {1: "the chipset cannot", 2: "these GPUs cannot", 3: "they hang on different I/O hubs", 4: "switched off in the driver",
            5: "not supported"}  # fmt: skip # NVML_P2P_STATUS_*


def _pair(first: int, second: int) -> Pair:
    import pynvml
    import torch

    on = torch.cuda.can_device_access_peer(first, second) and torch.cuda.can_device_access_peer(second, first)
    path = why = None
    with contextlib.suppress(pynvml.NVMLError):
        ends = _handle(first), _handle(second)
        path = _PATHS.get(pynvml.nvmlDeviceGetTopologyCommonAncestor(*ends))
        nvlink = pynvml.nvmlDeviceGetP2PStatus(*ends, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
        path = "NVLink" if nvlink == pynvml.NVML_P2P_STATUS_OK else path
        # Index 0 is reading; pynvml's own name for it is a tuple by a stray comma.
        why = None if on else _WHY_OFF.get(pynvml.nvmlDeviceGetP2PStatus(*ends, 0))
    return Pair(first, second, on, path, why)


def _bitsandbytes() -> dict[str, Any]:
    from bitsandbytes.cextension import lib

    if library := upstream_api.bitsandbytes_library():
        return {"bitsandbytes": library}
    return {"bitsandbytes_error": str(vars(lib).get("error_msg", "no library could be loaded"))}


def _hugging_face() -> dict[str, Any]:
    """What needs the whole stack to be imported."""
    import torch
    from huggingface_hub import constants
    from transformers.utils import is_flash_attn_2_available

    from distft.models.attention import VARLEN, kernel
    from distft.paths import cache_folder
    from distft.runs.wandb import has_wandb_key

    token = Path(constants.HF_TOKEN_PATH)
    attention = [VARLEN] if torch.cuda.is_available() and kernel() is not None else []
    attention += ["flash_attention_2"] if is_flash_attn_2_available() else []
    return {
        "attention": ("sdpa", *attention), "wandb_key": has_wandb_key(), "hub_offline": constants.is_offline_mode(),
        "hub_token": bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
                          or (token.is_file() and token.stat().st_size)),
        "caches": (_disk("hub cache", Path(constants.HF_HUB_CACHE)), _disk("distft cache", cache_folder())),
    }  # fmt: skip


def _disk(use: str, path: Path) -> Disk:
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    usage = shutil.disk_usage(there)
    return Disk(use, str(path), usage.total / _GIB, usage.free / _GIB, os.access(there, os.W_OK))


def memory_limit(root: Path) -> int | None:
    """Bytes that the control groups of this process let it take, the smallest of all levels; None where none does.

    `root` is where `proc` and `sys` are.
    """
    groups = root / "proc" / "self" / "cgroup"
    limits = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys" / "fs" / "cgroup" / controllers  # version 2 has one tree for all
        # In a container the path may be the host's, and the group is at the top of what is mounted.
        for place in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            file = place / ("memory.limit_in_bytes" if controllers else "memory.max")
            with contextlib.suppress(OSError):
                text = file.read_text().strip()
                limits += [int(text)] if text.isdigit() else []
            if place == top:
                break
    return min(limits, default=None)


def _slurm() -> Slurm | None:
    """None where there is no SLURM."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return None
    job = os.environ.get("SLURM_JOB_ID")
    try:
        version = _ask("sinfo", "--version").stdout.strip() or None
        asked = _ask("sinfo", "--noheader", "--format=%R: %D nodes, %G")
    except subprocess.TimeoutExpired:
        return Slurm(None, False, f"sinfo gives no answer within {_SCHEDULER_LIMIT_S} s", job)
    if asked.returncode:
        return Slurm(version, False, asked.stderr.strip().rpartition("\n")[2], job)  # its last line is why
    return Slurm(version, True, "; ".join(asked.stdout.splitlines()), job)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_SCHEDULER_LIMIT_S)
