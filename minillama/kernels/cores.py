"""CPUs, with OpenCL or without: which devices are some, and how their cores share a kernel."""
from ctypes import byref, c_ulong
from functools import cache

from tinygrad import Context, Device
from tinygrad.helpers import ceildiv
from tinygrad.uop.ops import AxisType

from minillama.kernels import tuning

CORES = 16          # that can share a kernel, at most


def on_cpu(device: str) -> bool:
    """Whether a device is a CPU: there a thread works alone, beside a large cache. (A GPU with OpenCL is none, nor one
    whose threads share memory. NULL counts as whom it acts for, and as a CPU where it acts for nobody.)"""
    name = device.split(":")[0]
    return runs_opencl_on_cpu(device) if name == "CL" else tuning.backend(device) in ("CPU", "CL", "NULL")


@cache
def runs_opencl_on_cpu(device: str) -> bool:
    """Whether OpenCL says that its device is a CPU (as PoCL's is)."""
    from tinygrad.runtime.autogen import opencl as cl  # not there without a library for it
    kind = c_ulong()
    with Context(ALLOW_DEVICE_USAGE=1):                 # also where a graph is being made, and nothing runs
        cl.clGetDeviceInfo(Device[device].cl_dev, cl.CL_DEVICE_TYPE, 8, byref(kind), None)
    return bool(kind.value & cl.CL_DEVICE_TYPE_CPU)


def between_cores(device: str) -> AxisType:
    """The kind of a loop over parts of a kernel that cores may share: on a CPU one that tells tinygrad so, whose parts
    our own graph gives to cores (`cpu_graph`); elsewhere any outer loop."""
    return AxisType.THREAD if device.split(":")[0] == "CPU" else AxisType.WEAK


def cores_for(size: int, waste: float = 0.0) -> int:
    """The most cores that can share so many turns evenly, or with that share of them done twice."""
    return next(cores for cores in range(CORES, 0, -1) if ceildiv(size, cores) * cores <= size * (1 + waste))
