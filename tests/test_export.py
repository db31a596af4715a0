"""Tests of export.py: a file has the keys and types of llama.cpp's converter, and this project reads it back."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer as Reference

from minillama.config import ModelConfig, check_tensors
from minillama.export import model_config, size_label, tensor_shapes, write_model
from minillama.gguf import GGUF
from minillama.tokenizer import Tokenizer

pytestmark = pytest.mark.host

VOCABULARY = Path(__file__).parents[1] / "data" / "tokenizer.json"
FOLDER = Path(os.environ.get("MINILLAMA_REFERENCE", Path(__file__).parent / "reference"))
CONVERTED = FOLDER / "ref-a-F16.gguf" if (FOLDER / "ref-a-F16.gguf").exists() else FOLDER / "ref-a-F32.gguf"
CONFIG = model_config("Little", layers=4, hidden=64, head_dim=32, rope_dim=8, state_dim=16, experts=4, experts_used=2,
                      expert_width=32, shared_width=32)


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(CONFIG)


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "little.gguf"
    write_model(path, CONFIG, tensors, VOCABULARY, name="Little")
    return path


def test_the_numbers_come_back_from_the_file(path):
    file = GGUF(path)
    check_tensors(file, CONFIG)
    assert ModelConfig.from_gguf(file) == CONFIG


def test_the_weights_come_back_to_the_bit(path, tensors):
    file = GGUF(path)
    assert file.tensors.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(file.values(name), values, err_msg=name)


def test_every_key_of_a_converted_file_is_there_with_its_type(path):
    ours, theirs = GGUF(path), GGUF(CONVERTED)
    wrong = {key: (ours.types.get(key), kind) for key, kind in theirs.types.items() if ours.types.get(key) != kind}
    assert not wrong, f"key: (our type, llama.cpp's): {wrong}"
    more = ours.types.keys() - theirs.types.keys()
    assert more == {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token"}  # as Qwen's own files have them


def test_tensors_have_the_names_and_ranks_of_a_converted_file():
    theirs = GGUF(CONVERTED)
    config = ModelConfig.from_gguf(theirs)
    expected = {name: tuple(n for n in info.shape if n > 1) for name, info in theirs.tensors.items()}
    assert tensor_shapes(config) == expected


def test_half_precision_keeps_what_a_converted_file_keeps_in_single(tmp_path, tensors):
    converted = FOLDER / "ref-a-F16.gguf"
    if not converted.exists():
        pytest.skip("MINILLAMA_REFERENCE does not name the folder that holds ref-a-F16.gguf")
    write_model(tmp_path / "half.gguf", CONFIG, tensors, VOCABULARY, name="Little", format="F16")
    ours, theirs = GGUF(tmp_path / "half.gguf"), GGUF(converted)
    shared = [name for name in ours.tensors if not name.startswith("blk.4.")]  # our MTP block is their fifth layer
    assert {n: ours.tensors[n].format for n in shared} == {n: theirs.tensors[n].format for n in shared}
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]


def test_size_label_counts_as_the_converter_does():
    file = GGUF(CONVERTED)
    tensors = {name: np.empty(info.shape, np.int8) for name, info in file.tensors.items()}
    assert size_label(tensors) == file.metadata["general.size_label"]


def test_the_vocabulary_encodes_as_the_library_that_made_it(path):
    ours, theirs = Tokenizer.from_gguf(GGUF(path)), Reference.from_file(str(VOCABULARY))
    text = 'def f(x: int) -> str:\n    """Größe 12345 €."""\n\treturn x  # 你好\n'
    text += "<|endoftext|><|im_start|>user\nHi<|im_end|>\n"
    ids = theirs.encode(text).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text
    assert ours.tokens == [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
    assert ours.stops == {theirs.token_to_id("<|endoftext|>"), theirs.token_to_id("<|im_end|>")}


def test_the_chat_template_renders_chatml(path):
    tokenizer = Tokenizer.from_gguf(GGUF(path))
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_gguf_package_reads_the_file(path):
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "qwen3next"
    assert len(reader.tensors) == len(tensor_shapes(CONFIG))


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_wrong_tensors_are_refused_before_anything_is_written(damage, tensors, tmp_path):
    bad = dict(tensors)
    name = "blk.0.attn_qkv.weight"
    if damage == "missing":
        del bad[name]
    else:
        bad[name] = bad[name][:-1] if damage == "shape" else bad[name] * np.nan
    with pytest.raises(ValueError, match=name):
        write_model(tmp_path / "bad.gguf", CONFIG, bad, VOCABULARY, name="Bad")
    assert not list(tmp_path.iterdir())


def test_the_shipped_model_has_about_20_million_parameters():
    shapes = tensor_shapes(model_config("Shipped")).values()
    count = sum(int(np.prod(shape)) for shape in shapes)
    assert 19e6 < count < 22e6, f"{count:,}"
