"""What each lever is worth: the embedded model with one lever of a recipe turned the other way at a time.

    python benchmarks/ablation.py --jobs 2      writes ablation.md beside this file

Judged on text that is neither calibrated on nor reported: the validation split of the training modules. The mean KL
divergence of the next token from full precision tells settings apart that perplexity cannot. Finished cases are kept
in ablation.json, so that an interrupted run goes on and a later one adds seeds; those whose settings are not those of
today's recipes are measured again, and `--fresh` drops all.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from common import HERE, measure

from rotoboa.pipeline.recipe_files import build_recipe, load_recipe

RECIPES = ("w2a16", "w3a16", "w4a4kv4", "w2a4kv4")
SETTING: dict[str, Any] = {"evaluation.split": "validation", "evaluation.windows": 64}
SAMPLES = {"w2a16": 64, "w3a16": 64, "w4a4kv4": 32, "w2a4kv4": 32}
"""Calibration sequences: fewer than a recipe's, and least where a run is slowest, so that all of it takes an hour."""
OTHER_MODEL = {
    "calibration.dataset": "stdlib",
    "evaluation.dataset": "stdlib",
    "calibration.sequence_length": 512,
}
"""A model that was trained like the embedded one is judged on the same text."""
DEFAULT = "default"
LEVERS: dict[str, dict[str, tuple[Any, Any]]] = {
    "residual compensation": {"weights.alpha": (1.0, 0.0)},
    "drift of the residual stream": {"weights.drift": (True, False)},
    "tokens weighted": {"weights.token_weights": (True, False)},
    "values by quantized attention": {"weights.sequential": (True, False)},
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
    "R1 and R2": {"rotation.r1": (True, False), "rotation.r2": (True, False)},
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


def fingerprint(recipe: str, changes: dict[str, Any]) -> str:
    """Of the settings that a case runs with: one that was measured under other defaults is another case."""
    fields = {**SETTING, "calibration.samples": SAMPLES[recipe], **changes}
    settings = build_recipe(load_recipe(recipe), fields).model_dump_json(exclude={"model", "output"})
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _one(model: str, recipe: str, changes: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(1)
    where = {} if model == "tiny" else {**OTHER_MODEL, "model": model}
    report = measure(recipe, {**SETTING, "calibration.samples": SAMPLES[recipe], **where, **changes})
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


def main(
    seeds: Annotated[int, typer.Option(help="Calibration seeds, from 0 on.")] = 3,
    jobs: Annotated[int, typer.Option(help="Cases measured side by side, each on one thread.")] = 2,
    model: Annotated[str, typer.Option(help="Another model than the embedded one.")] = "tiny",
    recipes: Annotated[str, typer.Option(help="Which recipes, separated by commas.")] = ",".join(RECIPES),
    name: Annotated[str, typer.Option(help="Name of the files that are written.")] = "ablation",
    title: Annotated[str, typer.Option(help="What the tables are of.")] = "the embedded model",
    fresh: Annotated[bool, typer.Option(help="Measure every case again.")] = False,
) -> None:
    """Measure what is missing and write the tables."""
    kept = HERE / f"{name}.json"
    results: dict[str, dict[str, Any]] = {}
    if kept.is_file() and not fresh:
        results = json.loads(kept.read_text(encoding="utf-8"))
    chosen = recipes.split(",")
    missing = {
        f"{recipe} | {case} | {seed}": (recipe, {**changes, "calibration.seed": seed})
        for seed in range(seeds)
        for recipe in chosen
        for case, changes in cases(recipe).items()
    }
    prints = {key: fingerprint(*value) for key, value in missing.items()}
    results = {key: found for key, found in results.items() if found.get("recipe") == prints.get(key)}
    missing = {key: value for key, value in missing.items() if key not in results}
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_one, model, *value): key for key, value in missing.items()}
        for number, future in enumerate(as_completed(waiting), 1):
            results[waiting[future]] = {**future.result(), "recipe": prints[waiting[future]]}
            kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            left = (time.monotonic() - started) / number * (len(missing) - number)
            print(f"{number} of {len(missing)}, {left / 60:.0f} min left: {waiting[future]} "
                  f"KL {results[waiting[future]]['kl']:.4f}", flush=True)  # fmt: skip
    settings = ", ".join(f"{key} {value}" for key, value in SETTING.items())
    command = "make ablation" if model == "tiny" else f'make ablation ARGS="--model MODEL --name {name} ..."'
    text = [
        f"# Ablation: {title}",
        "",
        f"Made by `{command}`.",
        "One lever at a time is turned against the recipe's default; differences are paired",
        f"by seed, ± is their standard deviation. Setting: {settings}.",
        f"Calibration sequences: {', '.join(f'{name} {SAMPLES[name]}' for name in chosen)}.",
        "KL is the mean divergence of the next token's distribution from full precision, in nats: lower is better. A",
        "positive `off - on` says that the lever helps.",
        f"torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}, "
        f"{platform.machine()}.",
        "",
    ]
    for recipe in chosen:
        text += table(recipe, results)
    Path(HERE / f"{name}.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {name}.md")


if __name__ == "__main__":
    typer.run(main)
