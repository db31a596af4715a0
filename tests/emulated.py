"""Products of halves on tensor cores that are not here, computed by tinygrad's emulator: run as a program, for
test_render.py, with DEV=PYTHON::sm_90 or DEV=PYTHON::METAL.

    python emulated.py CUDA|METAL FORMAT

Prints, for a dense product, for tiles of experts and for a prompt's attention, the largest difference from the twin,
relative to its largest value. With CUDA then products in tiles that go through shared memory; and for a few tokens: a
product, one of what has no norm yet, both halves of the chosen experts' networks.
"""
import sys

import numpy as np
from tinygrad import Tensor, UOp

from minillama.attention import BLOCK, attend, attend_in_blocks
from minillama.kernels import gemm, gemm_experts, groups, halves, mma, norm, product, tensor_cores, tuning
from minillama.kernels.layouts import LAYOUTS
from minillama.shapes import hashed, random_packed

BACKEND, FORMAT = sys.argv[1:]
EXPERTS, WIDTH, TOKENS, USED = 3, 64, 16, 2


def off(got: Tensor, want: Tensor) -> float:
    return float(np.abs(got.numpy() - want.numpy()).max() / np.abs(want.numpy()).max())


def few_tokens(fill) -> None:
    """Sums over two steps of 128 columns by two warps; three tokens, and experts' halves for two."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Tensor:
        return Tensor(rng.standard_normal(shape, dtype=np.float32)).realize()
    weight, x = random_packed(FORMAT, (32, 256), 0.1, fill), normal(3, 256)
    normed = product.Normed((x * 3).realize(), normal(256), 1e-6)
    assert isinstance(product.sums_along(weight, tokens=3), mma.MmaRows)
    print(off(product.linear(x, weight, residual := normal(3, 32)), product.linear_twin(x, weight, residual)))
    want = product.linear_twin(norm.rms_norm_twin(normed.x, normed.weight, normed.eps), weight)
    print(off(product.linear(normed, weight), want))
    gate, up, down = (random_packed(FORMAT, (EXPERTS, 32, 256), 0.1, fill) for _ in range(3))
    ids = Tensor([[2, 0], [1, 2]], dtype="int32").realize()
    share = Tensor(rng.random((2, 2), dtype=np.float32)).realize()
    x, routed, shared = normal(2, 256), normal(2, USED, 256), random_packed(FORMAT, (32, 256), 0.1, fill)
    print(off(product.gated(x, gate, up, ids, share), product.gated_twin(x, gate, up, ids, share)))
    want = product.mixed_twin(routed, down, ids) + product.linear_twin(x, shared)
    print(off(product.mixed(routed, down, ids, None, (x, shared)), want))


def in_tiles(fill) -> None:
    """Several stages, a last block that does some rows twice, both tilings of a warp; and the expert of all tokens."""
    rng = np.random.default_rng(2)
    for tokens, rows, columns in ((16, 48, 256), (64, 160, 256)):
        weight = random_packed(FORMAT, (rows, columns), 0.1, fill)
        x, residual = (Tensor(rng.standard_normal((tokens, size), dtype=np.float32)).realize()
                       for size in (columns, rows))
        assert halves.fits(weight)
        got = gemm.linear(halves.halves(x, weight.layout), weight, residual)
        print(off(got, product.linear_twin(x, weight, residual)))
    gate, up = (random_packed(FORMAT, (64, 256), 0.1, fill) for _ in range(2))
    down, share = random_packed(FORMAT, (256, 256), 0.1, fill), Tensor(rng.random(16, dtype=np.float32)).realize()
    x = Tensor(rng.standard_normal((16, 256), dtype=np.float32)).realize()
    h = gemm_experts.gated(halves.halves(x, gate.layout), gate, up, LAYOUTS[FORMAT], share)
    found = h.parts.numpy().astype(np.float32).reshape(16, 2, 2, 4, 4, 2)       # place, span, part, octet, pair, place
    got = np.zeros((16, 2, 4, 8), dtype=np.float32)
    for n, pair in enumerate(halves.order(down.layout)):
        for k, place in enumerate((pair.first, pair.second)):
            got[..., place] = (found[:, :, 0, :, n, k] + found[:, :, 1, :, n, k] / mma.LOW) * 2.0 ** (
                pair.power + mma.DOWN)
    want = (product.linear_twin(x, gate).silu() * product.linear_twin(x, up) * share.unsqueeze(1)).numpy()
    print(float(np.abs(got.reshape(16, 64) - want).max() / np.abs(want).max()))


def main() -> None:
    tuning.backend = lambda device: BACKEND
    rng, fill = np.random.default_rng(0), hashed()
    x, residual = (Tensor(rng.standard_normal((TOKENS, WIDTH), dtype=np.float32)).realize() for _ in range(2))
    weight = random_packed(FORMAT, (WIDTH, WIDTH), 0.1, fill)
    assert tuning.multiplies_halves(x.device, WIDTH) and tensor_cores.fits(weight)
    got = tensor_cores.linear(tensor_cores.halves(x), weight, residual)
    print(off(got, product.linear_twin(x, weight, residual)))
    gate, up, down = (random_packed(FORMAT, (EXPERTS, WIDTH, WIDTH), 0.1, fill) for _ in range(3))
    ids = Tensor(np.stack([rng.permutation(EXPERTS)[:USED] for _ in range(TOKENS)]).astype(np.int32)).realize()
    share = Tensor(rng.random((TOKENS, USED), dtype=np.float32)).realize()
    got = groups.experts(x, gate, up, down, groups.group(ids, EXPERTS), share)
    print(off(got, product.mixed_twin(product.gated_twin(x, gate, up, ids, share), down, ids)))
    q, keys, values = (Tensor(rng.standard_normal(shape, dtype=np.float32)).realize() for shape in
                       ((TOKENS, 2, 16), (2 * BLOCK, 1, 16), (2 * BLOCK, 1, 16)))
    start = UOp.variable("start", 0, BLOCK).bind(BLOCK - 5)     # the text ends in the second block
    got, seen = attend_in_blocks(q, keys, values, start), BLOCK - 5 + TOKENS
    print(off(got, attend(q, keys[:seen], values[:seen], BLOCK - 5)))
    if BACKEND == "CUDA":
        in_tiles(fill)
    if BACKEND == "CUDA" and FORMAT != "F16":
        few_tokens(fill)


if __name__ == "__main__":
    main()
