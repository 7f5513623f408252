"""The objectives that projections of a block are solved for, against the method's table written out in float64."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rotoboa.boa.objective.fisher import fisher_grams
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import AttentionInputs, AttentionTransform
from rotoboa.boa.online.transforms import OnlineTransforms

from ..small_block import (
    HEADS,
    KEY_HEADS,
    LENGTH,
    LLAMA,
    PLAIN,
    QUANTIZED,
    QUICK,
    ROTATED,
    SIZE,
    Solved,
    make_block,
    make_decoder,
    make_streams,
    run_small,
)
from ..toy_attention import rope_mean


@dataclass
class Met:
    """Attention written out, float64: queries and keys after RoPE, A, and the input of the output projection."""

    query: Tensor
    key: Tensor
    probabilities: Tensor
    attended: Tensor


def _attention(block: nn.Module, x: Tensor, cache: DynamicQuantizer | None = None) -> Met:
    cos, sin = (part.double() for part in make_decoder().position_embeddings(LENGTH))

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
    """(1/L) sum of R_l^T G R_l."""
    return rope_mean(gram, *(part[0].double() for part in make_decoder().position_embeddings(LENGTH)))


def _sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum over sequences and tokens of outer products."""
    return left.reshape(-1, left.shape[-1]).double().T @ right.reshape(-1, right.shape[-1]).double()


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _near(found: Tensor | None, expected: Tensor) -> None:
    """float32 sums of 60 products: 1e-5 of the largest."""
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("transforms", [PLAIN, ROTATED], ids=["plain", "rotated"])
@pytest.mark.parametrize("drift", [True, False])
def test_objectives(drift: bool, transforms: OnlineTransforms, solved: Solved) -> None:
    """Those that the projections are solved for, against the table of the method, written out on the streams."""
    # 2 bits: errors large enough to tell the streams apart.
    settings = QUICK.but(bits=2, method="boa", drift=drift, attention="fisher" if drift else "bound")
    context = run_small(settings, transforms).context
    full, rounded = make_block(make_decoder(), transforms), context.quantized
    (qk, v, o, gate_up, down) = (objective for _, objective in solved)
    names = ((LLAMA.query, LLAMA.key), (LLAMA.value,), (LLAMA.output,), (LLAMA.gate, LLAMA.up), (LLAMA.down,))
    for (weight, _), group in zip(solved, names, strict=True):
        stacked = torch.cat([full.get_parameter(f"{name}.weight") for name in group])
        assert torch.equal(weight.flatten(0, 1), stacked)

    hf, hq = (stream.double() for stream in make_streams())
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
    if drift:  # what attention makes of errors, in place of the Grams: see test_fisher
        seen = AttentionInputs(half.query, half.key, SIZE**-0.5)
        met = [_turned_back(gram) for grams in fisher_grams(seen, 1 << 20) for gram in grams]
    _near(qk.h_out, torch.stack(met))

    h_in, h_out, residual = [], [], []
    output = full.get_parameter(f"{LLAMA.output}.weight").double()
    for g in range(KEY_HEADS):
        pair = (2 * g, 2 * g + 1)
        y = {h: half.probabilities[:, h] @ xq for h in pair}
        h_in.append(_total(_sum(y[h], y[h]) for h in pair))
        residual.append(_total(_sum(exact.probabilities[:, h] @ xf - y[h], y[h]) for h in pair))
        parts = [output[:, h * SIZE : (h + 1) * SIZE] for h in pair]
        h_out.append(_total(part.T @ part for part in parts))
    _near(v.h_in, torch.stack(h_in))
    _near(v.h_out, torch.stack(h_out))
    value = full.get_parameter(f"{LLAMA.value}.weight").double().unflatten(0, (KEY_HEADS, SIZE))
    _near(v.drift, value @ torch.stack(residual))

    _near(o.h_in, _sum(given.attended, given.attended)[None])
    lost = (exact.attended - given.attended) @ output.T + (hf - hq if drift else 0)
    _near(o.drift, _sum(lost, given.attended)[None])
    hf, hq = (
        hf + exact.attended @ output.T,
        hq + given.attended @ rounded.get_parameter(f"{LLAMA.output}.weight").double().T,
    )

    mf, mq = (_normed(full, LLAMA.mlp_norm, h) for h in (hf, hq))
    _near(gate_up.h_in, _sum(mq, mq)[None])
    _near(gate_up.residual, _sum(mf - mq, mq)[None])

    def hidden(block: nn.Module, x: Tensor) -> Tensor:
        gate, up = (x @ block.get_parameter(f"{name}.weight").double().T for name in (LLAMA.gate, LLAMA.up))
        return transforms.down.rotate(nn.functional.silu(gate) * up)

    uf, uq = hidden(full, mf), hidden(rounded, mq)
    _near(down.h_in, _sum(uq, uq)[None])
    lost = (uf - uq) @ full.get_parameter(f"{LLAMA.down}.weight").double().T + (hf - hq if drift else 0)
    _near(down.drift, _sum(lost, uq)[None])
    for objective in (o, gate_up, down):
        assert objective.h_out is None
    assert o.residual is None and down.residual is None


def test_statistics_are_of_quantized_inputs(solved: Solved) -> None:
    context = run_small(QUICK.but(method="rtn"), QUANTIZED).context
    hf, hq = make_streams()
    norm = context.full.get_submodule(LLAMA.attention_norm)
    quantizer = DynamicQuantizer(4, True, 0.9)
    with torch.no_grad():
        xf, plain = norm(hf), norm(hq)
        xq = quantizer(plain)
    _near(solved[0][1].h_in, _sum(xq, xq)[None])
    _near(solved[0][1].residual, _sum(xf - xq, xq)[None])
    assert (solved[0][1].h_in.double() - _sum(plain, plain)).abs().max() > 0.1


def test_full_precision_attention_sees_no_cache_quantizer(solved: Solved) -> None:
    """Values: A_f of exact keys, A_q of keys as the cache holds them."""
    cache = DynamicQuantizer(3, False, 0.95)
    transforms = OnlineTransforms(attention=AttentionTransform(key=cache))
    context = run_small(QUICK, transforms).context
    hf, hq = (stream.double() for stream in make_streams())
    xf, xq = (_normed(context.full, LLAMA.attention_norm, h) for h in (hf, hq))
    exact, given = _attention(context.full, xf), _attention(context.full, xq, cache)
    for g in range(KEY_HEADS):
        pair = (2 * g, 2 * g + 1)
        y = {h: given.probabilities[:, h] @ xq for h in pair}
        lost = {h: exact.probabilities[:, h] @ xf - y[h] for h in pair}
        h_in, drift = solved[1][1].h_in, solved[1][1].drift
        assert drift is not None
        _near(h_in[g], _total(_sum(y[h], y[h]) for h in pair))
        value = context.full.get_parameter(f"{LLAMA.value}.weight").double().unflatten(0, (KEY_HEADS, SIZE))
        _near(drift[g], value[g] @ _total(_sum(lost[h], y[h]) for h in pair))
