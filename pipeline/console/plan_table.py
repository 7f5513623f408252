"""The plan of a run as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .human import human_size, human_time
from .sizes import BITS, size_rows


def plan_tables(plan: Mapping[str, Any]) -> list[Table]:
    """Tables of what `plan.plan` returns: model, rotations, schemes; sizes, calibration and memory; time."""
    model, calibration = plan["model"], plan["calibration"]
    facts = _table("Model")
    for name, value in model.items():
        facts.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    rotations = Table(title="Rotations", title_justify="left")
    for column in ("rotation", "where", "size", "Hadamard matrix"):
        rotations.add_column(column, justify="right" if column == "size" else "left")
    for name, rotation in plan["rotations"].items():
        rotations.add_row(name.upper(), rotation["where"], f"{rotation['size']:,}", rotation["construction"])
    costs = _table("Size and cost")
    bits = {name: plan["sizes"][name] for name in BITS}
    sizes = {name: size for name, size in plan["sizes"].items() if name not in ("was_tied", *BITS)}
    for row in size_rows(sizes, bits, plan["sizes"]["was_tied"]):
        costs.add_row(*row)
    costs.add_section()
    sequences = f"{calibration['sequences']:,} x {calibration['sequence_length']:,}"
    costs.add_row("calibration tokens", f"{sequences} = {calibration['tokens']:,}")
    costs.add_row("windows begin with BOS", "yes" if calibration["bos"] else "no")
    costs.add_row("evaluation windows", _or(calibration["evaluation_windows"], "all"))
    costs.add_row("both streams", human_size(calibration["streams"]))
    costs.add_row("inputs of a layer", human_size(calibration["block"]))
    costs.add_row("memory for these", human_size(calibration["memory"]))
    costs.add_row("in files, with embedding and head", human_size(calibration["spilled"]))
    costs.add_section()
    for name, size in plan["memory"].items():
        costs.add_row(f"memory: {name}", human_size(round(size)))
    directions = [directions_table(plan["directions"])] if "directions" in plan else []
    schemes = [scheme_table(plan["schemes"])] if "schemes" in plan else []
    return [facts, rotations, *directions, *schemes, costs, _times(plan["time"], calibration)]


def directions_table(costs: Mapping[str, Any]) -> Table:
    """What `estimate.direction_costs` says of directions of inputs."""
    table = _table("Directions of inputs in 8 bits")
    table.add_row("of each input of q, k, v, O, gate and up", f"{costs['kept']:,}")
    table.add_row("multiplications as the model runs", f"{costs['products']:+.1%}")
    table.add_row("stored", f"{human_size(costs['bytes'])}, {costs['bits_per_weight']:.3f} bits a weight")
    return table


def scheme_table(schemes: Mapping[str, Any]) -> Table:
    """Which layer has which scheme, as of `estimate.schemes`: a row for each scheme, embedding and head."""
    table = Table(title="Schemes of layers", title_justify="left")
    for column in ("scheme", "layers", "which"):
        table.add_column(column, justify="right" if column == "layers" else "left")
    groups = schemes["layers"]
    kinds = list(dict.fromkeys(kind for group in groups for kind in group["blocks"]))
    blocks = sorted({block for group in groups for own in group["blocks"].values() for block in own})
    for number, group in enumerate(groups):
        others = "all" if len(groups) == 1 else "all others"
        table.add_row(
            group["scheme"], f"{group['count']:,}", _which(group["blocks"], kinds, blocks) if number else others
        )
    if "embedding" in schemes:
        tied = schemes["head"] is None
        table.add_row(_of_weights(schemes["embedding"]), "1", "embedding, which is the head" if tied else "embedding")
        if not tied:
            table.add_row(_of_weights(schemes["head"]), "1", "head")
    return table


def _of_weights(named: Mapping[str, Any]) -> str:
    """The name of a scheme of weights alone."""
    return str(named["scheme"]).replace("A16", "")


def _which(own: Mapping[str, Sequence[int]], kinds: Sequence[str], blocks: Sequence[int]) -> str:
    """Layers of one scheme in words: kinds with the same blocks together."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for kind, where in own.items():
        alike.setdefault(tuple(where), []).append(kind)
    parts = []
    for where, names in alike.items():
        place = "" if list(where) == list(blocks) else f"block{'s' if len(where) > 1 else ''} {_ranges(where)}"
        name = "" if names == list(kinds) else ", ".join(names)
        parts.append(" in ".join(filter(None, (name, place))))
    return "; ".join(parts)


def _ranges(numbers: Sequence[int], most: int = 6) -> str:
    """Rising numbers as 0-3, 7: of more than `most` parts the first ones, the last, and how many numbers there are."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    parts = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    if len(parts) <= most:
        return ", ".join(parts)
    return f"{', '.join(parts[: most - 2])} ... {parts[-1]} ({len(numbers)} of them)"


def _times(time: Mapping[str, Any], calibration: Mapping[str, Any]) -> Table:
    """Operations and seconds by stage on this machine."""
    table = Table(title=f"Time, estimated, on {time['device']}", title_justify="left", caption_justify="left")
    for name in ("stage", "operations", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, stage in time["stages"].items():
        table.add_row(name, f"{stage['operations']:.2e}", human_time(stage["seconds"]))
    table.add_section()
    without = "" if calibration["evaluation_windows"] else ", without evaluation"
    table.add_row(f"in all{without}", "", human_time(time["seconds"]))
    rates = ", ".join(f"{rate / 1e9:,.3g} G {kind}" for kind, rate in time["rates"].items())
    doubt = ""
    if time["disturbed"]:
        doubt = (
            f"These times may be too long: something else was at work while {', '.join(time['disturbed'])} were "
            "measured. On a machine that is free they are shorter. "
        )
    table.caption = (
        f"{doubt}Counts over what this machine did in a second ({rates}), times factors from runs of the embedded "
        f"model on a processor: within {time['within']:g} times there, less certain on a GPU. Without reading text, "
        "and without downloads and tasks."
    )
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    return table


def _or(value: int | None, other: str) -> str:
    return other if value is None else f"{value:,}"
