"""Quantized files: the formats, the bytes and the metadata of llama-quantize, and nothing lost on failure."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_model as tiny
from tiny_model import write_tiny_model

from minillama.blocks import unpack
from minillama.config import ModelConfig, check_tensors
from minillama.gguf import GGUF, GGUFError
from minillama.packers import pack
from minillama.quantize import TARGETS, choose_formats, quantize

pytestmark = pytest.mark.host

REFERENCE = Path(os.environ.get("MINILLAMA_REFERENCE", Path(__file__).parent / "reference"))
FROM_FLOAT = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
FROM_Q6_K = ["Q4_K_M", "Q5_K_M", "Q6_K"]
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight", "bias", "ssm_a", "enorm.weight", "hnorm.weight")
KEPT += ("ffn_gate_inp_shexp.weight",)
CLOSE = {"F32": 0, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 0.01, "Q4_0": 0.12, "Q4_1": 0.11, "Q5_0": 0.06, "Q5_1": 0.06}
CLOSE |= {"Q4_K": 0.11, "Q5_K": 0.06, "Q6_K": 0.03, "Q4_K_M": 0.11, "Q5_K_M": 0.06}  # relative, root mean square


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows of 64 and 32 values: too short for the K formats, as in `ffn_down_exps` of the shipped model."""
    write_tiny_model(tmp_path / "source.gguf", metadata_overrides={"general.file_type": 0})
    return tmp_path / "source.gguf"


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_makes_a_valid_file_near_the_original(tmp_path: Path, source: Path, target: str):
    quantize(source, tmp_path / "out.gguf", target)
    before, after = GGUF(source), GGUF(tmp_path / "out.gguf")
    check_tensors(after, ModelConfig.from_gguf(after))
    for name in before.tensors:
        expected, found = before.values(name), after.values(name)
        error = np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())
        limit = 0 if name.endswith(KEPT) else CLOSE[target]
        assert error <= limit, f"{target} {name} ({after.tensors[name].format.name}): relative error {error:.4f}"


@pytest.mark.parametrize("target", TARGETS)
def test_metadata_is_copied_with_its_types(tmp_path: Path, source: Path, target: str):
    quantize(source, tmp_path / "out.gguf", target)
    before, after = GGUF(source), GGUF(tmp_path / "out.gguf")
    changed = {"general.file_type": TARGETS[target][1], "general.quantization_version": 2}
    assert after.metadata == before.metadata | changed
    assert {key: after.types[key] for key in before.types} == before.types


def test_file_types_are_numbered_as_the_gguf_package_numbers_them():
    for target, (_, number) in TARGETS.items():
        kind = gguf.LlamaFileType(number).name
        assert kind in (f"MOSTLY_{target}", f"ALL_{target}", f"MOSTLY_{target}_S"), f"{target}: {kind}"


def test_rows_that_do_not_divide_fall_back_as_in_llama_quantize(source: Path):
    file = GGUF(source)
    config = ModelConfig.from_gguf(file)
    for target, fallback in (("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("Q4_0", "Q4_0")):
        formats = choose_formats(file, config, target)
        assert formats["blk.0.ffn_down_exps.weight"].name == fallback, target
        assert formats["output.weight"].name == "Q8_0", target  # Q6_K, whose rows are too short here


def test_rows_shorter_than_a_block_of_32_become_f16(tmp_path: Path):
    narrow = {"qwen3next.expert_shared_feed_forward_length": 48}
    shapes = {f"blk.{i}.ffn_{part}_shexp.weight": (48, 64) for i in range(5) for part in ("gate", "up")}
    shapes |= {f"blk.{i}.ffn_down_shexp.weight": (64, 48) for i in range(5)}
    write_tiny_model(tmp_path / "narrow.gguf", shapes=shapes, metadata_overrides=narrow)
    for target in ("Q4_0", "Q4_K_M", "Q8_0"):
        quantize(tmp_path / "narrow.gguf", tmp_path / "out.gguf", target)
        assert GGUF(tmp_path / "out.gguf").tensors["blk.0.ffn_down_shexp.weight"].format.name == "F16", target


def test_a_tied_embedding_gets_the_head_s_format(tmp_path: Path):
    write_tiny_model(tmp_path / "tied.gguf", drop=["output.weight"])
    file = GGUF(tmp_path / "tied.gguf")
    assert choose_formats(file, ModelConfig.from_gguf(file), "Q4_0")["token_embd.weight"].name == "Q8_0"


def test_shards_become_one_file(tmp_path: Path):
    values = write_tiny_model(tmp_path / "tiny.gguf", split_max_tensors=40)
    quantize(tmp_path / "tiny-00002-of-00003.gguf", tmp_path / "out.gguf", "F32")
    file = GGUF(tmp_path / "out.gguf")
    assert not any(key.startswith("split.") for key in file.metadata)
    assert all(np.array_equal(file.values(name), array) for name, array in values.items())


def test_an_alignment_of_64_is_kept(tmp_path: Path):
    values = write_tiny_model(tmp_path / "tiny.gguf", alignment=64)
    quantize(tmp_path / "tiny.gguf", tmp_path / "out.gguf", "F32")
    file = GGUF(tmp_path / "out.gguf")
    assert all(info.offset % 64 == 0 for info in file.tensors.values())
    assert all(np.array_equal(file.values(name), array) for name, array in values.items())


def test_progress_counts_values_up_to_all_of_them(tmp_path: Path, source: Path):
    calls = []
    quantize(source, tmp_path / "out.gguf", "Q8_0", lambda done, total: calls.append((done, total)))
    total = sum(np.prod(shape) for shape in tiny.tensor_shapes(4, True).values())
    assert calls[-1] == (total, total) and len(calls) == len(GGUF(source).tensors)
    assert calls == sorted(calls)


def test_a_file_may_be_quantized_onto_itself(source: Path):
    before = GGUF(source).values("blk.0.attn_norm.weight")
    quantize(source, source, "Q8_0")
    assert GGUF(source).tensors["token_embd.weight"].format.name == "Q8_0"
    assert np.array_equal(GGUF(source).values("blk.0.attn_norm.weight"), before)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, value: float):
    path, out = tmp_path / "wild.gguf", tmp_path / "out.gguf"
    values = write_tiny_model(path)
    data, place = bytearray(path.read_bytes()), GGUF(path).tensors["blk.4.attn_k.weight"].offset
    data[place : place + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
    out.write_bytes(b"what was there before")
    with pytest.raises(GGUFError, match="'blk.4.attn_k.weight' holds"):
        quantize(path, out, "Q4_0")
    assert out.read_bytes() == b"what was there before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "wild.gguf"] and values


def test_unknown_formats_and_places_are_refused_in_one_line(tmp_path: Path, source: Path):
    with pytest.raises(GGUFError, match="unknown format 'Q3_K'; known are F32 F16"):
        quantize(source, tmp_path / "out.gguf", "Q3_K")
    with pytest.raises(GGUFError, match="cannot be written: No such file or directory"):
        quantize(source, tmp_path / "nowhere" / "out.gguf", "Q8_0")
    with pytest.raises(GGUFError, match="cannot be read"):
        quantize(tmp_path / "nothing.gguf", tmp_path / "out.gguf", "Q8_0")


def reference(name: str) -> Path:
    if not (REFERENCE / name).exists():
        pytest.skip(f"{REFERENCE} does not hold {name}; set MINILLAMA_REFERENCE")
    return REFERENCE / name


@pytest.mark.parametrize("target", FROM_FLOAT)
def test_simple_formats_equal_llama_quantize_byte_for_byte(tmp_path: Path, target: str):
    judge = reference(f"ref-a-{target}.gguf")
    quantize(reference("ref-a-F32.gguf"), tmp_path / "out.gguf", target)
    ours, theirs = GGUF(tmp_path / "out.gguf"), GGUF(judge)
    assert ours.metadata == theirs.metadata and ours.types == theirs.types
    for name, info in theirs.tensors.items():
        assert ours.tensors[name].format == info.format, f"{name}: {ours.tensors[name].format.name}"
        assert np.array_equal(ours.raw(name), theirs.raw(name)), f"{target} {name}: bytes differ"
    if target != "F32":  # which llama.cpp's converter wrote, in another order
        assert (tmp_path / "out.gguf").read_bytes() == judge.read_bytes()


@pytest.mark.parametrize("target", FROM_Q6_K)
def test_mixes_give_each_tensor_llama_quantize_s_format(target: str):
    source, theirs = GGUF(reference("ref-k-Q6_K.gguf")), GGUF(reference(f"ref-k-{target}.gguf"))
    formats = choose_formats(source, ModelConfig.from_gguf(source), target)
    assert {name: fmt.name for name, fmt in formats.items()} == {n: t.format.name for n, t in theirs.tensors.items()}


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q5_K_M"])
def test_k_formats_stay_as_near_to_q6_k_weights_as_llama_quantize_s(mix: str):
    """The float weights were not kept; the Q6_K file is the nearest to them, and its own error falls on both alike."""
    near, theirs = GGUF(reference("ref-k-Q6_K.gguf")), GGUF(reference(f"ref-k-{mix}.gguf"))
    for name, info in theirs.tensors.items():
        if info.format.name in mix:
            values = near.values(name)
            ours = np.square(unpack(pack(values, info.format), info.format, info.shape) - values).mean()
            llama = np.square(theirs.values(name) - values).mean()
            assert ours <= 1.02 * llama, f"{name}: mean squared error {ours:.3e}, llama-quantize {llama:.3e}"
