"""Where the halves of a block look for what they have just worked out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rotoboa.boa.attention_half import AttentionHalf

from .small_block import run_small


def test_values_take_what_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what has gone into a buffer for all tokens, which may be on the host while blocks compute on a GPU."""
    buffers: list[Tensor] = []
    given: list[Tensor] = []
    plain = AttentionHalf._add_values

    def empty(*size: int, **options: Any) -> Tensor:
        buffers.append(torch.empty(*size, **options))
        return buffers[-1]

    def add_values(self: AttentionHalf, *args: Any) -> None:
        given.append(args[3])
        plain(self, *args)

    monkeypatch.setattr(AttentionHalf, "_add_values", add_values)
    run_small(empty=empty)
    stored = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert len(given) == 2 and len(buffers) > 2
    assert not stored & {part.untyped_storage().data_ptr() for part in given}
