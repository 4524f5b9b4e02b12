"""On a GPU, models train in packs with a fast kernel, and the check of the samples of a pack sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.utils import is_flash_attn_2_available

from distft.config.recipe import load_recipe
from distft.data.loader import Collator
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.models import attention
from distft.models.isolation import IsolationCheck, set_attention
from distft.models.loading import load_base, load_model, load_tokenizer
from distft.models.prefix import on_gpu
from distft.models.unpacked import UNPACKED
from distft.models.varlen import VARLEN, varlen_attention
from distft.training.micro_batches import settle

from .families import adapted, saved, small_model
from .matrix import reference_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is preferred to PyTorch's kernels"),
]
PACKS, PADDED = Collator(0, packed=True), Collator(0, packed=False)
BF16 = ("recipe=tiny", "strategy=single", "model.dtype=bfloat16", "training.bf16=true", "lora.lora_dropout=0")
WORDS = {
    "bf16": (*BF16, "quantization=null"),
    "4 bits": (*BF16, "quantization.load_in_4bit=true", "quantization.bnb_4bit_compute_dtype=bfloat16"),
}
EXPECTED = {
    "llama": VARLEN,
    "gpt_oss": VARLEN,  # sinks and windows
    "mistral": VARLEN,  # a window
    "gemma3_text": VARLEN,
    "minicpm3": VARLEN,  # values of another size
    "youtu": VARLEN,
    "phi": VARLEN,  # LayerNorm, which returns fp32 under autocast
    "starcoder2": VARLEN,
    "gpt_neox": VARLEN,
    "nemotron": VARLEN,  # layers that pass no boundaries on
    "stablelm": VARLEN,
    "gemma2": UNPACKED,  # soft-capping
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model of a family."""
    return lambda family: saved(family, tmp_path_factory.mktemp(family))


def learn(model: Any, batch: dict[str, Any], precision: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of all next tokens, and the gradient of the adapter as one vector."""
    inputs = {key: value.cuda() if torch.is_tensor(value) else value for key, value in batch.items()}
    labels = inputs.pop("labels")[:, 1:].flatten()
    with torch.autocast("cuda", precision, enabled=precision is not None):
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([part.float().flatten() for part in found])


@pytest.mark.parametrize("bits", WORDS)
@pytest.mark.parametrize("family", EXPECTED)
def test_packs_learn_as_padded_rows_by_plain_modules(family: str, bits: str, folder_of: Callable[[str], Path]) -> None:
    model_words = (f"model.name={folder_of(family)}", "lora.target_modules=all-linear")
    recipe = load_recipe([*WORDS[bits], *model_words, "batching.micro_batch_tokens=600"])
    strategy = choose(recipe, World(), {}, Launcher())
    model = load_model(recipe, strategy)
    found = settle(model, recipe, strategy, load_tokenizer(recipe), np.array([14]))
    assert found.facts["attn_implementation"] == EXPECTED[family], found.notes
    assert found.recipe.batching.micro_batch_tokens == 600
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.train()
    loss, gradient = learn(model, PACKS(rows()), torch.bfloat16)
    reference = reference_of(model).eval()
    if bits == "bf16":
        reference = reference.float()
    expected, theirs = learn(reference, PADDED(rows()), None if bits == "bf16" else torch.bfloat16)
    errors = float(loss / expected - 1), float((gradient - theirs).norm() / theirs.norm())
    assert abs(errors[0]) < 3e-3 and errors[1] < 5e-2, (errors, found.facts)


@pytest.mark.parametrize("family", ["afmoe", "deepseek_v3", "opt", "ctrl", "mixtral"])
def test_other_models_get_the_kernel_too(family: str, folder_of: Callable[[str], Path]) -> None:
    """Experts, whose routers decide otherwise by rounding, and models with dropout are not compared here."""
    model_words = (f"model.name={folder_of(family)}", "lora.target_modules=all-linear")
    recipe = load_recipe([*WORDS["bf16"], *model_words, "batching.micro_batch_tokens=600"])
    strategy = choose(recipe, World(), {}, Launcher())
    found = settle(load_model(recipe, strategy), recipe, strategy, load_tokenizer(recipe), np.array([14]))
    assert found.facts["attn_implementation"] == VARLEN, found.notes
    assert found.recipe.batching.micro_batch_tokens == 600


def rows() -> list[dict[str, Any]]:
    samples = [[(7 * number + 3 * place) % 120 + 5 for place in range(size)] for number, size in enumerate((9, 14, 5))]
    return [{"input_ids": tokens, "labels": tokens} for tokens in samples]


def llama_7b(layers: int, folder: Path) -> Path:
    """A folder with a model of Llama-2-7B's widths."""
    with torch.device("cuda"):
        config = LlamaConfig(num_hidden_layers=layers, intermediate_size=11_008)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_7b(3, tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("bits", WORDS)
@pytest.mark.parametrize("device", ["cuda", "cpu"], ids=["on the GPU", "short copy of a model on the CPU"])
def test_a_wide_model_raises_no_alarm(bits: str, device: str, wide: Path) -> None:
    attention.register()
    recipe = load_recipe([*WORDS[bits], f"model.name={wide}"])
    base = load_base(recipe, device_map={"": device if device == "cpu" else 0}, attn_implementation=VARLEN)
    model = on_gpu(adapted(base))
    found = IsolationCheck(model, precision=torch.bfloat16).findings(PACKS, VARLEN)
    assert found.fault is None and max(found.errors.values()) < 0.03, found


WRONG = {"bloom": "eager", "falcon_alibi": "sdpa", "jamba": VARLEN, "recurrent_gemma": VARLEN, "minimax": VARLEN}


@pytest.mark.parametrize("family", WRONG)
def test_samples_that_see_each_other_in_packs_are_found(family: str) -> None:
    attention.register()
    check = IsolationCheck(adapted(small_model(family).bfloat16()).cuda(), precision=torch.bfloat16)
    assert check.findings(PACKS, WRONG[family]).fault is not None
    assert check.findings(PADDED, "eager" if family == "bloom" else "sdpa").fault is None


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("gpt_oss", "s_aux"), ("gpt_oss", "sliding_window"), ("mistral", "sliding_window")],
    ids=lambda value: value,
)
def test_a_kernel_that_leaves_out_a_feature_is_found(family: str, left_out: str) -> None:
    def without(*args: Any, **options: Any) -> Any:
        return varlen_attention(*args, **{key: value for key, value in options.items() if key != left_out})

    attention.register()
    AttentionInterface.register("without", without)
    model = adapted(small_model(family).bfloat16(), exclude_modules=["router"]).cuda()
    check = IsolationCheck(model, precision=torch.bfloat16)
    assert check.findings(PACKS, VARLEN).fault is None
    fault = check.findings(PACKS, "without").fault
    assert fault is not None and "logits" in fault


def test_a_kernel_that_lacks_dropout_is_found() -> None:
    attention.register()
    model = adapted(small_model("gpt2").bfloat16()).cuda()
    check = IsolationCheck(model, precision=torch.bfloat16)
    assert "dropout" in str(check.findings(PACKS, VARLEN).fault)
    assert set_attention(model, "sdpa") and check.findings(PACKS, "sdpa").fault is None
