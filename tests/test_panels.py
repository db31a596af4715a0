"""A prompt's products on a CPU by panels of weights, against their twins: all formats, sizes that nothing divides."""
import numpy as np
import pytest
from arrays import TOLERANCE, from_raw, integers, off, packed, tensor
from tinygrad import Device, Tensor

from minillama.blocks import FORMATS, unpack
from minillama.kernels import groups, panel_experts, panels, product
from minillama.kernels.cores import on_cpu
from minillama.kernels.layouts import LAYOUTS
from minillama.kernels.rendering import sources

pytestmark = pytest.mark.skipif(not on_cpu(Device.DEFAULT), reason="this device is no CPU")
EACH = pytest.mark.parametrize("format", LAYOUTS)
TINY, LARGEST = 6e-8, 65504.0      # the smallest and the largest half


@EACH
def test_a_product_by_panels_equals_its_twin(format):
    weight, x, residual = packed(format, 48, 512), tensor(32, 512), tensor(32, 48, seed=1)
    assert off(panels.linear(x, weight), product.linear_twin(x, weight)) < TOLERANCE
    assert off(panels.linear(x, weight, residual), product.linear_twin(x, weight, residual)) < TOLERANCE


@pytest.mark.parametrize("size", ((3, 40, 64), (17, 16, 32), (33, 5, 96), (19, 40, 64), (64, 776, 256),
                                  (32, 32, 4096)))
def test_parts_overlap_where_nothing_divides(size):
    tokens, rows, columns = size
    weight, x, residual = packed("F32", rows, columns), tensor(tokens, columns), tensor(tokens, rows, seed=1)
    assert off(panels.linear(x, weight, residual), product.linear_twin(x, weight, residual)) < TOLERANCE


@pytest.mark.parametrize("format", ("F16", "Q8_0", "Q4_1", "Q5_K", "Q6_K"))
@pytest.mark.parametrize("scale", (0.0, TINY, -1e-6, LARGEST))
def test_panels_widen_scales_rightly(format, scale):
    size, half = FORMATS[format].size, np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    raw = np.random.default_rng(1).integers(0, 256, (4, max(1, 256 // FORMATS[format].block), size), dtype=np.uint8)
    for place in {"Q4_1": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(format, (0,)):
        raw[..., place:place + 2] = half
    want = unpack(raw.reshape(-1), FORMATS[format], (4, 256))
    x = tensor(20, 256)
    assert off(panels.linear(x, from_raw(raw, format, 4, 256)), x.numpy() @ want.T) < TOLERANCE


@EACH
def test_experts_by_panels_equal_chosen_ones(format):
    """Six experts, of which one gets nothing and one nearly everything; matrices of two formats."""
    gate, up, down = (packed(kind, 6, *shape, seed=i) for i, (kind, shape) in enumerate(
        ((format, (40, 256)), ("Q8_0", (40, 256)), ("F16", (24, 40)))))
    x, share = tensor(20, 256), tensor(20, 3)
    ids = Tensor(np.array([[5, 0, 1 + t % 3] for t in range(20)], np.int32)).realize()
    found = groups.group(ids, 6)
    blocks = panel_experts.Blocks(found.tile, found.rows, found.firsts, found.ends)
    parts = panel_experts.gated(x, gate, up, share, blocks)
    want = product.gated_twin(x, gate, up, ids, share).realize()            # (tokens, used, width)
    places = found.places.numpy()
    assert off(Tensor(parts.numpy()[places]), want) < TOLERANCE
    nobody = (found.rows.numpy() < 0) & np.repeat(found.experts.numpy() >= 0, found.tile)
    assert not parts.numpy()[nobody].any()
    got = groups.summed(panel_experts.mixed(parts, down, blocks), found)
    assert off(got, product.mixed_twin(want, down, ids)) < TOLERANCE


@pytest.mark.parametrize("tokens, experts", ((18, 64), (1, 8)))
def test_experts_with_few_tokens_each_and_many_without(tokens, experts):
    gate, up, down = (packed("Q4_0", experts, 32, 32, seed=i) for i in range(3))
    x, share, ids = tensor(tokens, 32), tensor(tokens, 2), integers(tokens, 2, below=experts)
    got = groups.experts(x, gate, up, down, groups.group(ids, experts), share)
    want = product.mixed_twin(product.gated_twin(x, gate, up, ids, share), down, ids)
    assert off(got, want) < TOLERANCE


def test_the_shared_expert_by_panels_equals_its_twin():
    gate, up, x, share = packed("Q4_0", 40, 256), packed("Q8_0", 40, 256, seed=1), tensor(33, 256), tensor(33)
    want = product.linear_twin(x, gate).silu() * product.linear_twin(x, up) * share.reshape(-1, 1)
    assert off(panel_experts.shared_gated(x, gate, up, share), want) < TOLERANCE


@pytest.mark.host
def test_the_innermost_loop_is_left_for_a_compiler_to_make_vectors_of():
    """A loop over rows alone, one statement a token, no vector written down."""
    if Device.DEFAULT != "CPU":
        pytest.skip("about the C of a CPU")
    source, = sources(panels.linear(tensor(32, 512), packed("Q8_0", 64, 512)))
    tokens, rows = panels.block_sums("CPU")
    *_, loop, _ = source.split("for (")
    assert f"< {rows};" in loop and loop.count(" = ") == tokens + 2      # the loop's own, and a place
    assert "float4" not in source and "int2" not in source
