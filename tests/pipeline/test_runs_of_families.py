"""Every family through whole runs: measured as transformers measures it, saved, loaded, computed again."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.boa.online.attention import NAME
from rotoboa.eval.perplexity import last_states, part_sums, summary
from rotoboa.export.stored_sizes import stored_bytes
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.pipeline.console.sizes import exported_sizes
from rotoboa.pipeline.exporting import open_finished
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.settings import stays_tied
from rotoboa.pipeline.storage.files import read_report
from rotoboa.pipeline.storage.run_folder import RunFolder, recipe_of
from rotoboa.pipeline.verifying import run_logits
from rotoboa.tests.small_families import FAMILIES

NAMES = [name for name in FAMILIES if name != "llama"]  # which all other tests run
PAGE = {"evaluation.report": True, "evaluation.references": True}  # as a user has it by default
CACHE = {"cache.key_bits": 4, "cache.value_bits": 4, "cache.sink": 1, "rotation.r3": True}
LATENT = [name for name in NAMES if name.startswith("deepseek")]  # whose cache is not quantized
# Weights alone are rounded in the same way whatever attention does; norms, biases, fused layers and experts differ.
WEIGHTS_ALONE = (
    *("llama-biases", "phi3", "opt", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "qwen2_moe", "olmo2", "glm4"),
    *("granite", "starcoder2", "bloom", "falcon", "gpt_neox", "phi", "cohere2", "stablelm", "olmoe", "glm4_moe"),
    *("gpt_oss", "qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "deepseek_v3"),
)
CASES = [(name, "w4a4" if name in LATENT else "w4a4kv4") for name in NAMES]
CASES += [(name, "w2a16") for name in WEIGHTS_ALONE]
GENERATING = (
    *("mistral", "phi3", "opt", "gemma2", "gemma3_text", "mixtral", "bloom", "falcon-rw", "gpt_neox"),
    *("gpt_oss", "qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "deepseek_v3", "deepseek_v2", "llama4_text"),
)
DRAWN = ("mixtral",)  # a dense one in eval/drawing/test_report.py; the pictures of the others look the same
WITH_PAGE = (  # which takes longer than the rest of a run
    *(*DRAWN, "phi3", "opt", "gemma2", "qwen3_moe", "olmo2"),
    *("qwen3_next", "granitemoehybrid", "lfm2", "deepseek_v3"),
)
SMALL = {"calibration.samples": 4, "calibration.sequence_length": 40, "evaluation.windows": 3}


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoints(save_family: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoints("gemma2"): its folder, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_family(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def weights_alone(
    checkpoints: Callable[[str], Path], make_recipe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """weights_alone("gemma2"): a run whose inputs are in 16 bits, so that none falls to either side; made once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run") / "run"
            fixed = {"model": str(checkpoints(name)), "output": made[name], "weights.group_size": 16, **SMALL}
            cache = {} if name in LATENT else CACHE
            rotoboa.quantize(make_recipe("w2a16", fixed | cache | {"evaluation.baseline": False}))
        return made[name]

    return run


@torch.no_grad()
def _original(folder: Path) -> Any:
    """The original model by transformers alone, with its own attention."""
    attention = Checkpoint(folder).family.own_attention or "eager"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_that_of_transformers(checkpoints: Callable[[str], Path], name: str) -> None:
    """Block by block as the whole model: masks, windows, caps, kinds of RoPE, positions, experts."""
    folder, windows = checkpoints(name), _tokens(3, 60)
    checkpoint = Checkpoint(folder)
    decoder, outer = Decoder(checkpoint.config, attention=NAME), checkpoint.outer_layers()
    checkpoint.check(decoder.shapes)
    blocks = (partial(decoder.run, decoder.block(i, checkpoint.block(i))) for i in range(decoder.shape.blocks))
    states = last_states(windows, partial(decoder.embed, outer), blocks, decoder.logits(outer), batch=2)
    found, _ = summary(part_sums(windows, {"model": states})["model"], windows.numel() - len(windows), False)
    model = _original(folder)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    expected = math.exp(sum(losses) / len(losses))
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected > 120, "a model that guesses would be right without computing anything"


@torch.no_grad()
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_run_save_and_load(
    checkpoints: Callable[[str], Path],
    weights_alone: Callable[[str], Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    name: str,
    recipe: str,
    request: pytest.FixtureRequest,
) -> None:
    if name not in DRAWN:
        request.getfixturevalue("undrawn")
    if recipe == "w2a16":
        folder = weights_alone(name)
    else:
        folder, page = tmp_path / "run", PAGE if name in WITH_PAGE else {}
        rotoboa.quantize(make_recipe(recipe, {"model": str(checkpoints(name)), "output": folder, **SMALL, **page}))
    settings, report = recipe_of(folder), read_report(folder).to_json()
    assert (folder / "report.html").is_file() == settings.evaluation.report
    (measured,) = report["perplexity"].values()
    assert all(math.isfinite(value) for value in measured.values())
    job, run = prepare(settings), RunFolder.open(folder)
    family, tied = job.decoder.family, stays_tied(settings, job.rotations, job.decoder)
    sizes = exported_sizes(folder / "model")
    foretold = stored_bytes(job.decoder, job.spec, job.checkpoint.dtype.itemsize, tied=tied)
    assert sum(sizes.values()) == sum(foretold.values())
    for block in run.manifest.blocks:
        assert list(block.layers) == list(family.at(block.index).projections)
        # A loss of 1 is that of a weight of zero.
        assert all(0 <= layer.loss < (0.6 if recipe == "w2a16" else 0.1) for layer in block.layers.values())

    ids = _tokens(2, 50)
    model, tokenizer = rotoboa.load(folder, dtype=torch.float32)
    logits = model(ids).logits
    # A value at the edge of two levels of an activation may fall to either side.
    torch.testing.assert_close(logits, run_logits(open_finished(run), ids), rtol=1e-3, atol=1e-3)
    assert len(tokenizer("abc")["input_ids"]) == 3
    if recipe != "w2a16":
        original = _original(checkpoints(name))(ids).logits
        assert 0.001 < (logits - original).norm() / original.norm() < 0.9, "quantized, and still the same model"
    notices = " ".join(report["notices"])
    assert "R1" not in notices, "no recipe merges it where it cannot be"


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATING)
def test_loaded_model_generates_and_is_saved_again(
    weights_alone: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """With a cache, past the window, the same tokens as without; saved by transformers, the same logits."""
    model, _ = rotoboa.load(weights_alone(name), dtype=torch.float32)
    ids, logits = _tokens(2, 8), []
    for _ in range(12):
        logits.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    cache, found, step = None, [], ids[:, :8]
    for i in range(12):
        output = model(step, past_key_values=cache, use_cache=True)
        cache, step = output.past_key_values, ids[:, 8 + i : 9 + i]
        found.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(found), torch.stack(logits), rtol=1e-3, atol=1e-3)
    generated = model.generate(ids[:, :8], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert generated.shape == ids.shape

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
