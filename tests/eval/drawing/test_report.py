"""The page of a run: what it says, that it stands alone, and how it looks in a real browser."""

import copy
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rotoboa.eval.drawing import charts, costs, figures
from rotoboa.eval.drawing.figures import Layer
from rotoboa.eval.drawing.report import Contents, page
from rotoboa.pipeline.measure.comparing import comparison, table
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.storage.run_report import Report

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REPORT: dict[str, Any] = {
    "model": "tiny",
    "perplexity": {"stdlib": {"full_precision": 12.0, "rtn": 69.0, "quantized": 13.25}},
    "divergence": {"stdlib": {"kl": 0.0625, "top1": 0.875}},
    "tasks": {"next_line": {"metric": "acc", "full_precision": 0.75, "quantized": 0.7, "stderr": 0.02}},
    "tokens": {"calibration": [128, 512], "evaluation": [200, 512]},
    "seconds": {"text": 2.0, "quantize": 61.0, "total": 90.0},
    "plain_forward_seconds": 6.1,
    "peak_memory_bytes": {"host": 2**30},
    "sizes": {"original": 2**23, "quantized": 2**21},
    "bits_per_weight": 4.125,
    "device": "a CPU",
    "python": "3.11",
    "versions": {"torch": "2.13"},
    "recipe": build_recipe(load_recipe("w4a4kv4")).model_dump(mode="json"),
    "sources": {
        "kl": {"weights": 0.03125, "qkv": 0.0105, "keys": 0.0, "all": 0.0625},
        "exact": 2e-5,
        "blocks": {name: [1e-3, 3.21e-3, 2e-3] for name in ("weights", "qkv", "keys", "all")},
        "dataset": "stdlib",
        "tokens": [4, 2048],
    },
}


def activations(blocks: int = 3) -> dict[str, np.ndarray]:
    """Gaussians, and before the rotation of block 1 a channel a hundred times as large."""
    draw = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for state in ("before", "after"):
        for site in figures.SITES:
            found[f"{state}.size.{site}"] = np.array([512, 256])
            for block in range(blocks):
                picture = np.abs(draw.normal(size=(64, 128))).astype(np.float16)
                if state == "before" and block == 1 and site == "down":
                    picture[:, 17] *= 100
                found[f"{state}.picture.{site}.{block}"] = picture
        for figure in ("kurtosis", "peak"):
            found[f"{state}.{figure}"] = draw.uniform(2.5, 3.5, size=(blocks, 4)).astype(np.float32)
    found["before.kurtosis"][1, 3] = 120.0
    return found


def compared(reports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return comparison([(Path(run), Report.model_validate(report)) for run, report in reports.items()])


def contents(**changes: Any) -> Contents:
    other = copy.deepcopy(REPORT)
    other["recipe"]["weights"].update(method="gptq", bits=2)
    other["perplexity"]["stdlib"]["quantized"] = 14.0
    other["bits_per_weight"] = 2.125
    rows = compared({"runs/mine": REPORT, "runs/<b>other & $x$": other})
    given: dict[str, Any] = {
        "report": REPORT,
        "rows": rows,
        "columns": table(rows),
        "layers": [
            Layer(block, name, {"quantized": 0.001 * (i + 1), "gptq": 0.002 * (i + 1), "rtn": 0.05})
            for block in range(3)
            for i, name in enumerate(PROJECTIONS)
        ],
        "block_seconds": [(0, 20.0), (1, 21.0), (2, 20.5)],
        "storage": {"q_proj": {"integers": 2**20, "scales": 2**12}, "embedding, head": {"not quantized": 2**19}},
        "activations": activations(),
        "datasets": {"stdlib": "stdlib"},
    }
    given |= changes
    return Contents(**given | {"report": Report.model_validate(given["report"])})


@pytest.fixture(scope="module")
def html() -> str:
    return page(contents())


def test_the_page_holds_the_figures(html: str) -> None:
    text = re.sub(r"<svg.*?</svg>", "", html, flags=re.S)
    for words in ("13.250", "12.000 in full precision", "0.0625", "87.5%", "4.12", "2 MiB", "1 min 01 s", "next_line"):
        assert words in text, words
    for title in (
        "Activations before and after rotation",
        "Loss of each layer",
        "Where the loss comes from",
        "Where the bits went",
        "Where the seconds went",
    ):
        assert title in text
    for block in range(3):  # the numbers of the losses stand under their chart
        assert f"<td>{block}</td><td>down_proj</td><td>0.007</td><td>0.014</td><td>0.05</td>" in text
    assert "<td>inputs of Q, K, V</td><td>0.0105</td>" in text and "4 windows of 2,048 tokens" in text
    assert "<td>1</td><td>3.21e-03</td><td>3.21e-03</td><td>3.21e-03</td><td>3.21e-03</td>" in text
    assert "Inputs of down, block 1" in text, "the spikiest block is the one that is shown"
    assert (
        "channels balanced, rotated by R1 behind the norms, R2, R3, R4, heads" in text
        and "first 4 positions" not in text
    )


@pytest.mark.usefixtures("undrawn")
def test_the_sink_of_the_cache_is_named() -> None:
    report = copy.deepcopy(REPORT)
    report["recipe"]["cache"]["sink"] = 4
    low = "keys in 4 bits, values in 4 bits, but for the first 4 positions; channels balanced, rotated"
    assert low in page(contents(report=report))


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_shares_a_scale(html: str) -> None:
    assert "activations in 4 bits beside 32 directions in 8, keys in 4 bits" in html and "boa A4KV4" in html
    report = copy.deepcopy(REPORT)
    report["recipe"]["activations"] |= {"group_size": 64, "directions": 16}
    rows = compared({"runs/mine": report})
    grouped = page(contents(report=report, rows=rows, columns=table(rows)))
    assert "activations in 4 bits by token in groups of 64 beside 16 directions in 8, keys in 4 bits" in grouped
    assert "boa A4 in 64sKV4" not in grouped and "boa A4 in 64s KV4" in grouped


def test_names_are_text_and_no_markup(html: str) -> None:
    assert "<b>other" not in html and "&lt;b&gt;other &amp; $x$" in html


def test_the_page_stands_alone(html: str) -> None:
    assert "<script" not in html and "@import" not in html and len(html) < 2_000_000
    for target in re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', html):
        assert "".join(target).startswith(("data:", "#")), target
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', html):
        assert target in ids, target


def test_charts_are_named_and_take_their_colours_from_the_page(html: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(drawn) == 15
    used = set()
    for svg in drawn:
        assert 'role="img"' in svg and re.search(r'aria-label="[^"]+"', svg)
        variables = set(re.findall(r"var\((--[\w-]+)\)", svg))
        used |= variables
        assert not set(re.findall(r"#[0-9a-f]{6}", svg)) & set(charts.VARIABLES), "a sentinel colour is left"
    for variable in used:
        assert html.count(f"{variable}:") == 2, f"{variable} needs a light and a dark value"


def test_the_same_drawings_twice(html: str) -> None:
    """One of lines, one of bars and one of a surface."""
    layers = contents().layers
    again = [figures.losses_by_projection(layers), figures.losses_by_block(layers)]
    again.append(figures.surfaces(activations(), "down", 1))
    assert all(picture.svg in html for picture in again)


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_measured_has_no_section() -> None:
    bare = copy.deepcopy(REPORT)
    del bare["tasks"], bare["divergence"], bare["sources"]
    rows = compared({"one": bare})
    text = page(contents(report=bare, rows=rows, columns=table(rows), layers=[], activations={}, storage={}))
    for words in ("Activations", "Loss of each", "Zero-shot", "KL divergence", "bits went", "loss comes from"):
        assert words not in text
    assert "the only run with this model" in text


def test_a_loss_without_references_is_a_chart_of_one() -> None:
    layers = [Layer(0, "q_proj", {"quantized": 0.01}), Layer(0, "k_proj", {"quantized": 0.0})]
    for picture in (figures.losses_by_projection(layers), figures.losses_by_block(layers)):
        assert "RTN" not in picture.svg and list(picture.columns)[-1] == "this run"


def test_points_carry_their_own_figures() -> None:
    """Each mark's title stands in the mark: the first of a series is the first use, also where one is left out."""
    with charts.Chart() as chart:
        chart.line(chart.axes[0], [0, 1, 2], [1.0, np.nan, 4.0], "a", 0, ["first", "missing", "third"])
        chart.bars(chart.axes[0], [0, 1], [2.0, 3.0], "b", 1, ["low", "high"])
    root = ElementTree.fromstring(chart.svg("x"))
    space = "{http://www.w3.org/2000/svg}"
    titles = {t.text: parent for parent in root.iter() for t in parent.findall(f"{space}title")}
    assert sorted(map(str, titles)) == ["first", "high", "low", "third"]
    assert float(titles["first"].attrib["x"]) < float(titles["third"].attrib["x"])
    assert titles["low"].attrib["id"] != titles["high"].attrib["id"]


def test_geometric_means_and_units() -> None:
    layers = [Layer(0, "q_proj", {"quantized": 0.01}), Layer(1, "q_proj", {"quantized": 0.0001})]
    assert figures.losses_by_projection(layers).rows == [["q_proj", "0.001"]]
    found = costs.storage({"q_proj": {"integers": 3 * 2**30}, "norms": {"not quantized": 512}}, 2**34)
    assert found.rows == [["q_proj", "3 GiB", "0 B"], ["norms", "0 B", "512 B"]] and "16 GiB" in found.text
    spent = costs.seconds({"text": 5.0, "quantize": 60.0, "total": 100.0}, [(0, 60.0)])
    assert ["quantize", "60.0"] in spent.rows and ["checks, plain forward pass", "35.0"] in spent.rows


@pytest.mark.usefixtures("undrawn")
def test_runs_that_cannot_be_compared_are_not_in_the_chart() -> None:
    other = copy.deepcopy(REPORT)
    other["tokens"]["evaluation"] = [4, 512]
    rows = compared({"mine": REPORT, "fewer": other})
    text = page(contents(rows=rows, columns=table(rows), activations={}))
    assert "the only run with this model" in text and "other evaluation windows" in text


# -- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000"),
]
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement, cut = [];
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const own = text.getBoundingClientRect();
      if (own.left < box.left - 2 || own.right > box.right + 2 || own.top < box.top - 2 || own.bottom > box.bottom + 2)
        cut.push(svg.getAttribute("aria-label") + ": " + text.textContent);
    }
  }
  parent.document.documentElement.dataset.seen = JSON.stringify({
    width: innerWidth, wide: root.scrollWidth, cut, background: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
    tables: [...document.querySelectorAll(".scroll")].filter(e => e.getBoundingClientRect().right > innerWidth).length,
  });
});</script></head>"""


FRAME = (
    '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    '<link rel="icon" href="data:,">'
    '<body style="margin:0"><iframe width="{}" height="{}" style="border:0" srcdoc="{}"></iframe>'
)


def browse(tmp_path: Path, html: str, width: int, height: int, dark: bool) -> tuple[dict[str, Any], bytes, str]:
    """What a script in the page sees of it, a screenshot, and what the browser said."""
    file, shot = tmp_path / "page.html", tmp_path / "shot.png"
    # A window of Chromium is at least 500 pixels wide: the page is a frame of the width that is wanted.
    file.write_text(FRAME.format(width, height, escape(html.replace("</head>", PROBE))), encoding="utf-8")
    command = [
        str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},{height}", file.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.is_file(), shown.stderr
    found = re.search(r'data-seen="([^"]*)"', shown.stdout)
    assert found, shown.stderr
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen, shot.read_bytes(), shown.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is on the path: nothing can show the page")
@pytest.mark.parametrize(
    ("width", "height", "dark"), [(1280, 900, False), (390, 844, True)], ids=["light-desktop", "dark-phone"]
)
def test_in_a_browser(html: str, tmp_path: Path, width: int, height: int, dark: bool) -> None:
    seen, picture, said = browse(tmp_path, html, width, height, dark)
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert seen["width"] == width
    assert seen["wide"] <= width, "the page is wider than the window"
    assert seen["cut"] == [], "text is cut off at a chart's edge"
    assert seen["tables"] == 0, "a table is wider than its frame"
    assert not [name for name in seen["requests"] if not name.startswith("data:")]
    assert "CONSOLE" not in said
    assert seen["background"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
