"""What a job makes of its recipe."""

import pytest

from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

CHOICES = [(True, "auto", "diagonal"), (False, "auto", "hessian"), (True, "minmax", "minmax")]


@pytest.mark.parametrize(("r1", "grid", "expected"), CHOICES)
def test_the_grid_follows_the_rotation(r1: bool, grid: str, expected: str) -> None:
    recipe = build_recipe(load_recipe("w2a16"), {"rotation.r1": r1, "weights.grid": grid})
    assert prepare(recipe, "cpu").settings.grid == expected


def test_settings_are_those_of_the_recipe() -> None:
    settings = prepare(build_recipe({"weights": {"bits": 3, "rows": 2, "alpha": 0.5, "refine": 1}}), "cpu").settings
    assert (settings.bits, settings.rows, settings.alpha, settings.refine) == (3, 2, 0.5, 1)
