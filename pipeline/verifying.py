"""Loads an export as its users will, and compares its logits with the run's."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..boa.online.attention import NAME
from ..errors import InputError, RunError
from ..export.finished import Finished
from ..export.formats import compressed_tensors, compressed_tensors_reader, gguf_reader, gptq, mlx
from ..export.formats.native import load_native
from ..export.record import Record, check_files, read_record
from ..export.runtime.linear import QuantizedLinear
from ..export.runtime.prepared import packed_block
from ..export.runtimes.ask import ask
from ..models.generic.generic_decoder import decoder_for
from ..models.tokenizer import read_tokenizer
from .exporting import blocks_digest, open_finished
from .storage.files import MANIFEST
from .storage.run_folder import RunFolder

# Half prose, half code; long enough that every position is not the first.
_TEXT = '''"""Count the words of a file, and print the most frequent ones.

The words are compared in lower case. A word is a run of letters; digits and signs divide words.
"""
import sys
from collections import Counter


def main(path: str, most: int = 10) -> None:
    with open(path, encoding="utf-8") as file:
        words = Counter(word.lower() for line in file for word in line.split() if word.isalpha())
    for word, count in words.most_common(most):
        print(f"{count:8} {word}")


if __name__ == "__main__":
    main(*sys.argv[1:])
'''
_TOKENS = 128


@dataclass(frozen=True)
class Verified:
    """What was compared.

    Attributes:
        format, reader: of the export, and what loaded it.
        difference: the largest difference of a logit.
        deviation: standard deviation of the run's logits.
        agreement: share of positions with the same most likely token.
        tolerance: the difference that is allowed; None where the reader computes otherwise by design.
    """

    format: str
    reader: str
    difference: float
    deviation: float
    agreement: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (NaN is not)."""
        return self.tolerance is None or self.difference <= self.tolerance


def verify(export: Path, *, run: Path | None = None, tolerance: float | None = None) -> list[Verified]:
    """Compare the logits of an export, as its stock reader computes them in float32, with those of its run.

    Args:
        export: folder of an export, or a run, whose `model` folder it then is.
        run: folder of the run; None is where the export says it was.
        tolerance: the largest difference allowed; None is 1 % of the standard deviation of the run's logits, and 20 %
            where activations or cache are quantized: there a rounding that falls the other way is a whole level. 3 %
            of GGUF with asymmetric weights, whose offsets it rounds.

    Raises:
        InputError: the export is damaged, or its run is not found or another one.
        RunError: its reader failed.
    """
    if (export / MANIFEST).is_file():
        export = export / "model"
    record = read_record(export)
    check_files(export, record)
    finished = run_of(export, record, run)
    if record.format not in READERS:
        raise InputError(f"{export} is in the format {record.format}, which this release of rotoboa does not read.")
    if record.format != "native":  # the cache is the server's, and these readers keep another
        finished = replace(finished, spec=finished.spec.without_cache)
    ids, spec = sample(finished), finished.spec
    expected = run_logits(finished, ids, plain=record.format != "native")
    deviation = float(expected.std())
    online = spec.quantizes_inputs or spec.quantizes_cache
    rounded = record.format == "gguf" and spec.has_zero_points  # offsets, by up to 1.5 % of a step
    limit = tolerance if tolerance is not None else deviation * (0.2 if online else 0.03 if rounded else 0.01)
    results = []
    for reader, (judged, compute) in READERS[record.format].items():
        if reader == "llama.cpp" and find_spec("llama_cpp") is None:
            continue
        if record.format == "gguf" and not gguf_reader.is_stock(export) and reader == "transformers":
            reader, compute = "rotoboa's reader", _gguf_by_us
        found = compute(export, ids)
        if found.shape != expected.shape:
            shapes = f"{tuple(found.shape)}, and the run {tuple(expected.shape)}"
            raise RunError(f"{export}: {reader} gives logits of shape {shapes}: export it again.")
        if record.format == compressed_tensors.NAME and (finished.spec.r4 or finished.spec.online_r1):
            reader += ", rotations by compressed-tensors"
        difference = float((found - expected).abs().max())
        agreement = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
        results.append(Verified(record.format, reader, difference, deviation, agreement, limit if judged else None))
    return results


def run_of(export: Path, record: Record, run: Path | None) -> Finished:
    """The run that an export was made from: in `run`, or where the export says.

    Raises:
        InputError: it is not there, or another one is.
    """
    where = run or Path(os.path.normpath(export.resolve() / record.run))
    if not (where / MANIFEST).is_file():
        raise InputError(f"the run of {export} is not in {where}: give it with --run.")
    folder = RunFolder.open(where)
    if blocks_digest(folder) != record.blocks:
        raise InputError(f"{export} was made from another run than {where}: give the right one with --run.")
    return open_finished(folder)


def sample(run: Finished) -> Tensor:
    """(1, n) tokens of a text, at most 128 and no more than the model has positions."""
    tokenizer = read_tokenizer(run.folder)
    config = run.family.text(run.transformers_config())
    length = min(_TOKENS, int(getattr(config, "max_position_embeddings", _TOKENS)))
    ids = torch.tensor(tokenizer(_TEXT)["input_ids"][:length])
    return ids[ids < run.shape.vocabulary][None]


@torch.no_grad()
def run_logits(run: Finished, ids: Tensor, *, plain: bool = False) -> Tensor:
    """(1, n, vocabulary): as the run was measured, block by block in float32.

    `plain` multiplies by unpacked weights, as other readers do: products of integers differ from these in the last bit,
    which now and then turns a tie in the rounding of the next activation into a whole level.
    """
    decoder = decoder_for(run.transformers_config(), attention=NAME)
    outer = run.outer_layers()
    hidden = decoder.embed(outer, ids)
    for index in range(run.shape.blocks):
        block = packed_block(decoder, index, run.block(index), run.spec)
        for name in run.family.at(index).projections if plain else ():
            packed = block.get_submodule(name)
            if isinstance(packed, QuantizedLinear):  # a weight in 16 bits is not packed
                block.set_submodule(name, _Plain(packed))
        hidden = decoder.run(block, hidden)
    return decoder.logits(outer)(hidden)


class _Plain(nn.Module):
    """A packed layer computed by its definition."""

    def __init__(self, packed: QuantizedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        layer = self.packed
        return nn.functional.linear(layer.transform.of(layer)(x), layer.dequantize(x.dtype), layer.bias)


def _native(export: Path, ids: Tensor) -> Tensor:
    model, _ = load_native(export, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def _gptq(export: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = gptq.read(export)(ids).logits
    return logits


def _mlx(export: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = mlx.read(export)(ids).logits
    return logits


def _compressed_tensors(export: Path, ids: Tensor) -> Tensor:
    compressed_tensors_reader.inspect(export)
    return _fresh("transformers", export, ids)


def _gguf(export: Path, ids: Tensor) -> Tensor:
    gguf_reader.inspect(export)
    return _fresh("transformers", export, ids)


def _gguf_by_us(export: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = gguf_reader.read(export)(ids).logits
    return logits


def _llama(export: Path, ids: Tensor) -> Tensor:
    gguf_reader.inspect(export)
    return _fresh("llama.cpp", export, ids)


def _fresh(runtime: str, export: Path, ids: Tensor) -> Tensor:
    """Logits that a runtime computes in float32, in a process of its own which knows nothing of rotoboa.

    Raises:
        RunError: it failed.
    """
    with tempfile.TemporaryDirectory() as name:
        logits, python = Path(name) / "logits", Path(sys.executable)
        ask(runtime, export, ids[0].tolist(), python=python, dtype="float32", new_tokens=0, logits=logits)
        return load_file(logits)["logits"]


# Format -> reader -> whether its logits must be those of the run, and how they are computed.
READERS: Mapping[str, Mapping[str, tuple[bool, Callable[[Path, Tensor], Tensor]]]] = {
    "native": {"rotoboa.load": (True, _native)},
    "compressed-tensors": {"transformers": (True, _compressed_tensors)},
    "gptq": {"rotoboa's reader": (True, _gptq)},
    "gptq-v1": {"rotoboa's reader": (True, _gptq)},
    "mlx": {"rotoboa's reader": (True, _mlx)},
    # llama.cpp rounds activations to 8 bits, whatever the file says: it is shown, and not judged.
    "gguf": {"transformers": (True, _gguf), "llama.cpp": (False, _llama)},
}
