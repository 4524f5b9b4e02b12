"""The section `slurm` of a recipe: the job of `distft submit`."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator, Field

from distft.config.schema import PROCESSES, SECONDS, Section
from distft.text import parse_duration

_WORD = r"^[^\s\"'\\\\`$]+$"  # goes verbatim into an #SBATCH line, or between double quotes in the script
_TIME = r"^(\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|unlimited|INFINITE|infinite|-1)$"
_ARRAY = r"^\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?$"
_NUMBER_AS_TEXT = BeforeValidator(  # YAML reads `90` as a number
    lambda value: str(value) if type(value) is int else value, json_schema_input_type=int | str
)


class Slurm(Section):
    """The job of `distft submit`, under sbatch's own names; null leaves a choice to the cluster. Does not affect what
    is learned, so it may change between two starts of a run."""

    account: str | None = Field(None, pattern=_WORD)
    """Account to charge."""
    partition: str | None = Field(None, pattern=_WORD)
    """Partition, or several separated by commas."""
    qos: str | None = Field(None, pattern=_WORD)
    """Quality of service."""
    nodes: int = Field(1, ge=1, json_schema_extra={"unit": "nodes"})
    """Number of nodes."""
    gpus_per_node: int | None = Field(None, ge=1, json_schema_extra={"unit": "GPUs"})
    """GPUs per node; each gets one process."""
    gres: str | None = Field(None, pattern=_WORD)
    """Generic resources per node, for clusters that name GPUs this way: `gpu:h100-47:2`."""
    processes_per_node: int | None = Field(None, ge=1, json_schema_extra=PROCESSES)
    """Processes per node; null for one per GPU, or one without GPUs."""
    cpus_per_task: int | None = Field(None, ge=1, json_schema_extra={"unit": "CPU cores"})
    """CPU cores per node: each node runs one task, which launches its processes."""
    mem: Annotated[str, Field(pattern=_WORD), _NUMBER_AS_TEXT] | None = None
    """Memory per node, such as `200G`, in MiB without a unit; `0` for all."""
    time: Annotated[str, Field(pattern=_TIME), _NUMBER_AS_TEXT] | None = None
    """Time limit for one start of the job, in one of sbatch's forms: `minutes`, `minutes:seconds`,
    `hours:minutes:seconds`, `days-hours`, `days-hours:minutes`, `days-hours:minutes:seconds`, or `UNLIMITED`. The run
    may take several starts."""
    constraint: str | None = Field(None, pattern=_WORD)
    """Features that the nodes must have."""
    exclude: str | None = Field(None, pattern=_WORD)
    """Nodes to exclude."""
    reservation: str | None = Field(None, pattern=_WORD)
    """Reservation to use."""
    array: Annotated[str, Field(pattern=_ARRAY), _NUMBER_AS_TEXT] | None = None
    """For an experiment: which runs to start, counted from 0, and how many at a time, in sbatch's syntax: `0-7%2`,
    `0,3,5-9` or `0-8:4`; null for all."""
    dependency: str | None = Field(None, pattern=_WORD)
    """When the job may start: `afterok:1234` for a chain, or `singleton`."""
    container: str | None = Field(None, pattern=_WORD)
    """Container image with distft, passed to srun's --container-image (Pyxis and enroot)."""
    container_mounts: list[Annotated[str, Field(pattern=_WORD)]] = []
    """Mounts of the container besides the working folder: `source:target`."""
    modules: list[Annotated[str, Field(pattern=_WORD)]] = []
    """Environment modules to load."""
    setup: list[Annotated[str, Field(pattern=r"^[^\n\r]*$")]] = []
    """Shell lines to run on the first node after loading the modules; all nodes see the variables they export."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Environment variables for all processes. No secrets: export them, and sbatch passes them on."""
    grace_s: int = Field(120, ge=30, json_schema_extra=SECONDS)
    """How long before the time limit the run receives the signal to save and stop. Leave enough time for a save; SLURM
    may send the signal 30 s early."""
    max_requeues: int = Field(20, ge=0)
    """How often an unfinished job goes back into the queue."""

    @property
    def time_s(self) -> float | None:
        """The time limit in seconds; None for no limit. sbatch rounds it up to whole minutes, and takes 0 for no
        limit."""
        if self.time is None or not self.time[0].isdigit():
            return None
        return math.ceil(parse_duration(self.time) / 60) * 60 or None
