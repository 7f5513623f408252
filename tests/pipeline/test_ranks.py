"""One, two and four ranks end with the same; one that fails ends all, and any number goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rotoboa.export.packing import unpack
from rotoboa.pipeline.recipe import Recipe, recipe_to_yaml

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
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
def cases(
    save_llama: Callable[..., Path],
    save_family: Callable[..., Path],
    text: Path,
    make_recipe: MakeRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every run of this file, by name: its folder and what became of its ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    short = folder / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    data = {"calibration.dataset": str(short), "evaluation.dataset": str(short), "evaluation.windows": 5}
    size = {"calibration.samples": 8, "calibration.batch": 2, "weights.refine": 2, "weights.starts": 2}
    llama = str(save_llama(folder / "llama", num_hidden_layers=3))
    mixtral = str(save_family(folder / "mixtral", "mixtral"))
    recipes = {
        "llama": make_recipe("w4a4kv4", {"model": llama, **data, **size, "rotation.seeds": 3, "timeout": 20}),
        "mixtral": make_recipe("w3a16", {"model": mixtral, **data, **size, "timeout": 20}),
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(recipe_to_yaml(recipe))

    def case(model: str, name: str, ranks: int, **more: Any) -> Case:
        return {
            "recipe": str(folder / f"{model}.yaml"), "output": str(folder / name), "ranks": ranks, "overrides": {}, **more
        }  # fmt: skip

    fixed = {"overrides": {"deterministic": True, "evaluation.references": True, "weights.head": 0.5}}
    listed = [
        *(case("llama", f"llama-{n}", n) for n in (1, 2, 4)),
        *(case("llama", f"fixed-{n}", n, **fixed) for n in (1, 2, 3)),
        *(case("mixtral", f"mixtral-{n}", n) for n in (1, 2)),
        case("llama", "killed", 2, fault=[1, "kill", 1]),
        case("llama", "killed", 3),
        case("llama", "stopped", 2, fault=[1, "stop", 1], overrides={"timeout": 2}),
        case("llama", "hung", 3, fault=[2, "hang", 1], overrides={"timeout": 2}),
        case("llama", "raised", 2, fault=[1, "raise", 2]),
        case("llama", "raised", 1),
        case("llama", "few", 2, overrides={"calibration.samples": 1}),
    ]
    found = worlds(folder, listed)
    names = [Path(one["output"]).name for one in listed]
    again = {index for index, name in enumerate(names) if name in names[:index]}
    return {
        name + ("-again" if index in again else ""): (folder / name, result)
        for index, (name, result) in enumerate(zip(names, found, strict=True))
    }
