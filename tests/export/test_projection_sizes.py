"""Rows and columns of projections, as they are counted without a model."""

import pytest

from rotoboa.boa.online.attention import NAME
from rotoboa.export.finished import numbers_in_blocks, projection_columns, projection_rows
from rotoboa.models.decoder import Decoder
from rotoboa.tests.small_families import FAMILIES, family_config


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_those_of_the_modules(name: str) -> None:
    decoder = Decoder(family_config(name), attention=NAME)
    family, shape = decoder.family, decoder.shape
    numbers = 0
    for index in range(shape.blocks):
        rows, columns = projection_rows(family, shape, index), projection_columns(family, shape, index)
        block = decoder.empty_block(index)
        for layer in family.at(index).projections:
            weight = block.get_parameter(f"{layer}.weight")
            assert weight.shape == (rows[layer], columns[layer])
            numbers += weight.numel()
    assert numbers_in_blocks(family, shape) == numbers
