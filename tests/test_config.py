"""ModelConfig: read right, and refused where it is missing, absurd, or at odds with itself or the tensors."""

import math
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_model as tiny
from tiny_model import write_tiny_model

from minillama.config import ModelConfig, check_tensors, expected_tensors
from minillama.gguf import GGUF, GGUFError

pytestmark = pytest.mark.host

V = gguf.GGUFValueType
REFERENCE = Path(os.environ.get("MINILLAMA_REFERENCE", Path(__file__).parent / "reference"))
OPTIONAL = {
    "nextn_predict_layers": "not part of",  # its tensors would be left out: check_tensors says so
    "attention.value_length": None,
    "ssm.inner_size": None,
    "full_attention_interval": None,
    "attention.recurrent_layers": None,
}
REQUIRED = [key for key in tiny.metadata(4, True) if key.startswith("qwen3next.")]
REQUIRED = [key for key in REQUIRED if key.removeprefix("qwen3next.") not in OPTIONAL]


def load(path: Path, **changes: Any) -> ModelConfig:
    """The configuration of a tiny model with these changes, its tensors checked."""
    write_tiny_model(path, **changes)
    file = GGUF(path)
    config = ModelConfig.from_gguf(file)
    check_tensors(file, config)
    return config


def refused(path: Path, message: str, **changes: Any) -> None:
    with pytest.raises(GGUFError, match=message) as caught:
        load(path, **changes)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def test_every_field_is_read(path: Path):
    config = load(path)
    assert config == ModelConfig(
        name="Tiny",
        layers=4,
        mtp_blocks=1,
        context=tiny.CONTEXT,
        hidden=tiny.HIDDEN,
        vocab=len(tiny.vocabulary()),
        norm_eps=config.norm_eps,
        heads=tiny.HEADS,
        kv_heads=tiny.KV_HEADS,
        head_dim=tiny.HEAD_DIM,
        rope_dim=tiny.ROPE_DIM,
        rope_base=10000.0,
        k_heads=tiny.K_HEADS,
        v_heads=tiny.V_HEADS,
        state_dim=tiny.STATE_DIM,
        conv_width=tiny.CONV_WIDTH,
        experts=tiny.EXPERTS,
        experts_used=tiny.EXPERTS_USED,
        expert_width=tiny.EXPERT_WIDTH,
        shared_width=tiny.SHARED_WIDTH,
        recurrent=(True, True, True, False),
    )
    assert math.isclose(config.norm_eps, 1e-6, rel_tol=1e-6)
    assert (config.key_width, config.value_width, config.conv_channels) == (32, 64, 128)


def test_a_model_without_a_prediction_block_has_all_blocks_as_layers(path: Path):
    config = load(path, mtp=False, layers=6)
    assert (config.layers, config.mtp_blocks) == (6, 0)
    assert config.recurrent == (True, True, True, False, True, True)


@pytest.mark.parametrize("interval", [4, None])
def test_the_interval_serves_where_the_list_is_missing_and_4_where_both_are(path: Path, interval: int | None):
    changes = {"qwen3next.attention.recurrent_layers": None, "qwen3next.full_attention_interval": interval}
    assert load(path, metadata_overrides=changes).recurrent == (True, True, True, False)


def test_the_list_may_leave_the_prediction_block_out_and_beats_the_interval(path: Path):
    flags = [True, True, True, False]
    changes = {"qwen3next.attention.recurrent_layers": flags, "qwen3next.full_attention_interval": 3}
    assert load(path, metadata_overrides=changes).recurrent == tuple(flags)


def test_an_embedding_without_a_head_and_a_head_in_the_prediction_block_are_accepted(path: Path):
    load(path, drop=["output.weight"])
    table = (len(tiny.vocabulary()), tiny.HIDDEN)
    load(path, extra={"blk.4.nextn.embed_tokens.weight": table, "blk.4.nextn.shared_head_head.weight": table})
    refused(path, "has shape", extra={"blk.4.nextn.embed_tokens.weight": (5, tiny.HIDDEN)})


def test_the_older_fused_projection_is_accepted(path: Path):
    fused = {f"blk.{i}.ssm_in.weight": (192, tiny.HIDDEN) for i in range(3)}
    separate = [f"blk.{i}.attn_{part}.weight" for i in range(3) for part in ("qkv", "gate")]
    load(path, drop=separate, extra=fused)
    refused(path, "attn_gate.weight' is not part of", extra=fused)


def test_the_shared_gate_may_be_stored_as_a_matrix_of_one_row(path: Path):
    load(path, shapes={"blk.0.ffn_gate_inp_shexp.weight": (1, tiny.HIDDEN)})
    refused(path, "has shape", shapes={"blk.0.ffn_gate_inp_shexp.weight": (tiny.HIDDEN, 1)})


@pytest.mark.parametrize("path_", sorted(REFERENCE.glob("ref-?-*.gguf")), ids=lambda path: path.name)
def test_reference_models_hold_exactly_the_expected_tensors(path_: Path):
    file = GGUF(path_)
    config = ModelConfig.from_gguf(file)
    check_tensors(file, config)
    assert set(expected_tensors(config, file.tensors)) == set(file.tensors)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(path: Path, key: str):
    refused(path, f"'{key}' is missing", drop=[key])


@pytest.mark.parametrize("key", OPTIONAL)
def test_an_optional_key_may_be_missing_where_the_tensors_allow_it(path: Path, key: str):
    if OPTIONAL[key]:
        refused(path, OPTIONAL[key], drop=[f"qwen3next.{key}"])
    else:
        load(path, drop=[f"qwen3next.{key}"])


EACH_KIND = [name for name in tiny.tensor_shapes(4, True) if not name.startswith(("output.", "blk.1.", "blk.2."))]


@pytest.mark.parametrize("name", EACH_KIND)
def test_a_missing_a_misshapen_and_a_misnamed_tensor_are_each_named(path: Path, name: str):
    shape = tiny.tensor_shapes(4, True)[name]
    missing = f"'{name}' .* is missing"
    if name == "token_embd.weight":  # whose rows are the size of the vocabulary
        refused(path, "rows, the vocabulary", shapes={name: (shape[0] + 1, shape[1])})
    else:
        refused(path, f"'{name}' has shape", shapes={name: (shape[0] + 1, *shape[1:])})
    refused(path, f"'{name}' has shape", shapes={name: (*shape[:-1], shape[-1] + 1)}) if len(shape) > 1 else None
    refused(path, missing, drop=[name])
    refused(path, missing, rename={name: name.replace("weight", "weighs") + "x"})


def test_a_tensor_that_the_model_would_leave_out_is_refused(path: Path):
    refused(path, "'outpuu.weight' is not part of", rename={"output.weight": "outpuu.weight"})
    refused(path, "'blk.3.attn_q.bias' is not part of", extra={"blk.3.attn_q.bias": (128,)})


@pytest.mark.parametrize("architecture", ["qwen2", "", (V.UINT32, 3), None])
def test_another_architecture_is_refused_with_the_supported_ones_named(path: Path, architecture: Any):
    refused(path, "architecture .* supported: qwen3next", metadata_overrides={"general.architecture": architecture})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 0, "is 0, not from 1"),
        ("block_count", 1, "is 1, not from 0 to 0"),
        ("block_count", 2**31, "is 2147483648, not from"),
        ("block_count", 6, "'blk.5.attn_norm.weight' .* is missing"),
        ("block_count", 7, "has 5 entries for 6 layers, 7 blocks"),
        ("block_count", 4, "entries for 3 layers"),
        ("nextn_predict_layers", 2, "is 2, not from 0 to 1"),
        ("nextn_predict_layers", -1, "is -1, not from 0 to 1"),
        ("context_length", 0, "is 0, not from 1"),
        ("context_length", 2**30, "not from 1 to 16777216"),
        ("embedding_length", 128, "has shape"),
        ("embedding_length", -64, "is -64"),
        ("embedding_length", 64.0, "is 64.0, not an integer"),
        ("embedding_length", "64", "is '64', not an integer"),
        ("embedding_length", True, "is True, not an integer"),
        ("embedding_length", [64], r"is \[64\], not an integer"),
        ("attention.head_count", 0, "is 0, not from 1"),
        ("attention.head_count", 4, "has shape"),
        ("attention.head_count_kv", 0, "is 0, not from 1"),
        ("attention.head_count_kv", 3, "2 heads cannot share them"),
        ("attention.key_length", 64, "attention.value_length' is 32, the key length 64"),
        ("attention.value_length", 16, "is 16, the key length 32"),
        ("attention.layer_norm_rms_epsilon", math.nan, "is nan, not from"),
        ("attention.layer_norm_rms_epsilon", 0.0, "is 0.0, not from"),
        ("attention.layer_norm_rms_epsilon", -1e-6, "not from"),
        ("attention.layer_norm_rms_epsilon", 1.0, "not from"),
        ("attention.layer_norm_rms_epsilon", "1e-6", "not a number"),
        ("rope.freq_base", math.nan, "is nan, not from"),
        ("rope.freq_base", math.inf, "is inf, not from"),
        ("rope.freq_base", -10000.0, "is -10000.0, not from"),
        ("rope.freq_base", 0.0, "is 0.0, not from"),
        ("rope.dimension_count", 0, "is 0, not from 1"),
        ("rope.dimension_count", 7, "which is odd"),
        ("rope.dimension_count", 64, "above the head's 32"),
        ("rope.scaling.type", "yarn", "rope scaling is not supported"),
        ("rope.scaling.factor", math.nan, "is nan"),
        ("expert_count", 0, "is 0, not from 1"),
        ("expert_count", 8, "has shape"),
        ("expert_used_count", 0, "is 0, not from 1"),
        ("expert_used_count", 5, "is 5 of 4 experts"),
        ("expert_feed_forward_length", 64, "has shape"),
        ("expert_shared_feed_forward_length", 64, "has shape"),
        ("ssm.conv_kernel", 1, "is 1, not from 2 to 9"),
        ("ssm.conv_kernel", 20, "is 20, not from 2 to 9"),
        ("ssm.conv_kernel", 3, "has shape"),
        ("ssm.state_size", 0, "is 0, not from 1"),
        ("ssm.state_size", 32, "ssm.inner_size' is 64, not 4 value heads of 32"),
        ("ssm.group_count", 3, "4 value heads cannot share them"),
        ("ssm.group_count", 4, "has shape"),
        ("ssm.time_step_rank", 8, "ssm.inner_size' is 64, not 8"),
        ("ssm.inner_size", 65, "is 65, not 4"),
        ("full_attention_interval", 0, "is 0, not from 1"),
        ("attention.recurrent_layers", [True] * 3, "has 3 entries for 4 layers, 5 blocks"),
        ("attention.recurrent_layers", [True] * 5, "calls an MTP block recurrent"),
        ("attention.recurrent_layers", [True] * 4, "'blk.3.attn_qkv.weight' .* is missing"),
        ("attention.recurrent_layers", ["yes"] * 4, "not a list of truth values"),
        ("attention.recurrent_layers", [2, 1, 1, 0], "not a list of truth values"),
        ("attention.recurrent_layers", 1, "not a list of truth values"),
    ],
)
def test_an_absurd_or_inconsistent_value_is_refused(path: Path, key: str, value: Any, message: str):
    refused(path, message, metadata_overrides={f"qwen3next.{key}": value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.name", 7, "'general.name' is 7, not a string"),
        ("tokenizer.ggml.tokens", ["a", "b"], "has 266 rows, the vocabulary 2 entries"),
        ("tokenizer.ggml.tokens", [1, 2], "not a list of strings"),
        ("tokenizer.ggml.tokens", "abc", "not a list of strings"),
    ],
)
def test_a_vocabulary_or_name_that_cannot_be_is_refused(path: Path, key: str, value: Any, message: str):
    refused(path, message, metadata_overrides={key: value})


def test_scaling_that_changes_nothing_is_accepted(path: Path):
    load(path, metadata_overrides={"qwen3next.rope.scaling.type": "none", "qwen3next.rope.scaling.factor": 4.0})
    load(path, metadata_overrides={"qwen3next.rope.scaling.type": "linear", "qwen3next.rope.scaling.factor": 1.0})
    refused(path, "with factor 4", metadata_overrides={"qwen3next.rope.scaling.factor": 4.0})
