"""A packed matrix on the device: its format, its shape, and the arrays of its layout."""
from dataclasses import dataclass
from math import prod

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import KernelInfo, UOp

from minillama.kernels.layouts import LAYOUTS, OCTET, Layout


@dataclass(frozen=True)
class Packed:
    """A matrix (..., rows, columns) that keeps its block format; its arrays are (all rows, items)."""
    format: str
    shape: tuple[int, ...]
    arrays: tuple[Tensor, ...]

    @classmethod
    def from_bytes(cls, raw: Tensor, format: str, shape: tuple[int, ...]) -> "Packed":
        """Repack a file's bytes, (rows, bytes of a row) uint8 on the device. Raises ValueError for a size that does
        not fit."""
        layout, rows = LAYOUTS[format], prod(shape[:-1])
        if raw.numel() != layout.nbytes(rows, shape[-1]) or shape[-1] % layout.block:
            raise ValueError(f"{raw.numel()} bytes of {format} cannot fill the shape {shape}")
        arrays = tuple(array.contiguous() for array in layout.repack(raw.reshape(rows, -1)))
        Tensor.realize(*arrays)
        return cls(format, shape, arrays)

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.format]

    @property
    def rows(self) -> int:
        """All rows: of a stack of matrices, of all of them."""
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def device(self) -> str:
        return self.arrays[0].device

    @property
    def file_bytes(self) -> int:
        """What the blocks take in a file: the bytes that a format is about."""
        return self.layout.nbytes(self.rows, self.columns)

    def nbytes(self) -> int:
        """What the arrays take on the device."""
        return sum(array.nbytes() for array in self.arrays)

    def numel(self) -> int:
        return prod(self.shape)

    def values(self) -> Tensor:
        """All values, float32 of `shape`, in plain tensor code: the twin of `unpacked`, and the kernels' judge."""
        return self.layout.values(self.arrays).reshape(self.shape)


def unpacked(weight: Packed) -> Tensor:
    """The values of a packed matrix in a buffer of their own: (rows, columns) float32.

    One thread unpacks an octet; the kernel reads the packed bytes once and writes each value once. For a prompt, whose
    many tokens share the result, that is cheaper than unpacking inside the product again for every tile of tokens.
    """
    def kernel(out: UOp, *arrays: UOp) -> UOp:
        row, i = UOp.range(weight.rows, 0), UOp.range(weight.columns // OCTET, 1)
        stores = [out.index(row, i * OCTET + k).store(value)
                  for k, value in enumerate(weight.layout.octet(*arrays, row, i).values())]
        return UOp.group(*stores).end(row, i).sink(
            arg=KernelInfo(f"unpack_{weight.format}_{weight.rows}_{weight.columns}"))
    out = Tensor.empty(weight.rows, weight.columns, dtype=dtypes.float32, device=weight.device)
    return out.custom_kernel(*weight.arrays, fxn=kernel)[0]


def rows_of(weight: Packed, ids: Tensor) -> Tensor:
    """Rows looked up by number, unpacked: ids (tokens,) int32 -> (tokens, columns) float32. Twin: `values()[ids]`."""
    def kernel(out: UOp, ids: UOp, *arrays: UOp) -> UOp:
        token, i = UOp.range(ids.shape[0], 0), UOp.range(weight.columns // OCTET, 1)
        row = ids.index(token).load().cast(dtypes.weakint)
        stores = [out.index(token, i * OCTET + k).store(value)
                  for k, value in enumerate(weight.layout.octet(*arrays, row, i).values())]
        name = f"rows_{weight.format}_{ids.shape[0]}_{weight.columns}"
        return UOp.group(*stores).end(token, i).sink(arg=KernelInfo(name))
    out = Tensor.empty(ids.shape[0], weight.columns, dtype=dtypes.float32, device=weight.device)
    return out.custom_kernel(ids, *weight.arrays, fxn=kernel)[0]
