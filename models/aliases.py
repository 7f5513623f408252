"""Short names of models, and how any name a user gives becomes a local folder or a Hugging Face hub id.

The table holds models whose architecture has a row in `families`.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

TINY_FOLDER = Path(__file__).resolve().parent / "tiny"
HUB_ID = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Alias:
    """One row of the table.

    Attributes:
        name: what the user types.
        source: hub id, or for the embedded model the folder it lies in.
        dataset: what it is calibrated and evaluated on unless the recipe says otherwise.
        sequence_length: tokens per sequence, likewise.
        windows: how many windows of the evaluation text are measured, likewise; None is all.
    """

    name: str
    source: str
    dataset: str = "wikitext2"
    sequence_length: int = 2048
    windows: int | None = None


ALIASES = (
    Alias("tiny", str(TINY_FOLDER), dataset="stdlib", sequence_length=512, windows=200),
    Alias("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
    Alias("smollm2-360m", "HuggingFaceTB/SmolLM2-360M"),
    Alias("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B"),
    Alias("tinyllama-1.1b", "TinyLlama/TinyLlama_v1.1"),
    Alias("llama-7b", "huggyllama/llama-7b"),
    Alias("llama2-7b", "meta-llama/Llama-2-7b-hf"),
    Alias("llama2-13b", "meta-llama/Llama-2-13b-hf"),
    Alias("llama2-70b", "meta-llama/Llama-2-70b-hf"),
    Alias("llama3-8b", "meta-llama/Meta-Llama-3-8B"),
    Alias("llama3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
    Alias("llama3-70b", "meta-llama/Meta-Llama-3-70B"),
    Alias("llama3-70b-instruct", "meta-llama/Meta-Llama-3-70B-Instruct"),
    Alias("llama3.1-8b", "meta-llama/Llama-3.1-8B"),
    Alias("llama3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    Alias("llama3.1-70b", "meta-llama/Llama-3.1-70B"),
    Alias("llama3.1-70b-instruct", "meta-llama/Llama-3.1-70B-Instruct"),
    Alias("llama3.1-405b", "meta-llama/Llama-3.1-405B"),
    Alias("llama3.1-405b-instruct", "meta-llama/Llama-3.1-405B-Instruct"),
    Alias("llama3.2-1b", "meta-llama/Llama-3.2-1B"),
    Alias("llama3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    Alias("llama3.2-3b", "meta-llama/Llama-3.2-3B"),
    Alias("llama3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct"),
    Alias("llama3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct"),
    Alias("llama4-scout", "meta-llama/Llama-4-Scout-17B-16E"),
    Alias("llama4-scout-instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    Alias("llama4-maverick-instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
    Alias("mistral-7b", "mistralai/Mistral-7B-v0.1"),
    Alias("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3"),
    Alias("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3"),
    Alias("mistral-nemo-12b", "mistralai/Mistral-Nemo-Base-2407"),
    Alias("qwen2-7b", "Qwen/Qwen2-7B"),
    Alias("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
    Alias("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B"),
    Alias("qwen2.5-3b", "Qwen/Qwen2.5-3B"),
    Alias("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
    Alias("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
    Alias("qwen2.5-14b", "Qwen/Qwen2.5-14B"),
    Alias("qwen2.5-32b", "Qwen/Qwen2.5-32B"),
    Alias("qwen2.5-72b", "Qwen/Qwen2.5-72B"),
    Alias("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
    Alias("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
    Alias("qwen3-4b", "Qwen/Qwen3-4B"),
    Alias("qwen3-8b", "Qwen/Qwen3-8B"),
    Alias("qwen3-14b", "Qwen/Qwen3-14B"),
    Alias("qwen3-32b", "Qwen/Qwen3-32B"),
    Alias("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B"),
    Alias("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B"),
    Alias("phi3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"),
    Alias("phi3-mini-128k-instruct", "microsoft/Phi-3-mini-128k-instruct"),
    Alias("phi3-medium-4k-instruct", "microsoft/Phi-3-medium-4k-instruct"),
    Alias("phi3.5-mini-instruct", "microsoft/Phi-3.5-mini-instruct"),
    Alias("phi4", "microsoft/phi-4"),
    Alias("phi4-mini-instruct", "microsoft/Phi-4-mini-instruct"),
    Alias("opt-125m", "facebook/opt-125m"),
    Alias("opt-1.3b", "facebook/opt-1.3b"),
    Alias("opt-2.7b", "facebook/opt-2.7b"),
    Alias("opt-6.7b", "facebook/opt-6.7b"),
    Alias("opt-13b", "facebook/opt-13b"),
    Alias("opt-30b", "facebook/opt-30b"),
    Alias("bloom-560m", "bigscience/bloom-560m"),
    Alias("bloom-1b7", "bigscience/bloom-1b7"),
    Alias("bloom-3b", "bigscience/bloom-3b"),
    Alias("bloom-7b1", "bigscience/bloom-7b1"),
    Alias("pythia-160m", "EleutherAI/pythia-160m"),
    Alias("pythia-1.4b", "EleutherAI/pythia-1.4b"),
    Alias("pythia-6.9b", "EleutherAI/pythia-6.9b"),
    Alias("phi-1.5", "microsoft/phi-1_5"),
    Alias("phi-2", "microsoft/phi-2"),
    Alias("falcon-7b", "tiiuae/falcon-7b"),
    Alias("falcon-11b", "tiiuae/falcon-11B"),
    Alias("falcon-40b", "tiiuae/falcon-40b"),
    Alias("stablelm-3b", "stabilityai/stablelm-3b-4e1t"),
    Alias("stablelm2-1.6b", "stabilityai/stablelm-2-1_6b"),
    Alias("command-r7b", "CohereLabs/c4ai-command-r7b-12-2024"),
    Alias("gemma2-2b", "google/gemma-2-2b"),
    Alias("gemma2-9b", "google/gemma-2-9b"),
    Alias("gemma2-27b", "google/gemma-2-27b"),
    Alias("gemma3-270m", "google/gemma-3-270m"),
    Alias("gemma3-1b", "google/gemma-3-1b-pt"),
    Alias("gemma3-1b-instruct", "google/gemma-3-1b-it"),
    Alias("gemma3-4b", "google/gemma-3-4b-pt"),
    Alias("gemma3-4b-instruct", "google/gemma-3-4b-it"),
    Alias("gemma3-12b", "google/gemma-3-12b-pt"),
    Alias("gemma3-12b-instruct", "google/gemma-3-12b-it"),
    Alias("gemma3-27b", "google/gemma-3-27b-pt"),
    Alias("gemma3-27b-instruct", "google/gemma-3-27b-it"),
    Alias("gemma-2b", "google/gemma-2b"),
    Alias("gemma-7b", "google/gemma-7b"),
    Alias("smollm3-3b", "HuggingFaceTB/SmolLM3-3B"),
    Alias("granite3.3-2b-instruct", "ibm-granite/granite-3.3-2b-instruct"),
    Alias("granite3.3-8b-instruct", "ibm-granite/granite-3.3-8b-instruct"),
    Alias("granite4-h-tiny-instruct", "ibm-granite/granite-4.0-h-tiny"),
    Alias("granite4-h-small-instruct", "ibm-granite/granite-4.0-h-small"),
    Alias("seed-oss-36b", "ByteDance-Seed/Seed-OSS-36B-Base"),
    Alias("starcoder2-3b", "bigcode/starcoder2-3b"),
    Alias("starcoder2-7b", "bigcode/starcoder2-7b"),
    Alias("starcoder2-15b", "bigcode/starcoder2-15b"),
    Alias("olmo2-1b", "allenai/OLMo-2-0425-1B"),
    Alias("olmo2-7b", "allenai/OLMo-2-1124-7B"),
    Alias("olmo2-13b", "allenai/OLMo-2-1124-13B"),
    Alias("olmoe-1b-7b", "allenai/OLMoE-1B-7B-0924"),
    Alias("qwen1.5-moe-a2.7b", "Qwen/Qwen1.5-MoE-A2.7B"),
    Alias("gpt-oss-20b", "openai/gpt-oss-20b"),
    Alias("gpt-oss-120b", "openai/gpt-oss-120b"),
    Alias("olmo3-7b", "allenai/Olmo-3-1025-7B"),
    Alias("exaone4-1.2b", "LGAI-EXAONE/EXAONE-4.0-1.2B"),
    Alias("exaone4-32b", "LGAI-EXAONE/EXAONE-4.0-32B"),
    Alias("ernie4.5-0.3b", "baidu/ERNIE-4.5-0.3B-PT"),
    Alias("ernie4.5-21b-a3b", "baidu/ERNIE-4.5-21B-A3B-PT"),
    Alias("hunyuan-7b-instruct", "tencent/Hunyuan-7B-Instruct"),
    Alias("glm4-9b", "zai-org/GLM-4-9B-0414"),
    Alias("glm4.5-air", "zai-org/GLM-4.5-Air-Base"),
    Alias("glm4.5-air-instruct", "zai-org/GLM-4.5-Air"),
    Alias("dots1", "rednote-hilab/dots.llm1.base"),
    Alias("dots1-instruct", "rednote-hilab/dots.llm1.inst"),
    Alias("mistral-small3.1-24b", "mistralai/Mistral-Small-3.1-24B-Base-2503"),
    Alias("mistral-small3.1-24b-instruct", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    Alias("qwen2-vl-2b-instruct", "Qwen/Qwen2-VL-2B-Instruct"),
    Alias("qwen2-vl-7b-instruct", "Qwen/Qwen2-VL-7B-Instruct"),
    Alias("qwen2.5-vl-3b-instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    Alias("qwen2.5-vl-7b-instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
    Alias("qwen3-vl-2b-instruct", "Qwen/Qwen3-VL-2B-Instruct"),
    Alias("qwen3-vl-4b-instruct", "Qwen/Qwen3-VL-4B-Instruct"),
    Alias("qwen3-vl-8b-instruct", "Qwen/Qwen3-VL-8B-Instruct"),
    Alias("qwen3-vl-30b-a3b-instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct"),
    Alias("minimax-m2", "MiniMaxAI/MiniMax-M2"),
    Alias("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
    Alias("mixtral-8x7b-instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    Alias("mixtral-8x22b", "mistralai/Mixtral-8x22B-v0.1"),
)
BY_NAME = {alias.name: alias for alias in ALIASES}


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is, and what it is calibrated and evaluated on by default.

    Attributes:
        name: the name the user gave.
        source: an existing local folder, or a hub id ``owner/name``.
        is_local: whether `source` is a folder, so that nothing needs the network.
        dataset: default dataset, a name that `pipeline.calibration.load_texts` knows; None where there is none.
        sequence_length: default tokens per sequence. Not checked against the model's positions here.
        windows: default number of evaluation windows; None is all.
    """

    name: str
    source: str
    is_local: bool
    dataset: str | None
    sequence_length: int
    windows: int | None = None


def resolve_model(name: str) -> ResolvedModel:
    """Resolve a model's name: an alias, else an existing local folder, else a hub id ``owner/name``.

    A folder that is called like an alias is reached as ``./alias``. A hub id defaults to the dataset
    'wikitext2'; a local folder has no default, so that nothing is downloaded that was not named.

    Raises:
        InputError: `name` is a path to no folder, or none of the three.
    """
    if alias := BY_NAME.get(name):
        return ResolvedModel(
            name, alias.source, Path(alias.source).is_dir(), alias.dataset, alias.sequence_length, alias.windows
        )
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if name and path.is_dir():
        if path.resolve() == TINY_FOLDER:
            tiny = BY_NAME["tiny"]
            return ResolvedModel(name, tiny.source, True, tiny.dataset, tiny.sequence_length, tiny.windows)
        return ResolvedModel(name, str(path), True, None, 2048)
    if path.is_file():
        raise InputError(f"Model '{name}' is a file; give the folder that holds config.json and the weights.")
    if name.startswith((os.sep, ".", "~")):
        raise InputError(f"Model folder '{name}' does not exist; check the path.")
    if HUB_ID.fullmatch(name):
        return ResolvedModel(name, name, False, "wikitext2", 2048)
    raise InputError(_unknown(name))


def resolves_to_folder(name: str) -> bool:
    """Whether `resolve_model` gives a local folder for this name, from the current directory."""
    return name in BY_NAME or Path(name).expanduser().is_dir()


def _unknown(name: str) -> str:
    matches = difflib.get_close_matches(name.lower(), list(BY_NAME), n=3)
    close = f"use {' or '.join(matches)}, " if matches else "use "
    return (
        f"Model '{name}' is no known name, no local folder and no hub id of the form owner/name; {close}a folder or a "
        "hub id, or a name listed by `rotoboa models`."
    )
