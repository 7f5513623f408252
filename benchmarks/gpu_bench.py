"""What the steps of `gpu.py` share: the device, a shape, random weights and streams, and the figures so far."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_page import BLOCKS, markdown
from torch import Tensor
from transformers import LlamaConfig

from rotoboa.boa.block import solving
from rotoboa.boa.block.block import quantize_block
from rotoboa.boa.block.context import BlockContext, BlockResult, Share, Streams, shared_copy
from rotoboa.boa.online.attention import NAME
from rotoboa.boa.ranks import Ranks
from rotoboa.boa.stopwatch import Stopwatch
from rotoboa.export.packing import pack_block
from rotoboa.models.decoder import Decoder
from rotoboa.pipeline.console.progress import peak_resident
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.settings import rotations_of, settings_of, spec_of
from rotoboa.pipeline.storage.buffers import Buffers

LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_FRAMES = -8  # of a traceback: the innermost ones
_LONGEST = 6000  # characters of it


class Timed:
    """Solves projections, and adds up the seconds of each in `solved`; inside, it is what all steps of a block call."""

    def __init__(self) -> None:
        self.solved: dict[str, float] = {}
        self._solve = solving.solve_together
        self._patch = mock.patch.object(solving, "solve_together", self)

    def __call__(self, context: BlockContext, layers: Sequence[solving.Layers]) -> BlockResult:
        start = now(context.decoder.device)
        found = self._solve(context, layers)
        name = ", ".join(name.rpartition(".")[2] for name in layers[0].names)
        self.solved[name] = self.solved.get(name, 0.0) + now(context.decoder.device) - start
        return found

    def __enter__(self) -> Timed:
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


class Bench:
    """What the steps share.

    Args:
        device: where blocks compute.
        small: a tiny shape, to see that everything works.
        output: the folder of gpu.json and gpu.md.
        limit: seconds after which no further step is begun.
        earlier: the figures of a process that this one goes on from.
    """

    def __init__(
        self, device: torch.device, small: bool, output: Path, limit: float, earlier: dict[str, Any] | None = None
    ) -> None:
        self.device, self.small, self.output, self.limit = device, small, output, limit
        self.samples, self.length, self.batch = (6, 32, 2) if small else (128, 2048, 8)
        config = LlamaConfig(
            **(SMALL if small else LARGE), vocab_size=64, num_hidden_layers=2, max_position_embeddings=self.length
        )
        self.decoder = Decoder(config, attention=NAME, device=device)
        self.figures: dict[str, Any] = earlier or {
            **{"machine": machine(device), "shape": self._sizes(), "elapsed": 0.0},
            **{"tried": [], "skipped": [], "failed": {}, "warnings": []},
        }
        self.started = time.perf_counter() - self.figures["elapsed"]
        logging.getLogger("rotoboa").addHandler(_Warnings(self.figures["warnings"]))

    @property
    def elapsed(self) -> float:
        """Seconds since the first step began."""
        return time.perf_counter() - self.started

    def step(self, name: str, run: Callable[[Bench], Any]) -> bool:
        """Run one step, unless it was tried before or time is up, and write what is known so far.

        A step that fails is told with its traceback, and the others go on, whatever it was.

        Returns:
            Whether the device can still be used: a kernel that reads beyond its tensors spoils it for the process.
        """
        if name in self.figures["tried"]:
            return True
        if self.elapsed > self.limit:
            self.figures["skipped"].append(f"{name}: {self.elapsed:.0f} s had passed")
            self.write()
            return True
        self.figures["tried"].append(name)
        self.write()  # a process that is killed leaves a trace of where it was
        print(f"{self.elapsed:5.0f} s  {name} ...", file=sys.stderr, flush=True)
        try:
            self.keep(name, run(self))
        except Exception as error:
            text = traceback.format_exc(limit=_FRAMES)
            half = _LONGEST // 2
            self.figures["failed"][name] = text if len(text) <= _LONGEST else f"{text[:half]}\n...\n{text[-half:]}"
            print(f"         {type(error).__name__}: {error}"[:500], file=sys.stderr, flush=True)
        usable = self._recover()
        self.write()
        return usable

    def keep(self, name: str, found: Any) -> None:
        """Put away what a step found; `place/name` is one of several in a place."""
        place, _, part = name.partition("/")
        if found is None:
            return
        if part:
            self.figures.setdefault(place, {})[part] = found
        else:
            self.figures[place] = found
        self.write()

    def _recover(self) -> bool:
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except Exception as error:
            print(f"         the device cannot be used any more: {error}"[:500], file=sys.stderr, flush=True)
            return False
        return True

    def write(self) -> None:
        """gpu.json and gpu.md."""
        self.figures["elapsed"] = self.elapsed
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "gpu.json").write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        (self.output / "gpu.md").write_text(markdown(self.figures), encoding="utf-8")

    def _sizes(self) -> dict[str, Any]:
        names = ("hidden", "ffn", "query_heads", "key_heads", "head_dim")
        text = {"samples": self.samples, "length": self.length, "batch": self.batch}
        return {**{name: getattr(self.decoder.shape, name) for name in names}, **text}

    # -- one block ------------------------------------------------------------------------------------------------

    def random(self, *shape: int) -> Tensor:
        """Normally distributed, the same at every call."""
        return torch.randn(*shape, generator=torch.Generator(device=self.device).manual_seed(3), device=self.device)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The weights of a block as a checkpoint has them: random, in bfloat16."""
        generator = torch.Generator(device=self.device).manual_seed(index)

        def tensor(name: str, shape: torch.Size) -> Tensor:
            if "norm" in name:
                return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
            noise = torch.randn(shape, generator=generator, device=self.device)
            return (noise / shape[-1] ** 0.5).bfloat16()

        return {name: tensor(name, t.shape) for name, t in self.decoder.empty_block(index).state_dict().items()}

    def buffers(self) -> Buffers:
        """Where streams lie: on the GPU, as long as they leave half of it."""
        return Buffers(self.output / "buffers", None, self.device)

    def streams(self, buffers: Buffers, samples: int) -> tuple[Tensor, Tensor]:
        """Hidden states with a direction that all tokens share, so that no Hessian is a multiple of I."""
        hidden = self.decoder.shape.hidden
        full, quantized = (buffers.empty(samples, self.length, hidden) for _ in range(2))
        generator = torch.Generator(device=self.device).manual_seed(7)
        common = torch.randn(hidden, generator=generator, device=self.device)
        for part, other in zip(full.split(self.batch), quantized.split(self.batch), strict=True):
            noise = torch.randn(part.shape, generator=generator, device=self.device)
            part.copy_(noise.mul_(torch.linspace(0.5, 2, hidden, device=self.device)).add_(common, alpha=0.5))
            other.copy_(part)
        return full, quantized

    def quantize(self, recipe: Recipe, index: int, samples: int) -> dict[str, Any]:
        """One block: what it took, and its losses."""
        decoder = self.decoder
        start, watch = now(self.device), Stopwatch(self.device)
        rotations = rotations_of(recipe, decoder)
        rotated = rotations.rotate_block(self.tensors(index), decoder.family, index)
        block = decoder.block(index, rotated)
        projections = {f"{name}.weight" for name in decoder.family.projections}
        others = {name: tensor for name, tensor in rotated.items() if name not in projections}
        del rotated
        rotated_after, buffers = now(self.device), self.buffers()
        full, quantized = self.streams(buffers, samples)
        began = now(self.device)
        spec = spec_of(recipe, rotations, decoder)
        transforms = spec.transforms(decoder.shape, decoder.family)
        context = BlockContext(
            decoder, block, shared_copy(block), settings_of(recipe), transforms,
            Share.of(Ranks(), len(full), self.batch), empty=buffers.empty, release=buffers.release,
        )  # fmt: skip
        with watch, Timed() as timed:
            found = quantize_block(context, Streams(full, quantized))
        ended = now(self.device)
        pack_block(found.results, others, spec.schemes(decoder.family, 0), torch.bfloat16)
        return {
            "seconds": ended - began,
            "rotation": rotated_after - start,
            "packing": now(self.device) - ended,
            "stages": watch.seconds(),
            "solver by projection": timed.solved,
            "losses": found.losses,
            "streams on": full.device.type,
        }


class _Warnings(logging.Handler):
    """Keeps what the quantizer warns of, each text once."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.found and len(self.found) < 20:
            self.found.append(text)


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(run: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    if times > 1:
        run()
    found = []
    for _ in range(times):
        start = now(device)
        run()
        found.append(now(device) - start)
    return min(found)


def peak(device: torch.device) -> int:
    """The most bytes held: on the GPU since it was last asked to forget, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident() or 0


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    memory = None
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    return {
        "name": name,
        "memory_bytes": memory,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


__all__ = ["BLOCKS", "Bench", "fastest", "now", "peak"]
