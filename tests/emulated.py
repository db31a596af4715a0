"""Products of halves on tensor cores that are not here, computed by tinygrad's emulator: run as a program, for
test_render.py, with DEV=PYTHON::sm_90 or DEV=PYTHON::METAL.

    python emulated.py CUDA|METAL FORMAT

Prints, for a dense product, for tiles of experts and for a prompt's attention, the largest difference from the twin,
relative to its largest value.
"""
import sys

import numpy as np
from tinygrad import Tensor, UOp

from minillama.attention import BLOCK, attend, attend_in_blocks
from minillama.kernels import groups, product, tensor_cores, tuning
from minillama.shapes import hashed, random_packed

BACKEND, FORMAT = sys.argv[1:]
EXPERTS, WIDTH, TOKENS, USED = 3, 64, 16, 2


def off(got: Tensor, want: Tensor) -> float:
    return float(np.abs(got.numpy() - want.numpy()).max() / np.abs(want.numpy()).max())


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


if __name__ == "__main__":
    main()
