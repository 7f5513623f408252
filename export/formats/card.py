"""The model card, README.md of a hub repository, and the licence of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.config import CompressionFormat
from jinja2 import Environment, StrictUndefined

from ...boa.online.activations import OWN, stock_clip
from ...boa.scheme import FULL, QuantizationArgs, QuantizationScheme
from ..compressed_inputs import NAME
from ..scheme_layers import SchemeLayers
from ..spec import Spec
from ..vllm_inputs import BACKEND, served_inputs
from .card_facts import Base, Figures
from .gptq import refused_by_vllm
from .int_quantized import stored_as

FORMATS = {
    "native": "rotoboa",
    NAME: NAME,
    "gptq": "GPTQ, `gptq_v2`",
    "gptq-v1": "GPTQ, version 1",
    "gguf": "GGUF",
    "mlx": "MLX, affine",
}


@cache
def _template() -> Any:
    # A card is Markdown, which HTML escapes would spoil; what goes in is the user's own recipe and report.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    text = (resources.files("rotoboa.export.formats") / "card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def licence_of(folder: Path) -> str | None:
    """The licence of a checkpoint: `license` of its card's front matter, else the first line of its LICENSE file."""
    try:
        _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
        data = yaml.safe_load(front)
        name = data.get("license_name") or data.get("license")
        if isinstance(name, str):
            return name
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        pass
    for file in sorted(folder.glob("LICENSE*")):
        lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
        if named := next((line for line in lines if line), None):
            return named
    return None


def write_card(
    folder: Path,
    format_name: str,
    spec: Spec,
    figures: Figures,
    recipe: str,
    *,
    base: Base,
    files: Mapping[str, int],
    layers: Sequence[SchemeLayers] = (),
    divided: str = "",
    loader: str = "AutoModelForCausalLM",
) -> None:
    """Write README.md.

    Args:
        folder: of the export.
        format_name: a key of `FORMATS`.
        spec: what the run is.
        figures: what was measured of it.
        recipe: recipe.yaml of the run.
        base: the model that was quantized.
        files: bytes of each file with weights.
        layers: which layers have which scheme; none is all that of `spec`.
        divided: layers of several schemes which vLLM computes as one.
        loader: class of transformers that loads it.
    """
    schemes = [row.scheme for row in layers] or [spec.scheme]
    quantized = [scheme.weights for scheme in schemes if scheme.weights.quantizes]
    text = _template().render(
        format=format_name,
        format_name=FORMATS[format_name] + (f", `{stored_as(schemes).value}`" if format_name == NAME else ""),
        floats=sorted({args.format.upper() for args in quantized if args.format != "int"}),
        in_bytes=stored_as(schemes) == CompressionFormat.int_quantized,
        served=served_inputs(schemes),
        backend=BACKEND,
        cache=served_cache(spec),
        refused=refused_by_vllm(quantized),
        spec=spec,
        base=base,
        kind=_kind(spec) + (", some layers otherwise" if len(layers) > 1 else ""),
        tag=_kind(spec).lower(),
        layers=layers if len(layers) > 1 else (),
        divided=divided,
        loader=loader,
        bits=sorted({args.num_bits for args in quantized}),
        symmetric=all(args.symmetric for args in quantized),
        inputs=_inputs(schemes),
        perplexity=figures.perplexity,
        tokens=figures.tokens,
        bos=figures.bos,
        original=figures.original,
        size=sum(files.values()),
        files=files,
        recipe=recipe.strip(),
        transformers=version("transformers"),
        stock_clip=stock_clip,
        own=OWN,
        rotoboa=version("rotoboa"),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def served_cache(spec: Spec) -> str:
    """The options that keep the cache of a served model as the run followed it, in words; empty where it is ours."""
    if spec.cache_served_by == OWN or not spec.quantizes_cache:
        return ""
    if spec.cache_format == "fp8":
        return (
            "The run was calibrated and measured with keys and values in FP8 (E4M3), on scales that this checkpoint "
            "holds. vLLM reads them and keeps its cache so, without an option. transformers (5.24.0, with "
            "compressed-tensors 0.20.1) leaves them out, and keys and values in 16 bits."
        )
    if spec.cache_served_by == "vllm":
        flags, where = f"--kv-cache-dtype int{spec.key_bits}_per_token_head", "vLLM"
        more = "Its kernels for it run on GPUs, where they were not seen; on processors vLLM 0.32.0 computes nonsense."
    else:
        types = {4: "q4_0", 5: "q5_0", 8: "q8_0", FULL: "f16"}
        flags = f"--flash-attn on --cache-type-k {types[spec.key_bits]} --cache-type-v {types[spec.value_bits]}"
        where, more = "llama.cpp", "`rotoboa verify --runtime llama.cpp` compares it with the run."
    return (
        f"The run was calibrated and measured with the cache of {where}, which turns and rounds keys and values by "
        f"itself: serve it with `{flags}`. {more} Without these options, and in transformers, keys and values stay in "
        "16 bits."
    )


def _kind(spec: Spec) -> str:
    """Such as W4A16, or W4A4KV4."""
    cache_bits = {spec.key_bits, spec.value_bits}
    cached = "" if cache_bits == {16} else "KV" + "/".join(str(bits) for bits in sorted(cache_bits))
    return f"W{spec.bits}A{spec.activation_bits}{cached}"


def _inputs(schemes: Sequence[QuantizationScheme]) -> QuantizationArgs | None:
    """What the first scheme with quantized inputs has for them; None where there is none."""
    found = (scheme.input_activations for scheme in schemes if scheme.input_activations.quantizes)
    return next(found, None)
