"""Runs with schemes of single layers in every format that holds them: its own words for them, and the run's logits."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import compressed_tensors, gptq, mlx
from rotoboa.export.formats.compressed_tensors_reader import inspect
from rotoboa.export.scheme_layers import by_scheme, divided, patterns, scheme_layers
from rotoboa.pipeline.verifying import run_logits

Mixed = Callable[..., Finished]
BLOCKS = "model.layers"
STOCK = {"activations.bits": 8, "activations.search": False, "activations.clip": 254 / 255}
HALF = "blocks 0: weights.bits=16 activations.bits=16; *.down_proj: weights.bits=8"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 2048, (1, 40), generator=torch.Generator().manual_seed(0))


def test_layers_by_scheme(mixed_run: Mixed) -> None:
    run = mixed_run()
    shown = {scheme.shown: names for scheme, names in by_scheme(run).items()}
    assert {name: len(names) for name, names in shown.items()} == {
        "W4A16 g32": 5,
        "W16A16": 6,
        "W3A16": 2,
        "W8A16 g32": 1,
    }
    assert next(iter(shown)) == "W4A16 g32"  # that of the whole model
    assert [(row.scheme.shown, row.count, row.which) for row in scheme_layers(run)] == [
        ("W4A16 g32", 5, "q_proj, k_proj, v_proj, gate_proj, up_proj of block 1"),
        ("W16A16", 6, "q_proj, k_proj, v_proj, gate_proj, up_proj, down_proj of block 0"),
        ("W3A16", 2, "o_proj"),
        ("W8A16 g32", 1, "down_proj of block 1"),
    ]
    assert divided(run) == ""
    assert divided(mixed_run({"overrides": "*.1.*.q_proj: weights.bits=8"})) == "q_proj, k_proj, v_proj of block 1"


def test_patterns_match_their_layers_and_no_others(mixed_run: Mixed) -> None:
    run = mixed_run()
    every = [f"{BLOCKS}.{index}.{name}" for index in (0, 1, 10, 11) for name in run.family.projections]
    for names in by_scheme(run).values():
        if "o_proj" in names[0]:  # of all blocks, whatever their number
            assert patterns(names, run) == [r".*model\.layers\.\d+\.(self_attn\.o_proj)$"]
            continue
        assert {name for name in every for pattern in patterns(names, run) if re.match(pattern, name)} == set(names)
    (whole,) = patterns(next(iter(by_scheme(run).values())), run, fused=True)
    for name in ("self_attn.qkv_proj", "self_attn.q_proj", "mlp.gate_up_proj"):
        assert re.match(whole, f"{BLOCKS}.1.{name}") and not re.match(whole, f"{BLOCKS}.11.{name}")
    parts = patterns([f"{BLOCKS}.1.self_attn.q_proj", f"{BLOCKS}.1.self_attn.k_proj"], run, fused=True)
    assert not any(re.match(pattern, f"{BLOCKS}.1.self_attn.qkv_proj") for pattern in parts)


@torch.no_grad()
def test_stock_transformers_computes_what_the_run_computes(mixed_run: Mixed, ids: Tensor, tmp_path: Path) -> None:
    """Symmetric weights, with and without inputs in 8 bits; asymmetric ones where what is quantized has one scheme.

    In this process; `test_compressed_tensors.py` has one without rotoboa.
    """
    asymmetric = {"weights.symmetric": False, "overrides": "blocks 0: weights.bits=16"}
    runs = {
        "weights": (mixed_run(), 1e-4),
        "inputs": (mixed_run({**STOCK, "overrides": HALF}), 1e-4),
        "asymmetric": (mixed_run(asymmetric), 5e-3),
    }
    for name, (run, off) in runs.items():
        compressed_tensors.check(run)
        compressed_tensors.write(run, tmp_path / name)
        inspect(tmp_path / name)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
        expected = run_logits(run, ids, plain=True)
        assert expected.std() > 0.5
        assert (found - expected).abs().max() < off, name
    data = json.loads((tmp_path / "inputs" / "config.json").read_text())["quantization_config"]
    groups = [(g["weights"], g["input_activations"]) for g in data["config_groups"].values()]
    bits = [(weights["num_bits"], inputs and inputs["num_bits"]) for weights, inputs in groups]
    assert bits == [(4, 8), (8, None), (8, 8)]


def test_a_config_with_other_groups_is_found_out(mixed_run: Mixed, tmp_path: Path) -> None:
    compressed_tensors.write(mixed_run(), tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    whole = json.loads(file.read_text())
    groups = whole["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 3, 8]
    for change, words in (
        (lambda data: data["config_groups"]["group_1"]["weights"].update(num_bits=4), "o_proj.weight_packed has shape"),
        (lambda data: data["ignore"].append("re:.*o_proj$"), "has no tensor .*layers.0.self_attn.o_proj.weight:"),
        (lambda data: data["config_groups"].pop("group_2"), "has no tensor .*layers.1.mlp.down_proj.weight:"),
        (lambda data: data["config_groups"]["group_2"].update(targets=["re:("]), "cannot be used"),
    ):
        data = json.loads(json.dumps(whole))
        change(data["quantization_config"])
        file.write_text(json.dumps(data))
        with pytest.raises(InputError, match=words):
            inspect(file.parent)


@pytest.mark.parametrize("version", [gptq.V2, gptq.V1])
def test_gptq(mixed_run: Mixed, ids: Tensor, tmp_path: Path, version: str) -> None:
    run, folder = mixed_run(), tmp_path / "export"
    gptq.write(run, folder, version=version)
    data = json.loads((folder / "quantize_config.json").read_text())
    assert (data["bits"], data["group_size"]) == (4, 32)
    assert list(data["dynamic"].items()) == [
        (r"+:.*model\.layers\.\d+\.(self_attn\.o_proj)$", {"bits": 3, "group_size": -1, "sym": True}),
        (r"+:.*model\.layers\.(1)\.(mlp\.down_proj)$", {"bits": 8, "group_size": 32, "sym": True}),
        (r"-:.*model\.layers\.(0)\.(self_attn\.q_proj|self_attn\.k_proj|self_attn\.v_proj|mlp\.gate_proj|mlp\.up_proj"
         r"|mlp\.down_proj|self_attn\.qkv_proj|mlp\.gate_up_proj)$", {}),
    ]  # fmt: skip
    with torch.no_grad():
        found = gptq.read(folder)(ids).logits
    assert (found - run_logits(run, ids)).abs().max() < 1e-4
    config = json.loads((folder / "config.json").read_text())
    for dynamic, words in (
        ({}, "do not belong together|has .* groups"),
        ({"-:.*": {}}, "says None bits"),
        ({"+:(": {"bits": 4}}, "dynamic in .* is damaged"),
        (3, "dynamic in .* is damaged"),
    ):
        config["quantization_config"]["dynamic"] = dynamic
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=words):
            gptq.read(folder)


def test_mlx(mixed_run: Mixed, ids: Tensor, tmp_path: Path) -> None:
    run, folder = mixed_run(), tmp_path / "export"
    mlx.write(run, folder)
    config = json.loads((folder / "config.json").read_text())
    data = config["quantization"]
    assert {name: data[name] for name in ("bits", "group_size", "mode")} == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
    }
    assert data[f"{BLOCKS}.0.self_attn.o_proj"] == {"group_size": 64, "bits": 3}
    assert data[f"{BLOCKS}.1.mlp.down_proj"] == {"group_size": 32, "bits": 8}
    assert data[f"{BLOCKS}.0.mlp.down_proj"] is False and f"{BLOCKS}.1.mlp.up_proj" not in data
    with torch.no_grad():
        found = mlx.read(folder)(ids).logits
    assert (found - run_logits(run, ids)).abs().max() < 1e-4
    for wrong in (False, {"group_size": 64}, {"group_size": 64, "bits": 4}):
        data[f"{BLOCKS}.0.self_attn.o_proj"] = wrong
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"o_proj and config\.json do not belong together"):
            mlx.read(folder)


@pytest.mark.parametrize(
    ("check", "changes", "words"),
    [
        (compressed_tensors.check, {"weights.symmetric": False}, "as if all layers had one .* W4A16 g32 and W3A16"),
        (
            compressed_tensors.check,
            {**STOCK, "overrides": "blocks 0: weights.bits=16"},
            "its inputs in 8 bits: override",
        ),
        (compressed_tensors.check, {**STOCK, "overrides": "blocks 0: activations.bits=4"}, "use 0.9333333 at 4 bits"),
        (
            compressed_tensors.check,
            {"rotation.r4": True, "rotation.r4_blocks": True, "overrides": "*.1.*.k_proj: weights.bits=8"},
            "vLLM alone, which computes q_proj, k_proj, v_proj of block 1 as one layer",
        ),
        (compressed_tensors.check, {"overrides": "*: weights.bits=16"}, "all layers of this run have 16-bit weights"),
        (gptq.check, {"overrides": "*.o_proj: weights.bits=5"}, "GPTQ has 2, 3, 4 and 8 bits, and the run has 5"),
        (gptq.check, {"overrides": "*.o_proj: activations.bits=4"}, "needs 4-bit activations, which GPTQ"),
        (mlx.check, {"overrides": "*.o_proj: weights.bits=7"}, "MLX has 2, 3, 4, 5, 6 and 8 bits, and the run has 7"),
        (mlx.check, {"overrides": "*.o_proj: weights.group_size=16"}, "and 16 of self_attn.o_proj share a scale"),
        (
            gptq.check,
            {"embedding.bits": 8},
            "GPTQ is written with the embedding in 16 bits, and this run has it in 8",
        ),
        (
            compressed_tensors.check,
            {"head.bits": 8},
            "and this run has them: quantize with --head.symmetric",
        ),
        (
            compressed_tensors.check,
            {
                **STOCK,
                "overrides": "*.o_proj: weights.bits=8",
                "weights.bits": 8,
                "weights.group_size": None,
                "head.bits": 8,
            },
            "in one layout, int-quantized for this run, and its head is in few bits",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    mixed_run: Mixed, check: Callable[[Finished], None], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check(mixed_run(changes))
    assert "\n" not in str(caught.value)


def test_version_1_of_gptq_takes_symmetric_layers_alone(mixed_run: Mixed) -> None:
    with pytest.raises(InputError, match="this run is asymmetric: use --format gptq"):
        gptq.check(mixed_run({"overrides": "*.o_proj: weights.symmetric=false"}), gptq.V1)
