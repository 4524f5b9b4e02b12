"""The LoRA nodes against autograd and finite differences, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from distft.kernels.dropout import dropout
from distft.kernels.elementwise import ACTIVATIONS
from distft.kernels.lora import LoraLinears, LoraMlp, Origin, Spec, TiledLoraMlp

SEEDS = (1234, 99)


def parts(
    sizes: Sequence[tuple[int, int]], ranks: Sequence[int], scalings: Sequence[float], *, bias: bool
) -> tuple[tuple[Spec, ...], list[torch.Tensor | None], list[torch.Tensor]]:
    """Specs, tensors (weight, bias, A, B of each) and the trained tensors of linears with `sizes` (in, out)."""
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
    """`tensors` with A and B of each linear replaced by those in `trained`."""
    return [
        tensor if place % 4 < 2 else trained[place // 4 * 2 + place % 4 - 2] for place, tensor in enumerate(tensors)
    ]


def by_hand(x: torch.Tensor, scaling: float, parts: Sequence[Any], p: float, seed: int) -> torch.Tensor:
    """y = W x + bias + s B A dropout(x), for autograd to differentiate."""
    weight, bias, a, b = parts
    dropped = dropout(x.reshape(-1, x.shape[-1]), p, seed).view(x.shape)
    return linear(x, weight, bias) + scaling * linear(linear(dropped, a), b)


LINEARS = [
    pytest.param([(5, 4)], [2], [0.5], id="one"),
    pytest.param([(5, 6), (5, 2), (5, 2)], [2, 2, 2], [2.0, 2.0, 2.0], id="queries, keys, values"),
    pytest.param([(5, 6), (5, 2), (5, 3)], [3, 1, 4], [0.25, 16.0, 1.0], id="different ranks and scalings"),
]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("sizes", "ranks", "scalings"), LINEARS)
def test_linears_match_autograd_and_finite_differences(
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [(0.0, 0.0), (0.3, 0.5)], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("ranks", "scalings"), [([2, 2, 2], [2.0, 2.0, 2.0]), ([1, 3, 2], [0.5, 4.0, 1.0])])
def test_the_mlp_matches_autograd_and_finite_differences(
    ranks: list[int], scalings: list[float], bias: bool, p: tuple[float, float], activation: str
) -> None:
    specs, tensors, trained = mlp(ranks, scalings, bias=bias)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def node(x: torch.Tensor, *trained: torch.Tensor) -> Any:
        return LoraMlp.apply(x, Origin(), activation, specs, p, SEEDS, *with_trained(tensors, trained))

    assert torch.autograd.gradcheck(node, (x, *trained))
    gate, up = (by_hand(x, specs[i].scaling, tensors[4 * i : 4 * i + 4], p[0], SEEDS[0]) for i in range(2))
    expected = by_hand(ACTIVATIONS[activation](gate) * up, specs[2].scaling, tensors[8:], p[1], SEEDS[1])
    torch.testing.assert_close(node(x, *trained), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [(0.0, 0.0), (0.3, 0.5)], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("tile", [None, 4], ids=["whole", "tiled"])
def test_an_mlp_whose_gate_and_up_are_one_linear(tile: int | None, p: tuple[float, float]) -> None:
    specs, tensors, trained = parts([(4, 12), (6, 4)], [3, 2], [2.0, 0.5], bias=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def node(x: torch.Tensor, *trained: torch.Tensor) -> Any:
        given = ("gelu", specs, p, SEEDS, *with_trained(tensors, trained))
        return (
            LoraMlp.apply(x, Origin(), *given) if tile is None else TiledLoraMlp.apply(x, Origin(), True, tile, *given)
        )

    assert torch.autograd.gradcheck(node, (x, *trained))
    if tile is None:
        gate, up = by_hand(x, specs[0].scaling, tensors[:4], p[0], SEEDS[0]).chunk(2, -1)
        expected = by_hand(ACTIVATIONS["gelu"](gate) * up, specs[1].scaling, tensors[4:], p[1], SEEDS[1])
        torch.testing.assert_close(node(x, *trained), expected, rtol=1e-12, atol=1e-12)


def test_what_the_nodes_return_can_be_changed_in_place() -> None:
    """As models do with queries and keys. Autograd refuses it for views that a node has made."""
    specs, tensors, _ = parts([(5, 6), (5, 2)], [2, 2], [1.0, 1.0], bias=False)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = [2 * out for out in LoraLinears.apply(x, Origin(), specs, 0.0, 0, *tensors)]
    found = [out.mul_(2) for out in LoraLinears.apply(x, Origin(), specs, 0.0, 0, *tensors)]
    for each, other in zip(found, expected, strict=True):
        assert torch.equal(each, other)
    gradients = [torch.autograd.grad(sum(out.sum() for out in outs), x)[0] for outs in (found, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("tile", [2, 4, 6, 9])
def test_the_tiled_mlp_matches_the_mlp(tile: int) -> None:
    """Six tokens in tiles that divide six, do not, or exceed it; also after a forward without a result."""
    specs, tensors, trained = mlp([2, 3, 1], [2.0, 0.5, 1.0], bias=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    none = (0.0, 0.0)
    whole = LoraMlp.apply(x, Origin(), "silu", specs, none, SEEDS, *with_trained(tensors, trained))
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (x, *trained), grad)
    for given in (True, False):
        tiled = TiledLoraMlp.apply(
            x, Origin(), given, tile, "silu", specs, none, SEEDS, *with_trained(tensors, trained)
        )
        if given:
            torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
        for found, gradient in zip(torch.autograd.grad(tiled, (x, *trained), grad), expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_the_tiled_mlp_regenerates_its_dropout_masks_in_the_backward() -> None:
    specs, tensors, trained = mlp([2, 3, 1], [2.0, 0.5, 1.0], bias=False)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def node(x: torch.Tensor, *trained: torch.Tensor) -> Any:
        return TiledLoraMlp.apply(
            x, Origin(), True, 4, "silu", specs, (0.3, 0.5), SEEDS, *with_trained(tensors, trained)
        )

    assert torch.autograd.gradcheck(node, (x, *trained))


def test_every_tile_of_the_mlp_drops_elements_of_its_own() -> None:
    """Three tiles of the same two rows: with one mask for all tiles, their outputs would be the same."""
    specs, tensors, trained = mlp([2, 3, 1], [2.0, 0.5, 1.0], bias=False)
    rows, p = torch.randn(2, 4, dtype=torch.float64), (0.3, 0.5)
    x = rows.repeat(3, 1).requires_grad_()
    out = TiledLoraMlp.apply(x, Origin(), True, 2, "silu", specs, p, SEEDS, *tensors)
    tiles = out.detach().split(2)
    assert not any(torch.equal(tiles[one], tiles[other]) for one, other in [(0, 1), (0, 2), (1, 2)])

    # Each tile is the MLP with seeds of its own, forward and backward.
    weights = torch.randn(6, 4, dtype=torch.float64)
    of_tiles = torch.autograd.grad(out, (x, *trained), weights)
    y = rows.repeat(3, 1).requires_grad_()
    parts_of_y = zip(y.split(2), [(SEEDS[0] + tile, SEEDS[1] + tile) for tile in range(3)], strict=True)
    expected = torch.cat(
        [LoraMlp.apply(part, Origin(), "silu", specs, p, seeds, *tensors) for part, seeds in parts_of_y]
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for found, gradient in zip(of_tiles, torch.autograd.grad(expected, (y, *trained), weights), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_an_unused_output_contributes_nothing_to_the_gradients() -> None:
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


def test_the_backward_computes_in_its_own_types_under_autocast() -> None:
    x, a, b = torch.randn(6, 5, requires_grad=True), torch.randn(2, 5), torch.randn(4, 2)
    tensors = [torch.randn(4, 5), None, a.requires_grad_(), b.requires_grad_()]
    out = LoraLinears.apply(x, Origin(), (Spec(0.5, None, torch.float32),), 0.0, 1, *tensors)[0].square().sum()
    expected = torch.autograd.grad(out, [x, a, b], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, [x, a, b])
    assert all(map(torch.equal, found, expected))
