"""All causal model types of transformers, each as a tiny random model: what becomes of it here.

    python benchmarks/sweep.py                    # all of them: some minutes; writes benchmarks/sweep.md
    python benchmarks/sweep.py stablelm gpt2      # some, printed alone

A type is a row (models/families.py), is taken by the fallback (models/generic/), or is refused by name. Of the first
two the logits of a checkpoint that is read and run block by block must be those of transformers' own model. Ends with
1 where a type fails: other logits, another error than a refusal, a sound checkpoint called damaged, or too long.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from common import HERE
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from watched import watched

from rotoboa.boa.online.attention import NAME
from rotoboa.errors import InputError
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.families import FAMILIES, check_type
from rotoboa.models.generic.generic_decoder import decoder_for
from rotoboa.tests.generic_models import generic_config
from rotoboa.tests.small_families import family_config

TABLE = HERE / "sweep.md"
LARGEST = 50_000_000  # weights of a model that is run
NEAR = 1e-4  # of logits, in their standard deviation

# What many configs name alike, beside the common sizes of the tests.
_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8) | {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
}
_COMPRESSED = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
# What one type needs of its own.
_FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_state": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 4},
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
}


class Found(NamedTuple):
    """What became of a type.

    Attributes:
        kind: row, fallback, refused, refused by type, refused unrun (transformers' own model was not run, as no small
            config of it is known), unmade (no model) or failed.
        note: of a refusal or failure its reason; of the others the number of linear layers of a block.
    """

    kind: str
    note: str


def configs(name: str) -> Iterator[Any]:
    """Small configs of a type, the likeliest first."""
    if name in FAMILIES:
        yield family_config(name)
        return
    own = _FIELDS.get(name, {})
    further: list[dict[str, Any]] = [{}, {"head_dim": 8}, {"head_dim": 8, **_EXPERTS}, {**_EXPERTS, **_COMPRESSED}]
    for more in further:
        for pad in (None, 0):
            try:
                yield generic_config(name, **{"pad_token_id": pad, **more, **own})
            except Exception as error:  # each class has its own checks of what it is given
                logging.debug("%s: %s", name, error)
    try:
        yield transformers.AutoConfig.for_model(name)
    except Exception as error:
        logging.debug("%s: %s", name, error)


@torch.no_grad()
def own_model(name: str) -> tuple[Any, Any, torch.Tensor, str]:
    """A config, transformers' own model of it with random weights, or None and why none runs, and tokens (2, 20)."""
    first, why = None, "there is no config without fields of its own"
    tokens = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    for config in configs(name):
        try:
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
            first = config if first is None else first
            if sum(p.numel() for p in made.parameters()) > LARGEST:
                why = "no small config is known"
                continue
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
            for parameter in model.parameters():  # so that no norm is 1 and no bias 0
                parameter.add_(0.05 * torch.randn_like(parameter))
            model(tokens, use_cache=False)
            return config, model, tokens, ""
        except Exception as error:  # transformers cannot, whatever the reason: the next config
            why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return first, None, tokens, why


@torch.no_grad()
def examine(name: str) -> Found:
    """What becomes of one type; what it raises is a failure too."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        check_type(name, "the model")
    except InputError as error:
        return Found("refused by type", reason(error))
    config, model, tokens, why = own_model(name)
    if config is None:
        return Found("unmade", why)
    try:
        decoder_for(copy.deepcopy(config), attention=NAME)
    except InputError as error:
        if name in FAMILIES:
            raise
        return Found("refused" if model is not None else "refused unrun", reason(error))
    if model is None:
        return Found("unmade", why)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checkpoint = Checkpoint(Path(folder))
        decoder, outer = decoder_for(checkpoint.config, attention=NAME), checkpoint.outer_layers()
        checkpoint.check(decoder.shapes)
        hidden = decoder.embed(outer, tokens)
        for index in range(decoder.shape.blocks):
            hidden = decoder.run(decoder.block(index, checkpoint.block(index)), hidden)
        logits, wanted = decoder.logits(outer)(hidden), model(tokens, use_cache=False).logits
    off = float((logits - wanted).abs().max() / wanted.std())
    if not off <= NEAR:
        return Found("failed", f"logits differ by {off:.1e} of their standard deviation")
    return Found("row" if name in FAMILIES else "fallback", f"{len(decoder.family.projections)}")


def reason(error: InputError) -> str:
    """Of the sentence of a refusal what is not the same in all of them."""
    sentence = " ".join(str(error).split()).split("; supported architectures")[0]
    return sentence.split("which has no row of its own, and ")[-1].removesuffix(": choose another model.").rstrip(".")


def page(found: dict[str, Found]) -> str:
    """Markdown: the counts, and a table by type."""
    counts = Counter(one.kind for one in found.values())
    kinds = {
        "row": "with the logits of transformers' own model",
        "fallback": "taken without a row, with the logits of transformers' own model",
        "refused": "by name before any work; transformers' own model runs",
        "refused unrun": "by name before any work; known without data alone, as no small config of it was found",
        "refused by type": "by name before any work: encoders and the like",
        "unmade": "no small config was found by which transformers makes a model",
        "failed": "other logits, another error, or too long",
    }
    lines = [
        f"# The {len(found)} causal model types of transformers",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}; `make sweep` writes this file. Counted "
        "are the types that `AutoModelForCausalLM` knows, each as a tiny random model in float32: transformers saves a "
        "checkpoint, which is read and run here block by block, and its logits of 2 x 20 tokens must be those of its "
        f"own model (to {NEAR:g} of their standard deviation).",
        "",
        "| types | | |",
        "|---:|---|---|",
        *(f"| {counts[kind]} | {kind} | {text} |" for kind, text in kinds.items()),
        "",
        "| `model_type` | | linear layers of a block, or why not |",
        "|---|---|---|",
        *(f"| `{name}` | {one.kind} | {one.note.replace('|', '/')} |" for name, one in found.items()),
    ]
    return "\n".join(lines) + "\n"


def main(
    types: Annotated[list[str] | None, typer.Argument(help="Some types, which are printed alone.")] = None,
    seconds: Annotated[float, typer.Option(help="That one type may take.")] = 90.0,
) -> None:
    """Go over all types, write the page, and end with 1 where one failed."""
    found: dict[str, Found] = {}
    for name, result, lost in watched(examine, types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), seconds):
        found[name] = Found("failed", " ".join(lost.split())[:300]) if lost is not None else result
        print(f"{name}: {found[name].kind} ({found[name].note})", flush=True)
    if not types:
        TABLE.write_text(page(found), encoding="utf-8")
    failed = [name for name, one in found.items() if one.kind == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
