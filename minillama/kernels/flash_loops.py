"""Attention for a prompt, for CPUs: a core does a head by itself, and scores never leave its nearest cache.

Some queries go through keys and values in blocks of positions, in one pass: each keeps its largest score so far, the
sum of its weights and that of its weighed values; when a larger score turns up, both sums are scaled down. Source:
Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022, "FlashAttention".

In every buffer the queries lie side by side, and innermost loops run along them (`steps.py`): what they need of a key
or of a value is the same number for all, and no sum or maximum is one over neighbours.
"""
from collections.abc import Callable

from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from minillama.kernels.block import const
from minillama.kernels.cores import on_cpu
from minillama.kernels.product import Column, number, result
from minillama.kernels.softmax import NOWHERE
from minillama.kernels.steps import Steps, real
from minillama.kernels.tuning import fitting
from minillama.program_cache import at_most

QUERIES = 64        # at once
POSITIONS = 64      # of a block
SIDE = 4            # of a square of products that a loop adds at once: what it loads and stores serves them all


def fits(device: str, tokens: int, positions: int) -> bool:
    """Whether this is the form for so many queries over a cache: on a CPU."""
    return on_cpu(device) and tokens > 1 and positions % POSITIONS == 0


def attend(q: Tensor, keys: Tensor, values: Tensor, gate: Column, stride: int, position: Tensor) -> Tensor:
    """As `attention.attend_twin`; the gate of a head lies at gate + head * stride."""
    (tokens, heads, dim), (positions, kv_heads, _) = q.shape, keys.shape
    count, side, device = fitting(QUERIES, tokens), fitting(SIDE, dim), q.device

    def kernel(out: UOp, q: UOp, keys: UOp, values: UOp, gate_: UOp, position: UOp) -> UOp:
        steps = Steps(device)
        head, block = steps.each(heads, shared=True), steps.each(tokens // count)
        own, first = head // (heads // kv_heads), block * count
        start = number(position.index(const(0)), positions) + first         # position of the first query
        asked, told, scores = (steps.room(size, count) for size in (dim, dim, POSITIONS))
        high, total, scale = (steps.room(count) for _ in range(3))

        def product(sums: UOp, rows: int, terms: int, left: Callable[[UOp, UOp], UOp], right: UOp) -> None:
            """sums (rows, count) plus left (rows, terms) times right (terms, count)."""
            row, term, i = loops = steps.loop(rows // side), steps.loop(terms // side), steps.loop(count)
            some, others = ([x * side + n for n in range(side)] for x in (row, term))
            factors, values = [[left(r, t) for t in others] for r in some], [right.index(t, i).load() for t in others]
            cells = [steps.now(sums, row, term).index(r, i) for r in some]
            steps.do(loops, *(cell.store(cell.load() + sum(a * b for a, b in zip(mine, values, strict=True)))
                              for cell, mine in zip(cells, factors, strict=True)))

        i, d = loops = steps.loop(count), steps.loop(dim)
        steps.do(loops, asked.index(d, i).store(q.index(first + i, head, d).load() * dim ** -0.5))
        i = steps.loop(count)
        steps.do((i,), steps.now(high).index(i).store(real(NOWHERE)), total.index(i).store(real(0)))
        d, i = loops = steps.loop(dim), steps.loop(count)
        steps.do(loops, steps.now(told).index(d, i).store(real(0)))

        turn, n = steps.repeat(positions // POSITIONS)
        p, i = loops = steps.loop(POSITIONS), steps.loop(count)
        steps.do(loops, steps.now(scores, turn).index(p, i).store(real(0)))
        product(scores, POSITIONS, dim, lambda p, d: keys.index(n * POSITIONS + p, own, d).load(), steps.now(asked))

        # the largest so far, and what the sums are scaled by
        i = steps.loop(count)
        steps.do((i,), steps.now(scale).index(i).store(steps.now(high).index(i).load()))
        p, i = loops = steps.loop(POSITIONS), steps.loop(count)
        cell, best = steps.now(scores).index(p, i), steps.now(high, p).index(i)
        score = (n * POSITIONS + p <= start + i).where(cell.load(), NOWHERE)
        steps.do(loops, cell.store(score), best.store(best.load().maximum(score)))
        i = steps.loop(count)
        cell, sums = steps.now(scale).index(i), steps.now(total).index(i)
        down = (cell.load() - steps.now(high).index(i).load()).exp()
        steps.do((i,), cell.store(down), sums.store(sums.load() * down))
        d, i = loops = steps.loop(dim), steps.loop(count)
        cell = steps.now(told).index(d, i)
        steps.do(loops, cell.store(cell.load() * steps.now(scale).index(i).load()))

        # the weights, and the values weighed
        p, i = loops = steps.loop(POSITIONS), steps.loop(count)
        cell, sums = steps.now(scores).index(p, i), steps.now(total, p).index(i)
        weight = (cell.load() - steps.now(high).index(i).load()).exp()
        steps.do(loops, cell.store(weight), sums.store(sums.load() + weight))
        product(told, dim, POSITIONS, lambda d, p: values.index(n * POSITIONS + p, own, d).load(), steps.now(scores))
        steps.until(turn, n, (start + (count + POSITIONS - 1)) // POSITIONS)

        i, d = loops = steps.loop(count), steps.loop(dim)
        y = steps.now(told).index(d, i).load() / steps.now(total).index(i).load()
        strength = gate_.index(first + i, gate[1] + head * stride + d).load().sigmoid()
        steps.do(loops, out.index(first + i, head * dim + d).store(y * strength))
        name = f"attend_loops_{tokens}_{heads}_{kv_heads}_{dim}_{positions}"
        return steps.kernel(at_most(name, 2 * tokens * heads * positions * dim, out, q, keys, values, gate_))
    return result(tokens, heads * dim, like=q).custom_kernel(q, keys, values, gate[0], position, fxn=kernel)[0]
