"""One block of a small random Llama: streams, results and objectives against plain forward passes and formulas."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rotoboa.boa import units as block_module
from rotoboa.boa.activations import DynamicQuantizer
from rotoboa.boa.attention import NAME, AttentionTransform, set_attention
from rotoboa.boa.block import BlockQuantizer
from rotoboa.boa.objective import Objective
from rotoboa.boa.rounding import LAYERWISE, Quantized, Settings, quantize
from rotoboa.boa.transforms import InputTransform, OnlineTransforms
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES
from rotoboa.rotation.hadamard import Hadamard
from rotoboa.rotation.rotate import Rotations

LLAMA = FAMILIES["llama"]
HIDDEN, FFN, HEADS, KEY_HEADS, SIZE, SEQUENCES, LENGTH = 32, 24, 4, 2, 8, 3, 20
SHAPES = {
    LLAMA.query: (HEADS * SIZE, HIDDEN),
    LLAMA.key: (KEY_HEADS * SIZE, HIDDEN),
    LLAMA.value: (KEY_HEADS * SIZE, HIDDEN),
    LLAMA.output: (HIDDEN, HEADS * SIZE),
    LLAMA.gate: (FFN, HIDDEN),
    LLAMA.up: (FFN, HIDDEN),
    LLAMA.down: (HIDDEN, FFN),
}
QUICK = Settings(bits=4, refine=1, starts=1)
PLAIN = OnlineTransforms()
ROTATED = OnlineTransforms(
    down=InputTransform(Hadamard.of(FFN)), attention=AttentionTransform(rotation=Hadamard.of(SIZE))
)


def _w4a4kv4() -> OnlineTransforms:
    tokens, cache = DynamicQuantizer(4, True, 0.9), DynamicQuantizer(4, False, 0.95)
    site = InputTransform(quantizer=tokens)
    return OnlineTransforms(
        site,
        site,
        site,
        InputTransform(Hadamard.of(FFN), tokens),
        AttentionTransform(Hadamard.of(SIZE), cache, cache),
    )


QUANTIZED = _w4a4kv4()


def _decoder() -> Decoder:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
    )
    return Decoder(config, attention=NAME)


def _tensors(seed: int = 0) -> dict[str, Tensor]:
    """Weights that make attention sharp; the norms multiply by something else than 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(s, generator=generator) * 1.5 / s[1] ** 0.5 for name, s in SHAPES.items()}
    for name in (LLAMA.attention_norm, LLAMA.mlp_norm):
        tensors[f"{name}.weight"] = 0.5 + torch.rand(HIDDEN, generator=generator)
    return tensors


def _block(decoder: Decoder, transforms: OnlineTransforms, seed: int = 0) -> nn.Module:
    """With the folded half of R4 where the transforms have the other."""
    rotations = Rotations(decoder.shape, r4=transforms.down.rotation)
    return decoder.block(0, rotations.rotate_block(_tensors(seed), LLAMA, 0))


def _streams(apart: float = 0.1) -> tuple[Tensor, Tensor]:
    """Hidden states (sequences, length, hidden), correlated, some channels large; the quantized ones a bit off."""
    generator = torch.Generator().manual_seed(5)
    full = torch.randn(SEQUENCES, LENGTH, 12, generator=generator) @ torch.randn(12, HIDDEN, generator=generator) / 3
    full = full + 0.3 * torch.randn(full.shape, generator=generator)
    full[..., 3] *= 6
    return full, full + apart * torch.randn(full.shape, generator=generator)


@dataclass
class Ran:
    """A block quantizer that has run, and what became of the streams."""

    solver: BlockQuantizer
    full: Tensor
    quantized: Tensor


def _run(
    settings: Settings = QUICK,
    transforms: OnlineTransforms = PLAIN,
    *,
    batch: int = 2,
    done: dict[str, Quantized] | None = None,
    report: Callable[[str, float], None] | None = None,
) -> Ran:
    decoder = _decoder()
    block = _block(decoder, transforms)
    solver = BlockQuantizer(decoder, block, settings, transforms, batch=batch, done=done, report=report)
    full, quantized = _streams()
    solver.run(full, quantized)
    return Ran(solver, full, quantized)


def _forward(block: nn.Module, hidden: Tensor, transforms: OnlineTransforms, *, exact: bool, batch: int = 2) -> Tensor:
    """One block as transformers runs it, the transforms put beside its layers; `exact` leaves the quantizers out."""
    sites = {
        LLAMA.query: transforms.qkv,
        LLAMA.key: transforms.qkv,
        LLAMA.value: transforms.qkv,
        LLAMA.output: transforms.output,
        LLAMA.gate: transforms.gate_up,
        LLAMA.up: transforms.gate_up,
        LLAMA.down: transforms.down,
    }
    handles = []
    for name, site in sites.items():
        function = site.rotate if exact else site
        hook = lambda _, args, function=function: function(args[0])  # noqa: E731
        handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    attention = AttentionTransform(transforms.attention.rotation) if exact else transforms.attention
    set_attention(block.get_submodule(LLAMA.attention), attention)
    decoder = _decoder()
    with torch.no_grad():
        output = torch.cat([decoder.run(block, part) for part in hidden.split(batch)])
    for handle in handles:
        handle.remove()
    return output


# streams and results


@pytest.mark.parametrize("transforms", [PLAIN, ROTATED, QUANTIZED], ids=["plain", "rotated", "w4a4kv4"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("drift", [True, False])
def test_streams_are_forward_passes(drift: bool, sequential: bool, method: str, transforms: OnlineTransforms) -> None:
    ran = _run(replace(QUICK, method=method, sequential=sequential, drift=drift), transforms)
    full, quantized = _streams()
    block = _block(_decoder(), transforms)
    # float32 throughout; values are of order 10.
    torch.testing.assert_close(ran.full, _forward(block, full, transforms, exact=True), rtol=0, atol=1e-5)
    expected = _forward(ran.solver.quantized, quantized, transforms, exact=False)
    torch.testing.assert_close(ran.quantized, expected, rtol=0, atol=1e-5)
    assert (ran.full - ran.quantized).abs().max() > 0.01


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
def test_results(method: str, group_size: int | None) -> None:
    reported: list[tuple[str, float]] = []
    settings = replace(QUICK, method=method, group_size=group_size)
    solver = _run(settings, QUANTIZED, report=lambda *seen: reported.append(seen)).solver
    assert list(solver.results) == list(solver.losses) == list(LLAMA.projections)
    assert reported == list(solver.losses.items())
    original = _block(_decoder(), QUANTIZED)
    for name, (rows, columns) in SHAPES.items():
        result, weight = solver.results[name], solver.quantized.get_parameter(f"{name}.weight")
        assert result.integers.shape == (rows, columns) and result.integers.dtype == torch.uint8
        assert result.scale.shape == result.zero.shape == (rows, columns // (group_size or columns))
        assert int(result.integers.max()) <= 15
        assert torch.equal(weight, result.dequantize())
        given = original.get_parameter(f"{name}.weight")
        assert torch.equal(solver.full.get_parameter(f"{name}.weight"), given), "the full block was written to"
        # Rows and heads in their places: others than its own would be 1.4 away. The target moves by some of this.
        assert (weight - given).norm() < 0.5 * given.norm()
        assert 0 < solver.losses[name] < 0.2
    for name in (LLAMA.attention_norm, LLAMA.mlp_norm):
        assert torch.equal(solver.quantized.get_parameter(f"{name}.weight"), _tensors()[f"{name}.weight"])


@pytest.mark.parametrize("transforms", [PLAIN, QUANTIZED], ids=["plain", "w4a4kv4"])
@pytest.mark.parametrize("sequential", [True, False])
def test_going_on_from_results_gives_the_same_bits(sequential: bool, transforms: OnlineTransforms) -> None:
    settings = replace(QUICK, sequential=sequential)
    first = _run(settings, transforms)
    again = _run(settings, transforms, done=first.solver.results)
    assert torch.equal(again.full, first.full) and torch.equal(again.quantized, first.quantized)
    assert list(again.solver.results) == list(first.solver.results)
    for name, result in first.solver.results.items():
        other = again.solver.results[name]
        assert torch.equal(other.integers, result.integers)
        assert torch.equal(other.scale, result.scale) and torch.equal(other.zero, result.zero)
        weights = [ran.solver.quantized.get_parameter(f"{name}.weight") for ran in (first, again)]
        assert torch.equal(*weights)


def test_the_quantized_copy_shares_weights_until_they_are_replaced() -> None:
    decoder = _decoder()
    block = _block(decoder, PLAIN)
    before = {name: weight.clone() for name, weight in block.named_parameters()}
    solver = BlockQuantizer(decoder, block, QUICK, PLAIN, batch=2)
    for name, weight in solver.quantized.named_parameters():
        assert weight is not block.get_parameter(name) and weight.data_ptr() == block.get_parameter(name).data_ptr()
    solver.run(*_streams())
    projections = {f"{name}.weight" for name in decoder.family.projections}
    for name, weight in before.items():
        assert torch.equal(block.get_parameter(name), weight)
        assert torch.equal(solver.quantized.get_parameter(name), weight) == (name not in projections)


def test_values_without_the_output_projection() -> None:
    """aespa's own objective of the values; whatever comes before them is as it was."""
    settings = Settings(bits=2, method="aespa", refine=1, starts=1, iterations=20)
    with_output, without = (_run(replace(settings, value_output=on)).solver.results for on in (True, False))
    for name in (LLAMA.query, LLAMA.key):
        assert torch.equal(with_output[name].integers, without[name].integers)
    assert not torch.equal(with_output[LLAMA.value].integers, without[LLAMA.value].integers)


@pytest.mark.parametrize("transforms", [PLAIN, QUANTIZED], ids=["plain", "w4a4kv4"])
@pytest.mark.parametrize(("method", "start"), [("aespa", "boa"), ("adaround", "gptq")])
def test_learned_rounding_lowers_the_loss_of_every_layer(method: str, start: str, transforms: OnlineTransforms) -> None:
    """In the first layers, whose statistics no earlier choice of integers has changed."""
    settings = Settings(bits=2, refine=2, starts=1, iterations=200, learning_rate=0.05)
    learned, plain = (_run(replace(settings, method=name), transforms).solver.losses for name in (method, start))
    assert list(learned) == list(LLAMA.projections)
    before, after = (losses[LLAMA.query] + losses[LLAMA.key] for losses in (plain, learned))
    assert after < before


def test_twice_is_the_same() -> None:
    first, second = _run(transforms=QUANTIZED), _run(transforms=QUANTIZED)
    assert torch.equal(first.quantized, second.quantized)
    for name, result in first.solver.results.items():
        assert torch.equal(result.integers, second.solver.results[name].integers)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batch_size_does_not_matter(batch: int) -> None:
    """Sums over tokens come in another order, so that a rounding at the brink may fall the other way: 1 % of them."""
    first, second = _run(batch=2), _run(batch=batch)
    torch.testing.assert_close(first.full, second.full, rtol=0, atol=1e-5)
    differing = total = 0
    for name, result in first.solver.results.items():
        other = second.solver.results[name]
        differing += int((result.integers != other.integers).sum())
        total += result.integers.numel()
    assert differing <= 0.01 * total
    assert (first.quantized - second.quantized).norm() < 0.02 * first.quantized.norm()


# objectives


@dataclass
class Met:
    """Attention written out, float64: queries and keys after RoPE, A, and the input of the output projection."""

    query: Tensor
    key: Tensor
    probabilities: Tensor
    attended: Tensor


def _attention(block: nn.Module, x: Tensor, cache: DynamicQuantizer | None = None) -> Met:
    cos, sin = (part.double() for part in _decoder().position_embeddings(LENGTH))

    def heads(name: str) -> Tensor:
        return (x @ block.get_parameter(f"{name}.weight").double().T).unflatten(-1, (-1, SIZE)).transpose(1, 2)

    query, key = apply_rotary_pos_emb(heads(LLAMA.query), heads(LLAMA.key), cos, sin)
    key = key if cache is None else cache(key)
    group = HEADS // KEY_HEADS
    logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) / SIZE**0.5
    a = (logits + torch.full((LENGTH, LENGTH), -torch.inf).triu(1)).softmax(-1)
    attended = a @ heads(LLAMA.value).repeat_interleave(group, 1)
    return Met(query, key, a, attended.transpose(1, 2).flatten(-2))


def _normed(block: nn.Module, name: str, x: Tensor) -> Tensor:
    weight = block.get_parameter(f"{name}.weight").double()
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _turned_back(gram: Tensor) -> Tensor:
    """(1/L) sum of R_l^T G R_l, R_l made from transformers' RoPE of unit vectors."""
    cos, sin = (part.double() for part in _decoder().position_embeddings(LENGTH))
    units = torch.eye(SIZE, dtype=torch.float64)[None, :, None].expand(1, SIZE, LENGTH, SIZE)
    turned = apply_rotary_pos_emb(units, units, cos, sin)[0][0].permute(1, 2, 0)
    return torch.stack([r.T @ gram @ r for r in turned]).mean(0)


def _sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum over sequences and tokens of outer products."""
    return left.reshape(-1, left.shape[-1]).double().T @ right.reshape(-1, right.shape[-1]).double()


def _weights(stream: Tensor, on: bool) -> Tensor:
    """One over the root mean square of every token of the residual stream, or ones: a factor of each side of a sum."""
    return stream.square().mean(-1, keepdim=True).rsqrt() if on else torch.ones_like(stream[..., :1])


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _near(found: Tensor | None, expected: Tensor) -> None:
    """float32 sums of 60 products: 1e-5 of the largest."""
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("transforms", [PLAIN, ROTATED], ids=["plain", "rotated"])
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_objectives(
    weighted: bool, drift: bool, sequential: bool, transforms: OnlineTransforms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the projections are solved for, against the table of the method, written out on the streams."""
    solved: list[tuple[Tensor, Objective]] = []

    def spy(weight: Tensor, objective: Objective, settings: Settings) -> Quantized:
        solved.append((weight, objective))
        return quantize(weight, objective, settings)

    monkeypatch.setattr(block_module, "quantize", spy)
    # 2 bits: errors large enough to tell the streams apart.
    settings = replace(QUICK, bits=2, method="boa", sequential=sequential, drift=drift, token_weights=weighted)
    solver = _run(settings, transforms).solver
    full, rounded = _block(_decoder(), transforms), solver.quantized
    (qk, v, o, gate_up, down) = (objective for _, objective in solved)
    names = ((LLAMA.query, LLAMA.key), (LLAMA.value,), (LLAMA.output,), (LLAMA.gate, LLAMA.up), (LLAMA.down,))
    for (weight, _), group in zip(solved, names, strict=True):
        stacked = torch.cat([full.get_parameter(f"{name}.weight") for name in group])
        assert torch.equal(weight.flatten(0, 1), stacked)

    hf, hq = (stream.double() for stream in _streams())
    xf, xq = (_normed(full, LLAMA.attention_norm, h) for h in (hf, hq))
    exact, half, given = _attention(full, xf), _attention(full, xq), _attention(rounded, xq)

    _near(qk.h_in, _sum(xq, xq)[None])
    _near(qk.residual, _sum(xf - xq, xq)[None])
    assert qk.drift is None and gate_up.drift is None and v.residual is None
    met = []
    for h in range(HEADS):
        met.append(_turned_back(_sum(half.key[:, h // 2], half.key[:, h // 2])))
    for g in range(KEY_HEADS):
        met.append(_turned_back(_total(_sum(half.query[:, h], half.query[:, h]) for h in (2 * g, 2 * g + 1))))
    _near(qk.h_out, torch.stack(met))

    seen = given if sequential else half
    h_in, h_out, residual = [], [], []
    output = full.get_parameter(f"{LLAMA.output}.weight").double()
    for g in range(KEY_HEADS):
        pair = (2 * g, 2 * g + 1)
        y = {h: seen.probabilities[:, h] @ xq for h in pair}
        h_in.append(_total(_sum(y[h], y[h]) for h in pair))
        residual.append(_total(_sum(exact.probabilities[:, h] @ xf - y[h], y[h]) for h in pair))
        parts = [output[:, h * SIZE : (h + 1) * SIZE] for h in pair]
        h_out.append(_total(part.T @ part for part in parts))
    _near(v.h_in, torch.stack(h_in))
    _near(v.h_out, torch.stack(h_out))
    value = full.get_parameter(f"{LLAMA.value}.weight").double().unflatten(0, (KEY_HEADS, SIZE))
    _near(v.drift, value @ torch.stack(residual))

    w = _weights(hf, weighted)
    _near(o.h_in, _sum(w * given.attended, w * given.attended)[None])
    lost = (exact.attended - given.attended) @ output.T + (hf - hq if drift else 0)
    _near(o.drift, _sum(w * lost, w * given.attended)[None])
    hf, hq = (
        hf + exact.attended @ output.T,
        hq + given.attended @ rounded.get_parameter(f"{LLAMA.output}.weight").double().T,
    )

    mf, mq = (_normed(full, LLAMA.mlp_norm, h) for h in (hf, hq))
    w = _weights(hf, weighted)
    _near(gate_up.h_in, _sum(w * mq, w * mq)[None])
    _near(gate_up.residual, _sum(w * (mf - mq), w * mq)[None])

    def hidden(block: nn.Module, x: Tensor) -> Tensor:
        gate, up = (x @ block.get_parameter(f"{name}.weight").double().T for name in (LLAMA.gate, LLAMA.up))
        return transforms.down.rotate(nn.functional.silu(gate) * up)

    uf, uq = hidden(full, mf), hidden(rounded, mq)
    _near(down.h_in, _sum(w * uq, w * uq)[None])
    lost = (uf - uq) @ full.get_parameter(f"{LLAMA.down}.weight").double().T + (hf - hq if drift else 0)
    _near(down.drift, _sum(w * lost, w * uq)[None])
    for objective in (o, gate_up, down):
        assert objective.h_out is None
    assert o.residual is None and down.residual is None


def test_statistics_are_of_quantized_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[Objective] = []

    def spy(weight: Tensor, objective: Objective, settings: Settings) -> Quantized:
        solved.append(objective)
        return quantize(weight, objective, settings)

    monkeypatch.setattr(block_module, "quantize", spy)
    solver = _run(replace(QUICK, method="rtn"), QUANTIZED).solver
    hf, hq = _streams()
    norm = solver.full.get_submodule(LLAMA.attention_norm)
    quantizer = DynamicQuantizer(4, True, 0.9)
    with torch.no_grad():
        xf, plain = norm(hf), norm(hq)
        xq = quantizer(plain)
    _near(solved[0].h_in, _sum(xq, xq)[None])
    _near(solved[0].residual, _sum(xf - xq, xq)[None])
    assert (solved[0].h_in.double() - _sum(plain, plain)).abs().max() > 0.1


def test_full_precision_attention_sees_no_cache_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values: A_f of exact keys, A_q of keys as the cache holds them."""
    solved: list[Objective] = []

    def spy(weight: Tensor, objective: Objective, settings: Settings) -> Quantized:
        solved.append(objective)
        return quantize(weight, objective, settings)

    monkeypatch.setattr(block_module, "quantize", spy)
    cache = DynamicQuantizer(3, False, 0.95)
    transforms = OnlineTransforms(attention=AttentionTransform(key=cache))
    for sequential in (True, False):
        solved.clear()
        solver = _run(replace(QUICK, sequential=sequential), transforms).solver
        hf, hq = (stream.double() for stream in _streams())
        xf, xq = (_normed(solver.full, LLAMA.attention_norm, h) for h in (hf, hq))
        exact = _attention(solver.full, xf)
        given = _attention(solver.quantized if sequential else solver.full, xq, cache)
        for g in range(KEY_HEADS):
            pair = (2 * g, 2 * g + 1)
            y = {h: given.probabilities[:, h] @ xq for h in pair}
            lost = {h: exact.probabilities[:, h] @ xf - y[h] for h in pair}
            h_in, drift = solved[1].h_in, solved[1].drift
            assert drift is not None
            _near(h_in[g], _total(_sum(y[h], y[h]) for h in pair))
            value = solver.full.get_parameter(f"{LLAMA.value}.weight").double().unflatten(0, (KEY_HEADS, SIZE))
            _near(drift[g], value[g] @ _total(_sum(lost[h], y[h]) for h in pair))


# what each setting is for


def test_methods_in_order() -> None:
    """What the block's output has lost on the calibration text, at 3 bits: nearest, GPTQ, BoA."""
    lost = {}
    for method in ("rtn", "gptq", "boa"):
        ran = _run(replace(QUICK, bits=3, method=method, refine=4))
        lost[method] = float((ran.full - ran.quantized).norm())
    assert lost["gptq"] < 0.9 * lost["rtn"] and lost["boa"] < 0.9 * lost["rtn"]


def test_drift_brings_the_streams_together() -> None:
    lost = [
        float((ran.full - ran.quantized).norm()) for ran in (_run(replace(QUICK, drift=on)) for on in (True, False))
    ]
    assert lost[0] < 0.97 * lost[1]


@pytest.mark.parametrize("name", LLAMA.projections)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weight_is_named(name: str, value: float) -> None:
    decoder = _decoder()
    tensors = _tensors()
    tensors[f"{name}.weight"][1, 2] = value
    solver = BlockQuantizer(decoder, decoder.block(0, tensors), QUICK, PLAIN)
    with pytest.raises(ValueError, match=f"^{name}: its weight holds NaN or Inf$"):
        solver.run(*_streams())


@pytest.mark.parametrize("stream", ["full-precision", "quantized"])
def test_bad_stream_is_named(stream: str) -> None:
    decoder = _decoder()
    full, quantized = _streams()
    (full if stream == "full-precision" else quantized)[1, 5, 0] = float("nan")
    solver = BlockQuantizer(decoder, decoder.block(0, _tensors()), QUICK, PLAIN)
    with pytest.raises(ValueError, match=f"^the {stream} stream that comes in holds NaN or Inf$"):
        solver.run(full, quantized)


@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
@pytest.mark.parametrize(
    ("huge", "message"),
    [
        (LLAMA.query, f"{LLAMA.query}, {LLAMA.key}: what weighs its outputs holds NaN or Inf"),
        (LLAMA.value, f"{LLAMA.output}: what it should put out holds NaN or Inf"),
        (LLAMA.gate, f"{LLAMA.down}: what it should put out holds NaN or Inf"),
    ],
)
def test_what_arises_in_a_layer_is_named(huge: str, message: str, method: str) -> None:
    decoder, tensors = _decoder(), _tensors()
    tensors[f"{huge}.weight"] *= 1e37
    solver = BlockQuantizer(decoder, decoder.block(0, tensors), replace(QUICK, method=method), PLAIN)
    if method in LAYERWISE and huge == LLAMA.query:
        solver.run(*_streams())  # what queries and keys are weighed by is not looked at
        return
    with pytest.raises(ValueError, match=f"^{message}"):
        solver.run(*_streams())


@pytest.mark.parametrize("layer", [LLAMA.output, LLAMA.down])
def test_what_arises_where_nothing_is_solved_is_named(layer: str) -> None:
    decoder, ran = _decoder(), _run()
    tensors = _tensors()
    tensors[f"{layer}.weight"].mul_(3e38).clamp_(-3e38, 3e38)
    solver = BlockQuantizer(decoder, decoder.block(0, tensors), QUICK, PLAIN, done=ran.solver.results)
    with pytest.raises(ValueError, match=f"^{layer}: the full-precision stream after it holds NaN or Inf$"):
        solver.run(*_streams())


def test_damping_that_was_raised_is_told() -> None:
    decoder = _decoder()
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(SEQUENCES, LENGTH, 2, generator=generator) @ torch.randn(2, HIDDEN, generator=generator)
    settings = replace(QUICK, damping=1e-12, method="gptq", token_weights=False)
    solver = BlockQuantizer(decoder, decoder.block(0, _tensors()), settings, PLAIN)
    solver.run(full, full.clone())
    assert {LLAMA.query, LLAMA.key} <= solver.damping.keys()  # inputs of two dimensions
    assert all(1e-12 < value <= 1e-6 for value in solver.damping.values())
    assert _run().solver.damping == {}
