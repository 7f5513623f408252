"""What the fallback finds of a model without a row, and what it refuses by name."""

from typing import Any

import pytest
from transformers import AutoConfig

from rotoboa.errors import InputError
from rotoboa.models.families import FAMILIES, family_for
from rotoboa.models.generic.generic_family import generic_family
from rotoboa.tests.generic_models import GENERIC, generic_config


def _found(name: str, **fields: Any) -> Any:
    return family_for(generic_config(name, **fields), "it")


def test_layers_in_the_order_in_which_they_run() -> None:
    """Those that read one tensor are together, though the class names them in another order."""
    query_key_value = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert _found("helium").groups == (
        query_key_value,
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    # Attention and MLP of Cohere read one norm.
    assert _found("cohere").groups[0] == (*query_key_value, "mlp.gate_proj", "mlp.up_proj")
    assert _found("helium").sizes["mlp.down_proj"] == (32, 48)
    own = [name.replace("self_attn", "attn") for name in query_key_value]
    assert list(_found("gptj").sites) == [*own, "mlp.fc_in", "attn.out_proj", "mlp.fc_out"]


def test_what_is_outside_the_blocks() -> None:
    """Two of them have a row by now: what would be found without it is the same."""
    bloom, bigcode = generic_family(generic_config("bloom", n_head=4, n_layer=2), "it"), _found("gpt_bigcode")
    assert (bloom.embedding, bloom.final_norm, bloom.head) == (
        "transformer.word_embeddings",
        "transformer.ln_f",
        "lm_head",
    )
    assert bloom.others == tuple(f"transformer.word_embeddings_layernorm.{part}" for part in ("weight", "bias"))
    assert bigcode.others == ("transformer.wpe.weight",)
    assert generic_family(generic_config("gpt_neox"), "it").renamed == ((r"^embed_out\.", "lm_head."),)


def test_small_layers_stay() -> None:
    """What decides rather than computes: Mamba's steps are made from few numbers by a layer that is not called."""
    assert "mixer.dt_proj" not in _found("mamba").sites


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "falcon_h1",
            {"mamba_n_heads": 4},
            r"its blocks do not run by themselves \(ValueError: mup_vector of its Falcon",
        ),
        ("gpt2", {}, "it is no list of blocks with linear layers"),
        ("olmo", {}, "between its last block and its output layer there is something else than one norm"),
        (
            "inkling_text",
            {"n_routed_experts": 4, **dict.fromkeys(("layer_types", "mlp_layer_types"))},
            "its embedding has a layer of its own inside",
        ),
        ("bert-generation", {"is_decoder": True}, "between its last block and its output layer there is"),
        (
            "jamba",
            {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
            "its blocks are of several kinds",
        ),
    ],
)
def test_refused_by_name(name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^it is a '{name}' model, which has no row of its own, and {words}"):
        family_for(generic_config(name, **fields), "it")


def test_encoders_are_refused_as_before() -> None:
    config = AutoConfig.for_model("bert")
    with pytest.raises(InputError, match="is a 'bert' model, which is not supported; supported architectures"):
        family_for(config, "it")


def test_none_of_the_small_models_has_a_row() -> None:
    assert not set(GENERIC) & set(FAMILIES)
