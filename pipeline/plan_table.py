"""The plan of a run as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .progress import human_size, human_time


def plan_tables(plan: Mapping[str, Any]) -> list[Table]:
    """Tables of what `plan.plan` returns: the model and its rotations, then sizes, calibration, memory and time."""
    model, sizes, calibration = plan["model"], plan["sizes"], plan["calibration"]
    facts = _table("Model")
    for name, value in model.items():
        facts.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    rotations = Table(title="Rotations", title_justify="left")
    for column in ("rotation", "where", "size", "Hadamard matrix"):
        rotations.add_column(column, justify="right" if column == "size" else "left")
    for name, rotation in plan["rotations"].items():
        rotations.add_row(name.upper(), rotation["where"], f"{rotation['size']:,}", rotation["construction"])
    costs = _table("Size and cost")
    costs.add_row("original", human_size(sizes["original"]))
    costs.add_row("quantized", human_size(sizes["quantized"]))
    costs.add_row("bits per weight", f"{sizes['bits_per_weight']:.3f}")
    costs.add_section()
    sequences = f"{calibration['sequences']:,} x {calibration['sequence_length']:,}"
    costs.add_row("calibration tokens", f"{sequences} = {calibration['tokens']:,}")
    costs.add_row("evaluation windows", _or(calibration["evaluation_windows"], "all"))
    costs.add_row("both streams", human_size(calibration["streams"]))
    costs.add_row("inputs of a layer", human_size(calibration["block"]))
    costs.add_row("memory for these", human_size(calibration["memory"]))
    costs.add_row("in files, with embedding and head", human_size(calibration["spilled"]))
    costs.add_section()
    for name, size in plan["memory"].items():
        costs.add_row(f"memory: {name}", human_size(size))
    costs.add_section()
    time = plan["time"]
    for name, count in time["operations"].items():
        costs.add_row(f"operations: {name}", f"{count:.2e}")
    costs.add_row(f"operations a second on {time['device']}", f"{time['operations_per_second']:.2e}")
    without = "" if calibration["evaluation_windows"] else ", without evaluation"
    costs.add_row("time, roughly", human_time(time["seconds"]) + without)
    return [facts, rotations, costs]


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    return table


def _or(value: int | None, other: str) -> str:
    return other if value is None else f"{value:,}"
