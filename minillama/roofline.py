"""The roofline of a machine: how fast it moves bytes, how fast it multiplies, and what starting a kernel costs.

A computation that moves B bytes and does O operations takes at least max(B / bandwidth, O / speed). Both are measured
here by what tinygrad reaches on this machine, not taken from a data sheet; so is the cost of a launch.
S. Williams, A. Waterman, D. Patterson: Roofline, an insightful visual performance model (CACM 52, 2009).

`DEV=CPU python -m minillama.roofline` measures and keeps the result; `--store` keeps it among the project's own.
"""
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.dtype import DType

from minillama.kernels.copying import copied
from minillama.measure import time_call
from minillama.results import Result, Row, write_result

MIB = 1 << 20
CHAIN = 100     # kernels in the chain whose launches are timed
COPIES = 8      # of a large buffer, one after the other


@dataclass(frozen=True)
class Roofline:
    """What one device reaches: bandwidth in bytes a second (read and written), speed in operations a second (float32
    product), `half_speed` the same in half precision where the device has it (else 0), and the seconds that one tiny
    kernel takes in a replayed chain (`launch`) and when it is built anew each time (`eager`)."""
    device: str
    bandwidth: float
    speed: float
    half_speed: float
    launch: float
    eager: float

    @property
    def ridge(self) -> float:
        """Operations a byte at which arithmetic, not memory, becomes the limit."""
        return self.speed / self.bandwidth

    def seconds(self, bytes: float, operations: float, kernels: int = 0) -> float:
        """The least time for moving `bytes` and doing `operations`, plus the launches of `kernels`."""
        return max(bytes / self.bandwidth, operations / self.speed) + kernels * self.launch

    def reachable(self, intensity: float) -> float:
        """Operations a second that the roof allows at an intensity (operations a byte)."""
        return min(self.speed, intensity * self.bandwidth)


def fastest(call: Callable, *args, repeats: int = 5) -> float:
    """Seconds of the fastest of several calls: noise only ever slows."""
    return min(time_call(call, *args, repeats=repeats).samples_ns) * 1e-9


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of copies too large for any cache, there and back."""
    best, size = 0.0, 128 * MIB
    while True:
        buffers = [Tensor.full((size // 4,), float(n)).contiguous().realize() for n in range(2)]    # (values,) float32

        def back_and_forth(buffers: list[Tensor] = buffers) -> None:
            for n in range(COPIES):
                copied(buffers[n % 2], buffers[1 - n % 2]).realize()
        seconds = fastest(TinyJit(back_and_forth)) / COPIES
        best, size = max(best, 2 * size / seconds), 2 * size
        if seconds > 1e-3 or size > 1024 * MIB:
            return best


def product_speed(dtype: DType = dtypes.float32) -> float:
    """Operations a second of a product x @ W.T of square matrices, at the size where it is fastest."""
    best, size = 0.0, 512
    while True:
        x, w = (Tensor.ones(size, size, dtype=dtype).contiguous().realize() for _ in range(2))
        product = TinyJit(lambda x, w: (x @ w.T).realize())
        seconds = fastest(product, x, w)
        best, size = max(best, 2 * size**3 / seconds), 2 * size
        if seconds > 20e-3 or size > 8192:
            return best


def launch_cost() -> float:
    """Seconds for one kernel of a replayed chain of tiny kernels, each waiting for the one before."""
    def chain(x: Tensor) -> Tensor:
        for _ in range(CHAIN):
            x = (x + 1).contiguous()
        return x.realize()

    x, replay = Tensor.zeros(16).contiguous().realize(), TinyJit(chain)
    return fastest(replay, x, repeats=20) / CHAIN


def eager_cost() -> float:
    """Seconds for one tiny kernel when Python builds its graph anew at every call."""
    x = Tensor.zeros(16).contiguous().realize()
    return fastest(lambda: (x + 1).realize(), repeats=50)


def measure_roofline() -> Roofline:
    """Measure the default device, in a few seconds."""
    device = Device.DEFAULT
    half = product_speed(dtypes.float16) if device.split(":")[0] in ("CUDA", "METAL") else 0.0
    roof = Roofline(device, copy_bandwidth(), product_speed(), half, launch_cost(), eager_cost())
    allocator = Device[device].allocator
    if hasattr(allocator, "free_cache"):
        allocator.free_cache()      # give back the large buffers
    return roof


def as_result(roof: Roofline) -> Result:
    """The roofline as a result file holds it: one row, its figures under `values`."""
    figures = {name: value for name, value in asdict(roof).items() if name != "device"}
    return Result.here("roofline", None, [Row("roofline", values=figures)])


def from_result(result: Result) -> Roofline:
    """The roofline that `as_result` put into a result."""
    return Roofline(result.device.backend, **result.rows[0].values)


if __name__ == "__main__":
    print(write_result(as_result(measure_roofline()), local="--store" not in sys.argv))
