"""What a job makes of its recipe."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from rotoboa.errors import InputError
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.rotating.placing import settle
from rotoboa.rotation.placement import HARMFUL

CHOICES = [(True, "auto", "diagonal"), (False, "auto", "hessian"), (True, "minmax", "minmax")]


@pytest.mark.parametrize(("r1", "grid", "expected"), CHOICES)
def test_the_grid_follows_the_rotation(r1: bool, grid: str, expected: str) -> None:
    recipe = build_recipe(load_recipe("w2a16"), {"rotation.r1": r1, "weights.grid": grid})
    assert prepare(recipe, "cpu").settings.grid == expected


def test_settings_are_those_of_the_recipe() -> None:
    settings = prepare(build_recipe({"weights": {"bits": 3, "rows": 2, "alpha": 0.5, "refine": 1}}), "cpu").settings
    assert (settings.bits, settings.rows, settings.alpha, settings.refine) == (3, 2, 0.5, 1)


def test_what_a_stage_decides_makes_another_job() -> None:
    job = prepare(build_recipe(load_recipe("w4a16"), {"rotation.r1": "auto"}), "cpu")
    assert settle(job, None) is settle(job, HARMFUL) is job
    settled = settle(job, 2 * HARMFUL)
    assert settled.rotations.r1 is None and not settled.spec.r1 and settled.settings.grid == "hessian"
    assert job.rotations.r1 is not None and job.spec.r1 and job.settings.grid == "diagonal"
    assert [notice.split(":")[0] for notice in settled.found[len(job.found) :]] == ["R1 is left out"]
    assert job.reseeded(7).rotations.seed == 7 and job.rotations.seed == 0
    assert settled.clock is job.clock, "seconds of both are those of one run"
    with pytest.raises(FrozenInstanceError):
        job.spec = settled.spec  # type: ignore[misc]


def test_a_cache_of_latents_is_not_quantized(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    folder = str(save_family(tmp_path, "deepseek_v2"))
    for changes, what in (
        ({}, "a quantized cache is not for"),
        ({"cache.key_bits": 16, "cache.value_bits": 16}, "R3, "),
    ):
        with pytest.raises(
            InputError, match=rf"^{what}.*--cache.key_bits 16 --cache.value_bits 16 --rotation.r3 false"
        ):
            prepare(make_recipe("w4a4kv4", {"model": folder, **changes}))
    assert prepare(make_recipe("w4a4", {"model": folder})).spec.r2


def test_r2_that_a_gate_stops_is_said(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    job = prepare(make_recipe("w4a16", {"model": str(save_family(tmp_path, "qwen3_5_text"))}))
    assert not job.spec.r2 and any(notice.startswith("R2 is left out") for notice in job.notices)
