import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from rotoboa.pipeline.console.human import human_size, human_time
from rotoboa.pipeline.console.progress import (
    Progress,
    cost_table,
    loss_table,
    peak_memory,
    result_table,
    task_table,
)
from rotoboa.pipeline.console.sizes import size_rows
from rotoboa.pipeline.storage.manifest import BlockEntry
from rotoboa.pipeline.storage.run_report import Measured


def recorder(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=200, _environ={"TERM": "xterm"}), stream


def text(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def measured(**facts: Any) -> Measured:
    return Measured.model_validate(facts)


def work(progress: Progress) -> None:
    with progress:
        progress.stage("calibrate", total=4)
        for _ in range(4):
            progress.advance()
        progress.stage("quantize", total=3, done=1)
        progress.log("block [1] starts")  # brackets are no markup
        progress.advance(0, block=1, layer="q_proj", loss=0.01234)
        progress.advance(block=1, loss=0.5)
        progress.advance(0, block=2, layer="k_proj", loss=7.0)
        progress.advance(block=2)


def test_without_a_terminal_it_is_a_line_per_block_and_stage() -> None:
    console, stream = recorder(terminal=False)
    work(Progress(console=console))
    lines = [re.sub(r"\d[\d.]* (s|MiB|GiB)", "~", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "calibrate: 4/4 in ~, ~",
        "block [1] starts",
        "quantize 2/3: block 1  loss 0.5, ~, ~",
        "quantize 3/3: block 2, ~, ~",
        "quantize: 3/3 in ~, ~",
    ]


def test_on_a_terminal_bars_show_the_fields() -> None:
    console, stream = recorder(terminal=True)
    progress = Progress(console=console)
    with progress:
        progress.stage("quantize", total=2)
        progress.advance(0, block=0, layer="q_proj", loss=0.01234)
        assert progress._bars is not None
        progress._bars.refresh()
        progress.log("a line")
        progress.advance(block=0)
    output = stream.getvalue()
    assert "block 0  layer q_proj  loss 0.0123" in output and "1/2" in output and "a line" in output
    assert "iB" in output


def test_quiet_is_silent() -> None:
    console, stream = recorder(terminal=True)
    work(Progress(quiet=True, console=console))
    assert stream.getvalue() == ""


def test_a_stage_that_fails_says_how_far_it_came_and_passes_the_error_on() -> None:
    console, stream = recorder(terminal=False)
    with pytest.raises(KeyError), Progress(console=console) as progress:
        progress.stage("quantize", total=2)
        raise KeyError("x")
    assert stream.getvalue().startswith("quantize: 0/2 in ")


def test_advance_without_a_stage_is_harmless() -> None:
    Progress(quiet=True).advance()
    console, stream = recorder(terminal=False)
    Progress(console=console).advance(block=1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5 GiB"), (3 * 2**40, "3 TiB")]
)
def test_human_size(size: int, words: str) -> None:
    assert human_size(size) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0.0 s"), (59.97, "1 min 00 s"), (185.2, "3 min 05 s"), (7650, "2 h 07 min")]
)
def test_human_time(seconds: float, words: str) -> None:
    assert human_time(seconds) == words


def test_peak_memory_is_at_least_that_of_python() -> None:
    assert re.match(r"\d[\d.]* [MG]iB", peak_memory())


def test_result_table() -> None:
    perplexity = {
        "stdlib": {"full_precision": 9.12345, "rtn": 1234.5, "quantized": 9.9},
        "wikitext2": {"full_precision": 5.0, "rtn": None, "quantized": 5.25},
    }
    lines = text(result_table(measured(perplexity=perplexity))).splitlines()
    assert "stdlib" in lines[2] and "wikitext2" in lines[2]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["full precision", "9.123", "5.000"],
        ["RTN, no rotation", "1,234.500", ""],
        ["quantized", "9.900", "5.250"],
    ]


def test_divergence_has_columns_beside_its_data_set() -> None:
    report = {
        "perplexity": {"c4": {"full_precision": 5.0, "rtn": 7.0, "quantized": 5.5}, "wikitext2": {"quantized": 6.0}},
        "divergence": {"c4": {"kl": 0.0625, "top1": 0.875, "rtn": {"kl": 1.5, "top1": 0.5}}},
    }
    lines = text(result_table(measured(**report))).splitlines()
    assert lines[0].strip() == "Perplexity, and divergence from full precision"
    header = [cell.strip() for cell in lines[2].strip("┃").split("┃")]
    assert header == ["model", "c4", "KL (nats)", "same top-1", "wikitext2"]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["full precision", "5.000", "", "", ""],
        ["RTN, no rotation", "7.000", "1.5000", "50.0%", ""],
        ["quantized", "5.500", "0.0625", "87.5%", "6.000"],
    ]


def test_task_table() -> None:
    tasks = {
        "piqa": {"metric": "acc_norm", "full_precision": 0.75, "full_precision_stderr": 0.01, "quantized": 0.7},
        "average": {"metric": "average", "full_precision": 0.75, "quantized": 0.5, "stderr": 0.02},
    }
    lines = text(task_table(measured(tasks=tasks))).splitlines()
    assert [cell.strip() for cell in lines[2].strip("┃").split("┃")] == [
        "task",
        "metric",
        "full precision",
        "quantized",
    ]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [["piqa", "acc_norm", "0.750 ± 0.010", "0.700"], ["average", "", "0.750", "0.500 ± 0.020"]]
    assert not task_table(Measured()).rows


def test_what_was_not_measured_has_no_row() -> None:
    assert "RTN" not in text(result_table(measured(perplexity={"c4": {"full_precision": 5.0, "quantized": 5.25}})))
    assert not result_table(Measured()).rows and not cost_table(Measured()).rows


def test_cost_table() -> None:
    shown = text(cost_table(measured(seconds={"quantize": 61.0}, sizes={"original": 2**21, "quantized": 2**19})))
    for words in ("quantize", "1 min 01 s", "original", "2 MiB", "512 KiB"):
        assert words in shown


def test_sizes_are_those_that_people_count() -> None:
    def rows(bits: dict[str, float | None], was_tied: bool = False, **sizes: int) -> list[tuple[str, str]]:
        parts = {"original": 2000, "quantized": 1000, "blocks": 200, "embedding": 400, "head": 400}
        return list(size_rows(parts | sizes, bits, was_tied))

    assert rows({"bits_per_weight": 2.25, "bits_per_weight_of_file": 8.0}, was_tied=True) == [
        ("original", "1.95 KiB"),
        ("quantized", "1000 B, 50% of the original"),
        ("  blocks", "200 B"),
        ("  embedding", "400 B"),
        ("  head, which was the embedding", "400 B"),
        ("bits per weight of what is quantized", "2.250"),
        ("bits per weight of the whole file", "8.000"),
    ]
    assert [name for name, _ in rows({"bits_per_weight": None})][2:] == ["  blocks", "  embedding", "  head"]
    assert [name for name, _ in rows({}, head=0, was_tied=True)][2:] == [
        "  blocks",
        "  embedding, which is the head",
    ]


def test_cost_table_shows_memory_against_bfloat16() -> None:
    memory = {
        "model": {"bfloat16": 2**22, "quantized": 2**20},
        "cache": {"tokens": 2048, "bfloat16": 2**13, "quantized": 2**11 + 2**9},
    }
    lines = text(cost_table(measured(memory=memory))).splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["model in memory", "1 MiB, 25% of bfloat16"],
        ["cache of 2,048 tokens in memory", "2.5 KiB, 31% of bfloat16"],
    ]


def test_loss_table_takes_the_mean_of_experts() -> None:
    layers = {"self_attn.q_proj": {"loss": 0.125}}
    experts = {f"mlp.experts.{index}.up_proj": {"loss": float(index)} for index in range(3)}
    blocks = [
        BlockEntry.model_validate({"index": 0, "seconds": 1.25, "layers": layers}),
        BlockEntry.model_validate({"index": 1, "seconds": 2.0, "layers": layers | experts}),
        BlockEntry(index=2),
    ]
    lines = text(loss_table(blocks)).splitlines()
    assert [cell.strip() for cell in lines[2].strip("┃").split("┃")] == [
        "block",
        "seconds",
        "q_proj",
        "experts up_proj",
    ]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [["0", "1.2", "0.125", ""], ["1", "2.0", "0.125", "1"], ["2", "", "", ""]]
