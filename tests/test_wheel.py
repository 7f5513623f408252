"""A wheel of the package holds all that it needs, and runs where the source is not."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents; dependencies are those of the running interpreter."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_contents(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"rotoboa/recipes/{recipe.name}" in names
    for name in (
        "models/tiny/model.safetensors",
        "models/tiny/tokenizer.json",
        "py.typed",
        "pipeline/cli/app.py",
        "eval/drawing/report.html.jinja",
    ):
        assert f"rotoboa/{name}" in names
    assert not [name for name in names if any(part in name for part in ("tests/", "benchmarks/", "examples/", "docs/"))]


def test_it_quantizes(installed: Path, text: Path, tmp_path: Path) -> None:
    """In another folder and another process, with nothing of the source on the path.

    To the nearest: what is compiled for a file in a new place takes longer than all else here.
    """
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = 'rotoboa'\n"
        "import rotoboa; assert rotoboa.__file__.startswith(sys.path[0]), rotoboa.__file__\n"
        "from rotoboa.pipeline.cli.app import main; main()\n"
    )
    options = "--weights.method rtn --weights.grid minmax --calibration.samples 2 --calibration.sequence_length 32 "
    options += "--evaluation.windows 1 --no-evaluation.report --no-evaluation.references --no-evaluation.baseline"
    result = subprocess.run(
        [sys.executable, "-c", program, str(installed), "quantize", "--recipe", "w2a16", *options.split(),
         "--calibration.dataset", str(text), "--evaluation.dataset", str(text)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "tiny-w2a16" / "model" / "model.safetensors").is_file()
