"""Facts about this machine: packages, GPUs and the links between them, memory, disks, SLURM, logins.

Tolerates packages that cannot be imported, and never records the value of a secret.
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
from distft.doctor.network import Host, host

_GIB = 2**30
NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "nvidia-ml-py")
_MODULES = {"nvidia-ml-py": "pynvml", "liger-kernel": "liger_kernel", "flash-attn": "flash_attn"}
OPTIONAL = ("deepspeed", "wandb", "triton", "liger-kernel", "flash-attn")
_SCHEDULER_LIMIT_S = 15


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees, with torch's index."""

    index: int
    name: str
    memory_gib: float
    capability: tuple[int, int]
    supported: bool = True
    """Whether this build of torch has code for it."""
    free_gib: float | None = None
    nvlinks: int | None = None
    """Active links; None if the driver does not report them."""


@dataclass(frozen=True)
class Pair:
    """How two GPUs are connected. `path` is NVLink, or the PCIe path as `nvidia-smi topo -m` names it."""

    first: int
    second: int
    peer_to_peer: bool
    path: str | None = None
    why_off: str | None = None


@dataclass(frozen=True)
class Disk:
    """Space in a folder that distft writes to; `path` may not exist yet."""

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
    """ID of the job that this process runs in."""


@dataclass(frozen=True)
class Facts:
    """What is known about a machine; None for unknown or absent. Sizes are in GiB (2**30 bytes)."""

    python: str
    platform: str
    cpus: int
    memory_gib: float
    available_gib: float
    packages: Mapping[str, str]
    """Versions of the packages that can be imported."""
    broken: Mapping[str, str] = field(default_factory=dict)
    """Why a package that is installed or required cannot be imported."""
    requirements: Mapping[str, str] = field(default_factory=dict)
    """Version specifiers of distft's own requirements."""
    memory_limit_gib: float | None = None
    """Limit of the control group, set by a container or SLURM."""
    shm_gib: float | None = None
    disks: tuple[Disk, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    """The newest CUDA version that the driver supports."""
    driver_gpus: int = 0
    """Number of GPUs that the driver sees, regardless of CUDA_VISIBLE_DEVICES."""
    driver_error: str | None = None
    cuda: str | None = None
    """The CUDA version that torch was built for; None for a CPU build."""
    cuda_error: str | None = None
    nccl: str | None = None
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[Pair, ...] = ()
    attention: tuple[str, ...] = ()
    bitsandbytes: str | None = None
    """The library that bitsandbytes loaded."""
    bitsandbytes_error: str | None = None
    compiler: str | None = None
    slurm: Slurm | None = None
    interfaces: tuple[str, ...] = ()
    host: Host | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of NCCL, gloo and CUDA."""
    wandb_key: bool | None = None
    hub_token: bool | None = None
    hub_offline: bool | None = None
    bandwidth: Bandwidth | None = None


def gather(*, bandwidth: bool = True) -> Facts:
    """Collect the facts. Takes about half a minute, mostly for imports. `bandwidth` also starts processes to measure
    it."""
    found: dict[str, Any] = {}
    output = io.StringIO()  # discards what libraries print; exceptions are kept
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        packages, broken = _packages()
        if bandwidth and "torch" in packages:  # first: a GPU in exclusive mode is still free then
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
        python=platform.python_version(),
        platform=platform.platform(),
        cpus=len(os.sched_getaffinity(0)),
        memory_gib=memory.total / _GIB,
        available_gib=memory.available / _GIB,
        memory_limit_gib=limit / _GIB if limit is not None and limit < memory.total else None,
        packages=packages,
        broken=broken,
        requirements=_requirements(),
        shm_gib=shutil.disk_usage(shm).total / _GIB if shm.is_dir() else None,
        disks=(_disk("working folder", Path.cwd()), *found.pop("caches", ())),
        compiler=shutil.which(os.environ.get("CXX", "c++")),
        slurm=_slurm(),
        interfaces=tuple(psutil.net_if_addrs()),
        host=host(),
        variables={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"))
        },
        **found,
    )


def _packages() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the packages that can be imported, and why others cannot. Optional packages count only if
    installed."""
    versions, broken = {}, {}
    for name in (*NEEDED, *OPTIONAL):
        module = _MODULES.get(name, name)
        if name in OPTIONAL and importlib.util.find_spec(module) is None:
            continue
        try:
            version = getattr(importlib.import_module(module), "__version__", None)
        except Exception as error:  # a broken installation can raise anything
            broken[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            versions[name] = str(version or importlib.metadata.version(name))
    return versions, broken


def _requirements() -> dict[str, str]:
    """Package → version specifier, as in `pyproject.toml`; empty if distft runs without being installed."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in importlib.metadata.requires("distft") or ()]
    except ImportError:  # includes PackageNotFoundError
        return {}
    return {one.name: str(one.specifier) for one in requirements if one.marker is None and str(one.specifier)}


def _driver() -> dict[str, Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
            "driver_gpus": pynvml.nvmlDeviceGetCount(),
        }
    except pynvml.NVMLError_LibraryNotFound:
        return {}
    except pynvml.NVMLError as error:  # such as a driver upgraded under a running kernel module
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
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):  # raises at the first link that does not exist
            links += pynvml.nvmlDeviceGetNvLinkState(handle, link)
    supported = supports(torch.cuda.get_arch_list(), capability)
    return Gpu(index, properties.name, properties.total_memory / _GIB, capability, supported, free, links)


def supports(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures (`sm_90`, `compute_120`) runs on a GPU of this capability.

    Machine code (`sm`) runs on the same major version with an equal or higher minor version, PTX (`compute`) on any
    later version. True if the build does not list its architectures.
    """
    if not architectures:
        return True
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        version = divmod(int(number.rstrip("af")), 10)
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def _handle(index: int) -> Any:
    """NVML's handle for torch's device; their indices differ under CUDA_VISIBLE_DEVICES."""
    import pynvml
    import torch

    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


_PATHS = {0: "same board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}  # NVML_TOPOLOGY_*
_WHY_OFF = {  # NVML_P2P_STATUS_*
    1: "the chipset does not support it",
    2: "these GPUs do not support it",
    3: "they are on different I/O hubs",
    4: "disabled in the driver",
    5: "not supported",
}


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
        # Index 0 is read access; pynvml's constant for it is a tuple because of a stray comma.
        why = None if on else _WHY_OFF.get(pynvml.nvmlDeviceGetP2PStatus(*ends, 0))
    return Pair(first, second, on, path, why)


def _bitsandbytes() -> dict[str, Any]:
    from bitsandbytes.cextension import lib

    if library := upstream_api.bitsandbytes_library():
        return {"bitsandbytes": library}
    return {"bitsandbytes_error": str(vars(lib).get("error_msg", "no library could be loaded"))}


def _hugging_face() -> dict[str, Any]:
    """Facts that need the whole stack to be imported."""
    import torch
    from huggingface_hub import constants
    from transformers.utils import is_flash_attn_2_available

    from distft.models.varlen import VARLEN, kernel
    from distft.paths import cache_folder
    from distft.runs.wandb import has_wandb_key

    token = Path(constants.HF_TOKEN_PATH)
    attention = [VARLEN] if torch.cuda.is_available() and kernel() is not None else []
    attention += ["flash_attention_2"] if is_flash_attn_2_available() else []
    in_file = token.is_file() and token.stat().st_size > 0
    return {
        "attention": ("sdpa", *attention),
        "wandb_key": has_wandb_key(),
        "hub_offline": constants.is_offline_mode(),
        "hub_token": in_file or any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")),
        "caches": (_disk("hub cache", Path(constants.HF_HUB_CACHE)), _disk("distft cache", cache_folder())),
    }


def _disk(use: str, path: Path) -> Disk:
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    usage = shutil.disk_usage(there)
    return Disk(use, str(path), usage.total / _GIB, usage.free / _GIB, os.access(there, os.W_OK))


def memory_limit(root: Path) -> int | None:
    """The smallest memory limit, in bytes, of this process's control groups; None without one.

    `root` is the folder that contains `proc` and `sys`.
    """
    groups = root / "proc" / "self" / "cgroup"
    limits = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys" / "fs" / "cgroup" / controllers  # version 2 has a single tree
        # In a container the path may be the host's, while the group is mounted at the top.
        for place in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            file = place / ("memory.limit_in_bytes" if controllers else "memory.max")
            with contextlib.suppress(OSError):
                text = file.read_text().strip()
                limits += [int(text)] if text.isdigit() else []
            if place == top:
                break
    return min(limits, default=None)


def _slurm() -> Slurm | None:
    """None without SLURM."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return None
    job = os.environ.get("SLURM_JOB_ID")
    try:
        version = _run("sinfo", "--version").stdout.strip() or None
        sinfo = _run("sinfo", "--noheader", "--format=%R: %D nodes, %G")
    except subprocess.TimeoutExpired:
        return Slurm(None, False, f"sinfo did not respond within {_SCHEDULER_LIMIT_S} s", job)
    if sinfo.returncode:
        return Slurm(version, False, sinfo.stderr.strip().rpartition("\n")[2], job)  # the last line is the reason
    return Slurm(version, True, "; ".join(sinfo.stdout.splitlines()), job)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=_SCHEDULER_LIMIT_S)
