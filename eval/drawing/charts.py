"""Charts as inline SVG, drawn by matplotlib: text stays text, colours are CSS variables, points and bars carry titles.

A page sets `--ink`, `--faint` and `--series-0` to `--series-5`, so that one drawing reads on light and on dark. What a
pointer shows of a mark is its <title>, which needs no script.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

SVG = "http://www.w3.org/2000/svg"
WIDTH = 4.0  # inches, of 90 pixels: what a phone shows at its own size
PIXELS = 90
# Colours that nothing else has: each stands for a CSS variable.
INK, FAINT = "#010101", "#020202"
SERIES = tuple(f"#0{i}0{i}0{i}" for i in range(3, 9))
VARIABLES = {INK: "--ink", FAINT: "--faint"} | {colour: f"--series-{i}" for i, colour in enumerate(SERIES)}
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rotoboa",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: what the layout is measured by
    "font.size": 8.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "image.interpolation": "nearest",
}


class Chart:
    """One figure of `columns` x `rows` axes, `height` inches a row; a context manager, then `svg()`.

    with Chart(height=2) as chart:
        chart.line(chart.axes[0], [0, 1], [3.0, 2.5], "this run", 0, ["block 0: 3.0", "block 1: 2.5"])
    chart.svg("Loss by block")
    """

    def __init__(self, height: float = 2.6, rows: int = 1, columns: int = 1, **options: Any) -> None:
        self._context = mpl.rc_context(STYLE)
        self._titles: dict[str, list[str]] = {}
        self._size = (WIDTH, height * rows)
        self._grid = (rows, columns)
        self._options = options

    def __enter__(self) -> Chart:
        self._context.__enter__()
        self.figure = Figure(figsize=self._size, dpi=PIXELS, layout="constrained")
        axes = self.figure.subplots(*self._grid, squeeze=False, **self._options)
        self.axes: list[Any] = list(axes.flat)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._text = self._draw()
        finally:
            self._context.__exit__(*error)

    def line(
        self, axes: Axes, x: Sequence[float], y: Sequence[float], label: str, series: int, titles: Sequence[str],
        dashed: bool = False, joined: bool = True,
    ) -> None:  # fmt: skip
        """Points with their titles, joined by a line; what is not finite is left out."""
        kept = [(a, b, t) for a, b, t in zip(x, y, titles, strict=True) if np.isfinite(b)]
        if not kept:
            return
        xs, ys, texts = zip(*kept, strict=True)
        colour, marker = SERIES[series % len(SERIES)], MARKERS[series % len(MARKERS)]
        if joined:
            style = (0, (3, 2)) if dashed else "-"
            axes.plot(xs, ys, color=colour, linewidth=1.4, linestyle=style)
        size = 22 if len(xs) <= 40 else 9
        points = axes.scatter(xs, ys, s=size, color=colour, marker=marker, label=label, zorder=3)
        self._title(points, list(texts))

    def bars(
        self, axes: Axes, at: Sequence[float], lengths: Sequence[float], label: str | None, series: int,
        titles: Sequence[str], thickness: float = 0.7, left: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """Horizontal bars at heights `at`."""
        bars = axes.barh(at, lengths, thickness, left=left, color=SERIES[series % len(SERIES)], label=label)
        for bar, title in zip(bars, titles, strict=True):
            self._title(bar, [title])

    def cell(self, axes: Axes, x: float, y: float, text: str, strength: float, title: str) -> None:
        """A square around (x, y) with a few letters in it; `strength` is 0 to 1, and how dark it is."""
        square = Rectangle(
            (x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=0.08 + 0.47 * strength, edgecolor=FAINT, linewidth=0.4
        )
        axes.add_patch(square)
        axes.text(x, y, text, ha="center", va="center_baseline", fontsize=7.5)
        self._title(square, [title])

    def picture(self, axes: Axes, values: np.ndarray, low: float, high: float, title: str, extent: np.ndarray) -> Any:
        """Magnitudes (tokens, channels) on a logarithmic scale; `extent` is how many of each there were."""
        axes.grid(False)
        tokens, channels = extent
        image = axes.imshow(
            np.clip(values, low, high), norm=LogNorm(low, high), cmap="viridis", aspect="auto",
            extent=(0, channels, tokens, 0),
        )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("channel")
        return image

    def colours(self, image: Any, label: str) -> None:
        """The scale of pictures, below all axes."""
        bar = self.figure.colorbar(image, ax=self.axes, location="bottom", shrink=0.8, aspect=30, pad=0.03)
        bar.ax.grid(False)
        bar.ax.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.xaxis.set_minor_formatter(NullFormatter())
        bar.set_label(label)

    def _title(self, artist: Any, titles: list[str]) -> None:
        name = f"mark-{len(self._titles)}"
        artist.set_gid(name)
        self._titles[name] = titles

    def _draw(self) -> str:
        stream = io.StringIO()
        self.figure.savefig(
            stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
        return stream.getvalue()

    def svg(self, description: str) -> str:
        """The drawing as an <svg> element to be put into a page; `description` is what is read aloud of it."""
        ElementTree.register_namespace("", SVG)
        ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
        root = ElementTree.fromstring(self._text)
        for metadata in root.findall(f"{{{SVG}}}metadata"):
            root.remove(metadata)
        for name, titles in self._titles.items():
            group = root.find(f".//*[@id='{name}']")
            if group is None:
                raise ValueError(f"the drawing has no {name}")
            marks = [group] if len(titles) == 1 else list(group.iter(f"{{{SVG}}}use"))
            for mark, title in zip(marks, titles, strict=True):
                element = ElementTree.Element(f"{{{SVG}}}title")
                element.text = title
                mark.insert(0, element)
        for name in ("width", "height"):
            root.attrib.pop(name, None)
        root.set("role", "img")
        root.set("aria-label", description)
        return _coloured(_unique(ElementTree.tostring(root, encoding="unicode"), description))


def _coloured(text: str) -> str:
    """Sentinel colours become CSS variables."""
    return re.sub("|".join(VARIABLES), lambda match: f"var({VARIABLES[match[0]]})", text)


def _unique(text: str, description: str) -> str:
    """Ids become the chart's own: several charts stand in one page, where an id counts once."""
    own = f"c{zlib.crc32(description.encode()):x}"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{own}-\1"', text)
    return re.sub(r'(href="#|url\(#)', rf"\1{own}-", text)


def whole_numbers(axes: Axes) -> None:
    """Ticks at whole numbers of x, as blocks have them."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def log_scale(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers on it, also where it spans less than a decade."""
    axes = axis.axes
    vertical = axis is axes.yaxis
    (axes.set_yscale if vertical else axes.set_xscale)("log")
    (axes.set_ylim if vertical else axes.set_xlim)(low, high)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=8))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain if decades < 0.5 else NullFormatter())


def span(values: Sequence[float], room: float = 1.25) -> tuple[float, float]:
    """Bounds of a logarithmic axis around positive `values`."""
    finite = [value for value in values if np.isfinite(value) and value > 0] or [1.0]
    return min(finite) / room, max(finite) * room


def legend(chart: Chart, axes: Axes, columns: int = 2) -> None:
    """One legend above all axes."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        chart.figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, handletextpad=0.2, columnspacing=1
        )
