"""Fused models against PEFT's own modules."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    FalconH1Config,
    GemmaConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Qwen2Config,
)
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP

from distft.models.activation_checkpointing import checkpoint_layers
from distft.models.fused_lora import FusedMLP, fuse, fused_linears

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LAYERS = 2
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(7))
WHOLE = {"attention": LAYERS, "mlp": LAYERS, "linear": LAYERS}
"""What `fuse` finds with an adapter on all linears: in each layer q/k/v, the MLP, and the attention's output."""


def base_of(
    config: Any, folder: Path, *, bits: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A model with random weights, dense or quantised by bitsandbytes to 4 or 8 bits."""
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
    if config.model_type == "qwen2":  # zero biases, the default, would test nothing
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def adapted(base: Any, **options: Any) -> Any:
    """`base` with an adapter whose B is not zero, as after some training."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def learn(model: Any, *, seed: int = 3) -> dict[str, torch.Tensor]:
    """The loss of one step, and for every trained tensor its gradient and its value after the update."""
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
    """Compare tensors by relative norm. The order of fp32 operations alone has caused differences of 2e-6."""
    assert set(found) == set(expected) and len(found) > 2
    for name, tensor in expected.items():
        assert tensor.norm() > 0, f"{name} is zero, which tests nothing"
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


MODELS = [
    pytest.param(lambda: LlamaConfig(**SHAPE), id="llama"),
    pytest.param(lambda: LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True), id="llama with biases"),
    pytest.param(lambda: Qwen2Config(**SHAPE), id="qwen2"),
]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("config", MODELS)
def test_a_fused_model_learns_what_the_plain_model_learns(
    config: Callable[[], Any], bits: int, checkpointing: bool | None, tmp_path: Path
) -> None:
    plain = adapted(base_of(config(), tmp_path, bits=bits))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == WHOLE
    if checkpointing is not None:
        fused.enable_input_require_grads()
        fused.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_alike(learn(fused), learn(plain))


IN_ONE = {"attention": 0, "mlp": LAYERS, "linear": 2 * LAYERS}
"""With queries, keys and values in one linear, and gate and up in another."""
STILL = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
OTHERS = [
    pytest.param(lambda: GemmaConfig(**SHAPE, head_dim=16), WHOLE, id="gemma"),
    pytest.param(lambda: LlamaConfig(**SHAPE, hidden_act="gelu"), WHOLE, id="llama with gelu"),
    pytest.param(lambda: Phi3Config(**SHAPE, pad_token_id=0, partial_rotary_factor=0.5), IN_ONE, id="phi3"),
    pytest.param(
        lambda: GlmConfig(**SHAPE, head_dim=16, pad_token_id=0, attention_bias=True),
        {"attention": LAYERS, "mlp": LAYERS, "linear": LAYERS},
        id="glm",
    ),
    pytest.param(
        lambda: GPT2Config(n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=96, n_positions=64, **STILL),
        {"attention": 0, "mlp": 0, "linear": 4 * LAYERS},
        id="gpt2",
    ),
    pytest.param(
        lambda: FalconConfig(**SHAPE, bias=True, alibi=False, new_decoder_architecture=True),
        {"attention": 0, "mlp": 0, "linear": 4 * LAYERS},
        id="falcon",
    ),
]


@pytest.mark.parametrize(("bits", "checkpointed"), [(16, False), (4, True)], ids=["kept", "4 bits, checkpointed"])
@pytest.mark.parametrize(("config", "expected"), OTHERS)
def test_other_families(
    config: Callable[[], Any], expected: dict[str, int], bits: int, checkpointed: bool, tmp_path: Path
) -> None:
    plain = adapted(base_of(config(), tmp_path, bits=bits), target_modules="all-linear")
    fused = copy.deepcopy(plain)
    assert fuse(fused) == expected
    if checkpointed:
        checkpoint_layers(fused, LAYERS, offload=False)
        assert all(module.ends_checkpoint for module in fused.modules() if isinstance(module, FusedMLP))
    assert_alike(learn(fused), learn(plain))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_regenerates_the_dropout_masks(reentrant: bool, device: str, tmp_path: Path) -> None:
    kept = adapted(base_of(LlamaConfig(**SHAPE), tmp_path, device=device), lora_dropout=0.3)
    assert fuse(kept) == WHOLE
    checkpointed, other = copy.deepcopy(kept), copy.deepcopy(kept)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = learn(checkpointed)
    assert_alike(found, learn(kept))
    assert (found["loss"] - learn(other, seed=4)["loss"]).abs() > 1e-4, "the seed must decide what is dropped"


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("config", [MODELS[0], *(pytest.param(each.values[0], id=each.id) for each in OTHERS)])
def test_in_bf16_a_fused_model_is_as_close_to_fp32_as_the_plain_model(
    config: Callable[[], Any], options: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    """Under autocast, as in training. By the relative norm of the error of all gradients of several batches together;
    that of one batch is chance."""
    if options and bits == 8:
        pytest.skip("PEFT computes DoRA over 8 bits")
    options = {"target_modules": "all-linear", **options}
    exact = adapted(base_of(config(), tmp_path, bits=bits, device="cuda"), **options)
    plain = adapted(base_of(config(), tmp_path, bits=bits, dtype=torch.bfloat16, device="cuda"), **options)
    fused = copy.deepcopy(plain)
    assert any(fuse(fused).values()) and len(set(fused_linears(fused))) == 1
    sums = [0.0, 0.0, 0.0]
    for seed in range(8):
        ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(seed)).cuda()
        right = gradient(exact, ids)
        with torch.autocast(ids.device.type, torch.bfloat16):
            found = [gradient(model, ids) for model in (plain, fused)]
        for place, error in enumerate([right, *(each - right for each in found)]):
            sums[place] += float(error.square().sum())
    errors = [(part / sums[0]) ** 0.5 for part in sums[1:]]
    assert errors[1] < 1.5 * errors[0] < 0.2, f"fused {errors[1]:.4f}, plain {errors[0]:.4f}"


def gradient(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """That of all trained tensors, as one vector."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
    return torch.cat([part.flatten().double() for part in found])


def test_evaluation_mode_turns_dropout_off(tmp_path: Path) -> None:
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
        ({"use_dora": True}, {"attention": LAYERS, "mlp": 0, "linear": 4 * LAYERS}),
        ({"use_dora": True, "lora_dropout": 0.1}, NOTHING),
        ({"lora_bias": True}, NOTHING),
        ({"bias": "all"}, NOTHING),
        ({"bias": "lora_only"}, NOTHING),
    ],
    ids=lambda value: " ".join(value) if "attention" not in value else "",
)
def test_unsupported_adapters_are_left_alone(options: dict[str, Any], expected: dict[str, int], tmp_path: Path) -> None:
    """Such a model still learns what the plain one learns."""
    plain = adapted(base_of(LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True), tmp_path), **options)
    fused = copy.deepcopy(plain)
    assert fuse(fused) == expected
    assert_alike(learn(fused), learn(plain))


def test_linears_with_two_adapters_are_left_alone(tmp_path: Path) -> None:
    model = adapted(base_of(LlamaConfig(**SHAPE), tmp_path))
    model.add_adapter("second", LoraConfig(r=2, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"))
    assert fuse(model) == NOTHING


def test_an_mlp_with_another_activation_is_fused_linear_by_linear(tmp_path: Path) -> None:
    plain = adapted(base_of(LlamaConfig(**SHAPE, hidden_act="relu"), tmp_path))
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
def test_with_its_adapter_disabled_a_fused_model_is_the_base(bits: int, tmp_path: Path) -> None:
    base = base_of(LlamaConfig(**SHAPE), tmp_path, bits=bits)
    expected = logits(base)
    model = adapted(base)
    fuse(model)
    with_adapter = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), with_adapter)
    assert (with_adapter - expected).abs().max() > 0.01


def test_merging_and_unmerging(tmp_path: Path) -> None:
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


def test_a_copy_of_a_fused_model_is_independent(tmp_path: Path) -> None:
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


def test_a_group_keeps_nothing_once_all_outputs_are_taken(tmp_path: Path) -> None:
    """Outputs kept beyond their layer would cost memory, and could be returned after an update."""
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


def test_an_mlp_that_computes_more_is_fused_linear_by_linear() -> None:
    """Falcon-H1's MLP has the linears and the activation of Llama's, and multiplies twice."""
    config = FalconH1Config(hidden_size=16, intermediate_size=24, mlp_multipliers=[3.0, 0.5])
    torch.manual_seed(0)
    plain = get_peft_model(torch.nn.Sequential(FalconH1MLP(config)), LoraConfig(r=2, target_modules=MLP))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == {"attention": 0, "mlp": 0, "linear": 3}
    x = torch.randn(5, 16)
    torch.testing.assert_close(fused(x), plain(x))


def test_fusing_changes_no_name_and_no_parameter(tmp_path: Path) -> None:
    model = adapted(base_of(LlamaConfig(**SHAPE), tmp_path))
    before = dict(model.named_parameters()), set(dict(model.named_modules())), set(model.state_dict())
    assert fuse(model) == WHOLE
    after = dict(model.named_parameters())
    assert list(after) == list(before[0]) and all(after[name] is parameter for name, parameter in before[0].items())
    assert (set(dict(model.named_modules())), set(model.state_dict())) == before[1:]


def test_fused_modules_keep_the_input_of_a_norm_instead_of_its_output(tmp_path: Path) -> None:
    model = adapted(base_of(LlamaConfig(**SHAPE), tmp_path))
    fuse(model)
    layer = model.base_model.model.model.layers[0]
    norm, q_proj = layer.input_layernorm, layer.self_attn.q_proj
    x = torch.randn(1, 3, SHAPE["hidden_size"], requires_grad=True)
    y = norm(x)
    kept = norm.output.origin_of(y)
    assert kept.source is not None and kept.source.data_ptr() == x.data_ptr()
    assert q_proj.group.norm is norm.output and layer.mlp.norm is layer.post_attention_layernorm.output
    assert norm.output.origin_of(y.clone()).source is None
    del kept, y
    assert norm.output._source is None, "the input must not outlive the output"
