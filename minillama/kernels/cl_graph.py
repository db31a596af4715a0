"""Captured steps on an OpenCL device, replayed with as little Python as can be.

tinygrad gives a kernel its arguments anew at every launch. Here each kernel of a captured step gets an object of its
own, whose arguments stay; a replay sets those that differ, and puts one kernel after the other into the queue.
"""
import ctypes
from contextlib import suppress

from tinygrad import Device
from tinygrad.device import Buffer
from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import is_image_shape
from tinygrad.runtime.autogen import opencl as cl
from tinygrad.runtime.ops_cl import check, checked
from tinygrad.uop.ops import UOp


class CLGraph(GraphRunner):
    """The kernels of a captured step, each ready to be launched. `places`: by call and argument, its number in the
    kernel's signature; `values`: the same by call and variable, with its type."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        self.kernels, self.launches = [], []
        self.places: dict[tuple[int, int], int] = {}
        self.values: dict[tuple[int, int], tuple[int, type]] = {}
        for n, ((_, program, buffers, known), runtime) in enumerate(zip(self.calls, self.runtimes, strict=True)):
            info, status = program.arg, ctypes.c_int32()
            name = info.function_name.encode()
            self.kernels.append(checked(cl.clCreateKernel(runtime.program, name, status), status))
            for place, (_, slot, dtype, _) in enumerate(runtime.signature):
                if slot < len(info.globals):
                    self.places[n, info.globals[slot]] = place
                    self.set(n, place, buffers[info.globals[slot]])
                else:
                    i, kind = slot - len(info.globals), getattr(ctypes, f"c_int{dtype.bitsize}")
                    self.values[n, i] = place, kind
                    give(self.kernels[n], place, kind(known.get(info.vars[i].expr, 0)))
            self.launches.append(sizes(*info.launch_dims({name: 0 for name in self.vars})))
        self.given = [(n, self.places[n, i], slot) for n, pairs in enumerate(self.uop_replace) for i, slot in pairs
                      if (n, i) in self.places]

    def set(self, n: int, place: int, buffer: Buffer) -> None:
        give(self.kernels[n], place, buffer.ensure_allocated()._buf)

    def __call__(self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False) -> float | None:
        for n, place, slot in self.given:
            self.set(n, place, input_uops[slot].buffer)
        for n, i, value in self.updated_vars(var_vals):
            place, kind = self.values[n, i]
            give(self.kernels[n], place, kind(value))
        for n, work, group in self.updated_launch_dims(var_vals):
            self.launches[n] = sizes(work, group)
        queue, enqueue = Device[self.device].queue, cl.clEnqueueNDRangeKernel
        for kernel, (count, work, group) in zip(self.kernels, self.launches, strict=True):
            if (status := enqueue(queue, kernel, count, None, work, group, 0, None, None)) != 0:
                check(status)
        return None

    def __del__(self):
        with suppress(AttributeError, TypeError):       # at the end of Python the library may be gone first
            for kernel in self.kernels:
                cl.clReleaseKernel(kernel)

    @staticmethod
    def supports_uop(batch_devs: list, new_call: UOp) -> bool:
        """One device; no images, which are made at each launch."""
        return GraphRunner.supports_uop(batch_devs, new_call) and not any(
            is_image_shape(shape) for *_, shape in new_call.src[0].to_elf().signature)


def give(kernel, place: int, value) -> None:
    """Set a kernel's argument."""
    check(cl.clSetKernelArg(kernel, place, ctypes.sizeof(value), ctypes.byref(value)))


def sizes(work: tuple[int, ...], group: tuple[int, ...] | None) -> tuple:
    """Dimensions of a launch as OpenCL has them: how many, all work items, those of a group."""
    words = ctypes.c_size_t * len(work)
    if group is None:
        return len(work), words(*work), None
    return len(work), words(*(int(a * b) for a, b in zip(work, group, strict=True))), words(*group)
