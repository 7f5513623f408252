"""`rotoboa verify`: an export that is its run passes, one that is not fails, a damaged one is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.transforms import InputTransform
from rotoboa.boa.scheme import QuantizationArgs
from rotoboa.errors import InputError, RunError
from rotoboa.export.record import read_record, write_record
from rotoboa.export.runtime.linear import QuantizedLinear
from rotoboa.export.runtimes.ask import RUNTIMES
from rotoboa.pipeline import verifying
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.exporting import export
from rotoboa.pipeline.verifying import Verified, verify

Runs = Callable[..., Path]


@pytest.fixture
def run(cheap_run: Runs, tmp_path: Path) -> Path:
    """A copy of a symmetric run, which every format holds."""
    made = cheap_run("w4a16", {"weights.symmetric": True, "weights.group_size": 32})
    return Path(shutil.copytree(made, tmp_path / "run", ignore=shutil.ignore_patterns("exports")))


@pytest.mark.usefixtures("runtimes_here")
@pytest.mark.parametrize("name", ["compressed-tensors", "gguf"])
def test_stock_readers_agree_with_the_run(run: Path, name: str) -> None:
    result, *more = verify(export(run, name))
    assert (result.format, result.reader) == (name, "transformers")
    assert result.difference < 1e-5 < result.deviation and result.agreement == 1 and result.passed
    assert result.tolerance == pytest.approx(0.01 * result.deviation)
    assert len(more) == (name == "gguf" and find_spec("llama_cpp") is not None)


@pytest.mark.usefixtures("runtimes_here")
def test_gguf_rounds_the_offsets_of_asymmetric_weights(cheap_run: Runs, tmp_path: Path) -> None:
    folder = export(cheap_run("w4a16", {"weights.group_size": 32}), "gguf", output=tmp_path / "gguf")
    result, *_ = verify(folder)
    assert result.passed and result.tolerance == pytest.approx(0.03 * result.deviation)
    assert 1e-5 < result.difference < 0.02 * result.deviation


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is an optional extra, built from source")
def test_llama_cpp_runs_the_file(run: Path) -> None:
    _, llama = verify(export(run, "gguf"))
    assert llama.reader == "llama.cpp" and llama.passed and llama.tolerance is None
    assert llama.difference < 0.3 * llama.deviation and llama.agreement > 0.9


@pytest.mark.parametrize("name", ["native", "gptq", "gptq-v1", "mlx"])
def test_our_readers_agree_with_the_run(run: Path, name: str) -> None:
    (result,) = verify(export(run, name))
    assert result.difference < 1e-5 and result.passed and result.reader.startswith("rotoboa")


def test_a_run_is_verified_as_its_native_model(cheap_run: Runs) -> None:
    (result,) = verify(cheap_run("w4a4kv4"))
    assert result.format == "native" and result.passed
    assert result.tolerance == pytest.approx(0.2 * result.deviation)


def sign(folder: Path, run: Path) -> None:
    """Make an edited export look as if it had been exported so."""
    record = read_record(folder)
    write_record(folder, record.format, run, folder, record.blocks)


def test_an_edited_export_is_refused_and_a_wrong_one_fails(run: Path) -> None:
    folder = export(run, "gptq")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.scales"][0] *= 1.5
    save_file(tensors, file)
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 2 and "is not the file that was exported (its checksum differs)" in result.stderr
    sign(folder, run)
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1 and "TOO LARGE" in result.stdout
    assert "differs from its run by" in result.stderr and result.stderr.count("\n") == 1
    result = CliRunner().invoke(app, ["verify", str(folder), "--tolerance", "1000"])
    assert result.exit_code == 0 and " ok " in result.stdout


def test_the_stock_readers_complaint_is_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a process of its own, as people verify."""
    (tmp_path / "program.py").write_text("raise ValueError('no such layer.')")
    known = RUNTIMES["transformers"]
    monkeypatch.setitem(RUNTIMES, "transformers", known._replace(program=str(tmp_path / "program.py")))
    with pytest.raises(RunError, match=r"transformers cannot run .* \(ValueError: no such layer\)") as caught:
        verify(export(run, "compressed-tensors"))
    assert "\n" not in str(caught.value)


def test_truncated_files_of_every_format_are_refused(run: Path) -> None:
    for name in ("native", "compressed-tensors", "gptq", "gguf"):
        folder = export(run, name)
        file = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(InputError, match="is not the file that was exported"):
            verify(folder)
        sign(folder, run)
        with pytest.raises(InputError, match=r"is not a whole (safetensors|GGUF) file"):
            verify(folder)


def test_the_run_is_found_or_asked_for(run: Path, cheap_run: Runs, tmp_path: Path) -> None:
    folder = export(run, "gptq")
    moved = tmp_path / "elsewhere" / "deep" / "export"
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    with pytest.raises(InputError, match=r"the run of .*export is not in .*: give it with --run"):
        verify(moved)
    assert verify(moved, run=run)[0].passed
    with pytest.raises(InputError, match=r"was made from another run than .*: give the right one with --run"):
        verify(moved, run=cheap_run("w4a16"))


def test_what_is_no_export_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no export"):
        verify(tmp_path)
    folder = export(run, "gptq")
    write_record(folder, "exl3", run, folder, read_record(folder).blocks)
    with pytest.raises(InputError, match="is in the format exl3, which this release of rotoboa does not read"):
        verify(folder)


def test_nan_is_no_agreement() -> None:
    good = Verified("gptq", "x", 0.0, 1.0, 1.0, 0.01)
    assert good.passed and not replace(good, difference=float("nan")).passed
    assert not replace(good, difference=0.02).passed and replace(good, difference=9.0, tolerance=None).passed


def test_sample_is_text_within_the_positions(cheap_run: Runs) -> None:
    from rotoboa.pipeline.storage.run_folder import RunFolder

    finished = verifying.open_finished(RunFolder.open(cheap_run("w4a16")))
    ids = verifying.sample(finished)
    assert ids.shape == (1, 128) and ids.dtype == torch.int64 and len(set(ids[0].tolist())) > 40


def test_inputs_have_the_scale_that_calibration_found() -> None:
    """Numbers beyond its range are clipped, as the layer itself and its readers do."""
    args = QuantizationArgs.of("nvfp4", 4, None, True)
    quantizer = DynamicQuantizer(4, group_size=16, format="nvfp4")
    layer = QuantizedLinear.in_place_of(torch.nn.Linear(32, 8, bias=False), args, InputTransform(quantizer=quantizer))
    layer.qweight.random_(-(2**31), 2**31)
    layer.get_buffer("input_global_scale").fill_(512.0)
    x = 20 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    plain = verifying._Plain(layer)(x)
    torch.testing.assert_close(plain, layer(x), rtol=1e-5, atol=1e-3)
    layer.get_buffer("input_global_scale").fill_(1.0)
    assert (verifying._Plain(layer)(x) - plain).abs().max() > 1
