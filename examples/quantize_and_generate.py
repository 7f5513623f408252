"""Quantize the embedded model from Python, load the result, and let it write.

    python examples/quantize_and_generate.py
    python examples/quantize_and_generate.py --samples 8    # less calibration text: quicker, and worse

The embedded model knows Python source alone. With --model smollm2-135m, or a folder and --text, the same lines quantize
another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rotoboa


def main(model: str, text: str | None, output: Path, samples: int, windows: int) -> None:
    """Everything in 4 bits: weights, inputs, keys and values."""
    report = rotoboa.quantize(
        "w4a4kv4",
        model=model,
        output=output,
        calibration={"dataset": text, "samples": samples},
        evaluation={"dataset": text, "windows": windows, "report": False},  # True: report.html, to look at
    )
    for dataset, measured in report["perplexity"].items():
        print(f"perplexity on {dataset}:", {name: round(value, 2) for name, value in measured.items()})

    quantized, tokenizer = rotoboa.load(output)  # computes as it was measured: packed weights, packed cache
    prompt = tokenizer("def read_lines(path):\n", return_tensors="pt")
    written = quantized.generate(**prompt, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a short name, a hub id or a folder")
    parser.add_argument("--text", help="a text file or folder; by default the model's own text")
    parser.add_argument("--output", type=Path, default=Path("runs/example-generate"), help="folder of the run")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--windows", type=int, default=200, help="windows of text that are measured")
    main(**vars(parser.parse_args()))
