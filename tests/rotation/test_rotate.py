"""Rotations change every weight and no logit: whole models in float64, before and after."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rotoboa.boa.online.attention import NAME, AttentionInputs, AttentionTransform, set_attention
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES
from rotoboa.models.shape import Shape
from rotoboa.rotation.fold import fold_norms, neutral
from rotoboa.rotation.rotate import Rotations

LLAMA = FAMILIES["llama"]
EXACT = 1e-9  # logits are of order 1 to 10; what float64 loses in two blocks is near 1e-14
NONE = {"r1": False, "r2": False, "r3": False, "r4": False}
ALL = {"r1": True, "r2": True, "r3": True, "r4": True}
CHOICES = [NONE, *({**NONE, name: True} for name in NONE), {**ALL, "r1": False}, {**ALL, "r3": False}, ALL]
BLOCKS: dict[str, Any] = {**ALL, "blocks": 8}


def _named(choice: dict[str, bool]) -> str:
    return "+".join(name for name, on in choice.items() if on) or "none"


@pytest.fixture(autouse=True)
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm in the dtype of its input: transformers' own casts to float32 inside, and hides an error up to 1e-7."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def _config(*, ffn: int = 172, bias: bool = False, tied: bool = False) -> LlamaConfig:
    """Hidden 48 = 12 * 4; attention 64 wide, so that no two sizes are mixed up."""
    return LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=ffn,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
    )


def _model(config: LlamaConfig) -> LlamaForCausalLM:
    """Random weights of a size that makes attention sharp and every nonlinearity count; norm weights are not 1."""
    generator = torch.Generator().manual_seed(7)
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            wide = parameter.ndim == 2 and "embed" not in name
            parameter.copy_(noise * 2 / parameter.shape[1] ** 0.5 if wide else noise + ("norm" in name))
    return model


def _parts(model: LlamaForCausalLM) -> tuple[list[dict[str, Tensor]], Tensor, Tensor, Tensor]:
    """Blocks, embedding, final norm and head: what a checkpoint gives."""
    state = model.state_dict()
    prefixes = [f"model.layers.{i}." for i in range(model.config.num_hidden_layers)]
    blocks = [{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in prefixes]
    return blocks, state["model.embed_tokens.weight"], state["model.norm.weight"], state["lm_head.weight"]


@torch.no_grad()
def _rotated_logits(model: LlamaForCausalLM, rotations: Rotations, tokens: Tensor, *, online: bool = True) -> Tensor:
    """The model's logits after rotation, block by block; `online` False leaves out R3 and the online half of R4."""
    decoder = Decoder(model.config, attention=NAME, dtype=torch.float64)
    blocks, embedding, norm, head = _parts(model)
    hidden = rotations.rotate_embedding(embedding)[tokens]
    for index, tensors in enumerate(blocks):
        block = decoder.block(index, rotations.rotate_block(tensors, LLAMA, index))
        if online:
            set_attention(block.get_submodule(LLAMA.attention), AttentionTransform(rotations.r3))
        if online and (r4 := rotations.r4) is not None:
            block.get_submodule(LLAMA.down).register_forward_pre_hook(lambda _, args, r4=r4: r4.apply(args[0]))
        hidden = decoder.run(block, hidden)
    head, norm = rotations.rotate_head(head, norm, LLAMA)
    return decoder.norm(norm)(hidden) @ head.T


def _tokens(config: LlamaConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _difference(model: LlamaForCausalLM, choice: dict[str, bool], **options: Any) -> float:
    tokens = _tokens(model.config)
    rotations = Rotations.of(Shape.of(model.config), **choice, seed=3)
    return float((_rotated_logits(model, rotations, tokens, **options) - model(tokens).logits).abs().max())


@pytest.mark.parametrize("choice", [*CHOICES, BLOCKS], ids=_named)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("ffn", [40, 172])
def test_logits_stay(ffn: int, bias: bool, choice: dict[str, bool]) -> None:
    assert _difference(_model(_config(ffn=ffn, bias=bias)), choice) < EXACT


@pytest.mark.parametrize("choice", [NONE, ALL], ids=_named)
def test_tied_embeddings_are_untied(choice: dict[str, bool]) -> None:
    model = _model(_config(tied=True))
    _, embedding, norm, head = _parts(model)
    assert torch.equal(embedding, head)
    assert _difference(model, choice) < EXACT
    if choice["r1"]:
        rotations = Rotations.of(Shape.of(model.config), **choice)
        rotated, _ = rotations.rotate_head(head, norm, LLAMA)
        assert not torch.allclose(rotated, rotations.rotate_embedding(embedding), atol=0.1)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice["r3"] or choice["r4"]], ids=_named)
def test_online_part_is_needed(choice: dict[str, bool]) -> None:
    """R4 is half folded, so leaving out its other half must show; R3 has no folded half, and must not."""
    difference = _difference(_model(_config()), choice, online=False)
    assert difference > 0.1 if choice["r4"] else difference < EXACT


@torch.no_grad()
def test_r3_reaches_queries_and_keys() -> None:
    """Otherwise R3 would be exact for doing nothing."""
    model = _model(_config())
    decoder = Decoder(model.config, attention=NAME, dtype=torch.float64)
    block = decoder.block(0, _parts(model)[0][0])
    rotations = Rotations.of(decoder.shape, **{**NONE, "r3": True})
    assert rotations.r3 is not None
    seen, outputs = list[AttentionInputs](), []
    x = torch.randn(2, 8, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rotation in (None, rotations.r3):
        set_attention(block.get_submodule(LLAMA.attention), AttentionTransform(rotation), seen.append)
        outputs.append(decoder.run(block, x))
    plain, rotated = seen
    matrix = rotations.r3.matrix()
    torch.testing.assert_close(rotated.query, plain.query @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotated.key, plain.key @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)  # and leaves values alone


@torch.no_grad()
@pytest.mark.parametrize("choice", CHOICES[1:], ids=_named)
def test_logits_of_the_embedded_model_stay(choice: dict[str, bool]) -> None:
    checkpoint = Checkpoint(TINY_FOLDER)
    config = copy.deepcopy(checkpoint.config)
    config.num_hidden_layers = 2
    model = LlamaForCausalLM.from_pretrained(TINY_FOLDER, config=config, dtype=torch.float64).eval()
    blocks, embedding, _, head = _parts(model)
    assert torch.equal(embedding, checkpoint.embedding()[:].double()) and torch.equal(
        head, checkpoint.head()[:].double()
    )
    assert all(torch.equal(blocks[1][name], tensor.double()) for name, tensor in checkpoint.block(1).items())
    assert _difference(model, choice) < EXACT


@torch.no_grad()
def test_seeds() -> None:
    """Each seed is a rotation of its own, R2 one in each block, and the same seed gives the same bytes."""
    model = _model(_config(bias=True))
    shape, tokens = Shape.of(model.config), _tokens(model.config)
    block = _parts(model)[0][0]
    one, again, two = (Rotations.of(shape, **ALL, seed=seed) for seed in (0, 0, 1))
    first, same, other = (rotations.rotate_block(block, LLAMA, 0) for rotations in (one, again, two))
    assert all(torch.equal(first[name], same[name]) for name in block)
    for projection in LLAMA.projections:
        # R1 of the other seed differs, so no projection may be the same.
        assert (first[f"{projection}.weight"] - other[f"{projection}.weight"]).abs().max() > 0.01
    assert one.values(0) != one.values(1)
    below = one.rotate_block(block, LLAMA, 1)
    differing = {name for name in block if not torch.equal(first[name], below[name])}
    assert differing == {f"{LLAMA.value}.weight", f"{LLAMA.value}.bias", f"{LLAMA.output}.weight"}
    logits = [_rotated_logits(model, rotations, tokens) for rotations in (one, two)]
    assert (logits[0] - logits[1]).abs().max() < EXACT


def test_what_each_rotation_touches() -> None:
    model = _model(_config(bias=True))
    block = _parts(model)[0][0]
    before = {name: tensor.clone() for name, tensor in block.items()}
    weights = {name: f"{getattr(LLAMA, name)}.weight" for name in ("value", "output", "down")}
    biases = {name: f"{getattr(LLAMA, name)}.bias" for name in ("value", "output", "down")}
    norms = {f"{LLAMA.attention_norm}.weight", f"{LLAMA.mlp_norm}.weight"}
    everything = {f"{name}.weight" for name in LLAMA.projections}
    touched = {
        "r1": everything | norms | {biases["output"], biases["down"]},
        "r2": {weights["value"], biases["value"], weights["output"]},
        "r3": set(),
        "r4": {weights["down"]},
    }
    for name, expected in touched.items():
        rotated = Rotations.of(Shape.of(model.config), **{**NONE, name: True}).rotate_block(block, LLAMA, 0)
        assert {key for key in block if not torch.equal(rotated[key], block[key])} == expected
        assert all(tensor.dtype == torch.float64 for tensor in rotated.values())
    assert all(torch.equal(block[name], tensor) for name, tensor in before.items()), "the given block was written to"


def test_low_precision_weights_are_rotated_in_float64() -> None:
    block = {name: tensor.bfloat16() for name, tensor in _parts(_model(_config()))[0][0].items()}
    rotations = Rotations.of(Shape.of(_config()), **ALL)
    expected = rotations.rotate_block({name: tensor.double() for name, tensor in block.items()}, LLAMA, 0)
    assert all(torch.equal(rotations.rotate_block(block, LLAMA, 0)[name], expected[name]) for name in block)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_fold_norms(offset: float) -> None:
    """`W (offset + w) x` before, `W' (offset + w') x` after, with offset + w' = 1 exactly."""
    family = replace(LLAMA, norm_offset=offset)
    block = _parts(_model(_config(bias=True)))[0][0]
    before = {name: tensor.clone() for name, tensor in block.items()}
    fold_norms(block, family)
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    readers = {
        family.attention_norm: (family.query, family.key, family.value),
        family.mlp_norm: (family.gate, family.up),
    }
    for norm, names in readers.items():
        was, now = before.pop(f"{norm}.weight"), block[f"{norm}.weight"]
        assert now.shape == was.shape and torch.all(now + offset == 1)
        for name in names:
            expected = (x * (was + offset)) @ before.pop(f"{name}.weight").T
            torch.testing.assert_close(x @ block[f"{name}.weight"].T, expected, rtol=0, atol=1e-12)
    assert len(before) == 9  # seven biases, and the weights of output and down
    assert all(torch.equal(block[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_head_takes_the_final_norm(offset: float) -> None:
    family = replace(LLAMA, norm_offset=offset)
    _, _, norm, head = _parts(_model(_config()))
    rotations = Rotations.of(Shape.of(_config()), **ALL)
    rotated, weight = rotations.rotate_head(head, norm, family)
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = rotations.rotate_embedding(x) * (weight + offset) @ rotated.T
    torch.testing.assert_close(logits, x * (norm + offset) @ head.T, rtol=0, atol=1e-11)
    assert torch.equal(neutral(norm, family), torch.full_like(norm, 1 - offset))


def test_without_r1_the_head_and_norms_stay() -> None:
    blocks, embedding, norm, head = _parts(_model(_config()))
    rotations = Rotations.of(Shape.of(_config()), **{**ALL, "r1": False})
    assert torch.equal(rotations.rotate_embedding(embedding), embedding)
    rotated, weight = rotations.rotate_head(head, norm, LLAMA)
    assert torch.equal(rotated, head) and torch.equal(weight, norm)
    block = rotations.rotate_block(blocks[0], LLAMA, 0)
    assert torch.equal(block[f"{LLAMA.mlp_norm}.weight"], blocks[0][f"{LLAMA.mlp_norm}.weight"])
