"""Attention on tensor cores that are not here, of prompts and of a few tokens over a long cache, computed by
tinygrad's emulator: run as a program, for test_flash.py, with DEV=PYTHON::sm_90. Prints the largest difference from
the twin, relative to its largest value."""
import numpy as np
from tinygrad import Tensor, dtypes

from minillama.kernels import attention, flash, long_attention, tuning
from minillama.kernels.attention import attend_twin
from minillama.kernels.flash_cells import FlashTiling

# tokens, heads, those with keys, dimensions, positions, the first token's; and a tiling
CASES = ((16, 2, 1, 16, 100, 37, FlashTiling(32, 2, 2)),    # positions end inside a tile; parts of one tile
         (16, 2, 1, 16, 100, 0, FlashTiling(32, 2, 2)),     # a part without any
         (16, 2, 1, 16, 100, 25, FlashTiling(32, 2, 2)),    # a part of which a row sees nothing
         (16, 4, 2, 32, 200, 101, None),
         (32, 4, 1, 32, 150, 0, FlashTiling(64, 2, 1)),     # the first text, in one part
         (32, 2, 2, 64, 130, 47, FlashTiling(16, 4, 1)),    # heads share no keys; a text in two tiles
         (2, 6, 2, 64, 100, 70, "long"),                    # three heads of eight columns, a part that is not full
         (1, 8, 1, 64, 160, 31, "long"),                    # all eight; a part that is just full
         (1, 4, 2, 128, 130, 5, "long"))


def main() -> None:
    tuning.backend = lambda device: "CUDA"
    rng = np.random.default_rng(0)
    for tokens, heads, kv_heads, dim, positions, start, cut in CASES:
        q, gate = (rng.standard_normal((tokens, heads, size), dtype=np.float32) for size in (dim, 2 * dim))
        keys, values = (rng.standard_normal((positions, kv_heads, dim), dtype=np.float32) for _ in range(2))
        end = start + tokens
        keys[end:], values[end:] = np.nan, np.inf       # what nobody wrote
        given, read, written, beside = (Tensor(x).realize() for x in (q, keys, values, gate.reshape(tokens, -1)))
        at = Tensor([start], dtype=dtypes.int32).realize()
        given = given, read, written, (beside, dim), 2 * dim, at
        if cut == "long":
            long_attention.LONG = 1
            assert long_attention.fits(given[0].device, heads, kv_heads, dim, positions)
        got = attention.attend(*given) if cut == "long" else flash.attend(*given, cut)
        want = attend_twin(Tensor(q), Tensor(keys[:end]), Tensor(values[:end]), Tensor(gate[..., dim:]), start)
        print(float(np.abs(got.numpy() - want.numpy()).max() / np.abs(want.numpy()).max()))


if __name__ == "__main__":
    main()
