"""What config.json of a native checkpoint says: written, read again, and as earlier releases wrote it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import rotoboa
from rotoboa.boa.scheme import QuantizationArgs, QuantizationScheme
from rotoboa.errors import InputError
from rotoboa.export.spec import FORMAT_VERSION, Spec
from rotoboa.models.families import FAMILIES
from rotoboa.models.shape import Shape

FIXED = {"activations.search": False, "cache.search": False, "cache.center": False, "evaluation.windows": 2}
SITES = ("qkv", "output", "gate_up", "down")
LAYERS = {
    "model.layers.1.mlp.down_proj": QuantizationScheme(QuantizationArgs(4, 16, True), QuantizationArgs(8)),
    "lm_head": QuantizationScheme(QuantizationArgs(6)),
}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(2, 2048, (2, 20), generator=torch.Generator().manual_seed(0))
    result: Tensor = model(ids).logits
    return result


def rewrite(run: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the model folder with another `quantization_config`."""
    folder = Path(shutil.copytree(run / "model", folder, dirs_exist_ok=True))
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def of_version_1(fields: dict[str, Any], blocks: int = 2, down: float = 0.9) -> None:
    """Clip ratios by block and site, in place of those of all, which were other ones."""
    for name in ("activation_search", "cache_search", "cache_center"):
        fields.pop(name, None)
    clips = {**dict.fromkeys(SITES, 0.9), "down": down, "key": 0.95, "value": 0.95}
    fields |= {"format_version": 1, "activation_clip": 1.0, "cache_clip": 1.0, "clips": [clips] * blocks}


def test_version_1_loads_with_its_clip_ratios(cheap_run: Callable[..., Path], tmp_path: Path) -> None:
    run = cheap_run("w4a4kv4", FIXED)
    expected = logits(run / "model")
    old = rewrite(run, tmp_path / "old", of_version_1)
    assert torch.equal(logits(old), expected)
    other = rewrite(run, tmp_path / "other", lambda fields: of_version_1(fields, down=0.5))
    assert not torch.equal(logits(other), expected)
    model, _ = rotoboa.load(old)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), expected), "written again in the form of this release"
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved["format_version"] == FORMAT_VERSION and len(saved["clips"]) == 2


def test_clip_ratios_of_other_blocks_are_refused(cheap_run: Callable[..., Path], tmp_path: Path) -> None:
    run = cheap_run("w4a4kv4", FIXED)
    old = rewrite(run, tmp_path / "old", lambda fields: of_version_1(fields, blocks=3))
    with pytest.raises(InputError, match=r"clips of 3 blocks for 2: export it again"):
        rotoboa.load(old)


def test_version_2_loads(cheap_run: Callable[..., Path], tmp_path: Path) -> None:
    """As this release, but for what it had not yet."""
    run = cheap_run("w4a4kv4", FIXED)
    fields = json.loads((run / "model" / "config.json").read_text())["quantization_config"]
    assert not {"layers", "clips", "tied_head"} & set(fields), "a run with one scheme for all is written as before"
    old = rewrite(run, tmp_path / "old", lambda fields: fields.update(format_version=2))
    assert torch.equal(logits(old), logits(run / "model"))


def test_there_and_back_again() -> None:
    spec = Spec(bits=2, group_size=32, layers=LAYERS, tied_head=True)
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert Spec.from_dict(Spec(bits=2).to_dict()) == Spec(bits=2)


def test_a_layer_has_its_own_scheme() -> None:
    family, spec = FAMILIES["llama"], Spec(bits=2, activation_bits=4, layers=LAYERS)
    shape = Shape.of(AutoConfig.for_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    assert spec.schemes(family, 0)["mlp.down_proj"] == spec.scheme
    assert spec.schemes(family, 1)["mlp.down_proj"] == LAYERS["model.layers.1.mlp.down_proj"]
    quantizers = [spec.transforms(shape, family, index).down.quantizer for index in (0, 1)]
    assert [quantizer and quantizer.bits for quantizer in quantizers] == [4, 8]
    assert spec.outer("lm_head") == QuantizationArgs(6) and spec.outer("model.embed_tokens") == QuantizationArgs()
    inside = spec.inside("model.")
    assert set(inside.layers) == {"layers.1.mlp.down_proj", "lm_head"} and spec.inside("") is spec


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"lm_head": {"weights": {"num_bits": 9}}}, "is damaged: of lm_head num_bits is 9"),
        ({"lm_head": {"weights": {"group_size": 0}}}, "is damaged: of lm_head group_size is 0"),
        ({"lm_head": {"weights": {"type": "float"}}}, "is damaged: of lm_head type is 'float'"),
        ({"lm_head": {"weights": {"bits": 4}}}, "layers in the quantization_config of this checkpoint are damaged"),
        ({"lm_head": {"cache": {}}}, "layers in the quantization_config of this checkpoint are damaged"),
        ({"lm_head": 4}, "layers in the quantization_config of this checkpoint are damaged"),
        ([], "layers in the quantization_config of this checkpoint are damaged"),
    ],
)
def test_damaged_layers_are_refused(layers: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Spec.from_dict({**Spec(bits=4).to_dict(), "layers": layers})
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
