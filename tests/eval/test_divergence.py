"""KL divergence and top-1 agreement against float64, by hand and by the whole model."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.eval.perplexity import Divergence, States, last_states
from rotoboa.export.runtime.prepared import packed_block
from rotoboa.export.writing import read_outer_layers
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.outer_layers import OuterLayers
from rotoboa.pipeline.job.calibration import evaluation_tokens, load_texts
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.storage.run_folder import RunFolder, recipe_of

from .scoring import scores


def states(hidden: Tensor, head: Tensor) -> States:
    return States(hidden, lambda x: x @ head.T)


def tokens(windows: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(2))


def slow(windows: Tensor, logits: Tensor, original: Tensor) -> tuple[float, float, float]:
    """Perplexity, KL and top-1 agreement from all logits (windows, length, vocabulary), token by token in float64."""
    likelihood = kl = same = 0.0
    count = 0
    for window in range(windows.shape[0]):
        for position in range(windows.shape[1] - 1):
            q, p = (x[window, position].double().softmax(0).tolist() for x in (logits, original))
            likelihood += math.log(q[int(windows[window, position + 1])])
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            same += max(range(len(p)), key=p.__getitem__) == max(range(len(q)), key=q.__getitem__)
            count += 1
    return math.exp(-likelihood / count), kl / count, same / count


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_is_that_of_all_logits_in_float64(noise: float) -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(3, 12, 16), torch.randn(50, 16)
    other, other_head = hidden + noise * torch.randn(3, 12, 16), head + noise * torch.randn(50, 16)
    windows = tokens(3, 12, 50)
    perplexity, found = scores(windows, states(other, other_head), states(hidden, head))
    assert found is not None
    expected = slow(windows, other.double() @ other_head.double().T, hidden.double() @ head.double().T)
    # Logits of order 10 in float32 leave a small KL some 1e-8, in another order on another processor.
    assert (perplexity, found.kl, found.top1) == pytest.approx(expected, rel=2e-5, abs=5e-8)
    assert scores(windows, states(other, other_head))[1] is None


def test_two_tokens_by_hand() -> None:
    # The original says 3/4 and 1/4 after both tokens, the other 1/4 and 3/4 after the first, the same after the second.
    original = torch.tensor([[[3.0, 1.0], [3.0, 1.0], [9.0, 9.0]]]).log()
    other = torch.tensor([[[1.0, 3.0], [3.0, 1.0], [1.0, 9.0]]]).log()
    head = torch.eye(2)
    perplexity, found = scores(torch.tensor([[0, 0, 1]]), states(other, head), states(original, head))
    assert found is not None
    assert found.kl == pytest.approx((0.75 * math.log(3) - 0.25 * math.log(3)) / 2, rel=1e-6)
    assert found.top1 == 0.5
    assert perplexity == pytest.approx(4.0, rel=1e-6)  # both tokens had probability 1/4


def test_a_model_does_not_diverge_from_itself_nor_from_a_rotated_self() -> None:
    torch.manual_seed(3)
    hidden, head = torch.randn(2, 9, 16), torch.randn(40, 16)
    windows, plain = tokens(2, 9, 40), states(hidden, head)
    assert scores(windows, plain, plain)[1] == Divergence(0.0, 1.0)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    found = scores(windows, states(hidden @ rotation, head @ rotation), plain)[1]
    assert found is not None and abs(found.kl) < 1e-7 and found.top1 == 1.0


def test_the_order_of_the_two_models_matters() -> None:
    sure, unsure = torch.tensor([[[8.0, 0.0]] * 3]), torch.tensor([[[1.0, 0.0]] * 3])
    windows, head = torch.zeros(1, 3, dtype=torch.long), torch.eye(2)
    forward, backward = (
        scores(windows, states(a, head), states(b, head))[1] for a, b in ((unsure, sure), (sure, unsure))
    )
    assert forward is not None and backward is not None and backward.kl > 2 * forward.kl > 0


def test_a_broken_model_has_figures_too() -> None:
    hidden, head = torch.randn(1, 4, 8), torch.randn(10, 8)
    found = scores(tokens(1, 4, 10), states(hidden * math.nan, head), states(hidden, head))[1]
    assert found is not None and math.isnan(found.kl)


@torch.no_grad()
def test_the_embedded_model_and_a_packed_run_of_it_are_as_transformers_runs_them(tiny_run: Path, text: Path) -> None:
    job, folder = prepare(recipe_of(tiny_run)), RunFolder.open(tiny_run)
    windows = evaluation_tokens(job.tokenizer, load_texts(str(text), "evaluation"), 96, 3)
    checkpoint = Checkpoint(TINY_FOLDER)
    decoder, (packed, _) = job.decoder, rotoboa.load(tiny_run, dtype=torch.float32)
    spec = packed.config.quantization_config.spec

    def streamed(decoder: Decoder, blocks: list[nn.Module], outer: OuterLayers) -> States:
        run = [partial(decoder.run, b) for b in blocks]
        return last_states(windows, partial(decoder.embed, outer), run, decoder.logits(outer))

    indices = range(decoder.shape.blocks)
    original = streamed(decoder, [decoder.block(i, checkpoint.block(i)) for i in indices], checkpoint.outer_layers())
    blocks = [packed_block(decoder, i, folder.read_block(i), spec) for i in indices]
    quantized = streamed(decoder, blocks, read_outer_layers(tiny_run / "model", decoder.family))

    plain = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    expected, given = plain(windows).logits[:, :-1], packed(windows).logits[:, :-1]
    losses = [
        nn.functional.cross_entropy(x.flatten(0, 1).double(), windows[:, 1:].flatten()) for x in (expected, given)
    ]
    p, q = (x.double().log_softmax(-1) for x in (expected, given))
    perplexity, found = scores(windows, quantized, original)
    assert scores(windows, original)[0] == pytest.approx(math.exp(losses[0]), rel=1e-4)
    assert perplexity == pytest.approx(math.exp(losses[1]), rel=1e-4)
    assert found is not None
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1 / p[..., 0].numel())
    assert 0 < found.kl < 1 and 0.5 < found.top1 < 1
