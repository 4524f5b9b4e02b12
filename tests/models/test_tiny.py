"""The tiny model can be built by any process."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..distributed.conftest import on_two_ranks

PROGRAM = """
import json, os
import torch.distributed as dist
from distft.models import tiny

dist.init_process_group("gloo")
tiny.STEPS = 1
if dist.get_rank() == 0:
    dist.barrier()
folder = tiny.tiny_model()
if dist.get_rank() == 1:
    dist.barrier()
print(json.dumps(str(folder)))
dist.destroy_process_group()
"""


def test_a_rank_other_than_the_first_may_be_the_one_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path))
    (folder,) = set(on_two_ranks(PROGRAM))
    assert Path(folder).parent == tmp_path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.config.model_type, model.dtype.itemsize) == ("llama", 4)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
