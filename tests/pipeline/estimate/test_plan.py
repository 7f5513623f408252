"""The plan of a run says before what the run says after."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, NotASafetensorsRepoError
from safetensors import safe_open
from transformers import LlamaForCausalLM

import rotoboa
from rotoboa.errors import InputError
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.families import FAMILIES
from rotoboa.pipeline.console.plan_table import plan_tables
from rotoboa.pipeline.estimate.machines import Machine
from rotoboa.pipeline.estimate.plan import MEMORY, TIME, construction, plan
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.rotation.hadamard import Hadamard

MakeRecipe = Callable[..., Recipe]
RATES = Machine("still", 1e9, 5e8, 1e8, 1e10)


def tensor_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            total += sum(tensor.numel() * tensor.element_size() for tensor in map(reader.get_tensor, reader.keys()))
    return total


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({}, False),
        ({"weights.bits": 3, "weights.group_size": 16, "calibration.samples": 3}, False),
        ({"weights.bits": 2, "weights.group_size": 32, "memory": "1KiB"}, True),
    ],
)
def test_what_is_planned_is_what_comes(
    save_llama: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any], tied: bool
) -> None:
    model = save_llama(tmp_path / "model", tie_word_embeddings=tied)
    recipe = make_recipe("w4a16", {"model": str(model), "output": tmp_path / "run", **changes})
    planned, report = plan(recipe), rotoboa.quantize(recipe)
    reference = LlamaForCausalLM.from_pretrained(model)
    assert planned["model"]["parameters"] == sum(p.numel() for p in reference.parameters())
    linears = [m for m in reference.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert planned["model"]["quantized_parameters"] == sum(m.weight.numel() for m in linears)
    assert planned["model"]["dtype"] == "bfloat16"
    assert planned["sizes"]["original"] == report["sizes"]["original"]
    assert planned["sizes"]["quantized"] == tensor_bytes(tmp_path / "run" / "model")
    for name in ("bits_per_weight", "bits_per_weight_of_file"):
        assert planned["sizes"][name] == pytest.approx(report[name], rel=1e-12)
    for name in ("blocks", "embedding", "head"):
        assert planned["sizes"][name] == report["sizes"][name]
    assert report["sizes"]["embedding"] == report["sizes"]["head"] == 2 * 2048 * 64
    parameters = sum(p.numel() for p in reference.parameters())
    assert report["bits_per_weight_of_file"] == 8 * tensor_bytes(tmp_path / "run" / "model") / parameters
    assert planned["sizes"]["was_tied"] is report["was_tied"] is tied
    samples, length = report["tokens"]["calibration"]
    assert planned["calibration"]["tokens"] == samples * length
    assert planned["calibration"]["evaluation_windows"] == 4
    spilled = report["peak_memory_bytes"]["spilled"]
    assert planned["calibration"]["spilled"] == pytest.approx(spilled, abs=1024 if "memory" in changes else 0)


def test_parameters_of_the_model(llama: Path, make_recipe: MakeRecipe) -> None:
    reference = LlamaForCausalLM.from_pretrained(llama)
    planned = plan(make_recipe("w4a16", {"model": str(llama)}))
    assert planned["model"]["parameters"] == sum(p.numel() for p in reference.parameters())


def test_no_tensor_is_read(llama: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "tensor", lambda *arguments: pytest.fail("a tensor was read"))
    monkeypatch.setattr(Checkpoint, "matrix", lambda *arguments: pytest.fail("a tensor was read"))
    plan(make_recipe("w4a4kv4", {"model": str(llama)}))


def test_more_work_takes_longer(llama: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotoboa.pipeline.estimate.plan.measured", lambda device: RATES)

    def seconds(**changes: Any) -> float:
        fields = {name.replace("__", "."): value for name, value in changes.items()}
        return float(plan(make_recipe("w4a4kv4", {"model": str(llama), **fields}))["time"]["seconds"])

    base = seconds()
    assert base > 0
    assert seconds(calibration__samples=8) > base
    assert seconds(weights__refine=8) > base
    assert seconds(weights__method="gptq") < base
    assert seconds(weights__method="aespa") > base and seconds(weights__method="brecq") > base
    assert seconds(weights__method="adaround") > seconds(weights__method="gptq")
    assert seconds(weights__method="aespa", weights__iterations=100) < seconds(weights__method="aespa")
    assert seconds(evaluation__baseline=False) < base
    assert seconds(evaluation__sources=True) > base
    assert seconds(weights__method="rtn") < seconds(weights__method="gptq")


def test_the_table_says_when_its_times_look_wrong(
    llama: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def caption(machine: Machine) -> str:
        monkeypatch.setattr("rotoboa.pipeline.estimate.plan.measured", lambda device: machine)
        found = plan(make_recipe("w4a16", {"model": str(llama)}))
        return str(plan_tables(found)[-1].caption)

    assert "may be too long" not in caption(RATES) and "0.1 G elements" in caption(RATES)
    words = "These times may be too long: something else was at work while elements, bandwidth were measured."
    assert caption(replace(RATES, disturbed=("elements", "bandwidth"))).startswith(words)


def test_memory_grows_with_what_is_held(llama: Path, make_recipe: MakeRecipe) -> None:
    def memory(**fields: Any) -> dict[str, int]:
        return dict(plan(make_recipe("w4a16", {"model": str(llama), **fields}))["memory"])

    few, many = memory(**{"calibration.samples": 1}), memory(**{"calibration.samples": 100_000})
    assert many["peak"] > few["peak"] == max(value for name, value in few.items() if name != "peak")
    assert memory(**{"calibration.samples": 100_000, "memory": "0"})["solver"] < few["solver"]


# -- rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (64, "Sylvester of order 64"),
        (1, "Sylvester of order 1"),
        (12, "Paley I of order 12 over GF(11)"),
        (96, "Paley I of order 12 over GF(11) x Sylvester of order 8"),
        (14336, "Paley I of order 28 over GF(27) x Sylvester of order 512"),
        (36, "Paley II of order 36 over GF(17)"),
        (688, "Goethals-Seidel of order 172 x Sylvester of order 4"),
        (4 * 167, "167 blocks, each Sylvester of order 4"),
    ],
)
def test_constructions(size: int, words: str) -> None:
    assert construction(Hadamard.of(size)) == words


@pytest.mark.parametrize("size", [2, 20, 24, 40, 48, 60, 76, 104, 108, 116, 140, 148, 156, 172, 184, 768, 11008, 18944])
def test_orders_multiply_to_the_size(size: int) -> None:
    orders = [int(order) for order in re.findall(r"of order (\d+)", construction(Hadamard.of(size)))]
    assert math.prod(orders) == size


def test_rotations_that_are_on(llama: Path, make_recipe: MakeRecipe) -> None:
    rotations = plan(make_recipe("w4a4kv4", {"model": str(llama), "rotation.r3": False}))["rotations"]
    assert list(rotations) == ["r1", "r2", "heads", "r4"]
    assert [rotation["size"] for rotation in rotations.values()] == [64, 16, 64, 96]
    assert rotations["r4"]["base"] == 12 and all("online" in rotations[name]["where"] for name in ("r1", "heads", "r4"))


# -- against a run ----------------------------------------------------------------------------------------------------

RUN = """
import json, sys, time
time.perf_counter = time.process_time  # other work on the machine does not count
import torch
torch.set_num_threads(1)
import rotoboa
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
recipe = build_recipe(load_recipe("w2a16"), json.loads(sys.argv[1]))
planned, report = plan(recipe, "cpu"), rotoboa.quantize(recipe, device="cpu")
measured = report["plain_forward_seconds"] + sum(s for n, s in report["seconds"].items() if n not in ("text", "total"))
memory = [planned["memory"]["peak"], report["peak_memory_bytes"]["host"]]
print(json.dumps([planned["time"]["seconds"], measured, *memory]))
"""


@pytest.mark.slow
def test_a_run_takes_what_was_planned(text: Path, tmp_path: Path) -> None:
    changes = {
        "output": str(tmp_path / "run"),
        "calibration.dataset": str(text),
        "evaluation.dataset": str(text),
        "calibration.samples": 4,
        "evaluation.windows": 4,
        "evaluation.report": False,
        "weights.starts": 1,
        "weights.refine": 1,
        "weights.tabu": 0.5,
    }
    command = [sys.executable, "-c", RUN, json.dumps(changes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    time, took, memory, held = json.loads(done.stdout.splitlines()[-1])
    assert took / TIME <= time <= took * TIME, (time, took)
    assert held / MEMORY <= memory <= held * MEMORY, (memory, held)


# -- the hub ----------------------------------------------------------------------------------------------------------


def headers(folder: Path) -> SimpleNamespace:
    """As `get_safetensors_metadata` gives them."""
    tensors: dict[str, SimpleNamespace] = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        data = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        tensors |= {name: SimpleNamespace(**entry) for name, entry in data.items() if name != "__metadata__"}
    return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})


def test_of_a_hub_model_only_headers_are_fetched(
    llama: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*arguments: Any, **options: Any) -> str:
        assert options["local_files_only"]
        raise LocalEntryNotFoundError("not there")

    module = "rotoboa.models.remote"
    monkeypatch.setattr(f"{module}.snapshot_download", missing)
    monkeypatch.setattr(f"{module}.hf_hub_download", lambda source, name: str(llama / name))
    monkeypatch.setattr(f"{module}.get_safetensors_metadata", lambda source: headers(llama))
    monkeypatch.setattr(f"{module}.file_exists", lambda source, name: (llama / name).is_file())
    monkeypatch.setattr("rotoboa.pipeline.estimate.plan.measured", lambda device: RATES)
    local = plan(make_recipe("w4a16", {"model": str(llama)}))
    remote = plan(make_recipe("w4a16", {"model": "owner/name"}))
    assert remote["model"] == local["model"] | {"name": "owner/name"}
    assert remote["sizes"]["original"] == tensor_bytes(llama)  # without headers
    for part in ("rotations", "memory", "time"):
        assert remote[part] == local[part] or part == "memory"
    assert remote["sizes"]["quantized"] == local["sizes"]["quantized"]

    monkeypatch.setattr(f"{module}.file_exists", lambda source, name: name == "adapter_config.json")
    with pytest.raises(InputError, match=r"owner/name holds an adapter .* beside the model: merge it first"):
        plan(make_recipe("w4a16", {"model": "owner/name"}))

    def pickles(source: str) -> None:
        raise NotASafetensorsRepoError("only .bin")

    monkeypatch.setattr(f"{module}.get_safetensors_metadata", pickles)
    with pytest.raises(InputError, match="owner/name has no safetensors files: choose another"):
        plan(make_recipe("w4a16", {"model": "owner/name"}))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_planned(
    family: str,
    tmp_path: Path,
    save_family: Callable[..., Path],
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parameters, bytes and operations of each stage; experts and models without a gate among them."""
    monkeypatch.setattr("rotoboa.pipeline.estimate.plan.measured", lambda device: RATES)
    folder = save_family(tmp_path, family, torch.bfloat16)
    planned = plan(make_recipe("w2a16", {"model": str(folder)}))
    assert 0 < planned["model"]["quantized_parameters"] < planned["model"]["parameters"]
    assert planned["sizes"]["original"] >= tensor_bytes(folder) > planned["sizes"]["quantized"] > 0
    stages = planned["time"]["stages"]
    needed = ("forward", "input statistics", "value statistics", "rounding")
    assert all(stages[name]["operations"] > 0 for name in needed)
    assert planned["memory"]["peak"] > 0
