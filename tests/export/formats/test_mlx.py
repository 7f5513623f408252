"""MLX's format against a reader written from its description, and what it cannot hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rotoboa
from rotoboa.boa.solver.rounding import Quantized
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import mlx
from rotoboa.export.formats.mlx import from_mlx, to_mlx
from rotoboa.pipeline.verifying import run_logits

Opened = Callable[..., Finished]
GROUPED = {"weights.group_size": 32}
SIZES = {"hidden_size": 64, "intermediate_size": 96}
OTHERWISE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [], "moe_intermediate_size": 64, "num_hidden_layers": 2},
    "dots1": {"moe_intermediate_size": 64},
}
ENDS_OF = ("model.embed_tokens", "lm_head")


def slowly(tensors: dict[str, Tensor], bits: int, group: int) -> Tensor:
    """The weight, bit by bit of the row's words, in float64."""
    rows = []
    for words, scales, biases in zip(tensors["weight"].tolist(), tensors["scales"], tensors["biases"], strict=True):
        stream = sum(word << 32 * i for i, word in enumerate(words))
        values = [stream >> bits * i & (2**bits - 1) for i in range(len(words) * 32 // bits)]
        rows.append([float(scales[i // group]) * q + float(biases[i // group]) for i, q in enumerate(values)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bits", mlx.BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_round_trip_through_the_description(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(0, 2**bits, (3, 192), generator=generator, dtype=torch.uint8)
    scale = torch.rand(3, 3, generator=generator).half().float()
    zero = torch.full((3, 3), 2.0 ** (bits - 1)) if symmetric else torch.randint(0, 2**bits, (3, 3)).float()
    result = Quantized(integers, scale, zero)
    tensors = to_mlx(result, bits, 32)
    assert tensors["weight"].dtype == torch.uint32 and tensors["weight"].shape == (3, 192 * bits // 32)
    assert tensors["scales"].shape == tensors["biases"].shape == (3, 6)
    assert tensors["scales"].dtype == tensors["biases"].dtype
    assert not symmetric or tensors["scales"].dtype == torch.float16
    exact = result.dequantize().double()
    torch.testing.assert_close(slowly(tensors, bits, 32), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(from_mlx(tensors, bits, 32).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "group", "expected"), [(4, None, 32), (3, 32, 32)])
def test_our_reader_gives_the_logits_of_the_run(
    opened_run: Opened, bits: int, group: int | None, expected: int, tmp_path: Path
) -> None:
    run = opened_run("w4a16", {"weights.bits": bits, "weights.group_size": group})
    mlx.write(run, tmp_path / "model")
    assert list(mlx.group_sizes(run).values()) == [expected]
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        found = mlx.read(tmp_path / "model")(ids).logits
    torch.testing.assert_close(found, run_logits(run, ids), rtol=1e-4, atol=1e-4)


@pytest.fixture
def small_run(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> Callable[..., Finished]:
    """small_run("mixtral", {"rotation.r1": "none"}, head_dim=32): rounded to nearest, in groups of 32."""

    def make(name: str, changes: dict[str, Any] | None = None, **config: Any) -> Finished:
        folder = tmp_path / name
        model = save_family(folder / "small", name, **{**SIZES, **OTHERWISE.get(name, {}), **config})
        fields = {"model": str(model), "output": folder / "run", "weights.method": "rtn", **GROUPED}
        fields |= {"evaluation.baseline": False, "evaluation.windows": 1, "calibration.sequence_length": 40}
        rotoboa.quantize(make_recipe("w4a16", fields | (changes or {})))
        return Finished.open(folder / "run" / "model", sorted((folder / "run" / "blocks").iterdir()))

    return make


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "dots1", "lfm2", "phi3"])
def test_our_reader_gives_the_logits_of_other_families(
    small_run: Callable[..., Finished], tmp_path: Path, name: str
) -> None:
    """Experts of a block are one tensor, under mlx-lm's names; merged layers are whole."""
    run, folder = small_run(name, {"rotation.r1": "none"} if name in mlx.TIED else {}), tmp_path / "model"
    mlx.write(run, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    experts = [tensor for key, tensor in tensors.items() if f".{mlx.STACKED.get(name, 'switch_mlp')}." in key]
    assert bool(experts) == bool(run.family.experts) and all(tensor.shape[0] == 4 for tensor in experts)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        found = mlx.read(folder)(ids).logits
    torch.testing.assert_close(found, run_logits(run, ids), rtol=1e-4, atol=1e-4)
    assert (mlx.warning(run) is None) == (name in ("mixtral", "lfm2")), "windows that mlx-lm has not"


def test_mixtures_that_mlx_lm_has_not(small_run: Callable[..., Finished]) -> None:
    run = small_run("qwen2_moe", mlp_only_layers=[0])
    with pytest.raises(InputError, match="'qwen2_moe' has experts in every block, and this model has not"):
        mlx.check(run)
    run = small_run("mixtral", {"overrides": [{"layers": "*.down_proj", "weights": {"bits": 8}}]})
    with pytest.raises(InputError, match="one scheme where there are experts, and this run has others"):
        mlx.check(run)


ENDS = {**GROUPED, "embedding.bits": 4, "embedding.group_size": 32}


@pytest.mark.parametrize(
    ("changes", "tied", "named"),
    [
        ({**ENDS, "head.bits": 6}, False, {"model.embed_tokens": (32, 4), "lm_head": (64, 6)}),
        ({**ENDS, "embedding.bits": 16, "head.bits": 3}, True, {"lm_head": (64, 3)}),
        ({**ENDS, "rotation.r1": "none"}, True, {"model.embed_tokens": (32, 4)}),
        (ENDS, True, {"model.embed_tokens": (32, 4)}),
    ],
    ids=["both", "head", "tied", "tied and turned"],
)
def test_quantized_embedding_and_head(
    opened_run: Opened, tmp_path: Path, changes: dict[str, Any], tied: bool, named: dict[str, tuple[int, int]]
) -> None:
    """A tied head stays the embedding, but where R1 is in the weights: there it is a matrix of its own, in 16 bits."""
    run, folder = opened_run("w4a16", changes, {"tie_word_embeddings": tied}), tmp_path / "model"
    mlx.write(run, folder)
    config = json.loads((folder / "config.json").read_text())
    said = {name: (own["group_size"], own["bits"]) for name, own in config["quantization"].items() if name in ENDS_OF}
    assert said == named
    tensors = load_file(folder / "model.safetensors")
    assert {name for name in ENDS_OF if f"{name}.scales" in tensors} == set(named)
    assert not any(part in name for name in tensors for part in ("qweight", "turn"))
    one = changes.get("rotation.r1") == "none"
    assert config["tie_word_embeddings"] == one == ("lm_head.weight" not in tensors)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        found = mlx.read(folder)(ids).logits
    expected = run_logits(run, ids)
    off = 3e-2 if tied and not one and "lm_head" not in named else 1e-4  # a product that is rounded to bfloat16
    assert expected.std() > 0.5 and (found - expected).abs().max() < off


def test_what_it_cannot_hold(opened_run: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="MLX has 2, 3, 4, 5, 6 and 8 bits, and the run has 7"):
        mlx.check(opened_run("w4a16", {"weights.bits": 7}))
    with pytest.raises(InputError, match=r"MLX has groups of 32, 64 and 128 inputs, and 16 of .* share a scale"):
        mlx.check(opened_run("w4a16", {"weights.group_size": 16}))
    with pytest.raises(InputError, match=r"MLX has groups of .*, and 8 of model\.embed_tokens share a scale"):
        mlx.check(opened_run("w4a16", {"embedding.bits": 4, "embedding.group_size": 8}))
    monkeypatch.setattr(mlx, "TIED", ("llama",))  # as of gemma2
    with pytest.raises(InputError, match="has its embedding for a head, and this run has a head of its own: use"):
        mlx.check(opened_run("w4a16", GROUPED))
    with pytest.raises(InputError, match="4-bit activations"):
        mlx.check(opened_run("w4a4kv4"))


@pytest.mark.parametrize("part", ["scales", "biases", "weight"])
def test_a_damaged_checkpoint_is_one_sentence(opened_run: Opened, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "model"
    mlx.write(opened_run("w4a16"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f"q_proj.{part}"))
    tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, file)
    with pytest.raises(InputError, match="export it again"):
        mlx.read(folder)
