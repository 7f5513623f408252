"""Runs a folder in mlx-lm: `python in_mlx.py FOLDER REQUEST ANSWER`. Knows nothing of rotoboa; see `ask`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompt's tokens, the most likely ones, and those that follow it greedily."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import load

    model, _ = load(folder)
    dtype = getattr(mx, request["dtype"])
    quantized = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    scales: dict[str, set[str]] = {}
    for _, module in model.named_modules():
        if isinstance(module, quantized):
            scales.setdefault(type(module).__name__, set()).add(str(module.scales.dtype).rpartition(".")[2])
    kept = {"scales", "biases"}  # which mean what they were chosen to mean in their own type alone
    model.apply_to_modules(
        lambda _, module: module.update(
            {
                name: value.astype(dtype)
                for name, value in module.parameters().items()
                if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating) and name not in kept
            }
        )
    )
    ids = request["ids"]
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    found = logits - mx.logsumexp(logits, -1, keepdims=True)
    greedy: list[int] = []
    for _ in range(request["new_tokens"]):
        greedy.append(int(mx.argmax(model(mx.array([ids + greedy]))[0, -1]).item()))
    kernels = [
        f"{name}, {' and '.join(sorted(dtypes))} scales" for name, dtypes in sorted(scales.items(), reverse=True)
    ]
    return {
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "kernels": kernels or ["Linear"],
        "log_probabilities": [float(found[i, token]) for i, token in enumerate(ids[1:])],
        "top": [int(token) for token in mx.argmax(logits, -1).tolist()],
        "greedy": greedy,
    }


if __name__ == "__main__":
    answer = main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")
