"""An export in the runtime that serves it: what is compared, and what is refused. Real ones run in `make runtimes`."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rotoboa.errors import InputError, RunError
from rotoboa.export.finished import Finished
from rotoboa.export.runtimes.ask import RUNTIMES, Answer, interpreter
from rotoboa.pipeline import serving
from rotoboa.pipeline.exporting import export, open_finished
from rotoboa.pipeline.serving import Served, serve
from rotoboa.pipeline.storage.run_folder import RunFolder
from rotoboa.pipeline.verifying import run_logits

Runs = Callable[..., Path]
SYMMETRIC = {"weights.symmetric": True, "weights.group_size": 32}


@pytest.fixture(scope="module")
def folder(cheap_run: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(cheap_run("w4a16", SYMMETRIC), "gguf", output=tmp_path_factory.mktemp("export") / "gguf")


@pytest.mark.usefixtures("runtimes_here")
def test_transformers_serves_what_the_run_computes(cheap_run: Runs, tmp_path: Path) -> None:
    run = cheap_run("w4a16", SYMMETRIC)
    found = serve(export(run, "compressed-tensors", output=tmp_path / "ct"), "transformers")
    assert (found.format, found.runtime, found.dtype) == ("compressed-tensors", "transformers", "float32")
    assert found.control is not None and max(found.difference, found.control) < 1e-4
    assert found.agreement == found.greedy == 1 and found.unquantized is None and found.passed
    assert set(found.versions) == {"transformers", "torch", "compressed-tensors"} and found.kernels


@pytest.mark.parametrize("bits", [{"activations.bits": 4}, {"overrides": "blocks 1: activations.bits=4"}])
def test_activations_left_in_16_bits_are_found_out(
    cheap_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: dict[str, Any]
) -> None:
    """By a runtime that computes the same weights without rounding its inputs, and one that computes what was run."""
    rounded = {**bits, "activations.search": False, "activations.clip": 14 / 15}
    run = cheap_run("w4a16", {**SYMMETRIC, **rounded})
    folder = export(run, "compressed-tensors", output=tmp_path / "ct")

    original = serving.run_of

    def answers(change: Callable[[Finished], Finished]) -> Served:
        opened: list[Finished] = []

        def run_of(*given: Any) -> Finished:
            opened.append(original(*given))
            return opened[0]

        def ask(runtime: str, folder: Path, ids: list[int], **options: Any) -> Answer:
            logits = run_logits(change(opened[0]), torch.tensor([ids]), plain=True)[0].log_softmax(-1)
            chosen = logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
            return Answer({}, [], chosen, logits.argmax(-1).tolist(), [int(logits[-1].argmax())])

        monkeypatch.setattr(serving, "run_of", run_of)
        monkeypatch.setattr(serving, "ask", ask)
        return serve(folder, "transformers")

    right = answers(lambda finished: finished)
    assert right.difference == 0 and right.unquantized is not None and right.passed and right.greedy == 1
    wrong = answers(lambda finished: replace(finished, spec=finished.spec.without_inputs))
    assert wrong.unquantized == 0 and wrong.difference > 0 and wrong.in_16_bits and not wrong.passed


@pytest.mark.parametrize(("off", "passes"), [(0.004, True), (0.006, False), (float("nan"), False)])
def test_what_float32_may_be_off_by(
    cheap_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float, passes: bool
) -> None:
    """Where the dense model there is right, and the export's log-probabilities are off."""
    run = cheap_run("w4a16", SYMMETRIC)
    target = export(run, "compressed-tensors", output=tmp_path / "ct")

    def ask(runtime: str, folder: Path, ids: list[int], **options: Any) -> Answer:
        logits = run_logits(finished, torch.tensor([ids]), plain=True)[0].log_softmax(-1)
        chosen = logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        chosen[3] += off if folder == target else 0
        return Answer({}, [], chosen.tolist(), logits.argmax(-1).tolist(), [int(logits[-1].argmax())])

    finished = open_finished(RunFolder.open(run))
    monkeypatch.setattr(serving, "ask", ask)
    found = serve(target, "transformers")
    assert found.control == 0 and found.tolerance == 0.005 and found.passed == passes


def test_llama_cpp_has_a_dense_control_and_room_for_its_rounding(
    cheap_run: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = open_finished(RunFolder.open(cheap_run("w4a16", SYMMETRIC)))
    asked: list[str] = []

    def ask(runtime: str, where: Path, ids: list[int], **options: Any) -> Answer:
        asked.extend(file.name for file in where.glob("*.gguf"))
        logits = run_logits(finished, torch.tensor([ids]), plain=True)[0].log_softmax(-1)
        chosen = logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        chosen[3] += 0.1 if where == folder else 0.001
        return Answer({}, [], chosen.tolist(), logits.argmax(-1).tolist(), [int(logits[-1].argmax())])

    monkeypatch.setattr(serving, "ask", ask)
    run = cheap_run("w4a16", SYMMETRIC)
    found = serve(folder, "llama.cpp", run=run, python=Path(sys.executable))
    assert asked == ["model-Q4_0.gguf", "model-F32.gguf"]
    assert found.control == pytest.approx(0.001, rel=0.01) and found.tolerance > 0.1 and found.passed


def test_the_cache_that_a_run_follows_is_asked_for(
    cheap_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And found out where the runtime leaves it in 16 bits."""
    four = {"weights.symmetric": True, "cache.key_bits": 4, "cache.value_bits": 8, "cache.served_by": "llama.cpp"}
    run = cheap_run("w4a16", {**four, "model": "tiny", "weights.method": "rtn"})
    target, finished = export(run, "gguf", output=tmp_path / "gguf"), open_finished(RunFolder.open(run))
    asked: list[tuple[int, int] | None] = []

    def asking(change: Callable[[Finished], Finished]) -> Callable[..., Answer]:
        def ask(runtime: str, where: Path, ids: list[int], cache: tuple[int, int] | None, **options: Any) -> Answer:
            asked.append(cache)
            logits = run_logits(change(finished), torch.tensor([ids]), plain=True)[0].log_softmax(-1)
            chosen = logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
            return Answer({}, [], chosen, logits.argmax(-1).tolist(), [int(logits[-1].argmax())])

        return ask

    monkeypatch.setattr(serving, "ask", asking(lambda run: run))
    found = serve(target, "llama.cpp", python=Path(sys.executable))
    assert asked == [(4, 8)] * 2 and found.cache == (4, 8) and found.passed
    assert found.difference == found.control == 0 and found.unquantized is not None and found.unquantized > 0
    monkeypatch.setattr(serving, "ask", asking(lambda run: replace(run, spec=run.spec.without_cache)))
    assert serve(target, "llama.cpp", python=Path(sys.executable)).unquantized == 0

    def nonsense(*given: Any, **options: Any) -> Answer:
        answer = asking(lambda run: run)(*given, **options)
        return replace(answer, log_probabilities=[value - 20 for value in answer.log_probabilities])

    monkeypatch.setattr(serving, "ask", nonsense)  # of dense weights too, as by vLLM on processors
    assert not serve(target, "llama.cpp", python=Path(sys.executable)).passed
    monkeypatch.setattr(serving, "ask", asking(lambda run: replace(run, spec=run.spec.without_cache)))
    found = serve(target, "llama.cpp", python=Path(sys.executable), cache=False)
    assert asked[-1] is None and found.cache is None and found.difference == 0


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no runtime 'trt': use one of vllm, gptqmodel, mlx"):
        serve(folder, "trt")
    with pytest.raises(InputError, match="--dtype is int8 but must be one of float32, float16, bfloat16"):
        serve(folder, "llama.cpp", dtype="int8")
    with pytest.raises(InputError, match="vLLM does not read the format gguf: export the run with --format"):
        serve(folder, "vllm")
    with pytest.raises(InputError, match=r"there is no Python for llama\.cpp at .*: `make runtimes` makes one"):
        serve(folder, "llama.cpp", python=tmp_path / "python")
    with pytest.raises(RunError, match=r"mlx-lm cannot run .* \(ModuleNotFoundError: No module named 'mlx'\)"):
        serving.ask("mlx", folder, [1, 2], python=Path(sys.executable), dtype="float32")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_runtime_has_its_program(runtime: str, tmp_path: Path) -> None:
    known = RUNTIMES[runtime]
    assert (Path(serving.__file__).parents[1] / "export" / "runtimes" / known.program).is_file() and known.formats
    assert interpreter(runtime, Path(sys.executable)) == Path(sys.executable)
