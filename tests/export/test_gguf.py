"""GGUF files by llama.cpp's converter, quantised, and read by a real llama.cpp: breaks are named at their stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.config.recipe import Recipe
from distft.export import gguf
from distft.export.distance import Predictions
from distft.export.proof import Proof
from distft.export.run import Trained, prove_gguf, write_modelfile
from distft.export.sides import TransformersSide

from .conftest import TEMPLATE

pytest.importorskip("xllamacpp", reason="needs the extra export")


@pytest.fixture(scope="module")
def file(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    gguf.convert(merged, path, "float32")
    return path


@pytest.fixture(scope="module")
def in_transformers(trained: Trained, merged: Path) -> list[Predictions]:
    return TransformersSide.load(merged).predictions(trained.replays.items)


def stages(proof: Proof) -> dict[str, bool | None]:
    return {stage.name: stage.passed for stage in proof.stages}


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_weights_answer_in_llama_cpp_as_in_training(
    kind: str,
    file: Path,
    trained: Trained,
    recipe: Recipe,
    merged: Path,
    in_transformers: list[Predictions],
    tmp_path: Path,
) -> None:
    """Prompts come from Ollama's template, which renders those of the training."""
    made = tmp_path / f"tiny-{kind}.gguf"
    assert "ggml" in gguf.quantise(file, made, kind)
    assert made.stat().st_size < file.stat().st_size * (0.35 if kind == "q8_0" else 0.25)
    in_ollama = write_modelfile(trained, recipe, made, merged)
    proof = prove_gguf(trained, file, made, kind, [], in_transformers, in_ollama=in_ollama)
    assert stages(proof) == dict.fromkeys(("template", "tokenizer", "quantise", "engine"), True), proof.lines()
    by_name = {stage.name: stage for stage in proof.stages}
    engine, quantised = by_name["engine"].distance, by_name["quantise"].distance
    assert engine is not None and quantised is not None
    assert engine.kl.value < 1e-4 < quantised.largest
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert f"FROM ./tiny-{kind}.gguf\n" in text and 'PARAMETER stop "</s>"\n' in text
    assert "PARAMETER num_ctx 1024\n" in text, "the positions of the model"
    assert "{{ if not .System }}Be kind.\n{{ end }}{{ range .Messages }}" in text


def write_field(path: Path, name: str, value: Any) -> None:
    import gguf as library

    library.GGUFReader(path, "r+").fields[name].parts[-1][0] = value


def test_a_swapped_rope_theta_in_the_file_is_found_in_the_engine(
    file: Path, trained: Trained, in_transformers: list[Predictions], tmp_path: Path
) -> None:
    broken = Path(shutil.copy(file, tmp_path / "broken.gguf"))
    write_field(broken, "llama.rope.freq_base", 50.0)
    proof = prove_gguf(trained, broken, broken, "f32", [], in_transformers)
    assert proof.broken is not None and proof.broken.name == "engine"
    assert stages(proof) == {"template": True, "tokenizer": True, "engine": False}


def in_two_bits(encode: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def encoded(values: Any, kind: Any) -> Any:
        if values.shape[0] == 2048:  # the embedding and the output head
            blocks = values.reshape(-1, 32)
            low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
            step = np.maximum((high - low) / 3, 1e-9)
            values = (low + np.round((blocks - low) / step) * step).reshape(values.shape)
        return encode(values, kind)

    return encoded


def test_an_output_head_of_two_bits_is_found_in_quantising(
    file: Path,
    trained: Trained,
    in_transformers: list[Predictions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = gguf._by_ggml
    monkeypatch.setattr(gguf, "_by_ggml", lambda: in_two_bits(real()))
    gguf.quantise(file, made := tmp_path / "tiny-q8_0.gguf", "q8_0")
    proof = prove_gguf(trained, file, made, "q8_0", [], in_transformers)
    assert proof.broken is not None and proof.broken.name == "quantise"
    assert stages(proof)["engine"] is True
    assert "at most 0.02 expected" in proof.broken.found


def test_a_doubled_bos_is_found_in_the_file(
    file: Path, trained: Trained, in_transformers: list[Predictions], tmp_path: Path
) -> None:
    """The file has llama.cpp add the token, and the template, which writes it twice, loses only one."""
    import gguf as library

    broken = tmp_path / "broken.gguf"
    reader = library.GGUFReader(file)
    writer = library.GGUFWriter(broken, "llama")
    template = "{{ bos_token }}" + TEMPLATE
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "tokenizer.chat_template"):
            continue
        inner = field.types[-1] if field.types[0] == library.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_add_bos_token(True)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    proof = prove_gguf(trained, broken, broken, "f32", [], in_transformers)
    assert proof.broken is not None and proof.broken.name == "template", proof.lines()
    assert "'<s><s>Be kind" in proof.broken.found
