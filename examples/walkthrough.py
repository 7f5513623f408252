"""What a rotation does to activations: a walk through one block of the embedded model.

Run it whole (`python examples/walkthrough.py`), or cell by cell in an editor that knows `# %%`. TOKENS in the
environment says how many tokens are looked at.
"""

# %% The model: a small Llama that comes with the package, read one block at a time
from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.tokenizer import read_tokenizer
from rotoboa.rotation.hadamard import Hadamard
from rotoboa.rotation.outliers import kurtosis, peak, site_inputs
from rotoboa.rotation.rotate import Rotations

TOKENS = int(os.environ.get("TOKENS", "512"))
checkpoint = Checkpoint(TINY_FOLDER)
decoder = Decoder(checkpoint.config)
text = Path(argparse.__file__).read_text(encoding="utf-8")
tokens = torch.tensor([read_tokenizer(TINY_FOLDER)(text[: 8 * TOKENS])["input_ids"][:TOKENS]])

# %% The smallest rotation: a spike is spread over all channels, and comes back whole
spike = torch.tensor([8.0, 0.0, 0.0, 0.0])
turn = Hadamard.of(4)
print("a spike          ", spike.tolist())
print("rotated          ", turn.apply(spike).tolist())
print("and turned back  ", turn.apply_transposed(turn.apply(spike)).tolist())

# %% Why that helps: one scale for a token, which its largest channel sets
four_bits = DynamicQuantizer(bits=4)
vector = torch.tensor([8.0, 0.5, -0.4, 0.3])
print("rounded to 4 bits", four_bits(vector).tolist(), "- the small channels are lost")
print("rounded, rotated ", [round(x, 2) for x in turn.apply_transposed(four_bits(turn.apply(vector))).tolist()])

# %% The inputs of a real block: the residual stream as it enters block 1
hidden = decoder.embed(checkpoint.outer_layers(), tokens)
hidden = decoder.run(decoder.block(0, checkpoint.block(0)), hidden)
plain = decoder.block(1, checkpoint.block(1))
before = site_inputs(decoder, plain, hidden)

# %% The same block rotated as QuaRot does it: R1 in the residual stream, R2 in the heads, R4 before down
rotations = Rotations.of(decoder.shape, r1=True, r2=True, r3=False, r4=True, seed=0)
rotated = decoder.block(1, rotations.rotate_block(checkpoint.block(1), decoder.family, 1))
stream = rotations.rotate_stream(hidden, decoder.family)
after = site_inputs(decoder, rotated, stream, rotations)


# %% How spiky they are, and what 4 bits lose: kurtosis is 3 for a Gaussian, error is relative to the energy
def error(x: torch.Tensor) -> float:
    """Of rounding to 4 bits, |x - q|^2 / |x|^2."""
    return float((four_bits(x) - x).square().sum() / x.square().sum())


print(f"\n{'inputs of':<10} {'kurtosis':>19} {'peak':>15} {'4-bit error':>19}")
for site, x in before.items():
    y = after[site]
    figures = [f"{float(f(x).mean()):8.1f} -> {float(f(y).mean()):5.1f}" for f in (kurtosis, peak)]
    print(f"{site:<10} {figures[0]:>19} {figures[1]:>15} {error(x):>8.4f} -> {error(y):.4f}")

# %% And nothing else has changed: the rotated block puts out the rotated stream (without R4, which runs online)
offline = Rotations.of(decoder.shape, r1=True, r2=True, r3=False, r4=False, seed=0)
rotated = decoder.block(1, offline.rotate_block(checkpoint.block(1), decoder.family, 1))
out = offline.rotate_stream(decoder.run(plain, hidden), decoder.family)
largest = float((decoder.run(rotated, stream) - out).abs().max() / out.abs().max())
print(f"\nlargest difference of the block's output, relative: {largest:.1e}")
