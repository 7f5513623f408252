"""Runs a folder in transformers: `python in_transformers.py FOLDER REQUEST ANSWER`. Knows no rotoboa; see `ask`.

GPTQ is loaded by GPTQModel. Online rotations, which transformers leaves out, are put in by the library of the format,
as vLLM has them.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def load(folder: str, dtype: Any) -> tuple[Any, list[str]]:
    """The model, and the packages that compute it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    data = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    quantization = data.get("quantization_config") or {}
    if quantization.get("quant_method") == "gptq":
        from gptqmodel import BACKEND, GPTQModel

        packed = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=dtype)
        return packed.model, ["gptqmodel", "transformers", "torch"]
    transforms = quantization.pop("transform_config", None)
    files = [file.name for file in Path(folder).glob("*.gguf")]
    options: dict[str, Any] = {"gguf_file": files[0]} if files else {}
    if transforms is not None:
        data["quantization_config"] = {**quantization, "quantization_status": "compressed"}
    if transforms is not None or files:
        options["config"] = AutoConfig.for_model(**data)
    auto = AutoModelForImageTextToText if "vision_config" in data else AutoModelForCausalLM
    late = "fp4" in quantization.get("format", "") and not quantization.get("dequantize")
    if late:  # it unpacks such weights as the model first runs, to bfloat16, in which they are exact
        import torch

        model = auto.from_pretrained(folder, dtype=torch.bfloat16, **options)
        with torch.no_grad():
            model(torch.tensor([[0]]))
        model = model.to(dtype)
    else:
        model = auto.from_pretrained(folder, dtype=dtype, **options)
    if transforms is not None:
        from compressed_tensors.transform import TransformConfig, apply_transform_config

        apply_transform_config(model, TransformConfig.model_validate(transforms))
    return model, ["transformers", "torch", *(["compressed-tensors"] if quantization else [])]


def main(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompt's tokens, the most likely ones, and those that follow it greedily."""
    import torch

    model, packages = load(folder, getattr(torch, request["dtype"]))
    ids, greedy = torch.tensor([request["ids"]]), list[int]()
    with torch.no_grad():
        logits = model(ids).logits.float()
        for _ in range(request["new_tokens"]):
            sequence = torch.cat([ids, torch.tensor([greedy], dtype=ids.dtype)], 1)
            greedy.append(int(model(sequence).logits[0, -1].argmax()))
    if request["logits"]:
        from safetensors.torch import save_file

        save_file({"logits": logits.contiguous()}, request["logits"])
    layers = {type(module).__name__ for module in model.modules()}
    return {
        "versions": {name: version(name) for name in packages},
        "kernels": sorted(name for name in layers if "Linear" in name),
        "log_probabilities": logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist(),
        "top": logits[0].argmax(-1).tolist(),
        "greedy": greedy,
    }


if __name__ == "__main__":
    answer = main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")
