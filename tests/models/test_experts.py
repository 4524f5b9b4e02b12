"""Experts in 4 bits, with adapters, in grouped products: what they compute, and what is said of them before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.config.recipe import Recipe, load_recipe
from distft.data.loader import Collator
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.tensors import is_packed
from distft.distributed.world import World
from distft.errors import InvariantError
from distft.kernels.grouped import Routing
from distft.models.checks import model_faults
from distft.models.experts import Experts, fuses_experts
from distft.models.export import merge
from distft.models.fused_lora import use_plain_modules
from distft.models.isolation import IsolationCheck
from distft.models.loading import load_base, load_model
from distft.models.parameters import non_embedding_parameters
from distft.models.saved_adapter import load_trained

from .families import saved

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
FOUR = ("quantization.load_in_4bit=true", "quantization.bnb_4bit_compute_dtype=float32")
TARGETS = "lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
IDS = torch.randint(5, 200, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.distributed.strategies.selection.visible_devices", lambda: 0)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("mixtral", tmp_path_factory.mktemp("models") / "mixtral")


def recipe_for(base: Path, *words: str) -> Recipe:
    common = ("recipe=tiny", "strategy=single", "model.dtype=float32", "lora.lora_dropout=0.0", "lora.r=4")
    return load_recipe([*common, f"model.name={base}", "lora.target_modules=[q_proj,o_proj]", *words])


def loaded(recipe: Recipe) -> Any:
    """The model with an adapter that is not zero."""
    model = load_model(recipe, choose(recipe, World(), {}, Launcher()))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def learn(model: Any) -> list[torch.Tensor]:
    """The logits and the gradient of the adapter."""
    model.zero_grad()
    ids = IDS.to(next(model.parameters()).device)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    trained = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    assert all(part.any() for part in trained)
    return [out.logits.detach(), torch.cat(trained)]


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, expected, strict=True)]


@pytest.mark.parametrize("bits", [FOUR, ("quantization=null",)], ids=["4", "16"])
def test_grouped_products_compute_what_transformers_and_peft_do(base: Path, bits: tuple[str, ...]) -> None:
    model = loaded(recipe_for(base, TARGETS, *bits))
    packed = [name for name, parameter in model.named_parameters() if is_packed(parameter) and ".experts." in name]
    assert len(packed) == (4 if bits is FOUR else 0) and fuses_experts(model)
    found = learn(model)
    use_plain_modules(model)
    model.get_base_model().set_experts_implementation("eager")
    assert max(errors(found, learn(model))) < 2e-6
    assert max(errors(found, learn(loaded(recipe_for(base, TARGETS, *bits, "model.kernels=plain"))))) < 2e-6


@pytest.mark.parametrize("base", ["qwen3_moe", "gpt_oss"], indirect=True)
def test_4_bits_are_those_of_dequantised_weights_and_survive_a_merge(base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, TARGETS, *FOUR)
    model = loaded(recipe)
    found = learn(model)
    dense = learn(loaded(recipe_for(base, TARGETS, *FOUR, "quantization.dequantize_at_load=true")))
    original = learn(loaded(recipe_for(base, TARGETS, "quantization=null")))
    assert max(errors(found, dense)) < 2e-6 and min(errors(found, original)) > 0.01
    model.save_pretrained(tmp_path / "adapter")
    again = load_trained(recipe, tmp_path / "adapter")
    merge(recipe, tmp_path / "adapter", tmp_path / "merged")
    merged = load_trained(recipe_for(base, "quantization=null"), tmp_path / "merged")
    with torch.no_grad():
        for other in (again, merged):
            assert max(errors([other(IDS).logits], found[:1])) < 1e-4


def test_only_the_packed_weights_outlive_a_product(mixtral: Path) -> None:
    """Nothing that autograd keeps is as large as a dense weight."""
    model = loaded(recipe_for(mixtral, TARGETS, *FOUR))
    dense = min(m.states[name].shape.numel() for m in model.modules() if isinstance(m, Experts) for name in m.states)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.ndim == 3 and tensor.shape[0] == 4 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS)
    assert kept and max(kept) < dense


@pytest.mark.parametrize("wrong", ["sum", "sorted"])
def test_the_check_before_step_1_finds_grouped_products_that_are_wrong(
    wrong: str, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = IsolationCheck(loaded(recipe_for(mixtral, TARGETS, *FOUR)))
    packs, right = Collator(0, packed=True), getattr(Routing, wrong)
    assert check.findings(packs, "sdpa").fault is None
    monkeypatch.setattr(Routing, wrong, lambda routing, x: right(routing, x) * 1.01)
    fault = check.findings(packs, "sdpa").fault
    assert fault is not None and "alone" in fault
    assert check.findings(packs, "sdpa", plain=True).fault is None
    assert check._model.get_base_model().config._experts_implementation == "grouped_mm"


def test_model_flops_count_the_experts_of_a_token(mixtral: Path) -> None:
    found = [non_embedding_parameters(loaded(recipe_for(mixtral, *words))) for words in ((), (TARGETS,))]
    plain = load_model(recipe_for(mixtral, *FOUR), choose(recipe_for(mixtral), World(), {}, Launcher()))
    others = sum(p.numel() for name, p in plain.named_parameters() if "experts" not in name and not is_packed(p))
    others += 2 * (2 * 32 * 32 + 2 * 16 * 32) - plain.get_input_embeddings().weight.numel()
    of_experts, adapters = 2 * 4 * 3 * 32 * 48, 2 * 4 * 4 * (32 + 96 + 48 + 32)
    assert found == [others + of_experts // 2, others + (of_experts + adapters) // 2]
    assert non_embedding_parameters(plain) == found[0]


def test_what_is_quantised_and_what_trains_is_known_before(base: Path) -> None:
    recipe = recipe_for(base, TARGETS, *FOUR)
    faults, _, _, expected = model_faults(recipe)
    assert faults == [] and expected is not None and expected.weights is not None
    assert 0.9 < expected.weights.share < 1 and expected.weights.in_experts > 0.4
    (line,) = expected.lines(recipe)[1:]
    assert "of the linear weights in 4 bits" in line
    model = load_model(recipe, choose(recipe, World(), {}, Launcher()), expected.weights.require)
    expected.require(model)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    with pytest.raises(InvariantError, match="parameters of the loaded model train"):
        expected.require(model)


def test_a_model_that_was_loaded_otherwise_is_found(mixtral: Path) -> None:
    expected = model_faults(recipe_for(mixtral, *FOUR)).expected
    left = recipe_for(mixtral, *FOUR, "quantization.experts=false")
    assert expected is not None and expected.weights is not None
    with pytest.raises(InvariantError, match=r"0 of the 12,288 elements in mlp\.experts\.down_proj were quantised"):
        load_model(left, choose(left, World(), {}, Launcher()), expected.weights.require)


def test_a_quantisation_that_misses_the_experts_must_be_asked_for(mixtral: Path) -> None:
    eight = ("quantization.load_in_4bit=false", "quantization.load_in_8bit=true")
    (fault,) = model_faults(recipe_for(mixtral, *eight)).faults
    assert fault.key == "quantization.experts"
    assert "8 bits reach 14% of the linear weights" in fault.problem and "mlp.experts.gate_up_proj" in fault.problem
    for bits in (eight, FOUR):
        asked = model_faults(recipe_for(mixtral, *bits, "quantization.experts=false"))
        assert asked.faults == [] and asked.expected is not None and asked.expected.weights is not None
        assert asked.expected.weights.share < 0.3
        assert "mlp.experts.gate_up_proj, mlp.experts.down_proj" in asked.expected.lines(recipe_for(mixtral, *bits))[1]


def test_all_linear_says_whether_experts_get_an_adapter(base: Path) -> None:
    words = ("lora.target_modules=all-linear", "quantization=null")
    expected = model_faults(recipe_for(base, *words)).expected
    model = load_model(recipe_for(base, *words), choose(recipe_for(base), World(), {}, Launcher()))
    assert expected is not None
    expected.require(model)
    (note,) = expected.lines(recipe_for(base, *words))[1:]
    theirs = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and "lora_" in name)
    if theirs:
        assert f"adapts experts, too: {theirs:,} trained parameters are theirs" in note
    else:
        assert "puts no adapter on experts" in note
        assert "lora.target_parameters=[mlp.experts.down_proj, mlp.experts.gate_up_proj]" in note
    assert bool(theirs) == (base.name != "gpt_oss")


@pytest.mark.parametrize(
    ("words", "key", "problem"),
    [
        (["lora.target_parameters=[mlp.experts.up_gate_proj]"], "lora.target_parameters", "matches no parameter"),
        ([TARGETS, "lora.lora_dropout=0.1"], "lora.lora_dropout", "adapters on the parameters of experts"),
        ([TARGETS, "lora.use_dora=true"], "lora.use_dora", "adapters on the parameters of experts"),
        (
            ["lora.target_modules=all-linear", "lora.lora_dropout=0.1"],
            "lora.lora_dropout",
            "adapters on the parameters",
        ),
        ([TARGETS, "strategy=zero3"], "lora.target_parameters", "ZeRO-3 gathers a weight when its module is called"),
        (["model.name=tiny", "model.experts_implementation=eager"], "model.experts_implementation", "has no experts"),
    ],
)
def test_mistakes_with_experts(words: list[str], key: str, problem: str, mixtral: Path) -> None:
    (fault,) = model_faults(recipe_for(mixtral, "quantization=null", *words)).faults
    assert fault.key == key and problem in fault.problem


def test_weights_in_mxfp4_are_unpacked_and_not_quantised_again(tmp_path: Path) -> None:
    """As gpt-oss is stored: 32 values in E2M1 share an exponent."""
    folder = saved("gpt_oss", tmp_path / "gpt_oss")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in weights if ".experts." in name]:
        tensor, rows = weights.pop(name), 64 if "gate_up" in name else 32
        if name.endswith("_bias"):
            weights[name] = tensor[:, :rows].contiguous()
        else:
            blocks = torch.randint(256, (4, rows, 1, 16), generator=generator).to(torch.uint8)
            weights |= {f"{name}_blocks": blocks, f"{name}_scales": torch.full((4, rows, 1), 126, dtype=torch.uint8)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (fault,) = model_faults(recipe_for(folder, *FOUR)).faults
    assert "is stored in mxfp4, which bitsandbytes cannot quantise again" in fault.problem
    base = load_base(recipe_for(folder, "quantization=null"))
    dense = base.model.layers[0].mlp.experts.gate_up_proj
    assert dense.shape == (4, 32, 64) and dense.dtype == torch.float32
    assert {*dense.abs().unique().tolist()} == {0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3}


def of_experts(module: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """What the first experts of a model give for random tokens and scores, and the gradients."""
    device, generator = next(module.parameters()).device, torch.Generator().manual_seed(3)
    x = torch.randn(64, 32, generator=generator).to(torch.bfloat16).to(device, dtype).requires_grad_()
    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(64)]).to(device)
    scores = torch.rand(64, 2, generator=generator).to(torch.bfloat16).to(device, dtype).requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    out = module(x, experts, scores)
    weights = torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(device, dtype)
    return [part.detach().float() for part in (out, *torch.autograd.grad((out * weights).sum(), [x, scores, *trained]))]


@pytest.mark.parametrize("bits", [FOUR, ("quantization=null",)], ids=["4", "16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_bf16_grouped_products_are_as_close_to_fp32_as_transformers(
    device: str, bits: tuple[str, ...], base: Path
) -> None:
    half = ("model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16" if bits is FOUR else bits[0])
    exact = "quantization.dequantize_at_load=true" if bits is FOUR else bits[0]
    model = loaded(recipe_for(base, TARGETS, *bits, *half)).to(device)
    reference = loaded(recipe_for(base, TARGETS, *bits, *half, exact, "model.kernels=plain")).float().to(device)
    experts = model.get_base_model().model.layers[0].mlp.experts
    expected = of_experts(reference.get_base_model().model.layers[0].mlp.experts, torch.float32)
    ours = errors(of_experts(experts, torch.bfloat16), expected)
    use_plain_modules(model)
    model.get_base_model().set_experts_implementation("eager")
    theirs = errors(of_experts(experts, torch.bfloat16), expected)
    assert fuses_experts(loaded(recipe_for(base, TARGETS, *bits, *half))) and max(theirs) < 0.05
    assert all(our < 1.5 * their + 1e-3 for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [FOUR, ("quantization=null",)], ids=["4", "16"])
def test_in_fp32_a_gpu_computes_the_same(bits: tuple[str, ...], base: Path) -> None:
    model = loaded(recipe_for(base, TARGETS, *bits)).cuda()
    assert fuses_experts(model)
    found = learn(model)
    use_plain_modules(model)
    model.get_base_model().set_experts_implementation("eager")
    apart = errors(found, learn(model))
    assert max(apart) < 1e-5, apart
