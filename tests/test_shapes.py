"""Real models by name, and random weights of their shapes."""
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Context, GlobalCounters, dtypes

from minillama.config import ModelConfig
from minillama.engine import Engine
from minillama.gguf import GGUF
from minillama.kernels.layouts import LAYOUTS
from minillama.quantize import quantize
from minillama.recipe import Recipe
from minillama.shapes import (
    SHAPES,
    RandomWeights,
    check_format,
    hashed,
    parameters,
    random_packed,
    random_weights,
    shape_config,
    tensors_of,
    unfilled,
    weight_bytes,
)
from minillama.weights import load_weights

REFERENCE = Path(__file__).parent / "reference" / "ref-a-F32.gguf"
PUBLISHED, ACTIVE = 79.67e9, 3.87e9     # Qwen3-Next-80B-A3B: parameters, and those that work on one token


@pytest.mark.host
def test_the_80b_has_as_many_parameters_as_published():
    config = shape_config("qwen3-next-80b-a3b")
    total, expert = parameters(config), 3 * config.expert_width * config.hidden
    active = total - config.layers * (config.experts - config.experts_used) * expert
    assert (round(total / 1e9, 2), round(active / 1e9, 2)) == (PUBLISHED / 1e9, ACTIVE / 1e9), (total, active)


@pytest.mark.host
@pytest.mark.parametrize("layers, attention", [(None, 12), (8, 2), (6, 1), (3, 0)])
def test_fewer_layers_keep_the_pattern(layers, attention):
    config = shape_config("qwen3-coder-next", layers, mtp=True)
    assert (config.layers, config.mtp_blocks, config.rope_base) == (layers or 48, 1, 5e6)
    found = [index for index, recurrent in enumerate(config.recurrent) if not recurrent]
    assert found == [4 * i + 3 for i in range(attention)]


@pytest.mark.host
def test_unknown_names_are_refused_in_one_line_that_lists_the_known():
    with pytest.raises(ValueError, match=f"^unknown shape 'gpt': the shapes are {', '.join(SHAPES)}$"):
        shape_config("gpt")
    with pytest.raises(ValueError, match=r"^--format Q4_0: random weights come in F32, F16 \(packed .*packed\)$"):
        check_format("Q4_0", packed=False)
    with pytest.raises(ValueError, match="^--format Q2_K: random weights come in F32, .*, Q6_K, Q4_K_M, Q5_K_M$"):
        check_format("Q2_K", packed=True)
    with pytest.raises(ValueError, match="^--format Q4_K_M: random weights come in F32, F16, BF16, Q8_0, .*, Q6_K$"):
        check_format("Q4_K_M", packed=True, mixes=())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_random_weights_have_the_shapes_of_loaded_ones(fused, packed):
    file = GGUF(REFERENCE)
    config = ModelConfig.from_gguf(file)
    random = RandomWeights(config, "F32", fused, packed, unfilled()).model()
    loaded = load_weights(file, config, fused, packed)
    assert [t.shape for t in tensors_of(random)] == [t.shape for t in tensors_of(loaded)]
    assert [f.name for f in fields(random) if getattr(random, f.name) is None] == []
    assert parameters(config, file.tensors) == sum(math.prod(tensor.shape) for tensor in file.tensors.values())


@pytest.mark.parametrize("format", ["Q4_0", "Q4_K_M", "Q5_K_M"])
def test_packed_random_weights_are_in_the_formats_of_a_quantized_file(format, tmp_path):
    quantize(REFERENCE, tmp_path / "model.gguf", format)
    file = GGUF(tmp_path / "model.gguf")
    config = ModelConfig.from_gguf(file)
    maker = RandomWeights(config, format, True, True, unfilled())
    random, loaded = ([(tensor.shape, tensor.dtype) for tensor in tensors_of(record)]
                      for record in (maker.model(), load_weights(file, config, True, True)))
    assert random == loaded and len(set(maker.formats.values())) > 1


def test_values_are_spread_evenly_differ_between_tensors_and_are_the_same_again():
    fill, again = hashed(), hashed()
    first, second = (fill((64, 1000), -2.0, 6.0, dtypes.float32).numpy() for _ in range(2))
    assert np.array_equal(first, again((64, 1000), -2.0, 6.0, dtypes.float32).numpy())
    shares, _ = np.histogram(first, bins=8, range=(-2, 6))
    assert first.min() >= -2 and first.max() <= 6 and np.abs(shares / first.size - 1 / 8).max() < 0.01, shares
    for a, b in ((first, second), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_a_tensor_of_random_values_is_made_by_one_kernel():
    with Context(DEV="NULL"):
        hashed()((4, 4), 0, 1, dtypes.float16)
        before = GlobalCounters.kernel_count
        weights = hashed()((512, 1024, 2048), 0, 1, dtypes.float16)
        assert (GlobalCounters.kernel_count - before, weights.nbytes()) == (2, 2 ** 31)    # one fills in the number


@pytest.mark.parametrize("format", LAYOUTS)
def test_packed_random_weights_have_mean_0_and_the_deviation_asked_for(format):
    values = random_packed(format, (64, 2048), 0.02, hashed()).values().numpy()
    assert abs(values.mean()) < 0.15 * 0.02 and abs(values.std() / 0.02 - 1) < 0.05, (values.mean(), values.std())


@pytest.mark.host       # it is about the weights' sizes, not about a device
@pytest.mark.parametrize("format", ["F16", "Q4_0"])
def test_activations_stay_finite_and_alive_over_many_tokens(format):
    config, packed = shape_config("tiny"), format != "F16"
    weights = random_weights(config, format, packed=packed)
    engine = Engine(weights, config, Recipe(weights="packed" if packed else "float"), context=64, batches=(1,))
    spread = [float(engine.logits([token]).std()) for token in range(1, 41)]
    assert np.isfinite(spread).all() and 0.1 < min(spread) and max(spread) < 10, spread
    assert weight_bytes(weights) < (1 if packed else 4) * parameters(config)
    assert len(weights.layers[0].mixer.inputs) == (2 if packed else 1)      # of eight experts: attn_qkv is Q8_0
