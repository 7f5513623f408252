"""Where the loss comes from, in words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..results import Sources

LABELS = {
    "weights": "weights",
    "qkv": "inputs of Q, K, V",
    "output": "inputs of O",
    "gate_up": "inputs of gate, up",
    "down": "inputs of down",
    "latent": "inputs of what reads latents",
    "keys": "keys",
    "values": "values",
    "all": "all together",
}
COLUMNS = ("alone", "KL (nats)", "added by a block, mean", "most", "in block")
BY_BLOCK = (
    "What a block adds is |h' - h|^2 / |h|^2 of the residual stream h at its output, the mean over tokens: that "
    "quantizer in that block alone, on what full precision brings in."
)


def known(entries: Iterable[Sources]) -> list[str]:
    """The sources that any of the entries has, in the order of `LABELS`."""
    entries = list(entries)
    return [name for name in LABELS if any(name in entry.kl for entry in entries)]


def rows(sources: Sources) -> list[list[str]]:
    """A row of `COLUMNS` for each source."""
    found = []
    for name in known([sources]):
        errors = sources.blocks[name]
        most = max(range(len(errors)), key=errors.__getitem__)
        mean = sum(errors) / len(errors)
        found.append([LABELS[name], f"{sources.kl[name]:.4f}", f"{mean:.2e}", f"{errors[most]:.2e}", str(most)])
    return found


def measured_on(sources: Sources) -> str:
    """A sentence: which text, and what the measure itself is off by."""
    windows, length = sources.tokens
    return (
        f"On {windows} windows of {length:,} tokens; rotated, with no quantizer on, the model has a KL of "
        f"{sources.exact:.1e}."
    )


def markdown(entries: Mapping[str, Sources], title: str = "run") -> list[str]:
    """Lines of a Markdown table: KL by source, a row for each entry by its label, which `title` is the head of."""
    names = known(entries.values())
    lines = [
        f"| {' | '.join([title, *(LABELS[name] for name in names)])} |",
        f"|---|{'---|' * len(names)}",
    ]
    for label, entry in entries.items():
        cells = [f"{entry.kl[name]:.4f}" if name in entry.kl else "" for name in names]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def markdown_by_block(sources: Sources) -> list[str]:
    """Lines of a Markdown table: what each block adds to the residual stream, by source."""
    names = known([sources])
    lines = [f"| {' | '.join(['block', *(LABELS[name] for name in names)])} |", f"|---|{'---|' * len(names)}"]
    for index in range(len(sources.blocks[names[0]])):
        errors = [f"{sources.blocks[name][index]:.2e}" for name in names]
        lines.append(f"| {' | '.join([str(index), *errors])} |")
    return lines
