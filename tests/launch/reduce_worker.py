"""A worker that meets the others over gloo, and leaves its rank's file in the working folder."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
number = torch.ones(1)
distributed.all_reduce(number)
Path(f"rank-{os.environ['RANK']}").write_text(str(number.item()))
distributed.destroy_process_group()
