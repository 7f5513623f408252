"""Runs a folder in llama.cpp: `python in_llama_cpp.py FOLDER REQUEST ANSWER`. Knows nothing of rotoboa; see `ask`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompt's tokens, the most likely ones, and those that follow it greedily."""
    import llama_cpp
    import numpy

    (file,) = Path(folder).glob("*.gguf")
    ids, new = request["ids"], request["new_tokens"]
    options: dict[str, Any] = {"n_ctx": len(ids) + new, "logits_all": True, "verbose": False, "n_threads": 1}
    if request["cache"]:
        types = {4: llama_cpp.GGML_TYPE_Q4_0, 5: llama_cpp.GGML_TYPE_Q5_0, 8: llama_cpp.GGML_TYPE_Q8_0}
        keys, values = (types.get(bits, llama_cpp.GGML_TYPE_F16) for bits in request["cache"])
        options |= {"type_k": keys, "type_v": values, "flash_attn": True}
    model = llama_cpp.Llama(str(file), **options)
    model.eval(ids)
    logits = numpy.array(model.scores[: len(ids)], dtype=numpy.float64)
    peak = logits.max(-1, keepdims=True)
    found = logits - peak - numpy.log(numpy.exp(logits - peak).sum(-1, keepdims=True))
    greedy: list[int] = []
    for _ in range(new):
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(greedy[-1:])
    if request["logits"]:
        from safetensors.numpy import save_file

        save_file({"logits": logits[None].astype(numpy.float32)}, request["logits"])
    return {
        "versions": {"llama-cpp-python": version("llama-cpp-python")},
        "kernels": [kind if (kind := file.stem.rpartition("-")[2]) == "F32" else f"{kind}, inputs rounded to 8 bits"],
        "log_probabilities": [float(found[i, token]) for i, token in enumerate(ids[1:])],
        "top": logits.argmax(-1).tolist(),
        "greedy": greedy,
    }


if __name__ == "__main__":
    answer = main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")
