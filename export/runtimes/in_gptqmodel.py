"""Runs a folder in GPTQModel: `python in_gptqmodel.py FOLDER REQUEST ANSWER`. Knows nothing of rotoboa; see `ask`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompt's tokens, the most likely ones, and those that follow it greedily."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    given = json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("quantization_config")
    dtype = getattr(torch, request["dtype"])
    if given is None:  # a dense control
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=dtype).model
    ids, greedy = torch.tensor([request["ids"]]), list[int]()
    with torch.no_grad():
        logits = model(ids).logits[0].float()
        for _ in range(request["new_tokens"]):
            sequence = torch.cat([ids, torch.tensor([greedy], dtype=ids.dtype)], 1)
            greedy.append(int(model(sequence).logits[0, -1].argmax()))
    found = logits.log_softmax(-1)
    names = {type(module).__name__ for module in model.modules()}
    return {
        "versions": {name: version(name) for name in ("gptqmodel", "transformers", "torch")},
        "kernels": sorted(name for name in names if "Linear" in name),
        "log_probabilities": found[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(),
        "top": logits.argmax(-1).tolist(),
        "greedy": greedy,
    }


if __name__ == "__main__":
    answer = main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")
