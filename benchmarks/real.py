"""The judge: methods of the field times recipes on a real model, by texts that are given.

    python benchmarks/real.py --model M --text T --calibrate C            writes real-M.md, .json, .svg beside this file
    python benchmarks/real.py --model M --text T --calibrate C --quick    likewise real-M-quick.*, in minutes a case

Choose by the quick setting and a text that is not reported; the default setting is what is reported. Every case is a
process of its own. A finished case is kept by a fingerprint of its settings, model and texts: an interrupted run goes
on, a case that was measured under other settings is measured again, and `--fresh` measures all again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from common import HERE, PLACEMENTS, QUICK, file_name, shown, side_by_side
from methods import METHODS, Case, run
from real_page import DEFAULT, RECIPES, Subject, document, picture, sizes_picture, sources_picture

from rotoboa.errors import InputError, RunError
from rotoboa.pipeline.job.calibration import load_texts
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.recipe_files import build_recipe
from rotoboa.pipeline.storage.atomic import write_json, write_text

NAMES = ("RTN", "GPTQ", "BoA", "TurboBoA", "aespa", "default")
REPORTED: dict[str, Any] = {
    "calibration.samples": 16,
    "calibration.sequence_length": 2048,
    "evaluation.windows": 20,
}
"""The setting of what is reported; `common.QUICK` is the one to choose by."""


def cases(recipes: Iterable[str], names: Iterable[str], transforms: Iterable[str], seeds: int) -> list[Case]:
    """All of them, the quickest methods first."""
    return [
        Case(recipe, name, transform, seed)
        for seed in range(seeds)
        for name in names
        for recipe in recipes
        for transform in transforms
    ]


def measured(case: Case, threads: int, subject: Subject) -> dict[str, Any]:
    """The figures of one case in this process; `failed`, with a sentence, where it has none."""
    try:
        return dict(run(case._replace(recipe=RECIPES[case.recipe][0]), threads, subject.changes(case)))
    except (InputError, RunError) as error:
        return {"failed": str(error)}


def chosen(given: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    """Names with commas between them.

    Raises:
        InputError: one is not known.
    """
    names = tuple(given.split(","))
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{option} {', '.join(unknown)}: there are {', '.join(known)}.")
    return names


def judge(
    subject: Subject, wanted: list[Case], name: str, seeds: int, *, jobs: int, threads: int, fresh: bool
) -> dict[str, str]:
    """Measure what is missing and write the files; returns what failed, a sentence by case.

    Raises:
        InputError: the model or a text cannot be used.
    """
    job = prepare(build_recipe({}, subject.changes(Case("w4a16", "default", "rotation", 0))))
    load_texts(subject.calibrate, "calibration")
    load_texts(subject.text, job.recipe.evaluation.split)
    file = HERE / f"{name}.json"
    kept: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = {found["case"] for found in kept.values()} | {case.key for case in wanted}
    known = cases(RECIPES, METHODS, PLACEMENTS, seeds)
    prints = subject.prints(case for case in known if case.key in named)
    if fresh:
        kept = {key: found for key, found in kept.items() if key not in {prints[case.key] for case in wanted}}
    missing = {case.key: (case, threads, subject) for case in wanted if prints[case.key] not in kept}
    failed = {}
    for key, found, far in side_by_side(measured, missing, jobs):
        if "failed" in found:
            failed[key] = found["failed"]
            print(f"{far}{key}: failed", flush=True)
            continue
        if "sources" in found:
            found["sources"]["dataset"] = shown(found["sources"]["dataset"])
        kept[prints[key]] = {"case": key, **found}
        write_json(file, kept)
        print(
            f"{far}{key}: perplexity {found['perplexity']:,.2f}, KL {found['kl']:.4f}, {found['seconds']:.0f} s",
            flush=True,
        )
    results = {key: kept[mark] for key, mark in prints.items() if mark in kept}
    figures = {
        key: {figure: value for figure, value in found.items() if figure not in ("case", "sources")}
        for key, found in results.items()
    }
    if figures:
        lost = {key: found["sources"] for key, found in results.items() if "sources" in found}
        page = document(figures, subject, name, size=job.checkpoint.bytes, bos=job.bos, sources=lost)
        write_text(HERE / f"{name}.md", page)
        write_text(HERE / f"{name}.svg", picture(figures, subject.model))
        if by_size := sizes_picture(figures, subject.model):
            write_text(HERE / f"{name}-sizes.svg", by_size)
        if lost:
            write_text(HERE / f"{name}-sources.svg", sources_picture(lost, subject.model))
        print(f"wrote {name}.md and {name}.svg")
    return failed


def main(
    model: Annotated[str, typer.Option(help="A folder with a checkpoint, or a name of the hub.")] = "tiny",
    text: Annotated[str, typer.Option(help="Text to measure on: a file, or a data set as for a recipe.")] = "",
    calibrate: Annotated[str, typer.Option(help="Text to calibrate on.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The setting to choose by.")] = False,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of the text that is measured on.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence and of a window.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Calibration seeds, from 0 on.")] = 1,
    recipes: Annotated[str, typer.Option(help="Which recipes, separated by commas.")] = ",".join(DEFAULT),
    methods: Annotated[str, typer.Option(help="Which methods, separated by commas.")] = ",".join(NAMES),
    transforms: Annotated[str, typer.Option(help=f"{', '.join(PLACEMENTS)}; commas between.")] = "rotation",
    change: Annotated[list[str] | None, typer.Option("--set", help="field=value: for every case; repeatable.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cases measured side by side: seconds are best with one.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Of a case; 1: seconds are the processor's; 0: all.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the files that are written.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure every case again.")] = False,
) -> None:
    """Measure what is missing and write real-<model>.md, .json and .svg."""
    own = {"calibration.samples": samples, "calibration.sequence_length": length, "evaluation.windows": windows}
    setting = {**(QUICK if quick else REPORTED), **{key: value for key, value in own.items() if value is not None}}
    name = name or file_name("real", model) + ("-quick" if quick else "")
    try:
        if not text or not calibrate:
            raise InputError(
                "give a model and its texts: make real MODEL=<folder or hub name> TEXT=<test> CALIBRATE=<text>."
            )
        setting |= dict(_pair(given) for given in change or ())
        subject = Subject(model, text, calibrate, setting)
        wanted = cases(
            chosen(recipes, RECIPES, "--recipes"),
            chosen(methods, METHODS, "--methods"),
            chosen(transforms, PLACEMENTS, "--transforms"),
            seeds,
        )
        failed = judge(subject, wanted, name, seeds, jobs=jobs, threads=threads, fresh=fresh)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for key, why in failed.items():
        typer.echo(f"{key}: {why}", err=True)
    if failed:
        raise typer.Exit(1)


def _pair(given: str) -> tuple[str, str]:
    field, equals, value = given.partition("=")
    if not equals:
        raise InputError(f"--set {given} has no value: give field=value, such as rotation.seeds=4.")
    return field, value


if __name__ == "__main__":
    typer.run(main)
