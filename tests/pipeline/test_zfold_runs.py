"""weights.zfold through whole runs: saved, loaded, interrupted, exported; and what it is refused for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.errors import InputError
from rotoboa.models.families import SITES
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.exporting import export, open_finished
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe, recipe_to_yaml
from rotoboa.pipeline.storage.run_folder import RunFolder
from rotoboa.pipeline.storage.run_writer import RunWriter
from rotoboa.pipeline.verifying import run_logits

MakeRecipe = Callable[..., Recipe]
TIMINGS = ("seconds", "plain_forward_seconds", "peak_memory_bytes", "parts")


def _ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _check(run: Path) -> None:
    """The loaded model computes what was measured, and its norms are no 1 any more."""
    model, _ = rotoboa.load(run, dtype=torch.float32)
    torch.testing.assert_close(
        model(_ids()).logits, run_logits(open_finished(RunFolder.open(run)), _ids()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("group", [None, 16])
def test_run_save_and_load(llama: Path, make_recipe: MakeRecipe, tmp_path: Path, group: int | None) -> None:
    changes = {"model": str(llama), "weights.group_size": group, "evaluation.baseline": False}
    changes["weights.attention"] = "bound"  # of a random model nothing but large keys can be made better
    perplexities = {}
    for zfold in (False, True):
        run = tmp_path / str(zfold)
        report = rotoboa.quantize(make_recipe("w2a16", {**changes, "weights.zfold": zfold, "output": run}))
        (perplexities[zfold],) = report["perplexity"].values()
        blocks = json.loads((run / "manifest.json").read_text())["blocks"]
        _check(run)
        if not zfold:
            assert all("zfold" not in block for block in blocks)
            continue
        for index, block in enumerate(blocks):
            assert tuple(block["zfold"]) == SITES
            assert all(found["loss"] <= found["without"] for found in block["zfold"].values())
            assert any(found["least"] < 1 < found["most"] for found in block["zfold"].values())
            stored = load_file(run / "blocks" / f"{index:05}.safetensors")
            for norm, site in (("input_layernorm", "qkv"), ("post_attention_layernorm", "gate_up")):
                weight, found = stored[f"{norm}.weight"].float(), block["zfold"][site]
                outer = torch.tensor([found["least"], found["most"]])
                torch.testing.assert_close(torch.stack(weight.aminmax()), outer, rtol=2**-8, atol=0)
    assert perplexities[True]["full_precision"] == perplexities[False]["full_precision"]
    assert perplexities[True]["quantized"] != perplexities[False]["quantized"]


def _content(run: Path) -> dict[str, Any]:
    """Tensors, and the manifest but for what timing decides."""
    found: dict[str, Any] = {str(f.relative_to(run)): f.read_bytes() for f in run.rglob("*.safetensors")}
    manifest = json.loads((run / "manifest.json").read_text())
    found |= {key: value for key, value in manifest.items() if key not in (*TIMINGS, "model")}
    for block in found["blocks"]:
        del block["seconds"], block["stages"]
    return found


def test_resume_ends_with_the_same_bytes(
    llama: Path, make_recipe: MakeRecipe, interrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """Stopped after its first block: the second has the streams that the scales of the first have gone through."""
    recipe = make_recipe("w2a16", {"model": str(llama), "weights.zfold": True, "evaluation.baseline": False})
    whole, stopped = (recipe.model_copy(update={"output": tmp_path / name}) for name in ("whole", "stopped"))
    rotoboa.quantize(whole)
    interrupted(stopped, RunWriter, "write_block", call=2)
    assert rotoboa.quantize(stopped)["parts"] == 2
    assert _content(tmp_path / "stopped") == _content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("family", "sites", "changes"),
    [
        ("llama-biases", "true", {}),
        ("opt", "true", {}),
        ("gemma2", "output,down", {}),
        ("mixtral", "qkv, output", {}),
        ("qwen2", "qkv,output,gate_up", {"rotation.r4": True, "activations.bits": 4, "cache.value_bits": 4}),
    ],
)
def test_families(
    save_family: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path, family: str, sites: str, changes: Any
) -> None:
    """Biases, LayerNorm, post norms, experts; and beside R4, activation and cache quantizers."""
    small = {"calibration.sequence_length": 40, "evaluation.windows": 2, "evaluation.baseline": False}
    model = save_family(tmp_path / "model", family)
    data = {"model": str(model), "output": tmp_path / "run", "weights.zfold": sites, **small, **changes}
    rotoboa.quantize(make_recipe("w2a16", data))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    chosen = build_recipe({}, {"weights.zfold": sites}).weights.zfold
    assert all(tuple(block["zfold"]) == chosen for block in manifest["blocks"])
    if "activations.bits" not in changes:  # a value at the edge of two levels may fall to either side
        _check(tmp_path / "run")


@torch.no_grad()
def test_other_formats_hold_the_scaled_norms(llama: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    data = {"model": str(llama), "output": tmp_path / "run", "weights.zfold": True, "evaluation.baseline": False}
    rotoboa.quantize(make_recipe("w4a16", data))
    folder = export(tmp_path / "run", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = run_logits(open_finished(RunFolder.open(tmp_path / "run")), _ids())
    torch.testing.assert_close(model(_ids()).logits, expected, rtol=0, atol=0.01 * float(expected.std()))


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"rotation.r4": True},
            r"weights\.zfold: nothing before down of .* can take a scale a channel, since R4 runs online between "
            r"mlp\.up_proj and mlp\.down_proj: turn rotation\.r4 off or give --weights\.zfold qkv,output,gate_up\.",
        ),
        (
            "gemma2",
            {"rotation.r1": "merged"},
            r"before qkv and gate_up of .* R1 runs online .*: turn rotation\.r1 off or give .* output,down\.",
        ),
        ("mixtral", {}, r"experts, which share a norm with their router.*: give --weights\.zfold qkv,output\."),
        ("mixtral", {"weights.zfold": "down"}, r"nothing before down of .*: leave weights\.zfold out\."),
        ("llama", {"weights.method": "rtn"}, r"method rtn has none"),
    ],
)
def test_refused_by_name_before_any_work(
    save_family: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path, family: str, changes: Any, message: str
) -> None:
    model = save_family(tmp_path / "model", family)
    recipe = make_recipe("w2a16", {"model": str(model), "output": tmp_path / "run", "weights.zfold": True, **changes})
    for function in (rotoboa.quantize, prepare, plan):
        with pytest.raises(InputError, match=message) as caught:
            function(recipe)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_field() -> None:
    for given, sites in ((True, SITES), ("true", SITES), ("down, qkv", ("qkv", "down")), (["output"], ("output",))):
        recipe = build_recipe({"weights": {"zfold": given}})
        assert recipe.weights.zfold == sites
        assert build_recipe({}, {"weights.zfold": given}) == recipe
        assert build_recipe(yaml.safe_load(recipe_to_yaml(recipe))) == recipe
    for off in (False, "False", "none", None):
        assert build_recipe({"weights": {"zfold": off}}).weights.zfold is None
    wrongs: list[Any] = ["value", "qkv,qkv", [], 1, ""]
    for wrong in wrongs:
        with pytest.raises(InputError, match=r"weights\.zfold is .* but must be true, false, or some of qkv, output,"):
            build_recipe({"weights": {"zfold": wrong}})
    with pytest.raises(InputError, match=r"weights\.rows is True"):
        build_recipe({"weights": {"rows": True}})
