"""Perplexity and divergence as the program has them, of windows that one process holds."""

from torch import Tensor

from rotoboa.eval.perplexity import Divergence, States, part_sums, summary


def scores(tokens: Tensor, states: States, original: States | None = None) -> tuple[float, Divergence | None]:
    """Of a model's states over tokens (windows, length), and those of the model that it was made from."""
    return summary(
        part_sums(tokens, {"model": states}, original)["model"], tokens.numel() - len(tokens), original is not None
    )
