"""The guard of the defaults on a real model: a short setting, against figures that are committed.

    python benchmarks/real_check.py --model M --text T --calibrate C            exits 1 on a regression
    python benchmarks/real_check.py --model M --text T --calibrate C --accept   makes what it measures the baseline

It fails where the divergence of a recipe's default has risen by more than `WORSE`, or is not below that of plain GPTQ,
which was measured when the baseline was made. The baseline is of one model, by its folder's name, two texts and one
setting: others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from common import HERE, PLAIN, content, measure, shown

from rotoboa.errors import InputError, RunError
from rotoboa.pipeline.storage.atomic import write_json

CHECKED = ("w4a4kv4", "w2a16")
SETTING: dict[str, Any] = {
    "calibration.samples": 8,
    "calibration.sequence_length": 512,
    "evaluation.windows": 8,
    "weights.starts": 1,
    "weights.tabu": 0,
}
"""Minutes a recipe on a model of 135 M parameters and one core; what it leaves out changes no order of the methods."""
WORSE = 1.15
"""Integers that flip on another machine move these divergences by 2 to 5 %, another calibration seed by 8 %."""


def kl_of(recipe: str, changes: Mapping[str, Any]) -> float:
    """The divergence that a recipe ends at, in nats a token."""
    (divergence,) = measure(recipe, changes)["divergence"].values()
    return float(divergence["kl"])


def regressions(latest: Mapping[str, float], baseline: Mapping[str, Mapping[str, float]]) -> list[str]:
    """In words, of divergences by recipe; `baseline` has those of `default` and `gptq`."""
    found = []
    for recipe, kl in latest.items():
        default, gptq = baseline[recipe]["default"], baseline[recipe]["gptq"]
        if not kl <= default * WORSE:
            found.append(f"{recipe}: KL went from {default:.4f} to {kl:.4f}, more than {WORSE - 1:.0%}")
        if not kl < gptq:
            found.append(f"{recipe}: KL {kl:.4f} is not below that of plain GPTQ, {gptq:.4f}")
    return found


def check(changes: Mapping[str, Any], file: Path, *, accept: bool) -> list[str]:
    """Measure, print and compare; with `accept` write the baseline instead.

    Raises:
        InputError: there is no baseline, or it is of another model, text or setting.
    """
    names = [str(changes[name]) for name in ("model", "evaluation.dataset", "calibration.dataset")]
    titles = dict(zip(("model", "text", "calibrate"), map(shown, names), strict=True))
    setting = {name: value for name, value in changes.items() if value not in names}
    subject = {**titles, "contents": [content(name) for name in names[1:]], "setting": setting}
    kept: dict[str, Any] = {}
    if not accept:
        if not file.is_file():
            raise InputError(f"there is no {file.name}: make it with --accept.")
        kept = json.loads(file.read_text(encoding="utf-8"))
        if {name: kept.get(name) for name in subject} != subject:
            raise InputError(
                f"{file.name} is of another model, text or setting ({kept['model']}, {kept['text']}, "
                f"{kept['calibrate']}): give these, or make it anew with --accept."
            )
    latest = {}
    for recipe in CHECKED:
        latest[recipe] = kl_of(recipe, changes)
        print(f"{recipe}: KL {latest[recipe]:.4f}", flush=True)
    if not accept:
        return regressions(latest, kept["kl"])
    found = {recipe: {"default": kl, "gptq": kl_of(recipe, {**changes, **PLAIN})} for recipe, kl in latest.items()}
    write_json(file, {**subject, "kl": found})
    print(f"wrote {file.name}")
    return regressions(latest, found)


def main(
    model: Annotated[str, typer.Option(help="A folder with a checkpoint, or a name of the hub.")],
    text: Annotated[str, typer.Option(help="Text to measure on.")],
    calibrate: Annotated[str, typer.Option(help="Text to calibrate on.")],
    accept: Annotated[bool, typer.Option("--accept", help="Make what is measured the baseline.")] = False,
    baseline: Annotated[Path, typer.Option(help="What figures are held against.")] = HERE / "real-check.json",
) -> None:
    """Measure the defaults of two recipes, and exit with 1 where they are worse than they were."""
    changes = {**SETTING, "model": model, "evaluation.dataset": text, "calibration.dataset": calibrate}
    try:
        found = check(changes, baseline, accept=accept)
    except (InputError, RunError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for line in found:
        typer.echo(line, err=True)
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
