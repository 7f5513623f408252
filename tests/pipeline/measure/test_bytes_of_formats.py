"""What plan and report say of a run's size adds up to the bytes on disk: floats, K types, packed ends, scales."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rotoboa.export.packing import ALL_PARTS, PARTS
from rotoboa.export.stored_sizes import projection_bytes, stored_bytes
from rotoboa.pipeline.console.sizes import exported_sizes
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.settings import stays_tied
from rotoboa.pipeline.storage.files import read_report
from rotoboa.pipeline.storage.run_folder import recipe_of

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nvfp4, fp8 and integers, ends packed": (
        "nvfp4",
        {"overrides": "*.down_proj: weights.format=fp8; *.o_proj: weights.format=int weights.bits=3",
         "embedding.bits": 8, "embedding.group_size": 16, "head.bits": 6},
        {},
    ),
    "mxfp4, some in 16 bits, tied": (
        "mxfp4a16",
        {"overrides": "*.o_proj: weights.bits=16; blocks 1: weights.format=nvfp4", "embedding.bits": 4,
         "rotation.r1": "merged"},
        {"tie_word_embeddings": True},
    ),
    "fp8, its scales and those of its cache": (
        "fp8",
        {"activations.dynamic": False, "cache.key_bits": 8, "cache.value_bits": 8, "cache.format": "fp8"},
        {},
    ),
    "K types beside integers": (
        "w4a16",
        {"weights.format": "q4_k", "overrides": "*.down_proj: weights.format=q6_k; *.q_proj: weights.format=q3_k; "
         "*.o_proj: weights.format=int weights.bits=5 weights.group_size=32", "embedding.format": "q2_k",
         "head.format": "q6_k"},
        WIDE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bits_of_layers_add_up_to_the_file(cheap_run: Callable[..., Path], case: str) -> None:
    run = cheap_run(*CASES[case])
    recipe, report = recipe_of(run), read_report(run).to_json()
    job, planned = prepare(recipe), plan(recipe)
    stored, itemsize = exported_sizes(run / "model"), job.checkpoint.dtype.itemsize
    by_layer = projection_bytes(job.decoder, job.spec, itemsize)
    for name, size in by_layer.items():
        assert sum(stored.get(f"{name}.{part}", 0) for part in (*ALL_PARTS, "weight")) == size, name
    weights = planned["model"]["quantized_parameters"]
    assert 8 * sum(by_layer.values()) / weights == report["bits_per_weight"] == planned["sizes"]["bits_per_weight"]
    assert len({size / weights for size in by_layer.values()}) > 2
    tied = stays_tied(recipe, job.rotations, job.decoder)
    foretold = stored_bytes(job.decoder, job.spec, itemsize, tied=tied)
    parts = tuple(f".{part}" for part in ALL_PARTS)
    merged = dict[str, int]()
    for name, size in stored.items():
        whole = f"{name.rpartition('.')[0]}.weight" if name.endswith(parts) else name
        merged[whole] = merged.get(whole, 0) + size
    assert merged == foretold
    sizes = report["sizes"]
    assert {part: sizes[part] for part in ("embedding", "head", "blocks")} == {
        part: planned["sizes"][part] for part in ("embedding", "head", "blocks")
    }
    assert sizes["embedding"] + sizes["head"] + sizes["blocks"] == sum(stored.values())
    packed = job.spec.outer(job.decoder.family.head).quantizes
    assert packed == any(f"{job.decoder.family.head}.{part}" in stored for part in PARTS)
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in (run / "model").glob("*.safetensors"))
    assert sizes["quantized"] == sum(stored.values()) + headers, "every byte of the file"
