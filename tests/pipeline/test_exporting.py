"""`rotoboa export`: every format with all that a hub repository needs, atomic, refused in one sentence, uploaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from typer.testing import CliRunner

from rotoboa.errors import InputError, RunError
from rotoboa.pipeline import exporting
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.exporting import FORMATS, export, shard_size
from rotoboa.pipeline.recipe.recipe_files import build_recipe

Runs = Callable[..., Path]
ALWAYS = {"README.md", "recipe.yaml", "report.json", "export.json", "config.json", "generation_config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"}


@pytest.fixture(scope="module")
def run(cheap_run: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A symmetric 4-bit run, which every format holds, with a chat template and a licence."""
    folder = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(cheap_run("w4a16", {"weights.symmetric": True, "weights.group_size": 32}), folder)
    (folder / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model" / "LICENSE").write_text("Licence")
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_a_whole_repository(run: Path, name: str, text: Path, llama: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run), "--format", name])
    assert result.exit_code == 0, result.output
    folder = run / "exports" / name
    assert result.stdout == f"The export is in {folder}\n"
    found = {file.name for file in folder.iterdir()}
    weights = {"model-Q4_0.gguf"} if name == "gguf" else {"model.safetensors"}
    more = {"quantize_config.json"} if name.startswith("gptq") else set()
    assert found == ALWAYS | TOKENIZER | weights | more
    assert not list(folder.parent.glob(".*"))
    report = json.loads((folder / "report.json").read_text())
    assert set(report["perplexity"][text.name]) == {"full_precision", "quantized"}
    recipe = build_recipe(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert recipe.output is None and recipe.model == llama.name and recipe.weights.bits == 4
    for file in ("README.md", "recipe.yaml", "report.json", "export.json", "config.json"):
        assert str(llama.parent) not in (folder / file).read_text(), file
    card = (folder / "README.md").read_text()
    assert f"| this model | {report['perplexity'][text.name]['quantized']:.3f} |" in card
    assert "| licence of the base model | unknown" in card


def test_shards_and_index(run: Path, tmp_path: Path) -> None:
    target = export(run, "native", output=tmp_path / "out", shard_bytes=shard_size("100KB"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards == sorted(file.name for file in target.glob("*.safetensors"))
    together: dict[str, Any] = {}
    for shard in shards:
        tensors = load_file(target / shard)
        assert all(index["weight_map"][name] == shard for name in tensors)
        together |= tensors
    whole = load_file(run / "model" / "model.safetensors")
    assert together.keys() == whole.keys() and all(torch.equal(together[name], whole[name]) for name in whole)
    sizes = [tensor.numel() * tensor.element_size() for tensor in whole.values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_the_models_own_folder_has_a_card(run: Path) -> None:
    assert {file.name for file in (run / "model").iterdir()} >= ALWAYS
    assert "import rotoboa" in (run / "model" / "README.md").read_text()


def test_an_export_is_replaced_and_nothing_else(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    export(run, "native", output=target)
    export(run, "gptq", output=target)
    assert json.loads((target / "export.json").read_text())["format"] == "gptq"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="mine exists and is no export of rotoboa: give another --output"):
        export(run, "gptq", output=tmp_path / "mine")
    assert (tmp_path / "mine" / "photo.jpg").is_file()


def test_a_failure_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = export(run, "native", output=tmp_path / "out")
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_card", fail)
    with pytest.raises(InputError, match=r"out cannot be written \(No space left on device\): make room"):
        export(run, "gptq", output=target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("recipe", "name", "words"),
    [
        ("w4a4kv4", "compressed-tensors", "use --format native"),
        ("w4a4kv4", "gguf", "use --format native"),
        ("w4a16", "gptq-v1", "use --format gptq"),
        ("w3a16", "gguf", "quantize with --weights.bits 4, or use --format native"),
        ("w4a16", "safetensors", "there is no format 'safetensors': use one of native, compressed-tensors, gptq"),
    ],
)
def test_refusals_are_one_sentence(cheap_run: Runs, recipe: str, name: str, words: str) -> None:
    run = cheap_run(recipe)
    result = CliRunner().invoke(app, ["export", str(run), "--format", name])
    assert result.exit_code == 2 and result.stdout == ""
    assert words in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (run / "exports").exists()


def test_an_unfinished_or_damaged_run_is_refused(cheap_run: Runs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder of a run"):
        export(tmp_path, "native")
    run = Path(shutil.copytree(cheap_run("w4a16"), tmp_path / "run"))
    config = run / "model" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"the run has 2 blocks, and its config\.json 3"):
        export(run, "native")
    for damaged in ("{", json.dumps({**content, "quantization_config": {"quant_method": "awq"}}), "[]"):
        config.write_text(damaged)
        with pytest.raises(InputError, match="holds no model of a finished run"):
            export(run, "native")
    (run / "blocks" / "00001.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"00001\.safetensors is missing or damaged"):
        export(run, "native")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    with pytest.raises(InputError, match="is not finished"):
        export(run, "native")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kb", 1500), ("7B", 7)])
def test_shard_sizes(text: str, size: int) -> None:
    assert shard_size(text) == size
    for wrong in ("5", "GB", "-1GB", "0MB", "1TB", ""):
        with pytest.raises(InputError, match=r"--shard-size is .* but must be a size such as 5GB"):
            shard_size(wrong)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A hub that takes everything, and the calls that it got."""
    calls: list[tuple[str, Any]] = []

    def upload(**options: Any) -> None:
        calls.append(("upload", {**options, "files": sorted(f.name for f in Path(options["folder_path"]).iterdir())}))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: calls.append(("create", name)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return calls


def test_push(run: Path, tmp_path: Path, hub: list[tuple[str, Any]]) -> None:
    arguments = ["export", str(run), "--format", "gptq", "--output", str(tmp_path / "out"), "--push", "me/model"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.stdout == f"The export is in {tmp_path / 'out'} and in me/model\n"
    (first, name), (second, options) = hub
    assert (first, name, second) == ("create", "me/model", "upload")
    assert options["repo_id"] == "me/model" and options["folder_path"] == tmp_path / "out"
    assert set(options["files"]) >= ALWAYS | {"model.safetensors"}


def test_push_is_checked_before_and_its_failure_keeps_the_export(
    run: Path, tmp_path: Path, hub: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="must be a hub repository, owner/name"):
        export(run, "gptq", output=tmp_path / "out", push="model")

    def refuse(**options: Any) -> None:
        raise HfHubHTTPError.__new__(HfHubHTTPError)

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    with pytest.raises(RunError, match="out is written, but me/model did not take it"):
        export(run, "gptq", output=tmp_path / "out", push="me/model")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="--push needs a token that may write: set HF_TOKEN"):
        export(run, "gptq", output=tmp_path / "other", push="me/model")
    assert not (tmp_path / "other").exists()
