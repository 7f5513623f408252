"""compressed-tensors: packing against the format's description, logits by transformers in a process of its own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rotoboa.boa.solver.rounding import Quantized
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import compressed_tensors
from rotoboa.export.formats.compressed_tensors import compress
from rotoboa.export.formats.compressed_tensors_reader import inspect
from rotoboa.export.runtimes import ask
from rotoboa.pipeline import exporting
from rotoboa.pipeline.verifying import run_logits, verify
from rotoboa.rotation.hadamard import Hadamard

Runs = Callable[..., Path]
Opened = Callable[..., Finished]

# Name: recipe, its changes, the difference of a logit that its dtype of scales allows (of logits that spread by 1.6).
SETTINGS: dict[str, tuple[str, dict[str, Any], float]] = {
    "w2 groups": ("w2a16", {"weights.group_size": 16}, 5e-3),
    "w3 channels": ("w3a16", {}, 5e-3),
    "w8 groups": ("w4a16", {"weights.bits": 8, "weights.group_size": 32}, 5e-3),
    "w2 symmetric": ("w2a16", {"weights.symmetric": True}, 1e-5),
    "w3 symmetric groups": ("w3a16", {"weights.symmetric": True, "weights.group_size": 16}, 1e-5),
    "w8 symmetric": ("w4a16", {"weights.symmetric": True, "weights.bits": 8}, 1e-5),
    "w4 without rotation": ("w4a16", {"weights.symmetric": True, "rotation.r1": False, "rotation.r2": False}, 1e-5),
    "w4a8": ("w4a16", {"weights.symmetric": True, "activations.bits": 8, "activations.clip": 254 / 255,
                       "activations.search": False}, 1e-5),
    "w4a4": ("w4a16", {"weights.symmetric": True, "activations.bits": 4,
                       "activations.convention": "compressed-tensors"}, 1e-5),
    "w4 groups a4 groups": ("w4a16", {"weights.symmetric": True, "weights.group_size": 32, "activations.bits": 4,
                                      "activations.convention": "compressed-tensors",
                                      "activations.group_size": 32}, 1e-5),
    "nvfp4": ("nvfp4a16", {}, 1e-5),
    "static fp8": ("fp8", {"rotation.r1": "merged", "activations.dynamic": False}, 1e-5),
    "head": ("w4a16", {"weights.symmetric": True, "weights.group_size": 32, "head.bits": 6,
                       "head.symmetric": True}, 1e-5),
    "mxfp4": ("mxfp4a16", {"overrides": "*.o_proj: weights.bits=16"}, 1e-5),
}  # fmt: skip

LOAD = """
import runpy, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids, load = load_file(sys.argv[1])["ids"], runpy.run_path(sys.argv[3])["load"]
for folder in sys.argv[4:]:
    model, _ = load(folder, torch.float32)
    with torch.no_grad():
        save_file({"logits": model(ids).logits.contiguous()}, Path(folder).with_suffix(".logits"))
assert "rotoboa" not in sys.modules
import rotoboa
assert "rotoboa.pipeline.stages" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(Path(sys.argv[2]) / "model", dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(ids).logits.contiguous()}, Path(sys.argv[1]).with_name("native.logits"))
"""


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 2048, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def loaded(
    opened_run: Opened, cheap_run: Runs, ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Tensor, Tensor]]:
    """Setting -> logits of stock transformers, which has not seen rotoboa, as `verify` loads it, and of the run.

    And "native": of transformers once rotoboa is imported, of the run itself.
    """
    folder = tmp_path_factory.mktemp("exports")
    save_file({"ids": ids}, folder / "ids")
    runs = {name: opened_run(recipe, changes) for name, (recipe, changes, _) in SETTINGS.items()}
    for name, run in runs.items():
        compressed_tensors.write(run, folder / name)
        inspect(folder / name)
    native = str(cheap_run(*SETTINGS["w2 groups"][:2]))
    program = str(Path(ask.__file__).with_name(ask.RUNTIMES["transformers"].program))
    command = [sys.executable, "-c", LOAD, str(folder / "ids"), native, program, *(str(folder / name) for name in runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    logits = {name: load_file(folder / f"{name}.logits")["logits"] for name in runs}
    own = load_file(folder / "native.logits")["logits"], run_logits(runs["w2 groups"], ids)
    return {name: (logits[name], run_logits(run, ids, plain=True)) for name, run in runs.items()} | {"native": own}


@pytest.mark.parametrize("setting", SETTINGS)
def test_stock_transformers_computes_what_the_run_computes(
    loaded: dict[str, tuple[Tensor, Tensor]], setting: str
) -> None:
    found, expected = loaded[setting]
    assert expected.std() > 0.5
    assert (found - expected).abs().max() <= SETTINGS[setting][2]


def test_a_process_that_imports_only_rotoboa_and_transformers(loaded: dict[str, tuple[Tensor, Tensor]]) -> None:
    """It loads the native format."""
    found, expected = loaded["native"]
    assert (found - expected).abs().max() < 1e-4


def unpack_slowly(words: Tensor, bits: int, count: int) -> list[list[int]]:
    """Values of rows of words, bit by bit: value i is bits i * b to (i + 1) * b - 1, the lowest first, less 2^(b-1)."""
    rows = []
    for row in words.tolist():
        stream = "".join(format(word & 0xFFFFFFFF, "032b")[::-1] for word in row)
        values = [int(stream[i * bits : (i + 1) * bits][::-1], 2) for i in range(count)]
        rows.append([value - 2 ** (bits - 1) for value in values])
    return rows


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("groups", [1, 5])
def test_tensors_are_those_of_the_description(bits: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(2**bits, (7, 35), generator=generator).to(torch.uint8)
    zero = torch.randint(2**bits, (7, groups), generator=generator).float()
    scale = torch.rand(7, groups, generator=generator).half().float()
    result = Quantized(integers, scale, zero)
    tensors = compress(result, bits, symmetric=False)
    assert tensors["weight_shape"].tolist() == [7, 35] and tensors["weight_scale"].dtype == torch.float16
    q = torch.tensor(unpack_slowly(tensors["weight_packed"], bits, 35)).double()
    z = torch.tensor(unpack_slowly(tensors["weight_zero_point"].T, bits, 7)).T.double()
    weight = (q.unflatten(1, (groups, -1)) - z[..., None]) * tensors["weight_scale"].double()[..., None]
    assert torch.equal(weight.flatten(1), result.dequantize().double())
    with pytest.raises(ValueError, match="other zero points than the middle"):
        compress(result, bits, symmetric=True)


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("w4a4kv4", {}, "needs .* R3 .*cache of 4-bit keys and 4-bit values, its first position in 16 bits, "
         "which compressed-tensors cannot hold"),
        ("w4a4kv4", {"cache.sink": 4}, "4-bit values, its first 4 positions in 16 bits, which compressed-tensors"),
        ("w4a16", {"rotation.r4": True}, "needs R4 of width 96, no power of two, .* --rotation.r4_blocks"),
        ("w4a16", {"activations.bits": 8, "activations.search": False}, "needs symmetric weights"),
        ("w4a16", {"activations.bits": 8, "weights.symmetric": True}, r"cannot hold clip .*--activations\.convention"),
        ("w4a16", {"activations.bits": 4, "weights.symmetric": True, "activations.symmetric": False},
         "takes symmetric dynamic activations"),
        ("w4a16", {"activations.bits": 8, "weights.symmetric": True, "activations.group_size": 32, "rotation.r4": True,
                   "rotation.r4_blocks": True}, "per token and not in groups of 32.* --activations.group_size none"),
    ],
)  # fmt: skip
def test_what_stock_readers_would_compute_wrongly_is_refused(
    opened_run: Opened, tmp_path: Path, recipe: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        compressed_tensors.write(opened_run(recipe, changes), tmp_path / "export")
    assert "\n" not in str(caught.value) and not (tmp_path / "export").exists()


@pytest.fixture
def broken(opened_run: Opened, tmp_path: Path) -> Path:
    compressed_tensors.write(opened_run("w4a16"), tmp_path / "export", shard_bytes=100_000)
    inspect(tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.usefixtures("runtimes_here")
@pytest.mark.parametrize(("width", "order"), [(128, 128), (96, 32)])
def test_r4_is_written_for_vllm_and_kept_from_transformers(
    cheap_run: Runs, tmp_path: Path, width: int, order: int
) -> None:
    changes = {"rotation.r4": True, "rotation.r4_blocks": True, "weights.symmetric": True}
    run = cheap_run("w4a16", changes, {"intermediate_size": width})
    export = exporting.export(run, "compressed-tensors", output=tmp_path / "export")
    with pytest.raises(Exception, match="rotated online: for vLLM alone, not transformers"):
        AutoModelForCausalLM.from_pretrained(export)
    (group,) = json.loads((export / "config.json").read_text())["quantization_config"]["transform_config"][
        "config_groups"
    ].values()
    assert (
        group["type"] == "hadamard"
        and group["head_dim"] == (None if order == width else order)
        and group["randomize"] is False
    )
    assert [(where["targets"], where["location"]) for where in group["apply"]] == [(["re:.*mlp.down_proj$"], "input")]
    matrix = load_file(export / "model.safetensors")["model.layers.0.mlp.down_proj.R4_input.weight"].double()
    assert torch.equal(matrix / order**0.5, Hadamard.of(order).matrix())
    assert "With vLLM alone" in (export / "README.md").read_text()
    (result,) = verify(export)  # the stock model, and the rotation as the format's own library runs it
    assert result.difference < 1e-4 and result.reader == "transformers, rotations by compressed-tensors"


@pytest.mark.usefixtures("runtimes_here")
def test_r1_behind_the_norms_is_written_for_vllm(cheap_run: Runs, opened_run: Opened, tmp_path: Path) -> None:
    changes = {"rotation.r1": "online", "rotation.scale": True, "weights.symmetric": True}
    export = exporting.export(cheap_run("w4a16", changes), "compressed-tensors", output=tmp_path / "export")
    with pytest.raises(Exception, match="rotated online"):
        AutoModelForCausalLM.from_pretrained(export)
    config = json.loads((export / "config.json").read_text())["quantization_config"]["transform_config"]
    (applied,) = config["config_groups"]["R1"]["apply"]
    layers = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    assert applied["targets"] == [f"re:.*{layer}_proj$" for layer in layers] and applied["location"] == "input"
    (result,) = verify(export)
    assert result.difference < 1e-4
    with pytest.raises(InputError, match=r"a rotation over all heads .*online, before O.*, which"):
        compressed_tensors.write(opened_run("w4a16", {**changes, "rotation.heads": True}), tmp_path / "heads")
    with pytest.raises(InputError, match="5 directions of inputs in 8 bits"):
        kept = {"activations.bits": 4, "activations.directions": 5}
        compressed_tensors.write(opened_run("w4a16", changes | kept), tmp_path / "kept")


def weights(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return found


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(intermediate_size=80), "config.json asks for"),
        (lambda c: c.update(num_hidden_layers=3), "has no tensor model.layers.2"),
        (lambda c: c.update(num_hidden_layers=1), "has more blocks than the 1"),
        (lambda c: c.update(vocab_size=2000), "embed_tokens.weight has shape"),
        (lambda c: weights(c).update(num_bits=8), "weight_packed has"),
        (lambda c: weights(c).update(num_bits="x"), "cannot be used"),
        (lambda c: c["quantization_config"].update(format="int-quantized"), "int-quantized, where pack-quantized"),
        (lambda c: c["quantization_config"].update(format="of the future"), "cannot be used"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "says quant_method gptq"),
        (lambda c: c.pop("quantization_config"), "holds no compressed-tensors checkpoint"),
        (lambda c: c.update(model_type="mamba"), "cannot be used|not supported"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_its_tensors_is_refused(
    broken: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    edit(broken, change)
    with pytest.raises(InputError, match=words) as caught:
        inspect(broken)
    assert "\n" not in str(caught.value)


def test_damaged_shards_are_named(broken: Path) -> None:
    shards = sorted(broken.glob("*.safetensors"))
    assert len(shards) > 2
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"{shards[0].name} is not a whole safetensors file"):
        inspect(broken)
    shards[0].unlink()
    with pytest.raises(InputError, match=f"lacks {shards[0].name}, which its index names"):
        inspect(broken)
    shutil.copyfile(shards[1], shards[0])
    with pytest.raises(InputError, match="and its index disagree about"):
        inspect(broken)
    (broken / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="is not a valid index"):
        inspect(broken)
