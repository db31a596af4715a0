"""Solutions of chapter 11's exercises."""
from tinygrad import dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp


def answer(out: UOp, memory: UOp, query: UOp, keep: UOp) -> UOp:
    """A place for each column, a sum over the rows."""
    column, row = UOp.range(64, 0), UOp.range(64, 1, AxisType.REDUCE)
    total = (memory.index(row, column).load() * query.index(row).load()).reduce(row, arg=Ops.ADD)
    kept = total * keep.index(UOp.const(0, dtypes.weakint)).load()
    return out.index(column).store(kept).end(column).sink(arg=KernelInfo("answer"))


def row_sums(first: int, row_step: int, column_step: int):
    """The steps stand in the index and nowhere else."""
    def kernel(out: UOp, x: UOp) -> UOp:
        row, column = UOp.range(16, 0), UOp.range(8, 1, AxisType.REDUCE)
        total = x.index(row * row_step + column * column_step + first).load().reduce(column, arg=Ops.ADD)
        return out.index(row).store(total).end(row).sink(arg=KernelInfo("row_sums"))
    return kernel


def from_sums(sk: float, sq: float, kk: float, qq: float, kq: float, v: float, keep: float,
              beta: float) -> tuple[float, float]:
    """A raw sum over k, divided by k's length, is that over the unit key; the write carries the length once more."""
    k_norm, q_norm = kk ** -0.5, qq ** -0.5
    difference = beta * (v - keep * sk * k_norm)
    return difference * k_norm, (keep * sq + kq * k_norm * difference) * q_norm
