"""A job: everything that a run stands on, resolved and checked before any long work."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...boa.online.attention import NAME
from ...boa.ranks import Ranks
from ...boa.solver.rounding_settings import Settings
from ...errors import InputError
from ...export.spec import Spec
from ...models.aliases import ResolvedModel, resolve_model
from ...models.checkpoint import Checkpoint
from ...models.decoder import Decoder
from ...models.generic.generic_decoder import decoder_for
from ...models.hub import fetch
from ...models.tokenizer import read_tokenizer, size_notices
from ...rotation.balance import balanced_sites
from ...rotation.channels import activation_of
from ...rotation.rotate import Rotations
from ..ranks import launch
from ..ranks.distributed import device_name
from ..recipe.recipe import Recipe
from ..recipe.settings import moves_head, rotations_of, settings_of, spec_of, stays_tied
from ..storage.buffers import Buffers
from ..storage.manifest import BudgetEntry
from ..storage.run_folder import device_of
from .checks import bos_of, check_bos, check_sizes
from .clock import Clock
from .plain_recipe import plain_recipe


@dataclass(frozen=True)
class Job:
    """Everything that a run stands on, checked before any long work. What a stage decides makes another job of it.

    Attributes:
        found: notices, a sentence each, of what was found so far.
        clock: of the whole run, one for all jobs that are made of this one.
    """

    recipe: Recipe
    model: ResolvedModel
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    rotations: Rotations
    spec: Spec
    buffers: Buffers
    ranks: Ranks = field(default_factory=Ranks)
    found: tuple[str, ...] = ()
    clock: Clock = field(default_factory=Clock)

    @property
    def settings(self) -> Settings:
        """Of the rounding, as the recipe has them."""
        return settings_of(self.recipe, self.rotations)

    @property
    def bos(self) -> bool:
        """Whether windows of text begin with the tokenizer's BOS."""
        return bos_of(self.recipe, self.decoder)

    @property
    def notices(self) -> list[str]:
        """What a user should know of how the recipe was carried out, a sentence each."""
        notices = list(self.found)
        if self.rotations.online_r1 and self.recipe.rotation.r1 == "merged":
            notices.append(
                f"The norms after attention and MLP of {self.decoder.family.model_type} keep R1 from being folded into "
                "the weights: it runs as a Hadamard transform at the inputs of q, k, v, gate and up."
            )
        if self.recipe.rotation.r2 and not self.spec.r2:
            notices.append(
                f"R2 is left out: the attention of {self.decoder.family.model_type} has a gate between its values and "
                "the output projection. With rotation.heads all channels of what that reads are turned, online."
            )
        if self.recipe.rotation.scale:
            notices += self._unbalanced()
        unmoved = self.recipe.model_copy(update={"weights": self.recipe.weights.model_copy(update={"head": 0.0})})
        if moves_head(self.recipe) and stays_tied(unmoved, self.rotations, self.decoder):
            notices.append(
                "weights.head moves the output layer away from the embedding that it was tied to, and both are stored; "
                "with weights.head 0 they stay one."
            )
        return notices

    def _unbalanced(self) -> list[str]:
        """A sentence where rotation.scale leaves inputs out."""
        family, config = self.decoder.family, self.decoder.config
        if self.rotations.turned:
            return [
                "The inputs of q, k, v, gate and up are not balanced: with R1 merged their norms are folded into the "
                "weights. With rotation.r1 online or none they are."
            ]
        if not family.pre_norms:
            return ["The inputs of q, k, v, gate and up are not balanced: no norm stands before them."]
        if family.experts and not family.linear_up:
            return ["The inputs of the experts' down are not balanced: what clamps up's output lets no scale through."]
        if "down" not in balanced_sites(family, config, folded=False) and not family.experts:
            function = activation_of(config)
            return [f"The input of {family.down} is not balanced: {function} before it lets no scale through."]
        return []

    def with_notices(self, *notices: str) -> Job:
        """The same with further notices."""
        return replace(self, found=(*self.found, *notices))

    def without_r1(self) -> Job:
        """The same with R1 nowhere, where the recipe leaves it to the model."""
        return replace(self.rotated(r1=None, online_r1=False), spec=replace(self.spec, r1=False, online_r1=False))

    def reseeded(self, seed: int) -> Job:
        """The same with the signs of its rotations drawn from another seed."""
        return replace(self, rotations=self.rotations.reseeded(seed))

    def budgeted(self, budget: BudgetEntry | None) -> Job:
        """The same with the bits that a budget has for each layer."""
        layers, prefix, whole = dict(self.spec.layers), self.decoder.family.layers, self.spec.scheme
        for unit in () if budget is None else budget.units:
            for name in unit.layers:
                full = f"{prefix}.{unit.block}.{name}"
                scheme = layers.pop(full, whole)
                scheme = replace(scheme, weights=replace(scheme.weights, num_bits=unit.bits))
                layers |= {} if scheme == whole else {full: scheme}
        return replace(self, spec=replace(self.spec, layers=layers))

    def rotated(self, **changes: Any) -> Job:
        """The same with fields of its rotations changed."""
        return replace(self, rotations=replace(self.rotations, **changes))

    def release(self) -> None:
        """Called after each batch: what lies in files need not stay in memory, and this rank is at work."""
        self.buffers.release()
        self.ranks.tick()

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add the seconds of a stage to those of the run."""
        return self.clock.timed(stage, self.decoder.device)


def prepare(recipe: Recipe, device: str | None = None, ranks: Ranks | None = None, clock: Clock | None = None) -> Job:
    """Resolve and check a recipe; `ranks` are those that the run is shared by, `clock` began with the run.

    Raises:
        InputError: the model, its files, the sizes or the device do not fit the recipe.
    """
    target = device_of(device_name(device))
    model = resolve_model(recipe.model)
    checkpoint = Checkpoint(fetch(model.source, model.is_local))
    decoder = decoder_for(checkpoint.config, attention=NAME, device=target)
    checkpoint.check(decoder.shapes)
    recipe, adapted = plain_recipe(recipe, decoder.family, model) if decoder.family.generic else (recipe, ())
    check_sizes(recipe, decoder, model)
    if recipe.weights.method == "brecq" and ranks is not None and ranks.size > 1:
        raise InputError("weights.method brecq learns a block in one process: start it without torchrun.")
    tokenizer = read_tokenizer(checkpoint.folder)
    check_bos(recipe, decoder, tokenizer, model)
    rotations = rotations_of(recipe, decoder)
    spec = spec_of(recipe, rotations, decoder)
    buffers = Buffers(recipe.output or Path(tempfile.gettempdir()), recipe.memory, target, launch.local_world())
    return Job(
        recipe, model, checkpoint, tokenizer, decoder, rotations, spec, buffers, ranks or Ranks(),
        found=(*adapted, *checkpoint.notices(decoder.shapes), *size_notices(tokenizer, decoder.shape.vocabulary)),
        clock=clock or Clock(),
    )  # fmt: skip
