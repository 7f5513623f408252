"""Whole runs by their settings: methods, bits, groups and grids do to model and losses what they are for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rotoboa
from rotoboa.export.packing import packed_width
from rotoboa.pipeline.exporting import open_finished
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.storage.run_folder import RunFolder
from rotoboa.pipeline.verifying import run_logits

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def two_bits(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Perplexities of the embedded model in 2 bits, with the settings that are the default."""
    changes = {"output": tmp_path_factory.mktemp("runs") / "run", "calibration.samples": 16, "weights.grid": "diagonal"}
    (measured,) = rotoboa.quantize(make_recipe("w2a16", changes))["perplexity"].values()
    return dict(measured)


def test_two_bits_are_better_than_rounding_to_nearest(two_bits: dict[str, float]) -> None:
    assert two_bits["full_precision"] < two_bits["quantized"] < two_bits["rtn"]


@pytest.mark.parametrize(
    ("method", "bits", "group"),
    [
        *(("boa", bits, group) for bits, group in [(2, 8), (2, None), (3, 16), (4, 32), (8, None)]),
        *((method, *one) for method in ("rtn", "gptq") for one in [(2, 8), (8, None)]),
    ],
)
def test_methods_bits_and_groups(
    llama: Path, make_recipe: MakeRecipe, tmp_path: Path, method: str, bits: int, group: int | None
) -> None:
    changes = {
        "weights.method": method,
        "weights.bits": bits,
        "weights.group_size": group,
        "evaluation.baseline": False,
    }
    report = rotoboa.quantize(make_recipe("w4a16", {"model": str(llama), "output": tmp_path / "run", **changes}))
    (measured,) = report["perplexity"].values()
    assert list(measured) == ["full_precision", "quantized"] and "evaluate rtn" not in report["seconds"]
    (divergence,) = report["divergence"].values()
    assert list(divergence) == ["kl", "top1"]
    if bits == 8:
        assert measured["quantized"] == pytest.approx(measured["full_precision"], rel=0.02)
        assert divergence["kl"] < 0.01 and divergence["top1"] > 0.9
    tensors = load_file(tmp_path / "run" / "blocks" / "00001.safetensors")
    assert tensors["mlp.down_proj.qweight"].shape == (64, packed_width(96, bits))
    assert tensors["mlp.down_proj.scale"].shape == tensors["mlp.down_proj.zero"].shape == (64, 96 // (group or 96))
    assert tensors["mlp.down_proj.scale"].dtype == torch.float16
    assert int(tensors["mlp.down_proj.zero"].max()) < 2**bits
    with torch.no_grad():
        assert rotoboa.load(tmp_path / "run")[0](torch.arange(20)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("group", "symmetric"), [(64, False), (16, True)])
def test_groups_of_activations(
    save_llama: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path, group: int, symmetric: bool
) -> None:
    """Calibrated, searched, saved and loaded in groups; and nearer to the original than by token."""
    changes = {
        "model": str(save_llama(tmp_path / "llama", hidden_size=128, intermediate_size=192, num_hidden_layers=1)),
        "weights.bits": 8,
        "activations.bits": 3,
        "activations.symmetric": symmetric,
        "rotation.r4": True,
        "evaluation.baseline": False,
    }
    ids, divergences = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(1)), {}
    for size in (None, group):
        run = tmp_path / str(size)
        report = rotoboa.quantize(make_recipe("w4a16", {**changes, "activations.group_size": size, "output": run}))
        (divergence,) = report["divergence"].values()
        divergences[size] = divergence["kl"]
    spec = json.loads((run / "model" / "config.json").read_text())["quantization_config"]
    assert spec["activation_group"] == group and spec["activation_search"]
    with torch.no_grad():
        logits = rotoboa.load(run, dtype=torch.float32)[0](ids).logits
    torch.testing.assert_close(logits, run_logits(open_finished(RunFolder.open(run)), ids), rtol=1e-4, atol=1e-4)
    assert divergences[group] < divergences[None]


def test_losses_fall_with_bits_and_methods(
    save_llama: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    model = save_llama(tmp_path / "llama", num_hidden_layers=1)

    def loss(method: str, bits: int) -> float:
        output = tmp_path / f"{method}{bits}"
        changes = {"weights.method": method, "weights.bits": bits, "model": str(model), "output": output}
        changes |= {"evaluation.baseline": False, "evaluation.windows": 1}
        rotoboa.quantize(make_recipe("w4a16", changes))
        first = json.loads((output / "manifest.json").read_text())["blocks"][0]["layers"]
        return float(first["self_attn.q_proj"]["loss"])

    losses = {(method, bits): loss(method, bits) for method in ("rtn", "gptq", "boa") for bits in (2, 4)}
    for method in ("rtn", "gptq", "boa"):
        assert 0 < losses[method, 4] < losses[method, 2] < 1
    for bits in (2, 4):
        assert losses["boa", bits] < losses["gptq", bits] < losses["rtn", bits]


def test_symmetric_grids_have_their_zero_in_the_middle(llama: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes = {"weights.symmetric": True, "weights.bits": 3, "model": str(llama), "output": tmp_path}
    rotoboa.quantize(make_recipe("w4a16", changes))
    tensors = load_file(tmp_path / "blocks" / "00000.safetensors")
    assert all((tensor == 4).all() for name, tensor in tensors.items() if name.endswith("zero"))
