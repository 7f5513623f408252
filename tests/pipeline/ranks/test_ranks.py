"""One, two and four ranks end with the same; one that fails ends all, and any number goes on."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rotoboa.export.packing import unpack
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import recipe_to_yaml

MakeRecipe = Callable[..., Recipe]
Case = dict[str, Any]


def worlds(folder: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """What `worlds.py` says of cases."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("worlds.py")), str(folder / "cases.json")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def integers(run: Path, bits: int) -> torch.Tensor:
    """All of a run's, one after another."""
    found = []
    for file in sorted((run / "blocks").iterdir()):
        tensors = load_file(file)
        words = [tensors[name] for name in sorted(tensors) if name.endswith("qweight")]
        found += [unpack(word, bits, word.shape[1] * word.element_size() * 8 // bits).flatten() for word in words]
    return torch.cat(found)


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def runs(
    llama: Path,
    save_family: Callable[..., Path],
    text: Path,
    make_recipe: MakeRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every run of this file, by name: its folder and what became of its ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    short = folder / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    data = {"calibration.dataset": str(short), "evaluation.dataset": str(short), "evaluation.windows": 3}
    size = {"calibration.samples": 4, "calibration.batch": 1, "weights.refine": 1, "weights.starts": 2}
    mixtral = str(save_family(folder / "mixtral", "mixtral", num_hidden_layers=1))
    recipes = {
        "llama": make_recipe("w4a4kv4", {"model": str(llama), **data, **size, "rotation.seeds": 2, "timeout": 30}),
        "mixtral": make_recipe("w3a16", {"model": mixtral, **data, **size, "head.bits": 4}),
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(recipe_to_yaml(recipe))

    def case(model: str, name: str, ranks: int, fault: Any = None, **overrides: Any) -> Case:
        files = {"recipe": str(folder / f"{model}.yaml"), "output": str(folder / name)}
        return {**files, "ranks": ranks, "fault": fault, "overrides": overrides}

    fixed: dict[str, Any] = {"deterministic": True, "evaluation.references": True, "weights.head": 0.5}
    fixed |= {"weights.zfold": "output", "rotation.heads": False}
    fixed |= {"overrides": "*.q_proj: weights.bits=3; blocks 1: weights.bits=8", "embedding.bits": 4}
    fixed |= {"evaluation.sources": True, "evaluation.windows": 2}  # of three ranks one has none
    listed = [
        *(case("llama", f"llama-{n}", n) for n in (1, 2)),
        *(case("llama", f"fixed-{n}", n, **fixed) for n in (1, 3)),
        *(case("mixtral", f"mixtral-{n}", n) for n in (1, 2)),
        case("llama", "killed", 2, fault=[1, "kill", 1]),
        case("llama", "killed", 3),
        case("llama", "stopped", 3, fault=[2, "stop", 1], timeout=5),
        case("llama", "raised", 2, fault=[1, "raise", 1]),
        case("llama", "raised", 1),
        case("llama", "few", 2, **{"calibration.samples": 1}),
    ]
    found = worlds(folder, listed)
    names = [Path(one["output"]).name for one in listed]
    again = {index for index, name in enumerate(names) if name in names[:index]}
    return {
        name + ("-again" if index in again else ""): (folder / name, result)
        for index, (name, result) in enumerate(zip(names, found, strict=True))
    }


def test_the_same_answer(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    for model, bits in (("llama", 4), ("mixtral", 3)):
        alone = runs[f"{model}-1"][0]
        path, result = runs[f"{model}-2"]
        assert result["codes"] == [0, 0], result["said"]
        assert float((integers(path, bits) != integers(alone, bits)).double().mean()) < 1e-3
        for dataset, measured in report(alone)["perplexity"].items():
            assert report(path)["perplexity"][dataset] == pytest.approx(measured, abs=0.01)
            theirs, ours = (report(run)["divergence"][dataset] for run in (alone, path))
            assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-3)
        assert report(path)["ranks"]["count"] == 2
        assert report(path)["notices"] == report(alone)["notices"]
    assert "ranks" not in report(runs["llama-1"][0])


def test_deterministic_runs_end_with_the_same_bytes(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    alone, one = runs["fixed-1"][0], report(runs["fixed-1"][0])
    path, result = runs["fixed-3"]
    assert result["codes"] == [0, 0, 0], result["said"]
    for file in (
        "model/model.safetensors",
        "model/config.json",
        "blocks/00000.safetensors",
        "blocks/00001.safetensors",
    ):
        assert (path / file).read_bytes() == (alone / file).read_bytes(), file
    many = report(path)
    assert all(many[part] == one[part] for part in ("perplexity", "divergence", "seeds"))
    entries = [json.loads((run / "manifest.json").read_text())["blocks"] for run in (alone, path)]
    assert [block["layers"] for block in entries[0]] == [block["layers"] for block in entries[1]]
    assert torch.equal(*(integers(runs[name][0], 4) for name in ("killed-again", "llama-1")))


def test_sources_are_the_same(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    alone, shared = (report(runs[name][0])["sources"] for name in ("fixed-1", "fixed-3"))
    assert shared["tokens"] == alone["tokens"] == [2, 64] and {"weights", "keys", "all"} <= alone["kl"].keys()
    for part in ("kl", "blocks"):
        assert shared[part].keys() == alone[part].keys()
        for name in alone[part]:
            assert shared[part][name] == pytest.approx(alone[part][name], rel=0.02), (part, name)


def test_a_rank_that_dies_ends_all_and_the_run_goes_on(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    path, result = runs["killed"]
    assert result["codes"] == [1, -9]
    told = [line for said in result["said"] for line in said.splitlines()]
    assert len(told) == 1
    assert re.fullmatch(
        r"PeerError: rank 1 \(\S+, process \d+\) died, perhaps for want of memory: run the same command again, with "
        r"any number of ranks, and it goes on from its last block\.",
        told[0],
    )
    assert runs["killed-again"][1]["codes"] == [0, 0, 0]
    assert report(path)["parts"] == 2 and report(path)["ranks"]["count"] == 3


def test_a_rank_that_hangs_ends_all(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    _, result = runs["stopped"]
    assert result["codes"] == [1, 1, -9] and result["seconds"] < 60  # 5 s of silence, and all that came before
    told = [line for said in result["said"] for line in said.splitlines()]
    assert len(told) == 1
    assert re.search(r"rank 2 \(\S+, process \d+\) (died or )?hangs: .* \d+ s: run the same command again", told[0])


def test_what_a_rank_fails_of_is_said(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    path, result = runs["raised"]
    assert result["codes"] == [1, 1]
    told = [line for said in result["said"] for line in said.splitlines()]
    assert len(told) == 1 and re.search(
        r"rank 1 \(\S+, process \d+\) ended: the run in .* failed: CUDA out of memory\. Tried to allocate 2\.00 GiB; "
        r"the same command goes on from its last block\.",
        told[0],
    )
    assert runs["raised-again"][1]["codes"] == [0]
    assert torch.equal(integers(path, 4), integers(runs["llama-1"][0], 4))


def test_bad_input_is_said_once(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    path, result = runs["few"]
    assert result["codes"] == [1, 1] and not path.exists()
    told = [line for said in result["said"] for line in said.splitlines()]
    assert told == [
        "InputError: 1 calibration sequences leave rank 0 of 2 without work: start fewer ranks, or give more "
        "--calibration.samples."
    ]
