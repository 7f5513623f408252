"""Run folders of other releases: earlier ones are read, and what cannot be read is refused in one sentence.

`old_run` holds what a release that wrote no versions left of a run of the embedded model, without its tensors.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from rotoboa.errors import InputError
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.measure.comparing import comparison
from rotoboa.pipeline.measure.evaluating import evaluate
from rotoboa.pipeline.storage.files import MANIFEST, REPORT, read_manifest, read_report
from rotoboa.pipeline.storage.manifest import MANIFEST_VERSION, BlockEntry, Identity, LayerEntry
from rotoboa.pipeline.storage.run_folder import recipe_of
from rotoboa.pipeline.storage.run_report import REPORT_VERSION
from rotoboa.pipeline.storage.run_writer import RunWriter

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old run, to be changed."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def content(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / name).read_text(encoding="utf-8"))
    return found


def change(run: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    data = content(run, name)
    edit(data)
    (run / name).write_text(json.dumps(data), encoding="utf-8")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(".")
    return line


# -- earlier releases -------------------------------------------------------------------------------------------------


def test_an_old_run_is_read_whole() -> None:
    """No key is lost, none is added."""
    assert "version" not in content(OLD, MANIFEST) and "version" not in content(OLD, REPORT)
    manifest, report = read_manifest(OLD), read_report(OLD)
    assert manifest.version == report.version == 0
    assert manifest.to_json() == content(OLD, MANIFEST) and report.to_json() == content(OLD, REPORT)
    assert manifest.finished and len(manifest.blocks) == 4 and manifest.sources == report.sources
    assert report.shown.weights.method == "boa" and report.perplexity["stdlib"].quantized is not None


def test_every_command_that_shows_runs_shows_it(old: Path) -> None:
    report = read_report(old)
    quantized = report.perplexity["stdlib"].quantized
    shown = call("inspect", old)
    assert shown.exit_code == 0, shown.output
    for words in ("weights.method", "q_proj", "Where the loss comes from", f"{quantized:.3f}"):
        assert words in shown.stdout
    found = json.loads(call("inspect", old, "--json").stdout)
    assert found == {"manifest": content(OLD, MANIFEST), "report": content(OLD, REPORT)}
    (row,) = json.loads(call("compare", old, "--format", "json").stdout)
    assert row["perplexity"] == content(OLD, REPORT)["perplexity"] and row["bits"]["keys"] == 4
    assert call("report", old).exit_code == 0
    page = (old / "report.html").read_text(encoding="utf-8")
    assert f"{quantized:,.3f}" in page and "<td>3</td><td>down_proj</td>" in page and "R1 behind the norms" in page


def test_a_recipe_that_this_release_has_not_is_shown_and_not_run(old: Path) -> None:
    for name in (MANIFEST, REPORT):
        change(old, name, lambda data: (data.get("identity") or data)["recipe"]["weights"].update(of_old="yes"))
    with pytest.raises(InputError, match=r"the recipe in .*json is not one that this release of rotoboa reads"):
        recipe_of(old)
    (old / "blocks").mkdir()
    change(old, MANIFEST, lambda data: data.pop("finished"))
    assert "the recipe in" in refused("quantize", "--resume", old)
    assert "of_old" in call("inspect", old).stdout and call("compare", old).exit_code == 0


def test_an_old_run_is_gone_on_with_as_a_new_one(old: Path) -> None:
    """With what it knew, and no other than itself."""
    change(old, MANIFEST, lambda data: data.update(finished=False, blocks=[]))
    before = content(old, MANIFEST)
    early = {name: before["identity"][name] for name in ("recipe", "versions")}
    folder = RunWriter(old, Identity.model_validate(early))
    folder.identify(checkpoint=before["identity"]["checkpoint"], text=before["identity"]["text"], bos=False)
    with pytest.raises(InputError, match=r"holds another run, with other text\.calibration"):
        folder.identify(text={"calibration": "another"})
    with pytest.raises(InputError, match=r"holds another run, with other versions\.torch"):
        RunWriter(old, Identity.model_validate(early | {"versions": before["identity"]["versions"] | {"torch": "0"}}))
    assert not folder.is_new and content(old, MANIFEST) == before
    folder.start("model: tiny\n", lambda: {"total": 1.0})
    folder.write_block(0, {"q": torch.ones(2)}, BlockEntry(index=0, layers={"q": LayerEntry(loss=0.5)}))
    folder.close()
    after = content(old, MANIFEST)
    assert list(after)[:2] == ["version", "identity"] and after["version"] == MANIFEST_VERSION
    (block,) = after.pop("blocks")
    assert block.keys() == {"index", "layers", "sha256"} and block["layers"] == {"q": {"loss": 0.5}}
    gone_on = {"version": MANIFEST_VERSION, "parts": before["parts"] + 1, "seconds": {"total": 1.0}}
    assert {**after, "blocks": []} == before | gone_on


def test_what_is_measured_later_is_added_to_an_old_report(tiny_run: Path, text: Path, tmp_path: Path) -> None:
    run, other = Path(shutil.copytree(tiny_run, tmp_path / "run")), tmp_path / "other.txt"
    for name in (MANIFEST, REPORT):
        change(run, name, lambda data: data.pop("version"))
    shape = content(run, REPORT)["tokens"]["evaluation"][str(text)]
    change(run, REPORT, lambda data: data["tokens"].update(evaluation=shape))  # as it was when there was one text
    other.write_text(text.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    before = content(run, REPORT)
    found = evaluate(run, dataset=str(other))
    after = content(run, REPORT)
    assert after["version"] == REPORT_VERSION and after["recipe"] == before["recipe"]
    assert after["perplexity"] == before["perplexity"] | found.to_json()["perplexity"]
    assert after["tokens"]["evaluation"] == {str(text): shape, **found.to_json()["tokens"]["evaluation"]}


def test_forms_of_the_first_releases(old: Path) -> None:
    change(old, MANIFEST, lambda data: [block.update(clips={"down": [0.9]}) for block in data["blocks"]])
    assert read_manifest(old) == read_manifest(OLD)
    change(old, REPORT, lambda data: data["tokens"].update(evaluation=[2, 64]))
    change(old, REPORT, lambda data: data["recipe"]["rotation"].update(r1=True))
    report = read_report(old)
    assert report.tokens.evaluation == {"stdlib": (2, 64)} == read_report(OLD).tokens.evaluation
    assert report.shown.rotation.r1 is True
    assert [row["notes"] for row in comparison([(OLD, read_report(OLD)), (old, report)])] == [[], []]


# -- later ones, and damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "evaluate", "export", "resume", "report"])
def test_a_manifest_of_a_later_release_is_refused(old: Path, command: str) -> None:
    change(old, MANIFEST, lambda data: data.update(version=MANIFEST_VERSION + 1, of_the_future={}))
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    arguments = {
        "resume": ("quantize", "--resume", old),
        "export": ("export", old, "--format", "gptq"),
    }.get(command, (command, old))
    message = refused(*arguments)
    assert f"manifest.json has version {MANIFEST_VERSION + 1}, and this release of rotoboa reads up to" in message
    assert message.endswith(f" {MANIFEST_VERSION}: use the release that made the run, or a later one.")
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before


@pytest.mark.parametrize("command", ["inspect", "compare", "report"])
def test_a_report_of_a_later_release_is_refused(old: Path, command: str) -> None:
    change(old, REPORT, lambda data: data.update(version=REPORT_VERSION + 1))
    assert f"report.json has version {REPORT_VERSION + 1}, and this release" in refused(command, old)


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        (MANIFEST, lambda data: data.update(unheard="of"), "unheard: extra inputs are not permitted"),
        (MANIFEST, lambda data: data.pop("identity"), "identity: field required"),
        (MANIFEST, lambda data: data["blocks"][2]["layers"]["mlp.up_proj"].pop("loss"), "blocks.2.layers.mlp.up_proj"),
        (MANIFEST, lambda data: data.update(version="new"), "version: input should be a valid integer"),
        (REPORT, lambda data: data.update(perplexity=3), "perplexity: input should be a valid dictionary"),
        (REPORT, lambda data: data["recipe"]["weights"].pop("bits"), "recipe.weights.bits: field required"),
        (REPORT, lambda data: data["sources"].update(kl={"all": "much"}), "sources.kl.all: input should be a valid"),
    ],
)
def test_what_is_not_as_it_should_be_is_named(
    old: Path, name: str, edit: Callable[[dict[str, Any]], object], what: str
) -> None:
    change(old, name, edit)
    message = refused("inspect", old)
    assert f"{name} is not one that this release of rotoboa reads ({what}" in message
    assert message.endswith("): use the release that made the run, or run it again.")
