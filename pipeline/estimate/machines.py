"""How fast a machine is, measured in a second or as published, and the seconds that counted work takes on it.

Published figures, dense, without sparsity: NVIDIA's data sheets of A100 (SXM 80 GB), H100 (SXM), H200 (SXM), HGX B200
and L40S. NVLink is quoted for both directions together, and here is what goes one way; L40S has PCIe 4.0 x16. Networks
are of a node: eight NDR InfiniBand ports of 400 Gb/s, as a DGX H100 has them, eight of HDR (200 Gb/s), or one Ethernet
port. What of it a run achieves is `ACHIEVED`, an assumption: no such machine was at hand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from statistics import median

import torch

from ...errors import InputError
from .counting import Work

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """Published peaks: operations a second by format, bytes a second, bytes of memory."""

    title: str
    float32: float
    tf32: float
    float64: float
    bandwidth: float
    memory: float
    link: float


GPUS = {
    "a100": Gpu("A100 80 GB", 19.5 * TERA, 156 * TERA, 19.5 * TERA, 2.039 * TERA, 80 * GIGA, 300 * GIGA),
    "h100": Gpu("H100 80 GB", 67 * TERA, 494.7 * TERA, 67 * TERA, 3.35 * TERA, 80 * GIGA, 450 * GIGA),
    "h200": Gpu("H200 141 GB", 67 * TERA, 494.7 * TERA, 67 * TERA, 4.8 * TERA, 141 * GIGA, 450 * GIGA),
    "b200": Gpu("B200 180 GB", 80 * TERA, 1100 * TERA, 40 * TERA, 8 * TERA, 180 * GIGA, 900 * GIGA),
    "l40s": Gpu("L40S 48 GB", 91.6 * TERA, 183 * TERA, 1.4 * TERA, 0.864 * TERA, 48 * GIGA, 32 * GIGA),
}
NETWORKS = {
    "ndr": 8 * 50 * GIGA,
    "hdr": 8 * 25 * GIGA,
    "ethernet-100": 12.5 * GIGA,
    "ethernet-25": 3.125 * GIGA,
    "ethernet-10": 1.25 * GIGA,
}
ACHIEVED = {"products": 0.6, "wide": 0.3, "elements": 0.1, "bandwidth": 0.8, "link": 0.7}
"""Part of the peak that large products, factorisations, columns one after another, copies and transfers are taken to
reach."""
SLOWEST = {"products": 1e9, "wide": 5e8, "elements": 1e8, "bandwidth": 1e9}
"""Rates that one core of any processor of today reaches: what is measured below them is not of the machine."""
LEAST_RUNS, MOST_RUNS, SPENT = 5, 200, 0.1  # of a measurement: as many runs as there is time for, in seconds
UNEVEN = 3.0  # a median of all runs so many times the best one: something else is at work
IN_THE_WAY = 1.5  # one thread so many times as fast as all of them: they wait for each other


def calibrated() -> dict[str, float]:
    """How many times as long as its counts each stage takes on a processor; "" for stages that were not measured.

    `make limits` writes them to factors.json from what `make speed` measured: medians over its recipes, on the embedded
    model. Its small matrices make calls dear, so stages of few operations (rotation, rows) come out too long elsewhere.
    """
    text = (resources.files("rotoboa.pipeline.estimate") / "factors.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@dataclass(frozen=True)
class Machine:
    """Rates of one device, and of the links between several.

    Attributes:
        products, wide, elements: operations a second, by the kinds of `Work`.
        bandwidth: bytes a second to and from memory.
        memory: bytes of the device; None: those of the host.
        link, network: bytes a second that a device sends to the next of its node, and a node to the next.
        per_node: devices of a node.
        disturbed: the kinds that something else was at work beside while they were measured, as far as it shows.
        factors: by stage, how many times what is counted it takes; of other stages that of "", else 1.
    """

    name: str
    products: float
    wide: float
    elements: float
    bandwidth: float
    memory: float | None = None
    link: float = 0.0
    network: float = 0.0
    per_node: int = 8
    disturbed: tuple[str, ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, work: Work, stage: str = "") -> float:
        """Arithmetic or memory, whichever takes longer, times the stage's factor."""
        computing = work.products / self.products + work.wide / self.wide + work.elements / self.elements
        return max(computing, work.bytes / self.bandwidth) * self.factors.get(stage, self.factors.get("", 1.0))

    def transfer(self, count: float, ranks: int) -> float:
        """Seconds for which each of `ranks` devices sends `count` bytes to the next in a ring."""
        if ranks == 1 or not count:
            return 0.0
        return count / (self.link if ranks <= self.per_node else min(self.link, self.network))


def published(gpu: str, network: str = "ndr", *, tf32: bool = False, per_node: int = 8) -> Machine:
    """A machine of `GPUS` and `NETWORKS`, at what of its peaks is achieved.

    Raises:
        InputError: the table has no such GPU or network.
    """
    for name, known, option in ((gpu, GPUS, "--gpu"), (network, NETWORKS, "--network")):
        if name not in known:
            raise InputError(f"{option} {name} is in no table: give one of {', '.join(known)}.")
    found = GPUS[gpu]
    return Machine(
        found.title,
        products=ACHIEVED["products"] * (found.tf32 if tf32 else found.float32),
        wide=ACHIEVED["wide"] * found.float64,
        elements=ACHIEVED["elements"] * found.float32,
        bandwidth=ACHIEVED["bandwidth"] * found.bandwidth,
        memory=found.memory,
        link=ACHIEVED["link"] * found.link,
        network=ACHIEVED["link"] * NETWORKS[network],
        per_node=per_node,
    )


def measured(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Machine:
    """This machine, by short products, sums in cache and copies, of each the best; a second on a processor.

    What else is at work can only make them slower, so one undisturbed run is enough. On a processor one thread is
    measured too: where others want its cores, several wait for each other in every run. A rate is `SLOWEST` at least.

    Processes that talk through this host's memory (gloo on one machine) are taken to send at a quarter of its copying:
    a transfer is written and read on both sides.
    """
    large, threads = device.type == "cuda", torch.get_num_threads()
    found, disturbed = _rates(device, clock, 8192 if large else 1024)
    if not large and threads > 1:
        torch.set_num_threads(1)
        try:
            alone, uneven = _rates(device, clock, 512)
        finally:
            torch.set_num_threads(threads)
        disturbed |= uneven | {kind for kind in found if alone[kind] > IN_THE_WAY * found[kind]}
        found = {kind: max(rate, alone[kind]) for kind, rate in found.items()}
    disturbed |= {kind for kind, rate in found.items() if rate < SLOWEST[kind]}
    rates = {kind: max(rate, SLOWEST[kind]) for kind, rate in found.items()}
    return Machine(
        str(device),
        products=rates["products"],
        wide=rates["wide"],
        elements=rates["elements"],
        bandwidth=rates["bandwidth"],
        memory=float(torch.cuda.get_device_properties(device).total_memory) if large else None,
        link=rates["bandwidth"] / 4,
        network=rates["bandwidth"] / 4,
        disturbed=tuple(kind for kind in rates if kind in disturbed),
    )


def _rates(device: torch.device, clock: Callable[[], float], size: int) -> tuple[dict[str, float], set[str]]:
    """Operations and bytes a second by kind, of products of `size`, and the kinds whose runs were uneven."""
    large = device.type == "cuda"
    x = torch.randn(2**22 if large else 2**16, device=device)
    out = torch.empty_like(x)
    source = torch.zeros(2**28 if large else 2**24, device=device)
    target = torch.zeros_like(source)

    def sums() -> None:
        for _ in range(16):
            torch.addcmul(x, x, x, out=out)

    def product(n: int, dtype: torch.dtype) -> tuple[float, Callable[[], object]]:
        a = torch.randn(n, n, device=device, dtype=dtype)
        return 2 * n**3, lambda: a @ a

    runs: dict[str, tuple[float, Callable[[], object]]] = {
        "products": product(size, torch.float32),
        "wide": product(size // 2, torch.float64),
        "elements": (16 * 2 * x.numel(), sums),
        "bandwidth": (2 * 4 * source.numel(), lambda: target.copy_(source)),
    }
    rates, uneven = {}, set()
    for kind, (work, run) in runs.items():
        times = _times(run, device, clock)
        rates[kind] = work / max(min(times), 1e-9)
        if median(times) > UNEVEN * min(times):
            uneven.add(kind)
    return rates, uneven


def _times(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of several runs."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    times: list[float] = []
    while len(times) < LEAST_RUNS or (sum(times) < SPENT and len(times) < MOST_RUNS):
        start = now()
        run()
        times.append(now() - start)
    return times
