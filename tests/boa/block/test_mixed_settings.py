"""A block whose layers have schemes of their own."""

import pytest
import torch

from rotoboa.boa.scheme import QuantizationArgs, QuantizationScheme
from rotoboa.boa.solver.rounding_settings import Settings

from ..small_block import LLAMA, QUANTIZED, QUICK, Ran, run_small

# Hessians are factored once for all layers of a site, whatever their bits; starts and grids are of each.
BY_METHOD = {
    "gptq": QUICK.but(method="gptq", starts=2),
    "boa": QUICK.but(rows=2, starts=2, tabu=0.5),
    "zfold": QUICK.but(method="gptq", zfold=("output",)),
}


def ran(settings: Settings, **bits: int | QuantizationArgs) -> Ran:
    """With other bits, or weights, of some layers, by the names of `Family`."""
    args = {name: one if isinstance(one, QuantizationArgs) else QuantizationArgs(one) for name, one in bits.items()}
    schemes = {getattr(LLAMA, name): QuantizationScheme(one) for name, one in args.items()}
    return run_small(settings, QUANTIZED, schemes=schemes)


def same(mixed: Ran, alone: Ran, name: str) -> bool:
    ours, theirs = mixed.found.results[name], alone.found.results[name]
    parts = ((getattr(one, part) for one in (ours, theirs)) for part in ("integers", "scale", "zero"))
    return all(torch.equal(*pair) for pair in parts) and mixed.found.losses[name] == alone.found.losses[name]


@pytest.mark.parametrize("method", ["gptq", "boa"])
def test_queries_and_keys_are_solved_as_each_alone(method: str) -> None:
    settings = BY_METHOD[method]
    mixed = ran(settings, query=3, key=QuantizationArgs(4, 8))
    assert same(mixed, ran(settings.but(bits=3)), LLAMA.query)
    assert same(mixed, ran(settings.but(group_size=8)), LLAMA.key)
    assert not same(mixed, ran(settings), LLAMA.query)
    if method == "gptq":  # values have the same inputs; those of boa know how queries and keys were rounded
        assert same(mixed, ran(settings), LLAMA.value)


@pytest.mark.parametrize("method", ["gptq", "boa"])
def test_gate_and_up_are_solved_as_each_alone(method: str) -> None:
    settings = BY_METHOD[method]
    mixed = ran(settings, gate=2, up=8)
    assert same(mixed, ran(settings, gate=2, up=2), LLAMA.gate)
    assert same(mixed, ran(settings, gate=8, up=8), LLAMA.up)


def test_a_layer_of_16_bits_stays_and_is_not_solved() -> None:
    found = ran(BY_METHOD["gptq"], query=16, gate=16, down=16)
    left = (LLAMA.query, LLAMA.gate, LLAMA.down)
    assert not set(left) & set(found.found.results) and not set(left) & set(found.found.losses)
    for name in left:
        full, quantized = (m.get_parameter(f"{name}.weight") for m in (found.context.full, found.context.quantized))
        assert torch.equal(full, quantized)
    assert set(found.found.results) == set(LLAMA.projections) - set(left)
    assert same(found, ran(BY_METHOD["gptq"]), LLAMA.key)


def test_all_of_16_bits_change_nothing_but_what_runs_online() -> None:
    names = ("query", "key", "value", "output", "gate", "up", "down")
    found = run_small(QUICK, schemes={getattr(LLAMA, n): QuantizationScheme() for n in names}, follows_full=True)
    assert not found.found.results
    start = found.full - found.quantized
    assert start.abs().max() > 0, "the streams differed before the block"
    same_start = run_small(QUICK.but(alpha=0.0), schemes={getattr(LLAMA, n): QuantizationScheme() for n in names})
    assert torch.equal(same_start.quantized, found.quantized)


def test_z_fold_where_the_layers_of_a_site_differ() -> None:
    """Its scale goes into the layer before, which is quantized with groups and bits of its own."""
    found = ran(BY_METHOD["zfold"], value=8, output=2)
    assert "output" in found.found.channel_scales
    assert found.found.results[LLAMA.output].integers.max() == 3
    assert 15 < found.found.results[LLAMA.value].integers.max() <= 255


def test_a_whole_scheme_by_name_is_the_setting() -> None:
    names = ("query", "key", "value", "output", "gate", "up", "down")
    by_name = ran(BY_METHOD["boa"], **dict.fromkeys(names, 3))
    whole = ran(BY_METHOD["boa"].but(bits=3))
    assert all(same(by_name, whole, getattr(LLAMA, name)) for name in names)
    assert torch.equal(by_name.quantized, whole.quantized)
