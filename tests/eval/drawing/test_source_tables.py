"""Tables and pictures of where the loss comes from."""

import re

from rotoboa.eval.drawing import source_figures, source_tables
from rotoboa.eval.results import Sources
from rotoboa.pipeline.console.progress import source_table
from rotoboa.pipeline.storage.run_report import Measured

FOUND = Sources(
    kl={"weights": 0.25, "down": 0.125, "values": 0.0, "all": 0.5},
    exact=3e-6,
    blocks={"weights": (0.02, 0.01), "down": (0.001, 0.004), "values": (0.0, 0.0), "all": (0.03, 0.01)},
    dataset="stdlib",
    tokens=(4, 512),
)
WEIGHTS = FOUND.model_copy(
    update={
        "kl": {"weights": 0.2, "all": 0.2},
        "blocks": dict.fromkeys(("weights", "all"), FOUND.blocks["weights"]),
    }
)


def test_rows() -> None:
    assert source_tables.rows(FOUND) == [
        ["weights", "0.2500", "1.50e-02", "2.00e-02", "0"],
        ["inputs of down", "0.1250", "2.50e-03", "4.00e-03", "1"],
        ["values", "0.0000", "0.00e+00", "0.00e+00", "0"],
        ["all together", "0.5000", "2.00e-02", "3.00e-02", "0"],
    ]
    assert source_table(Measured(sources=FOUND)).row_count == 4
    assert not source_table(Measured()).rows


def test_markdown() -> None:
    """Of several runs, each has the columns of all."""
    assert source_tables.markdown({"full": FOUND, "w2": WEIGHTS}, "recipe") == [
        "| recipe | weights | inputs of down | values | all together |",
        "|---|---|---|---|---|",
        "| full | 0.2500 | 0.1250 | 0.0000 | 0.5000 |",
        "| w2 | 0.2000 |  |  | 0.2000 |",
    ]
    assert source_tables.markdown_by_block(WEIGHTS) == [
        "| block | weights | all together |",
        "|---|---|---|",
        "| 0 | 2.00e-02 | 2.00e-02 |",
        "| 1 | 1.00e-02 | 1.00e-02 |",
    ]


def test_pictures() -> None:
    both = source_figures.kl_by_source({"full": FOUND, "w2": WEIGHTS}, "Two runs")
    assert both.columns == ["alone", "full", "w2"]
    assert both.rows == [
        ["weights", "0.2500", "0.2000"],
        ["inputs of down", "0.1250", ""],
        ["values", "0.0000", ""],
        ["all together", "0.5000", "0.2000"],
    ]
    marks = re.findall(r"<title>(.*?)</title>", both.svg)
    assert marks == [
        *("weights, full: 0.2500", "inputs of down, full: 0.1250", "all together, full: 0.5000"),
        *("weights, w2: 0.2000", "all together, w2: 0.2000"),
    ], "what costs nothing has no place on a logarithmic axis"
    assert both.text.count("4 windows of 512 tokens") == 1
    blocks = source_figures.errors_by_block(FOUND)
    assert blocks.rows == [
        ["0", "2.00e-02", "1.00e-03", "0.00e+00", "3.00e-02"],
        ["1", "1.00e-02", "4.00e-03", "0.00e+00", "1.00e-02"],
    ]
    assert "block 1, inputs of down: 0.004" in blocks.svg
    assert len(source_figures.errors_by_block(WEIGHTS).rows) == 2
