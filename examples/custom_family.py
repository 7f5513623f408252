"""Quantize an architecture that RotoBoA has no row for: Arcee, here a small random one.

    python examples/custom_family.py

A family is one row of a table: the names of its modules, and what is special about it. Arcee is built as Llama is,
but that its MLP has no gate, so its row is Llama's with `up` and an activation alone. Before you trust a row of your
own, check that rotation changes no logit, as the end of this script does: a model that is built otherwise gives other
logits.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import ArceeConfig, ArceeForCausalLM, AutoModelForCausalLM, AutoTokenizer

import rotoboa
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.models.families import FAMILIES

FAMILIES["arcee"] = replace(FAMILIES["llama"], model_type="arcee", gate="", activation="mlp.act_fn")


def save_model(folder: Path) -> None:
    """A random checkpoint of two blocks, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    config = ArceeConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    ArceeForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)


@torch.no_grad()
def main(output: Path, samples: int) -> None:
    """Save, quantize to 8 bits, load, compare."""
    checkpoint, run = output / "checkpoint", output / "run"
    save_model(checkpoint)
    text = str(Path(argparse.__file__))  # any text file
    rotoboa.quantize(
        "w4a16",
        model=str(checkpoint),
        output=run,
        rotation={"r1": "merged"},
        weights={"bits": 8, "group_size": 16},
        calibration={"dataset": text, "samples": samples, "sequence_length": 64},
        evaluation={"dataset": text, "windows": 4, "baseline": False, "report": False},
    )
    quantized, tokenizer = rotoboa.load(run)
    original = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = tokenizer("import os", return_tensors="pt")
    wanted, found = (model(**tokens).logits.float().log_softmax(-1) for model in (original, quantized))
    kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    print(f"KL from the original, with 8-bit weights: {kl:.6f}")
    if kl > 0.01:
        raise SystemExit("The row does not fit the architecture: rotation has changed the model.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/example-family"), help="folder for both")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    main(**vars(parser.parse_args()))
