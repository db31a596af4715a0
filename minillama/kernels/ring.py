"""A ring: rows of a buffer that are indexed by position, modulo how many there are."""
from math import prod

from tinygrad import Tensor
from tinygrad.uop.ops import KernelInfo, UOp

from minillama.kernels.block import const
from minillama.kernels.product import number, result


def slot_of(position: UOp, offset: int, slots: int) -> UOp:
    """Where the ring holds position + offset; position is an array of one int32."""
    return (number(position.index(0)) + (offset + slots)) % slots


def read(ring: Tensor, position: Tensor, offset: int, count: int) -> tuple[Tensor, Tensor]:
    """A copy of the rows of `count` positions from position + offset on, (count, ...), and the ring after the reading:
    whoever writes to that waits for it. ring (slots, ...) float32, position (1,) int32."""
    slots, size = ring.shape[0], prod(ring.shape[1:])

    def kernel(out: UOp, ring: UOp, position: UOp) -> UOp:
        place = UOp.range(size, 0)
        out, ring = out.reshape(count, size), ring.reshape(slots, size)
        stores = [out.index(const(r), place).store(ring.index(slot_of(position, offset + r, slots), place).load())
                  for r in range(count)]
        return UOp.group(*stores).end(place).sink(arg=KernelInfo(f"ring_read_{count}_{size}"))
    out, after, _ = result(count, *ring.shape[1:], like=ring).custom_kernel(ring, position, fxn=kernel)
    return out, after


def write(ring: Tensor, rows: Tensor, position: Tensor, offset: int) -> Tensor:
    """The ring with `rows` (count, ...) at position + offset and on, written in place; arguments as `read`."""
    slots, size, count = ring.shape[0], prod(ring.shape[1:]), rows.shape[0]

    def kernel(ring: UOp, rows: UOp, position: UOp) -> UOp:
        place = UOp.range(size, 0)
        ring, rows = ring.reshape(slots, size), rows.reshape(count, size)
        stores = [ring.index(slot_of(position, offset + r, slots), place).store(rows.index(const(r), place).load())
                  for r in range(count)]
        return UOp.group(*stores).end(place).sink(arg=KernelInfo(f"ring_write_{count}_{size}"))
    return ring.custom_kernel(rows, position, fxn=kernel)[0]
