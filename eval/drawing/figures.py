"""Activations and losses of a run's report: each a chart, what it shows in words, and its numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...models.families import SITES
from .charts import INK, Chart, legend, log_scale, span, whole_numbers

WORDS = dict(zip(SITES, ("Q, K and V", "the output projection", "gate and up", "down"), strict=True))
STATES = {"before": "before rotation", "after": "after rotation"}
METHODS = {"quantized": "this run", "gptq": "plain GPTQ", "rtn": "RTN"}
PLACES = dict(zip(SITES, ("Q, K, V", "O", "gate, up", "down"), strict=True))


@dataclass(frozen=True)
class Picture:
    """What a page shows: a title, an <svg>, a sentence or two, and the numbers (titles of columns, rows)."""

    title: str
    svg: str
    text: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Layer:
    """One projection of one block: its loss as this run, plain GPTQ and RTN have it, by the keys of `METHODS`."""

    block: int
    name: str
    losses: Mapping[str, float]


# -- activations ------------------------------------------------------------------------------------------------------


def pictured_block(activations: Mapping[str, np.ndarray]) -> int:
    """Of the blocks with pictures the one that the rotation changes most."""
    blocks = sorted({int(name.rpartition(".")[2]) for name in activations if name.startswith("before.picture.")})
    gains = np.nanmax(_gains(activations), axis=1)
    return max(blocks, key=lambda block: gains[block])


def pictured_site(activations: Mapping[str, np.ndarray], block: int) -> str:
    """The site of a block whose kurtosis the rotation lowers most."""
    return SITES[int(np.nanargmax(_gains(activations)[block]))]


def _gains(activations: Mapping[str, np.ndarray]) -> np.ndarray:
    """Kurtosis before the rotation over that after it, (blocks, sites)."""
    found: np.ndarray = activations["before.kurtosis"] / activations["after.kurtosis"]
    return found


def surfaces(activations: Mapping[str, np.ndarray], site: str, block: int) -> Picture:
    """QuaRot's picture: magnitude over tokens and channels, before and after, at one scale."""
    pair = [activations[f"{state}.picture.{site}.{block}"].astype(np.float32) for state in STATES]
    top = max(float(part.max()) for part in pair)
    with Chart(height=2.3, columns=2, subplot_kw={"projection": "3d"}) as chart:
        for axes, values, label in zip(chart.axes, pair, STATES.values(), strict=True):
            tokens, channels = (np.arange(n) for n in values.shape)
            axes.plot_surface(
                *np.meshgrid(channels, tokens), values, cmap="viridis", vmin=0, vmax=top, rcount=64, ccount=64,
                linewidth=0, antialiased=False, rasterized=True,
            )  # fmt: skip
            axes.set_zlim(0, top)
            axes.set_title(label)
            axes.set_xlabel("channel", labelpad=-10)
            axes.set_ylabel("token", labelpad=-10)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.tick_params(axis="z", pad=-2)
            axes.set_box_aspect((1.4, 1.2, 1), zoom=0.95)
            for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
                axis.set_pane_color((0, 0, 0, 0))
    title = f"Magnitude of the inputs of {WORDS[site]}, block {block}"
    text = (
        f"Height is the absolute value, the same scale in both: the largest is {pair[0].max():.3g} before and "
        f"{pair[1].max():.3g} after. A rotation spreads a token's outliers over all its channels."
    )
    return Picture(title, chart.svg(title), text)


def pictures(activations: Mapping[str, np.ndarray], block: int) -> list[Picture]:
    """Heat maps of every site, before and after, at one logarithmic scale each."""
    found = []
    for site, words in WORDS.items():
        names = [f"{state}.picture.{site}.{block}" for state in STATES]
        if not all(name in activations for name in names):
            continue
        pair = [activations[name].astype(np.float32) for name in names]
        top = max(float(part.max()) for part in pair) or 1.0
        low = max(min(float(np.quantile(part, 0.02)) for part in pair), top * 1e-4)
        with Chart(height=2.5, columns=2, sharey=True) as chart:
            for axes, values, label in zip(chart.axes, pair, STATES.values(), strict=True):
                image = chart.picture(axes, values, low, top, label, activations[f"before.size.{site}"])
            chart.axes[0].set_ylabel("token")
            chart.colours(image, "absolute value")
        title = f"Inputs of {words}, block {block}"
        rows = [
            [STATES[state], f"{part.max():.3g}", f"{np.median(part):.3g}"]
            for state, part in zip(STATES, pair, strict=True)
        ]
        text = f"{pair[0].shape[0]} x {pair[0].shape[1]} pixels, each the largest absolute value of what it covers."
        found.append(Picture(title, chart.svg(title), text, ["", "largest", "median pixel"], rows))
    return found


def spikiness(activations: Mapping[str, np.ndarray], figure: str) -> Picture:
    """`kurtosis` or `peak` of every site, by block, before and after."""
    before, after = (activations[f"{state}.{figure}"] for state in STATES)
    names = {"kurtosis": "Kurtosis of a token's activations", "peak": "Largest channel over the root mean square"}
    with Chart(height=1.75, rows=2, columns=2, sharex=True, sharey=True) as chart:
        bounds = span([*before.flat, *after.flat, 3.0] if figure == "kurtosis" else [*before.flat, *after.flat])
        for column, (axes, site) in enumerate(zip(chart.axes, SITES, strict=True)):
            for series, (values, label) in enumerate(((before, "before rotation"), (after, "after rotation"))):
                titles = [f"block {i}, {label}: {v:.3g}" for i, v in enumerate(values[:, column])]
                chart.line(axes, range(len(values)), values[:, column].tolist(), label, series, titles)
            if figure == "kurtosis":
                axes.axhline(3, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), label="a Gaussian: 3")
            axes.set_title(PLACES[site])
            log_scale(axes.yaxis, *bounds)
            whole_numbers(axes)
        for axes in chart.axes[2:]:
            axes.set_xlabel("block")
        legend(chart, chart.axes[0], 3)
    columns = ["block", *(f"{PLACES[site]} {state}" for site in SITES for state in STATES)]
    rows = [
        [str(i), *(f"{part[i, column]:.3g}" for column in range(len(SITES)) for part in (before, after))]
        for i in range(len(before))
    ]
    texts = {
        "kurtosis": "Mean over tokens. 3 is a Gaussian's; more means that few channels hold most of a token's energy, "
        "and that most of its levels go unused when it is quantized.",
        "peak": "Mean over tokens. A token has one scale, which its largest channel sets: what is halved here is worth "
        "a bit.",
    }
    return Picture(names[figure], chart.svg(names[figure]), texts[figure], columns, rows)


# -- losses -----------------------------------------------------------------------------------------------------------


def _methods(layers: Sequence[Layer]) -> list[str]:
    return [key for key in METHODS if any(key in layer.losses for layer in layers)]


def _geometric(values: Sequence[float]) -> float:
    """The mean of ratios to each other, which loss spans many orders of."""
    positive = [value for value in values if value > 0]
    return math.exp(sum(map(math.log, positive)) / len(positive)) if positive else math.nan


def losses_by_projection(layers: Sequence[Layer]) -> Picture:
    """Bars: the geometric mean over blocks."""
    names, methods = list(dict.fromkeys(layer.name for layer in layers)), _methods(layers)
    means = {
        key: [_geometric([x.losses[key] for x in layers if x.name == name and key in x.losses]) for name in names]
        for key in methods
    }
    low, high = span([value for values in means.values() for value in values])
    thickness = 0.8 / len(methods)
    with Chart(height=0.5 + 0.42 * len(names)) as chart:
        axes = chart.axes[0]
        for i, key in enumerate(methods):
            at = [row + (i - (len(methods) - 1) / 2) * thickness for row in range(len(names))]
            titles = [f"{name}, {METHODS[key]}: {value:.3g}" for name, value in zip(names, means[key], strict=True)]
            lengths = [max(value - low, 0) if value == value else 0 for value in means[key]]
            chart.bars(axes, at, lengths, METHODS[key], i, titles, 0.9 * thickness, left=[low] * len(at))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        log_scale(axes.xaxis, low, high)
        axes.set_xlabel("loss, relative to a zero weight")
        legend(chart, axes, 3)
    title = "Loss of each projection"
    rows = [[name, *(f"{means[key][i]:.3g}" for key in methods)] for i, name in enumerate(names)]
    columns = ["projection", *(METHODS[key] for key in methods)]
    return Picture(title, chart.svg(title), "The geometric mean over all blocks.", columns, rows)


def losses_by_block(layers: Sequence[Layer]) -> Picture:
    """A small chart for each projection: loss by block and method."""
    names, methods = list(dict.fromkeys(layer.name for layer in layers)), _methods(layers)
    bounds = span([value for layer in layers for value in layer.losses.values()])
    lines = -(-len(names) // 2)
    with Chart(height=1.45, rows=lines, columns=2, sharex=True, sharey=True) as chart:
        for axes, name in zip(chart.axes, names, strict=False):
            own = [layer for layer in layers if layer.name == name]
            for i, key in enumerate(methods):
                have = [(layer.block, layer.losses[key]) for layer in own if key in layer.losses]
                titles = [f"{name}, block {block}, {METHODS[key]}: {loss:.3g}" for block, loss in have]
                chart.line(axes, [b for b, _ in have], [loss for _, loss in have], METHODS[key], i, titles)
            axes.set_title(name)
            log_scale(axes.yaxis, *bounds)
            whole_numbers(axes)
        for axes in chart.axes[len(names) :]:
            axes.set_axis_off()
        for axes in chart.axes[max(0, len(names) - 2) : len(names)]:
            axes.set_xlabel("block")
            axes.tick_params(labelbottom=True)
        legend(chart, chart.axes[0], 3)
    title = "Loss by block"
    rows = [
        [str(layer.block), layer.name, *(f"{layer.losses[key]:.3g}" if key in layer.losses else "" for key in methods)]
        for layer in layers
    ]
    columns = ["block", "projection", *(METHODS[key] for key in methods)]
    return Picture(title, chart.svg(title), "Relative to a zero weight.", columns, rows)
