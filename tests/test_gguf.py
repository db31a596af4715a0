"""Our reader of GGUF files against the `gguf` package's, and its refusals."""

import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import vocabulary, write_tiny_model

from minillama.gguf import GGUF, GGUFError

pytestmark = pytest.mark.host

HERE = Path(__file__).parent
REFERENCE = Path(os.environ.get("MINILLAMA_REFERENCE", HERE / "reference"))
VOCABULARY = REFERENCE / "ggml-vocab-qwen2.gguf"
needs_vocabulary = pytest.mark.skipif(not VOCABULARY.exists(), reason=f"{VOCABULARY} is not there")
V = gguf.GGUFValueType
LIMITS = {V.UINT8: (0, 2**8), V.INT8: (-(2**7), 2**7), V.UINT16: (0, 2**16), V.INT16: (-(2**15), 2**15)}
LIMITS |= {V.UINT32: (0, 2**32), V.INT32: (-(2**31), 2**31), V.UINT64: (0, 2**64), V.INT64: (-(2**63), 2**63)}


def assert_equals_the_package(path: Path) -> None:
    """Metadata, types, tensors and their raw bytes as `gguf.GGUFReader` sees them."""
    ours, theirs = GGUF(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        value, expected = ours.metadata[key], field.contents()
        assert same(value, expected), f"{key} is {value!r:.80}, the judge says {expected!r:.80}"
        assert ours.types[key] == tuple(kind.value for kind in field.types), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist())), tensor.name
        assert (info.format.name, info.offset) == (tensor.tensor_type.name, tensor.data_offset), tensor.name
        assert np.array_equal(ours.raw(tensor.name), tensor.data.reshape(-1).view(np.uint8)), tensor.name


def same(a: Any, b: Any) -> bool:
    """Equal, and NaN equal to NaN; types as Python writes them (True is not 1)."""
    return repr(a) == repr(b)


@pytest.mark.parametrize("format", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_file_reads_as_the_gguf_package_reads_it(tmp_path: Path, format: str):
    values = write_tiny_model(tmp_path / "tiny.gguf", format=format)
    assert_equals_the_package(tmp_path / "tiny.gguf")
    if format == "F32":
        file = GGUF(tmp_path / "tiny.gguf")
        assert all(np.array_equal(file.values(name), array) for name, array in values.items())


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("ref-*.gguf")), ids=lambda path: path.name)
def test_reference_files_read_as_the_gguf_package_reads_them(path: Path):
    if "-split-" not in path.name:
        assert_equals_the_package(path)


@needs_vocabulary
def test_the_real_vocabulary_of_151936_entries_opens_within_a_second():
    start = time.process_time()     # the processor's: other work on the machine does not count
    file = GGUF(VOCABULARY)
    seconds = time.process_time() - start
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 151936 and not file.tensors
    assert seconds < 1, f"{seconds:.2f} s"


def test_the_qwen2_vocabulary_file_without_tensors_opens(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "qwen2")
    writer.add_array("tokenizer.ggml.tokens", vocabulary())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = GGUF(tmp_path / "vocab.gguf")
    assert file.metadata == {"general.architecture": "qwen2", "tokenizer.ggml.tokens": vocabulary()}


scalars = st.one_of(
    *(st.tuples(st.just(k), st.integers(low, high - 1)) for k, (low, high) in LIMITS.items()),
    st.tuples(st.just(V.FLOAT32), st.floats(width=32)),
    st.tuples(st.just(V.FLOAT64), st.floats()),
    st.tuples(st.just(V.BOOL), st.booleans()),
    st.tuples(st.just(V.STRING), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
)
lists = st.one_of(
    *(st.tuples(st.just(k), st.lists(st.integers(low, high - 1), min_size=1)) for k, (low, high) in LIMITS.items()),
    st.tuples(st.just(V.FLOAT32), st.lists(st.floats(width=32), min_size=1)),
    st.tuples(st.just(V.BOOL), st.lists(st.booleans(), min_size=1)),
    st.tuples(st.just(V.STRING), st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1)),
)
keys = st.text("abcdefghijklmnop._0123456789", min_size=1, max_size=30).filter(lambda key: key != "general.alignment")


@settings(max_examples=60, deadline=None)
@given(
    single=st.dictionaries(keys, scalars, max_size=6),
    several=st.dictionaries(keys, lists, max_size=4),
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5),
    alignment=st.sampled_from([8, 16, 32, 64, 4096]),
)
def test_any_metadata_and_tensors_survive_the_way_through_a_file(tmp_path_factory, single, several, shapes, alignment):
    path = tmp_path_factory.mktemp("any") / "any.gguf"
    writer = gguf.GGUFWriter(path, "anything")
    writer.add_custom_alignment(alignment)
    for key, (kind, value) in single.items():
        writer.add_key_value(f"one.{key}", value, kind)
    for key, (kind, value) in several.items():
        writer.add_key_value(f"many.{key}", value, V.ARRAY, sub_type=kind)
    for i, shape in enumerate(shapes):
        writer.add_tensor(f"tensor {i}", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if shapes:
        assert_equals_the_package(path)
    file = GGUF(path)
    for key, (kind, value) in single.items():
        assert same(file.metadata[f"one.{key}"], value) and file.types[f"one.{key}"] == (kind.value,)
    for key, (kind, value) in several.items():
        assert same(file.metadata[f"many.{key}"], value) and file.types[f"many.{key}"] == (9, kind.value)


def test_raw_is_a_view_of_the_map_and_cannot_be_written(tmp_path: Path):
    write_tiny_model(tmp_path / "tiny.gguf")
    raw = GGUF(tmp_path / "tiny.gguf").raw("output.weight")
    assert not raw.flags.owndata and not raw.flags.writeable
    assert raw.nbytes == len(vocabulary()) * 64 * 4


def test_any_shard_opens_all_of_them_and_they_equal_the_whole(tmp_path: Path):
    write_tiny_model(tmp_path / "whole.gguf")
    write_tiny_model(tmp_path / "tiny.gguf", split_max_tensors=40)
    whole, paths = GGUF(tmp_path / "whole.gguf"), sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(paths) == 3
    for path in paths:
        file = GGUF(path)
        assert file.paths == tuple(paths)
        assert {key: v for key, v in file.metadata.items() if not key.startswith("split.")} == whole.metadata
        assert list(file.tensors) == list(whole.tensors)
        assert all(np.array_equal(file.raw(name), whole.raw(name)) for name in whole.tensors)


SHARDS = sorted(REFERENCE.glob("ref-a-F16-split-*.gguf"))


@pytest.mark.skipif(len(SHARDS) != 3 or not (REFERENCE / "ref-a-F16.gguf").exists(), reason="no reference shards")
@pytest.mark.parametrize("path", SHARDS, ids=lambda path: path.name)
def test_shards_split_by_llama_cpp_equal_the_whole_file(path: Path):
    file, whole = GGUF(path), GGUF(REFERENCE / "ref-a-F16.gguf")
    assert list(file.tensors) == list(whole.tensors)
    assert all(np.array_equal(file.raw(name), whole.raw(name)) for name in whole.tensors)
    assert file.metadata.items() >= whole.metadata.items()


def test_broken_sets_of_shards_are_refused(tmp_path: Path):
    write_tiny_model(tmp_path / "tiny.gguf", split_max_tensors=40)
    first, second, third = sorted(tmp_path.glob("tiny-*.gguf"))
    lone = tmp_path / "lone.gguf"
    lone.write_bytes(first.read_bytes())
    refused(lone, r"one of 3 shards, so its name must end in -0000i-of-00003\.gguf")
    kept = {path: path.read_bytes() for path in (second, third)}
    second.unlink()
    refused(first, "shard tiny-00002-of-00003.gguf is missing beside it")
    second.write_bytes(kept[third])
    refused(first, r"do not say shard 1 \(from 0\) of 3")
    write_tiny_model(tmp_path / "other.gguf", split_max_tensors=40, mtp=False, layers=5)
    second.write_bytes((tmp_path / "other-00002-of-00003.gguf").read_bytes())
    refused(first, "is there twice|split.tensors.count")


def refused(path: Path, message: str) -> None:
    with pytest.raises(GGUFError, match=message) as caught:
        GGUF(path)
    assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)


def header(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def test_version_2_is_read_and_others_are_refused(tmp_path: Path):
    path = tmp_path / "version.gguf"
    path.write_bytes(header(2, keys=1) + text("general.name") + struct.pack("<I", 8) + text("old"))
    assert GGUF(path).metadata == {"general.name": "old"}
    for version, message in ((1, "version 1 is too old"), (4, "version 4 is unknown"), (0, "version 0 is too old")):
        path.write_bytes(header(version))
        refused(path, message)
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    refused(path, "big-endian")


def test_what_is_no_gguf_file_is_refused(tmp_path: Path):
    path = tmp_path / "some.gguf"
    refused(path, "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"PK\3\4 a zip archive")
    refused(path, "not a GGUF file")
    path.write_bytes(b"GGUF\3")
    refused(path, "runs past the end")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (text("a") + struct.pack("<IB", 0, 1) + text("a") + struct.pack("<IB", 0, 1), "'a': is there twice"),
        (text("a") + struct.pack("<IB", 7, 2) + bytes(20), "truth value is 2"),
        (text("a") + struct.pack("<IIQ", 9, 7, 2) + b"\1\7" + bytes(20), "truth value is 7"),
        (text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(40), "neither a number nor a string"),
        (text("a") + struct.pack("<I", 13) + bytes(40), "unknown type 13"),
        (text("a") + struct.pack("<IQ", 8, 2) + b"\xff\xfe" + bytes(40), "not valid UTF-8"),
        (text("a") + struct.pack("<IQ", 8, 2**63) + bytes(40), "runs past the end"),
        (text("a") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(40), "a list of 4611686018427387904 numbers"),
        (text("a") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(40), "a list of 2305843009213693952 strings"),
        (struct.pack("<Q", 2**64 - 1) + bytes(40), "has 18446744073709551615 bytes, more than 4096"),
        (text("new\nline") + struct.pack("<I", 99) + bytes(40), r"'new\\nline'"),
    ],
)
def test_broken_metadata_is_refused_with_the_key_named(tmp_path: Path, body: bytes, message: str):
    path = tmp_path / "broken.gguf"
    path.write_bytes(header(keys=2) + body)
    refused(path, message)


def tensor(name: str, dims: list[int], code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor("a", [8]), tensor("a", [8], offset=32)], "'a' is there twice"),
        ([tensor("a", [8]), tensor("b", [8], offset=0)], "'b': its data at offset 0 overlaps"),
        ([tensor("a", [8]), tensor("b", [8], offset=64)], "'b': its data at offset 64 leaves a gap"),
        ([tensor("a", [8]), tensor("b", [8], offset=33)], "'b': its data at offset 33 leaves a gap"),
        ([tensor("a", [8]), tensor("b", [64], offset=32)], "'b': its data ends at byte .* truncated"),
        ([tensor("a", [8]), tensor("b", [2**63, 4], offset=32)], "'b': its data ends at byte"),
        ([tensor("a", [8]), tensor("b", [8], offset=32)], "'b': it is the last and ends at byte .* goes on"),
        ([tensor("a", [8], code=99)], "format code 99 is not one of those read here: F32 F16"),
        ([tensor("a", [8], code=2)], "rows have 8 values, not a multiple of Q4_0's 32"),
        ([tensor("a", [8, 0])], r"shape \(0, 8\) is empty"),
        ([tensor("a", [])], "has 0 dimensions"),
        ([tensor("a", [1] * 5)], "has 5 dimensions"),
    ],
)
def test_broken_tensors_are_refused_with_the_tensor_named(tmp_path: Path, tensors: list[bytes], message: str):
    path, body = tmp_path / "broken.gguf", header(tensors=len(tensors)) + b"".join(tensors)
    path.write_bytes(body + bytes(-len(body) % 32) + bytes(65 if "last" in message else 64))
    refused(path, message)


def test_data_where_padding_should_be_is_refused(tmp_path: Path):
    """So a float32 tensor of 4 values that is called half precision is found out, though both fill 32 bytes."""
    body = header(tensors=2) + tensor("a", [4], code=1) + tensor("b", [2], code=1, offset=32)
    wrong = {"the padding before it": b"\1" * 16 + bytes(20), "it is the last": bytes(36) + b"\1"}
    for message, data in wrong.items():
        (tmp_path / "padding.gguf").write_bytes(body + bytes(-len(body) % 32) + data)
        refused(tmp_path / "padding.gguf", message)
    (tmp_path / "padding.gguf").write_bytes(body + bytes(-len(body) % 32) + b"\1" * 8 + bytes(24) + b"\1" * 4)
    assert list(GGUF(tmp_path / "padding.gguf").tensors) == ["a", "b"]


@pytest.mark.parametrize("alignment", [0, 1, 3, 48, 2**31])
def test_alignments_that_are_no_sane_power_of_two_are_refused(tmp_path: Path, alignment: int):
    write_tiny_model(tmp_path / "tiny.gguf", metadata_overrides={"general.alignment": alignment})
    refused(tmp_path / "tiny.gguf", "'general.alignment': is .* not a power of two")


def test_an_alignment_of_64_is_honoured(tmp_path: Path):
    values = write_tiny_model(tmp_path / "tiny.gguf", alignment=64)
    file = GGUF(tmp_path / "tiny.gguf")
    assert all(info.offset % 64 == 0 for info in file.tensors.values())
    assert all(np.array_equal(file.values(name), array) for name, array in values.items())


def test_asking_for_a_tensor_that_is_not_there_names_it(tmp_path: Path):
    write_tiny_model(tmp_path / "tiny.gguf")
    with pytest.raises(GGUFError, match="there is no tensor 'nothing'"):
        GGUF(tmp_path / "tiny.gguf").values("nothing")
