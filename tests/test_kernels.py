"""Kernels written by hand against their plain-tensor twins, and packed weights against the file's own unpacking."""
from types import SimpleNamespace

import numpy as np
import pytest
from arrays import TOLERANCE, from_raw, integers, numbers, off, packed, tensor, threads_share
from tinygrad import Tensor, dtypes
from tinygrad.device import CompileError
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.runtime.support.compiler_cpu import ClangCompiler

from minillama.blocks import FORMATS, unpack
from minillama.kernels import bits, groups, norm, product, ring, router, sums, tensor_cores, tuning
from minillama.kernels.layouts import LAYOUTS
from minillama.kernels.packed import Packed, rows_of, unpacked
from minillama.kernels.rendering import sources
from minillama.packers import pack

EACH = pytest.mark.parametrize("format", LAYOUTS)
SOME = pytest.mark.parametrize("format", ("F16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K"))
TINY, LARGEST = 6e-8, 65504.0      # the smallest and the largest half


# ---- layouts ------------------------------------------------------------------------------------------------------


@EACH
def test_repacked_bytes_are_hardly_more_and_give_the_same_values_to_the_last_bit(format):
    raw = pack(numbers(6, 512), FORMATS[format])
    weight = from_raw(raw, format, 6, 512)
    assert weight.nbytes() == FORMATS[format].device_bytes((6, 512))
    assert weight.file_bytes == raw.size <= weight.nbytes() <= 1.03 * raw.size
    want = unpack(raw, FORMATS[format], (6, 512))
    assert np.array_equal(weight.values().numpy(), want)
    assert off(unpacked(weight), want) < 1e-6


@pytest.mark.parametrize("format", [name for name in LAYOUTS if name not in ("F32", "BF16")])
@pytest.mark.parametrize("scale", (0.0, TINY, -1e-6, LARGEST))
def test_scales_that_are_zero_subnormal_or_largest_are_widened_rightly(format, scale, monkeypatch):
    """Random blocks whose every half (scale, minimum) is one number: its bits are written over the packed ones. By an
    instruction, where there is one, and by moving bits."""
    size, half = FORMATS[format].size, np.float16(scale).view(np.uint16).item().to_bytes(2, "little")
    raw = np.random.default_rng(1).integers(0, 256, (4, max(1, 256 // FORMATS[format].block), size), dtype=np.uint8)
    places = {"F16": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for place in places.get(format, (0,)):
        raw[..., place:place + 2] = np.frombuffer(half, np.uint8)
    want = unpack(raw.reshape(-1), FORMATS[format], (4, 256))
    weight = from_raw(raw, format, 4, 256)
    assert np.array_equal(weight.values().numpy(), want)
    assert off(unpacked(weight), want) < 1e-6
    x = tensor(1, 256)
    assert off(product.linear(x, weight), x.numpy() @ want.T) < TOLERANCE
    monkeypatch.setattr(sums, "converts_halves", lambda device: False)
    assert off(product.linear(x, weight), x.numpy() @ want.T) < TOLERANCE


@pytest.mark.host
@pytest.mark.parametrize(("arch", "known"), (("x86_64,x86-64", False), ("x86_64,ivybridge", True),
                                             ("arm64,cortex-a72", True)))
def test_an_instruction_that_widens_halves_is_found_by_asking_the_compiler(arch, known, monkeypatch):
    """ivybridge was the first x86 of Intel's with F16C."""
    renderer = object.__new__(ClangRenderer)
    renderer.compiler = ClangCompiler(arch.split(","))
    monkeypatch.setattr(bits, "Device", {"CPU": SimpleNamespace(renderer=renderer)})
    assert bits.converts_halves.__wrapped__("CPU") == known
    assert not bits.converts_halves.__wrapped__("CL")

    def refuse(source: str) -> bytes:
        raise CompileError("__fp16 is not supported on this target")
    monkeypatch.setattr(renderer.compiler, "compile_cached", refuse)
    assert not bits.converts_halves.__wrapped__("CPU")


@pytest.mark.host
def test_the_compiler_is_asked_even_where_a_graph_is_being_made():
    from tinygrad import function

    @function(precompile=True)
    def asked(x: Tensor) -> Tensor:
        return x + int(bits.converts_halves.__wrapped__("CPU"))
    assert asked(Tensor([1.0], device="CPU")).tolist() == [1.0 + bits.converts_halves("CPU")]


@pytest.mark.host
def test_a_product_on_a_cpu_leaves_vectors_to_the_compiler():
    """Results are stored one by one; scales are halves where there is an instruction for them."""
    arrays = [Tensor.empty(*part.shape(64, 256), dtype=part.on("CPU"), device="CPU") for part in LAYOUTS["Q4_0"].parts]
    x = Tensor.empty(1, 256, device="CPU")
    source, = sources(product.linear(x, Packed("Q4_0", (64, 256), tuple(arrays))))
    assert "*)((data0" not in source
    assert ("__fp16" in source) == bits.converts_halves("CPU")


def test_bytes_that_do_not_fill_the_shape_are_refused():
    with pytest.raises(ValueError, match="36 bytes of Q4_0 cannot fill the shape"):
        Packed.from_bytes(Tensor(np.zeros((2, 18), np.uint8)), "Q4_0", (2, 64))


@SOME
def test_rows_are_looked_up_by_number(format):
    weight, ids = packed(format, 20, 256), integers(5, below=20)
    assert off(rows_of(weight, ids), weight.values().numpy()[ids.numpy()]) < 1e-6


# ---- products -----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("tokens", (1, 3))
def test_a_product_equals_its_twin(format, tokens):
    weight, x, residual = packed(format, 48, 512), tensor(tokens, 512), tensor(tokens, 48, seed=1)
    assert off(product.linear(x, weight), product.linear_twin(x, weight)) < TOLERANCE
    assert off(product.linear(x, weight, residual), product.linear_twin(x, weight, residual)) < TOLERANCE


@EACH
@pytest.mark.parametrize("size", (1e-12, 1e12))
def test_quants_multiplied_where_they_lie_give_the_same_for_small_and_large_x(format, size, monkeypatch):
    monkeypatch.setattr(tuning, "multiplies_subnormals", lambda device: True)
    weight, x = packed(format, 16, 256), (tensor(1, 256) * size).realize()
    assert off(product.linear(x, weight), product.linear_twin(x, weight)) < TOLERANCE


@SOME
@pytest.mark.parametrize("tokens", (1, 3))
def test_chosen_experts_equal_their_twins(format, tokens):
    gate, up, down = (packed(format, 6, *shape, seed=i) for i, shape in enumerate(((32, 256), (32, 256), (64, 256))))
    ids, share, x = integers(tokens, 2, below=6), tensor(tokens, 2), tensor(tokens, 256)
    assert off(product.gated(x, gate, up, ids, share), product.gated_twin(x, gate, up, ids, share)) < TOLERANCE
    routed, residual = tensor(tokens, 2, 256), tensor(tokens, 64)
    assert off(product.mixed(routed, down, ids, residual), product.mixed_twin(routed, down, ids, residual)) < TOLERANCE


@pytest.mark.parametrize("tokens", (1, 3))
def test_the_shared_expert_equals_its_twin_with_halves_of_different_formats(tokens):
    gate, up = packed("Q4_0", 64, 256), packed("Q8_0", 64, 256, seed=1)
    share, x = (tensor(256) / 16).realize(), tensor(tokens, 256)
    assert off(product.shared_gated(x, gate, up, share)[0], product.shared_gated_twin(x, gate, up, share)) < TOLERANCE


@pytest.mark.parametrize(("format", "tokens"), (("Q4_0", 1), ("Q6_K", 1), ("Q4_0", 3)))
def test_experts_in_four_kernels_equal_their_twins(format, tokens, monkeypatch):
    threads_share(monkeypatch)
    size, experts = 256, 32
    gate, up, down = (packed(format, experts, size, size, seed=i) for i in range(3))
    router_weight, down_shared = packed("F32", experts, size), packed(format, size, size, seed=3)
    gate_shared, up_shared = (packed(format, experts, size, seed=i) for i in (4, 5))
    x, residual, share = tensor(tokens, size), tensor(tokens, size, seed=1), (tensor(size) / 16).realize()
    first, logits = product.shared_gated(x, gate_shared, up_shared, share, router_weight)
    Tensor.realize(first, logits)
    assert off(logits, product.linear_twin(x, router_weight)) < TOLERANCE
    assert off(first, product.shared_gated_twin(x, gate_shared, up_shared, share)) < TOLERANCE
    ids, best = router.choose(logits, 4)
    wanted_ids, shares = router.route_twin(logits, 4)
    assert np.array_equal(ids.realize(best).numpy(), wanted_ids.numpy())
    routed, want = product.gated(x, gate, up, ids, best, logits=True), product.gated_twin(x, gate, up, ids, shares)
    assert off(routed, want) < TOLERANCE
    shared = tensor(tokens, size, seed=2)
    got = product.mixed(want.contiguous(), down, ids, residual, (shared, down_shared))
    before = product.linear_twin(shared, down_shared, residual)
    assert off(got, product.mixed_twin(want, down, ids, before)) < TOLERANCE


@pytest.mark.parametrize("skewed", (False, True))
@pytest.mark.parametrize(("tokens", "experts"), ((20, 6), (40, 64)))
def test_grouped_experts_equal_chosen_ones_however_tokens_are_routed(tokens, experts, skewed):
    gate, up, down = (packed("Q4_0", experts, *shape, seed=i)
                      for i, shape in enumerate(((64, 64), (64, 64), (64, 64))))
    chosen = np.stack([np.random.default_rng(t).permutation(experts)[:3] for t in range(tokens)])
    ids = Tensor((chosen * 0 + [4, 1, 3] if skewed else chosen).astype(np.int32)).realize()
    x, share = tensor(tokens, 64) / 64, tensor(tokens, 3)
    found = groups.group(ids, experts)
    places = found.places.numpy().ravel()
    assert len(set(places.tolist())) == places.size, "two assignments in one place"
    assert np.array_equal(found.experts.numpy()[places // found.tile], ids.numpy().ravel())
    assert ((found.rows.numpy().reshape(-1, found.tile) >= 0).any(1) == (found.experts.numpy() >= 0)).all()
    got = groups.experts(x, gate, up, down, found, share)
    want = product.mixed_twin(product.gated_twin(x, gate, up, ids, share), down, ids)
    assert off(got, want) < TOLERANCE
    tiles = groups.mixed(groups.gated(x, gate, up, found, share), down, found)
    assert off(groups.summed(tiles, found), want) < TOLERANCE
    halves = groups.summed(groups.in_halves(x, gate, up, down, found, share), found)
    assert off(halves, want) < TOLERANCE


# ---- products of halves: here a plain loop; what tensor cores make of it is seen by rendering, and on a GPU ---------


@pytest.mark.host       # OpenCL never runs them
@pytest.mark.parametrize("format", [name for name, layout in LAYOUTS.items() if layout.span])
def test_a_product_of_halves_equals_its_twin(format):
    weight, x, residual = packed(format, 48, 512), tensor(24, 512), tensor(24, 48, seed=1)
    assert tensor_cores.fits(weight)
    halves = tensor_cores.halves(x)
    assert off(tensor_cores.linear(halves, weight), product.linear_twin(x, weight)) < TOLERANCE
    assert off(tensor_cores.linear(halves, weight, residual), product.linear_twin(x, weight, residual)) < TOLERANCE


def test_what_halves_cannot_hold_is_refused():
    assert not any(tensor_cores.fits(packed(name, 16, 512)) for name in ("F32", "BF16"))
    assert not tensor_cores.fits(packed("Q4_0", 16, 32))        # one span is no loop


def added(halves: tensor_cores.Halves) -> Tensor:
    """The numbers that pairs of halves stand for."""
    return halves.parts[:, 0].float() + halves.parts[:, 1].float() / tensor_cores.LOW


@pytest.mark.host       # PoCL rounds the product of two halves to a half, and has no subnormal ones
@pytest.mark.parametrize("scale", (1e-2, 1.0, 1e3))
def test_products_of_pairs_of_halves_keep_21_bits(scale):
    a, b = numbers(24, 256) * scale, numbers(16, 256, seed=1)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    for form in (tensor_cores.product, tensor_cores.long_product):
        assert off(form(Tensor(a), Tensor(b)), exact) < TOLERANCE
    a[0, 0] = 1e6                                               # more than the largest half
    assert np.isfinite(tensor_cores.product(Tensor(a), Tensor(b)).numpy()).all()


def test_two_halves_hold_a_float_to_21_bits():
    x = tensor(20, 256)
    halves = tensor_cores.halves(x)
    assert off(added(halves), x) < 2.0 ** -21
    small = (x / 4096).realize()
    assert off(added(tensor_cores.halves(small)), small) < 2.0 ** -14
    assert off(halves.sums, x.numpy().reshape(20, -1, tensor_cores.SPAN).sum(-1)) < 1e-6


def test_what_no_half_can_hold_is_taken_for_the_largest_that_it_can():
    x = Tensor([[6e4, -6e4, 1e6, -1e38] + [0.0] * 12]).realize()
    found = added(tensor_cores.halves(x)).numpy()[0, :4]
    assert np.allclose(found, [6e4, -6e4, LARGEST, -LARGEST], rtol=2 ** -21)


# ---- what is small ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((1, 256), (3, 2048), (2, 96)))
def test_the_norm_equals_its_twin(shape):
    x, weight = tensor(*shape), tensor(shape[1], seed=1)
    assert off(norm.rms_norm(x, weight, 1e-6), norm.rms_norm_twin(x, weight, 1e-6)) < TOLERANCE


@pytest.mark.parametrize(("experts", "used"), ((512, 10), (16, 4), (6, 2)))
def test_the_router_chooses_as_its_twin_and_ties_go_to_the_smaller_number(experts, used):
    logits = Tensor(np.round(3 * numbers(3, experts), 1)).realize()
    ids, probs = router.route(logits, used)
    want, shares = router.route_twin(logits, used)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :used]
    assert np.array_equal(ids.numpy(), want.numpy()) and np.array_equal(ids.numpy(), order)
    assert off(probs, shares) < TOLERANCE and np.allclose(probs.numpy().sum(1), 1)


def test_a_ring_is_read_and_written_by_position_past_its_end():
    rows, position = tensor(5, 2, 3), Tensor([13], dtype=dtypes.int32).realize()
    before, new = rows.numpy(), tensor(2, 2, 3, seed=1)
    read, after = ring.read(rows, position, -3, 3)
    written = ring.write(after, new, position, 0)
    Tensor.realize(read, written)
    assert np.array_equal(read.numpy(), before[[0, 1, 2]])
    before[[3, 4]] = new.numpy()
    assert np.array_equal(rows.numpy(), before)
    ring.write(rows, new, position, -3).realize()
    before[[0, 1]] = new.numpy()
    assert np.array_equal(rows.numpy(), before)
