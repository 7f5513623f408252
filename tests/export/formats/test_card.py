"""The model card and the record of an export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats.card import FORMATS, licence_of, write_card
from rotoboa.export.formats.card_facts import Base, Figures
from rotoboa.export.record import check_files, read_record, write_record
from rotoboa.export.scheme_layers import divided, scheme_layers
from rotoboa.export.spec import Spec
from rotoboa.models.aliases import TINY_FOLDER

FIGURES = Figures(
    perplexity={"wikitext2": {"full_precision": 9.7583, "rtn": 13.25, "quantized": 10.125}},
    tokens={"wikitext2": (141, 2048)},
    original=3 * 2**20,
)
HUB = Base("meta-llama/Llama-3.2-1B", hub=True, licence="llama3.2")


def card(folder: Path, name: str, spec: Spec, base: Base | None = None) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    write_card(folder, name, spec, FIGURES, "model: x\n", base=base or HUB, files={"model.x": 2**20})
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("name", FORMATS)
def test_card(tmp_path: Path, name: str) -> None:
    front, text = card(tmp_path, name, Spec(bits=3, group_size=64))
    assert front["base_model"] == "meta-llama/Llama-3.2-1B" and front["base_model_relation"] == "quantized"
    assert front["license"] == "llama3.2" and front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["rotoboa", "quantized", "w3a16", name]
    assert "# meta-llama/Llama-3.2-1B in W3A16" in text
    assert "On wikitext2, 141 windows of 2048 tokens" in text
    for row in ("original | 9.758", "rounded to nearest, without rotation | 13.250", "this model | 10.125"):
        assert f"| {row} |" in text
    assert "3 bits, asymmetric, a scale per group of 64 inputs" in text
    assert "| size | 1.00 MiB (original 3.00 MiB) |" in text and "| rotations | R1, R2 (R1" in text
    assert "```yaml\nmodel: x\n```" in text
    assert "\n\n\n" not in text and "None" not in text


def test_card_says_how_to_load(tmp_path: Path) -> None:
    asymmetric = card(tmp_path, "compressed-tensors", Spec(bits=4))[1]
    assert "CompressedTensorsConfig(dequantize=True)" in asymmetric and "vllm serve" in asymmetric
    symmetric = card(tmp_path, "compressed-tensors", Spec(bits=4, symmetric=True))[1]
    assert "dequantize" not in symmetric
    active = card(tmp_path, "compressed-tensors", Spec(bits=4, symmetric=True, activation_bits=8))[1]
    assert "max |x| / 127.5" in active and "W4A8" in active
    assert "| 8 bits, dynamic, per token |" in active and "rounded per token with the scale" in active
    grouped = Spec(bits=4, symmetric=True, activation_bits=8, activation_group=64)
    active = card(tmp_path, "compressed-tensors", grouped)[1]
    assert "| 8 bits, dynamic, per token in groups of 64 |" in active
    assert "rounded per token in groups of 64 channels with the scale max |x| / 127.5" in active
    assert "--linear-backend humming" in active and "inputs of W4A8 in 16 bits" in active
    assert "\n\n\n" not in active
    assert "import rotoboa" in card(tmp_path, "native", Spec(bits=4, key_bits=4, value_bits=4))[1]
    kept = card(tmp_path, "native", Spec(bits=4, activation_bits=4, activation_directions=16))[1]
    assert "| 4 bits, dynamic, per token, but 16 directions in 8 |" in kept
    sink = card(tmp_path, "native", Spec(bits=4, key_bits=4, value_bits=3, cache_sink=2))[1]
    assert "| keys and values | 4 and 3 bits, of the first 2 positions 16 |" in sink
    one = card(tmp_path, "native", Spec(bits=4, key_bits=4, value_bits=4, cache_sink=1))[1]
    assert "| keys and values | 4 and 4 bits, of the first position 16 |" in one
    assert "gguf_file=" in card(tmp_path, "gguf", Spec(bits=4, symmetric=True))[1]
    assert "GPTQModel" in card(tmp_path, "gptq", Spec(bits=4))[1]


def test_card_has_a_table_of_schemes(mixed_run: Callable[..., Finished], tmp_path: Path) -> None:
    def written(name: str, run: Finished) -> str:
        layers, base = scheme_layers(run), Base("mine", hub=False, licence=None)
        write_card(
            tmp_path, name, run.spec, FIGURES, "x", base=base, files={"x": 1}, layers=layers, divided=divided(run)
        )
        return (tmp_path / "README.md").read_text()

    text = written("compressed-tensors", mixed_run())
    assert "# mine in W4A16, some layers otherwise" in text and "tags: [rotoboa, quantized, w4a16, compressed" in text
    assert "| weights | 4 bits, symmetric, a scale per group of 32 inputs, but for the layers below |" in text
    assert "| activations | not quantized |" in text and "Kernels for 3-bit weights" in text
    table = text[text.index("## Layers") : text.index("## Perplexity")].splitlines()
    assert [line for line in table if line][3:] == [
        "| W4A16 g32 | 5 | q_proj, k_proj, v_proj, gate_proj, up_proj of block 1 |",
        "| W16A16 | 6 | q_proj, k_proj, v_proj, gate_proj, up_proj, down_proj of block 0 |",
        "| W3A16 | 2 | o_proj |",
        "| W8A16 g32 | 1 | down_proj of block 1 |",
    ]
    assert "\n\n\n" not in text and "None" not in text
    one = written("native", mixed_run({"overrides": "*.q_proj: weights.bits=4"}))
    assert "## Layers" not in one and "otherwise" not in one and "layers below" not in one
    ends = written("native", mixed_run({"head.bits": 8}))
    assert "| 1 | head |" in ends
    for name in ("compressed-tensors", "gptq"):
        split = written(name, mixed_run({"overrides": "*.1.*.q_proj: weights.bits=8"}))
        assert "vLLM cannot load this model: it computes q_proj, k_proj, v_proj of block 1 as one layer" in split
        assert "vllm serve" not in split and "\n\n\n" not in split
    change = {"weights.symmetric": False, "overrides": "blocks 1: activations.bits=8"}
    assert "| activations | not quantized, but for the layers below |" in written("native", mixed_run(change))


def test_card_of_a_local_model_of_unknown_licence(tmp_path: Path) -> None:
    front, text = card(tmp_path, "native", Spec(bits=2), Base("mine", hub=False, licence=None))
    assert "base_model" not in front and "license" not in front
    assert "| licence of the base model | unknown: see the base model |" in text


def test_licence_of_a_checkpoint(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("\n  LLAMA 2 COMMUNITY LICENSE AGREEMENT\nmore\n")
    assert licence_of(tmp_path) == "LLAMA 2 COMMUNITY LICENSE AGREEMENT"
    for content in ("no front matter", "---\n[\n---\n", "---\nlicense: [a]\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(content)
        assert licence_of(tmp_path) == "LLAMA 2 COMMUNITY LICENSE AGREEMENT"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    assert licence_of(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\n---\n")
    assert licence_of(tmp_path) == "gemma"
    assert licence_of(TINY_FOLDER) == "apache-2.0"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "exports" / "gptq"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("card")
    write_record(folder, "gptq", tmp_path / "run", folder, "blocks")
    return folder


def test_record_names_the_run_and_guards_the_files(export: Path) -> None:
    record = read_record(export)
    assert (record.format, record.run, record.blocks) == ("gptq", "../..", "blocks")
    assert list(record.files) == ["model.safetensors"] and str(export) not in (export / "export.json").read_text()
    (export / "README.md").write_text("edited")
    check_files(export, record)
    (export / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(InputError, match=r"model\.safetensors is not the file that was exported"):
        check_files(export, record)
    (export / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks model\.safetensors, which was exported"):
        check_files(export, record)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"record_version": 0}, "has version 0, and this installation reads 1: install the release that wrote it"),
        ({"record_version": 2}, "has version 2, and this installation reads 1"),
        ({"surplus": 1}, "is damaged .*surplus"),
        ({"files": []}, r"is damaged \(files is \[\]\)"),
        ({"run": None}, r"is damaged \(run is None\)"),
    ],
)
def test_a_record_of_another_version_or_damaged_is_refused(export: Path, changes: dict[str, Any], words: str) -> None:
    data = json.loads((export / "export.json").read_text())
    (export / "export.json").write_text(json.dumps({**data, **changes}))
    with pytest.raises(InputError, match=words):
        read_record(export)


def test_what_is_no_record_is_refused(export: Path) -> None:
    for content in ("", "{", "[]", "{}"):
        (export / "export.json").write_text(content)
        with pytest.raises(InputError, match=r"export\.json is damaged"):
            read_record(export)
    (export / "export.json").unlink()
    with pytest.raises(InputError, match=r"is no export: it has no export\.json; write one with `rotoboa export`"):
        read_record(export)
