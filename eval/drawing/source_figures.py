"""Where the loss comes from, drawn: KL by source, of one run or of several, and what each block adds."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..results import Sources
from .charts import Chart, legend, log_scale, span, whole_numbers
from .figures import Picture
from .source_tables import BY_BLOCK, LABELS, known, measured_on


def kl_by_source(entries: Mapping[str, Sources], title: str = "KL with one quantizer on alone") -> Picture:
    """Points, a row for each source: what each entry has there, by its label.

    Args:
        entries: what was found of a run, by what to call it.
        title: of the picture; no other on a page may have it.
    """
    names = known(entries.values())
    low, high = span([entry.kl[name] for entry in entries.values() for name in names if name in entry.kl], 1.4)
    with Chart(height=0.7 + 0.26 * len(names)) as chart:
        axes = chart.axes[0]
        for series, (label, entry) in enumerate(entries.items()):
            have = [(i, entry.kl[name]) for i, name in enumerate(names) if entry.kl.get(name, 0) > 0]
            titles = [f"{LABELS[names[i]]}, {label}: {kl:.4f}" for i, kl in have]
            at = [i + 0.7 * ((series + 0.5) / len(entries) - 0.5) for i, _ in have]
            chart.line(axes, [kl for _, kl in have], at, label, series, titles, joined=False)
            if len(entries) == 1:
                for place, kl in have:
                    axes.annotate(f"{kl:.3g}", (kl, place), (6, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        log_scale(axes.xaxis, low, high * 1.6)  # room for the last figure
        axes.set_xlabel("KL from full precision, nats")
        if len(entries) > 1:
            legend(chart, axes)
    cells = [[f"{entry.kl[name]:.4f}" if name in entry.kl else "" for entry in entries.values()] for name in names]
    rows = [[LABELS[name], *own] for name, own in zip(names, cells, strict=True)]
    measured = " ".join(dict.fromkeys(measured_on(entry) for entry in entries.values()))
    text = f"Mean over next tokens, all else in full precision. {measured}"
    return Picture(title, chart.svg(title), text, ["alone", *entries], rows)


def errors_by_block(sources: Sources, title: str = "What each block adds to the residual stream") -> Picture:
    """A small chart for each source, beside all together."""
    blocks = sources.blocks
    names = known([sources])
    single = [name for name in names if name != "all"]
    bounds = span([error for name in names for error in blocks[name]])
    lines = -(-len(single) // 2)
    with Chart(height=1.45, rows=lines, columns=2, sharex=True, sharey=True) as chart:
        for axes, name in zip(chart.axes, single, strict=False):
            for series, (key, label) in enumerate(((name, "alone"), ("all", LABELS["all"]))):
                titles = [f"block {i}, {LABELS[key]}: {error:.3g}" for i, error in enumerate(blocks[key])]
                shown = [error if error > 0 else math.nan for error in blocks[key]]  # 0 has no logarithm
                chart.line(axes, range(len(shown)), shown, label, series, titles)
            axes.set_title(LABELS[name])
            log_scale(axes.yaxis, *bounds)
            whole_numbers(axes)
        for axes in chart.axes[len(single) :]:
            axes.set_axis_off()
        for axes in chart.axes[max(0, len(single) - 2) : len(single)]:
            axes.set_xlabel("block")
            axes.tick_params(labelbottom=True)
        legend(chart, chart.axes[0])
    rows = [[str(i), *(f"{blocks[name][i]:.2e}" for name in names)] for i in range(len(blocks["all"]))]
    return Picture(title, chart.svg(title), BY_BLOCK, ["block", *(LABELS[name] for name in names)], rows)
