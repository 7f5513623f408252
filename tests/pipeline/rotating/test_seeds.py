"""The choice of the rotation's seed."""

from pathlib import Path

import pytest
import torch

from rotoboa.pipeline.console.progress import Progress
from rotoboa.pipeline.job.job import Job, prepare
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.rotating import seeds


def _job(recipe: str, **changes: object) -> Job:
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return prepare(build_recipe(load_recipe(recipe), {"model": "tiny", **overrides}))


TOKENS = torch.arange(2 * 64).view(2, 64) * 7 % 2048


def test_cost_is_that_of_rounding() -> None:
    """Fewer bits cost more, of weights and of activations; a rotation spares 4-bit activations most of it."""
    job = _job("w4a4kv4")
    rotated = seeds.rounding_cost(job, job.rotations, TOKENS)
    plain = _job("w4a4kv4", rotation__r1=False, rotation__r2=False, rotation__r4=False)
    assert rotated < 0.6 * seeds.rounding_cost(plain, plain.rotations, TOKENS)
    for changes in ({"weights__bits": 3}, {"activations__bits": 3}):
        coarse = _job("w4a4kv4", **changes)
        assert seeds.rounding_cost(coarse, coarse.rotations, TOKENS) > 1.2 * rotated
    fine = _job("w4a4kv4", weights__bits=8, activations__bits=16)
    assert seeds.rounding_cost(fine, fine.rotations, TOKENS) < 1e-4


def test_the_least_cost_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job("w2a16", rotation__seed=5, rotation__seeds=3)
    seen = []

    def cost(job: Job, rotations: object, tokens: object) -> float:
        seen.append(rotations.seed)  # type: ignore[attr-defined]
        return {5: 3.0, 6: 1.0, 7: 2.0}[seen[-1]]

    monkeypatch.setattr(seeds, "rounding_cost", cost)
    assert seeds.choose_seed(job, TOKENS, Progress(quiet=True)) == 6
    assert seen == [5, 6, 7]


def test_a_seed_is_other_signs_of_the_same_rotations() -> None:
    job = _job("w2a16")
    again, other = job.rotations.reseeded(0), job.rotations.reseeded(1)
    assert again == job.rotations
    assert other.r1 is not None and job.rotations.r1 is not None and other.r4 is job.rotations.r4
    x = torch.randn(3, 256, dtype=torch.float64)
    assert not torch.allclose(other.r1.apply(x), job.rotations.r1.apply(x))
    torch.testing.assert_close(other.r1.apply(x).norm(dim=-1), x.norm(dim=-1))


def test_one_seed_or_no_rotation_is_no_choice(tmp_path: Path) -> None:
    for job in (
        _job("w2a16", rotation__seed=4),
        _job("w2a16", rotation__r1=False, rotation__r2=False, rotation__seeds=9),
    ):
        assert seeds.choose_seed(job, TOKENS, Progress(quiet=True)) == job.recipe.rotation.seed
