"""The fused LoRA nodes against what they replace: autograd in float64, and PEFT's own modules in whole models."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear, silu
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconH1Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP

from distft.kernels.dropout import dropout
from distft.kernels.lora import LoraLinears, LoraMlp, Origin, Spec, TiledLoraMlp
from distft.models.fused_lora import fuse

SEEDS = (1234, 99)

# ---- the nodes in float64 --------------------------------------------------------------------------------------------


def parts(
    sizes: Sequence[tuple[int, int]], ranks: Sequence[int], scalings: Sequence[float], *, bias: bool
) -> tuple[tuple[Spec, ...], list[torch.Tensor | None], list[torch.Tensor]]:
    """Specs, tensors (weight, bias, A, B of each) and of these the trained ones, of linears of `sizes` (in, out)."""
    torch.manual_seed(0)
    specs, tensors, trained = [], [], []
    for (inputs, outputs), rank, scaling in zip(sizes, ranks, scalings, strict=True):
        specs.append(Spec(scaling, None, torch.float64))
        a = torch.randn(rank, inputs, dtype=torch.float64, requires_grad=True)
        b = torch.randn(outputs, rank, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(outputs, inputs, dtype=torch.float64)
        tensors += [weight, torch.randn(outputs, dtype=torch.float64) if bias else None, a, b]
        trained += [a, b]
    return tuple(specs), tensors, trained


def with_trained(tensors: Sequence[torch.Tensor | None], trained: Sequence[torch.Tensor]) -> list[Any]:
    """`tensors` with A and B of each linear taken from `trained`."""
    return [
        tensor if place % 4 < 2 else trained[place // 4 * 2 + place % 4 - 2] for place, tensor in enumerate(tensors)
    ]


def by_hand(x: torch.Tensor, scaling: float, parts: Sequence[Any], p: float, seed: int) -> torch.Tensor:
    """y = W x + bias + s B A dropout(x), written down for autograd."""
    weight, bias, a, b = parts
    dropped = dropout(x.reshape(-1, x.shape[-1]), p, seed).view(x.shape)
    return linear(x, weight, bias) + scaling * linear(linear(dropped, a), b)


LINEARS = [
    pytest.param([(5, 4)], [2], [0.5], id="one"),
    pytest.param([(5, 6), (5, 2), (5, 2)], [2, 2, 2], [2.0, 2.0, 2.0], id="queries, keys, values"),
    pytest.param([(5, 6), (5, 2), (5, 3)], [3, 1, 4], [0.25, 16.0, 1.0], id="ranks and scalings of their own"),
]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("sizes", "ranks", "scalings"), LINEARS)
def test_linears_have_the_gradients_of_finite_differences(
    sizes: list[tuple[int, int]], ranks: list[int], scalings: list[float], bias: bool, p: float
) -> None:
    specs, tensors, trained = parts(sizes, ranks, scalings, bias=bias)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def node(x: torch.Tensor, *trained: torch.Tensor) -> Any:
        return LoraLinears.apply(x, Origin(), specs, p, SEEDS[0], *with_trained(tensors, trained))

    assert torch.autograd.gradcheck(node, (x, *trained))
    for out, spec, place in zip(node(x, *trained), specs, range(0, len(tensors), 4), strict=True):
        expected = by_hand(x, spec.scaling, tensors[place : place + 4], p, SEEDS[0])
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def mlp(
    ranks: Sequence[int], scalings: Sequence[float], *, bias: bool
) -> tuple[tuple[Spec, ...], list[torch.Tensor | None], list[torch.Tensor]]:
    return parts([(4, 6), (4, 6), (6, 4)], ranks, scalings, bias=bias)


@pytest.mark.parametrize("p", [(0.0, 0.0), (0.3, 0.5)], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("ranks", "scalings"), [([2, 2, 2], [2.0, 2.0, 2.0]), ([1, 3, 2], [0.5, 4.0, 1.0])])
def test_the_mlp_has_the_gradients_of_finite_differences(
    ranks: list[int], scalings: list[float], bias: bool, p: tuple[float, float]
) -> None:
    specs, tensors, trained = mlp(ranks, scalings, bias=bias)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def node(x: torch.Tensor, *trained: torch.Tensor) -> Any:
        return LoraMlp.apply(x, Origin(), specs, p, SEEDS, *with_trained(tensors, trained))

    assert torch.autograd.gradcheck(node, (x, *trained))
    gate, up = (by_hand(x, specs[i].scaling, tensors[4 * i : 4 * i + 4], p[0], SEEDS[0]) for i in range(2))
    expected = by_hand(silu(gate) * up, specs[2].scaling, tensors[8:], p[1], SEEDS[1])
    torch.testing.assert_close(node(x, *trained), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [2, 4, 6, 9])
def test_the_mlp_in_tiles_is_the_mlp(tile: int) -> None:
    """Six tokens, in tiles that fill, leave a rest, or hold them all; and what a second forward without a result keeps will do."""
    specs, tensors, trained = mlp([2, 3, 1], [2.0, 0.5, 1.0], bias=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    none = (0.0, 0.0)
    whole = LoraMlp.apply(x, Origin(), specs, none, SEEDS, *with_trained(tensors, trained))
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (x, *trained), grad)
    for given in (True, False):
        tiled = TiledLoraMlp.apply(x, Origin(), given, tile, specs, none, SEEDS, *with_trained(tensors, trained))
        if given:
            torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
        for found, gradient in zip(torch.autograd.grad(tiled, (x, *trained), grad), expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_the_mlp_in_tiles_drops_the_same_places_in_its_backward() -> None:
    specs, tensors, trained = mlp([2, 3, 1], [2.0, 0.5, 1.0], bias=False)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def node(x: torch.Tensor, *trained: torch.Tensor) -> Any:
        return TiledLoraMlp.apply(x, Origin(), True, 4, specs, (0.3, 0.5), SEEDS, *with_trained(tensors, trained))

    assert torch.autograd.gradcheck(node, (x, *trained))


def test_an_output_that_nothing_uses_has_no_part_in_the_gradient() -> None:
    specs, tensors, trained = parts([(5, 6), (5, 2), (5, 2)], [2, 2, 2], [1.0, 1.0, 1.0], bias=False)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    query, _, value = LoraLinears.apply(x, Origin(), specs, 0.0, 0, *tensors)
    (query.sum() + (value**2).sum()).backward()
    assert all(tensor.grad is not None for tensor in trained)
    assert trained[2].grad.abs().max() == trained[3].grad.abs().max() == 0
    other = x.detach().clone().requires_grad_()
    of_hand = [by_hand(other, 1.0, tensors[4 * i : 4 * i + 4], 0.0, 0) for i in range(3)]
    (of_hand[0].sum() + (of_hand[2] ** 2).sum()).backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)


# ---- whole models against PEFT ---------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LAYERS = 2
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(7))
WHOLE = {"attention": LAYERS, "mlp": LAYERS, "linear": LAYERS}
"""What `fuse` finds in each layer of an adapter on all linears: q/k/v, the MLP, and the attention's output alone."""


def base_of(
    config: Any, folder: Path, *, bits: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A model of random weights, dense or with bitsandbytes' 4-bit or 8-bit ones."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    quantised = {
        8: BitsAndBytesConfig(load_in_8bit=True),
        4: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
    }
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantised.get(bits), device_map={"": device}
    )
    if config.model_type == "qwen2":  # biases start as zeros, which would hide them
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def adapted(base: Any, **options: Any) -> Any:
    """`base` with an adapter that has learned something already: B is not zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def learn(model: Any, *, seed: int = 3) -> dict[str, torch.Tensor]:
    """The loss of one step, and by name the gradient and the value after one update of every trained tensor."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(seed)
    ids = IDS.to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no gradient reaches {name}"
            found[f"gradient of {name}"] = parameter.grad.clone()
    optimizer.step()
    return found | {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Each tensor within `tolerance` of the other, relative in norm (fp32 in another order: 2e-6 was seen)."""
    assert set(found) == set(expected) and len(found) > 2
    for name, tensor in expected.items():
        assert tensor.norm() > 0, f"{name} is nothing to compare"
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


MODELS = [
    pytest.param(lambda: LlamaConfig(**SHAPE), id="llama"),
    pytest.param(lambda: LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True), id="llama with biases"),
    pytest.param(lambda: Qwen2Config(**SHAPE), id="qwen2"),
]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("config", MODELS)
def test_a_fused_model_learns_what_the_plain_one_does(
    config: Callable[[], Any], bits: int, checkpointing: bool | None, tmp_path: Path
) -> None:
    plain = adapted(base_of(config(), tmp_path, bits=bits))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == WHOLE
    if checkpointing is not None:
        fused.enable_input_require_grads()
        fused.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_alike(learn(fused), learn(plain))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_places_again(reentrant: bool, device: str, tmp_path: Path) -> None:
    kept = adapted(base_of(LlamaConfig(**SHAPE), tmp_path, device=device), lora_dropout=0.3)
    assert fuse(kept) == WHOLE
    checkpointed, other = copy.deepcopy(kept), copy.deepcopy(kept)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = learn(checkpointed)
    assert_alike(found, learn(kept))
    assert (found["loss"] - learn(other, seed=4)["loss"]).abs() > 1e-4, "the seed decides what is dropped"


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_in_bf16_a_fused_model_is_as_near_to_fp32_as_the_plain_one(bits: int, tmp_path: Path) -> None:
    """Of all gradients together, relative in norm."""
    exact = learn(adapted(base_of(LlamaConfig(**SHAPE), tmp_path, bits=bits, device="cuda")))
    plain = adapted(base_of(LlamaConfig(**SHAPE), tmp_path, bits=bits, dtype=torch.bfloat16, device="cuda"))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == WHOLE
    errors = []
    for model in (plain, fused):
        found, names = learn(model), [name for name in exact if name.startswith("gradient of")]
        differences = torch.stack([(found[name] - exact[name]).norm() for name in names])
        errors.append(float(differences.norm() / torch.stack([exact[name].norm() for name in names]).norm()))
    assert errors[1] < 1.5 * errors[0] < 0.1


def test_dropout_ends_with_training(tmp_path: Path) -> None:
    plain = adapted(base_of(LlamaConfig(**SHAPE), tmp_path), lora_dropout=0.5).eval()
    fused = copy.deepcopy(plain)
    fuse(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


NOTHING = {"attention": 0, "mlp": 0, "linear": 0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 1}}, WHOLE),
        ({"use_rslora": True}, WHOLE),
        ({"target_modules": ["q_proj", "v_proj"]}, {"attention": 0, "mlp": 0, "linear": 2 * LAYERS}),
        ({"target_modules": ["gate_proj", "up_proj"]}, {"attention": 0, "mlp": 0, "linear": 2 * LAYERS}),
        ({"layers_to_transform": [0]}, {"attention": 1, "mlp": 1, "linear": 1}),
        ({"modules_to_save": ["lm_head"]}, WHOLE),
        ({"use_dora": True}, NOTHING),
        ({"lora_bias": True}, NOTHING),
        ({"bias": "all"}, NOTHING),
        ({"bias": "lora_only"}, NOTHING),
    ],
    ids=lambda value: " ".join(value) if "attention" not in value else "",
)
def test_what_the_nodes_do_not_know_is_left_alone(
    options: dict[str, Any], expected: dict[str, int], tmp_path: Path
) -> None:
    """And learns what it would have learned."""
    plain = adapted(base_of(LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True), tmp_path), **options)
    fused = copy.deepcopy(plain)
    assert fuse(fused) == expected
    assert_alike(learn(fused), learn(plain))


def test_linears_with_two_adapters_are_left_alone(tmp_path: Path) -> None:
    model = adapted(base_of(LlamaConfig(**SHAPE), tmp_path))
    model.add_adapter("second", LoraConfig(r=2, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"))
    assert fuse(model) == NOTHING


def test_an_mlp_of_another_activation_is_fused_linear_by_linear(tmp_path: Path) -> None:
    plain = adapted(base_of(LlamaConfig(**SHAPE, hidden_act="gelu"), tmp_path))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == {"attention": LAYERS, "mlp": 0, "linear": 4 * LAYERS}
    assert_alike(learn(fused), learn(plain))


def test_a_frozen_base_without_an_adapter_is_left_alone(tmp_path: Path) -> None:
    assert fuse(base_of(LlamaConfig(**SHAPE), tmp_path)) == NOTHING


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("bits", [16, 4])
def test_without_its_adapter_it_is_the_base(bits: int, tmp_path: Path) -> None:
    base = base_of(LlamaConfig(**SHAPE), tmp_path, bits=bits)
    expected = logits(base)
    model = adapted(base)
    fuse(model)
    with_adapter = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), with_adapter)
    assert (with_adapter - expected).abs().max() > 0.01


def test_merging_and_taking_it_back(tmp_path: Path) -> None:
    model = adapted(base_of(LlamaConfig(**SHAPE), tmp_path))
    fuse(model)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert isinstance(merged, LlamaForCausalLM)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_fused_model_is_a_model_of_its_own(tmp_path: Path) -> None:
    model = adapted(base_of(LlamaConfig(**SHAPE), tmp_path))
    fuse(model)
    expected, other = logits(model), copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with model.disable_adapter():
        base = logits(model)
    torch.testing.assert_close(logits(other), base, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), expected)


def test_siblings_keep_nothing_once_all_have_their_outputs(tmp_path: Path) -> None:
    """A kept input would cost memory beyond its layer, and meet the next pass with outputs of before the update."""
    model = adapted(base_of(LlamaConfig(**SHAPE), tmp_path))
    fuse(model)
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 3, SHAPE["hidden_size"])
    outputs = []
    with torch.no_grad():
        for _ in range(2):
            outputs.append([getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")])
            for parameter in model.parameters():
                parameter.data *= 1.01
    assert all(not torch.equal(before, after) for before, after in zip(*outputs, strict=True))
    kept = weakref.ref(x)
    del x
    assert kept() is None


def test_an_mlp_that_does_more_is_fused_linear_by_linear() -> None:
    """Falcon-H1's has the linears and the activation of Llama's, and multiplies twice."""
    config = FalconH1Config(hidden_size=16, intermediate_size=24, mlp_multipliers=[3.0, 0.5])
    torch.manual_seed(0)
    plain = get_peft_model(torch.nn.Sequential(FalconH1MLP(config)), LoraConfig(r=2, target_modules=MLP))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == {"attention": 0, "mlp": 0, "linear": 3}
    x = torch.randn(5, 16)
    torch.testing.assert_close(fused(x), plain(x))
