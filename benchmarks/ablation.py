"""What each lever is worth: a model with one lever of a recipe turned the other way at a time.

    python benchmarks/ablation.py --jobs 2                               writes ablation.md beside this file
    python benchmarks/ablation.py --model M --text T --calibrate C       writes ablation-M.md

The embedded model is judged on text that is neither calibrated on nor reported: the validation split of the training
modules. Another model takes the quick setting, and the texts that are given: not the one to report. The mean KL
divergence of the next token from full precision tells settings apart that perplexity cannot. Finished cases are kept
in ablation.json, so that an interrupted run goes on and a later one adds seeds; those whose settings are not those of
today's recipes are measured again, and `--fresh` drops all.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from common import HERE, QUICK, command_of, content, file_name, fingerprint, measure, shown, side_by_side

from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.storage.atomic import write_text

RECIPES = ("w2a16", "w3a16", "w4a4kv4", "w2a4kv4")
SETTING: dict[str, Any] = {"evaluation.split": "validation", "evaluation.windows": 64}
SAMPLES = {"w2a16": 64, "w3a16": 64, "w4a4kv4": 32, "w2a4kv4": 32}
"""Calibration sequences: fewer than a recipe's, and least where a run is slowest, so that all of it takes an hour."""
OTHER_MODEL = {
    "calibration.dataset": "stdlib",
    "evaluation.dataset": "stdlib",
    "calibration.sequence_length": 512,
}
"""A model that was trained like the embedded one is judged on the same text, where no other is given."""
DEFAULT = "default"
LEVERS: dict[str, dict[str, tuple[Any, Any]]] = {
    "residual compensation": {"weights.alpha": (1.0, 0.0)},
    "drift of the residual stream": {"weights.drift": (True, False)},
    "refinement": {"weights.refine": (8, 0)},
    "several starts": {"weights.starts": (3, 1)},
    "tabu search": {"weights.tabu": (2.0, 0.0)},
    "act order": {"weights.act_order": (True, False)},
    "attention-aware Hessians": {"weights.method": ("boa", "gptq")},
    "grids by the Hessian's diagonal": {"weights.grid": ("auto", "hessian")},
    "output layer moved": {"weights.head": (0.5, 0.0)},
    "clip search, activations": {"activations.search": (True, False)},
    "clip search, cache": {"cache.search": (True, False)},
    "best of 8 rotations": {"rotation.seeds": (8, 1)},
    "R1 behind the norms": {"rotation.r1": ("online", "merged")},
    "R2": {"rotation.r2": (True, False)},
    "heads rotated": {"rotation.heads": (True, False)},
    "channels balanced": {"rotation.scale": (True, False)},
}
"""What is changed, and its values with the lever on and off. A recipe's default is one of the two."""


def cases(recipe: str) -> dict[str, dict[str, Any]]:
    """The default and every lever turned the other way, with the changes each takes; levers that do nothing are out."""
    settings = build_recipe(load_recipe(recipe))
    found: dict[str, dict[str, Any]] = {DEFAULT: {}}
    for name, fields in LEVERS.items():
        if (name == "clip search, activations" and settings.activations.bits == 16) or (
            name == "clip search, cache" and settings.cache.key_bits == 16
        ):
            continue
        on = is_on(recipe, name)
        found[name] = {field: off if on else value for field, (value, off) in fields.items()}
    return found


def is_on(recipe: str, lever: str) -> bool:
    """Whether a recipe has this lever on."""
    settings = build_recipe(load_recipe(recipe)).model_dump()
    states = {settings[field.split(".")[0]][field.split(".")[1]] == on for field, (on, _) in LEVERS[lever].items()}
    assert len(states) == 1, f"{recipe} has {lever} half on"
    return states.pop()


def setting_of(recipe: str, model: str, text: str | None, calibrate: str | None) -> dict[str, Any]:
    """What all cases of a recipe have alike, by field.

    Raises:
        typer.BadParameter: one of the texts is missing.
    """
    own = {**SETTING, "calibration.samples": SAMPLES[recipe]}
    if not text and not calibrate:
        return own if model == "tiny" else {**own, **OTHER_MODEL, "model": model}
    if not text or not calibrate:
        raise typer.BadParameter("give both --text and --calibrate (make ablation MODEL=... TEXT=... CALIBRATE=...)")
    return {**QUICK, "model": model, "evaluation.dataset": text, "calibration.dataset": calibrate}


def print_of(recipe: str, setting: dict[str, Any], changes: dict[str, Any]) -> str:
    """Of what a case runs with: one that was measured under other defaults, or on another text, is another case."""
    given = [setting[key] for key in ("model", "calibration.dataset", "evaluation.dataset") if key in setting]
    return fingerprint(build_recipe(load_recipe(recipe), {**setting, **changes}), *map(content, given))


def _one(recipe: str, setting: dict[str, Any], changes: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(1)
    report = measure(recipe, {**setting, **changes})
    (perplexity,), (divergence,) = report["perplexity"].values(), report["divergence"].values()
    return {
        "kl": divergence["kl"],
        "perplexity": perplexity["quantized"],
        "full_precision": perplexity["full_precision"],
    }


def table(recipe: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown of one recipe: the default, then what each lever changes, over the seeds that are measured of both."""

    def of(case: str) -> dict[int, dict[str, Any]]:
        """By seed."""
        prefix = f"{recipe} | {case} | "
        return {int(key.removeprefix(prefix)): found for key, found in results.items() if key.startswith(prefix)}

    def spread(values: list[float], digits: int, sign: str = "") -> str:
        return f"{mean(values):{sign}.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    default = of(DEFAULT)
    if not default:
        return []
    found = list(default.values())
    lines = [
        f"## {recipe}",
        f"Default (seeds: {len(found)}): KL {spread([d['kl'] for d in found], 4)}, perplexity "
        f"{spread([d['perplexity'] for d in found], 3)} (full precision {found[0]['full_precision']:.3f}).",
        "",
        "| lever | default | seeds | KL on | KL off | off - on | perplexity off - on |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases(recipe):
        other = of(case)
        both = sorted(default.keys() & other.keys())
        if case == DEFAULT or not both:
            continue
        lever_on = is_on(recipe, case)
        ours, theirs = [default[seed] for seed in both], [other[seed] for seed in both]
        on, off = (ours, theirs) if lever_on else (theirs, ours)
        kl, ppl = ([b[key] - a[key] for a, b in zip(on, off, strict=True)] for key in ("kl", "perplexity"))
        lines.append(
            f"| {case} | {'on' if lever_on else 'off'} | {len(both)} | {mean(a['kl'] for a in on):.4f} "
            f"| {mean(b['kl'] for b in off):.4f} | {spread(kl, 4, '+')} | {spread(ppl, 3, '+')} |"
        )
    return [*lines, ""]


def _said(setting: dict[str, Any]) -> str:
    fields = {key: value for key, value in setting.items() if key not in ("model", "calibration.samples")}
    return ", ".join(f"{key} {shown(value) if isinstance(value, str) else value}" for key, value in fields.items())


def main(
    seeds: Annotated[int, typer.Option(help="Calibration seeds, from 0 on.")] = 3,
    jobs: Annotated[int, typer.Option(help="Cases measured side by side, each on one thread.")] = 2,
    model: Annotated[str, typer.Option(help="Another model than the embedded one.")] = "tiny",
    text: Annotated[str | None, typer.Option(help="Text that such a model is judged on.")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Text that such a model is calibrated on.")] = None,
    recipes: Annotated[str, typer.Option(help="Which recipes, separated by commas.")] = ",".join(RECIPES),
    name: Annotated[str | None, typer.Option(help="Name of the files that are written.")] = None,
    title: Annotated[str | None, typer.Option(help="What the tables are of.")] = None,
    fresh: Annotated[bool, typer.Option(help="Measure every case again.")] = False,
) -> None:
    """Measure what is missing and write the tables."""
    name = name or ("ablation" if model == "tiny" else file_name("ablation", model))
    title = title or ("the embedded model" if model == "tiny" else shown(model))
    kept = HERE / f"{name}.json"
    results: dict[str, dict[str, Any]] = {}
    if kept.is_file() and not fresh:
        results = json.loads(kept.read_text(encoding="utf-8"))
    chosen = recipes.split(",")
    setting = {recipe: setting_of(recipe, model, text, calibrate) for recipe in chosen}
    missing = {
        f"{recipe} | {case} | {seed}": (recipe, setting[recipe], {**changes, "calibration.seed": seed})
        for seed in range(seeds)
        for recipe in chosen
        for case, changes in cases(recipe).items()
    }
    prints = {key: print_of(*value) for key, value in missing.items()}
    results = {key: found for key, found in results.items() if found.get("recipe") == prints.get(key)}
    missing = {key: value for key, value in missing.items() if key not in results}
    for key, found, far in side_by_side(_one, missing, jobs, alone=False):
        results[key] = {**found, "recipe": prints[key]}
        write_text(kept, json.dumps(results, indent=1) + "\n")
        print(f"{far}{key} KL {found['kl']:.4f}", flush=True)
    samples = [f"{recipe} {setting[recipe]['calibration.samples']}" for recipe in chosen]
    document = [
        f"# Ablation: {title}",
        "",
        f"Made by `{command_of('ablation', model, text, calibrate)}`.",
        "One lever at a time is turned against the recipe's default; differences are paired",
        f"by seed, ± is their standard deviation. Setting: {_said(setting[chosen[0]])}.",
        f"Calibration sequences: {', '.join(samples)}.",
        "KL is the mean divergence of the next token's distribution from full precision, in nats: lower is better. A",
        "positive `off - on` says that the lever helps.",
        f"torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}, "
        f"{platform.machine()}.",
        "",
    ]
    for recipe in chosen:
        document += table(recipe, results)
    Path(HERE / f"{name}.md").write_text("\n".join(document).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {name}.md")


if __name__ == "__main__":
    typer.run(main)
