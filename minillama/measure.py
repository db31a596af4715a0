"""Measuring: three clocks told apart, calls counted, samples kept.

A call of a tensor program spends its time in three places: *building* the graph (Python decides what to compute),
*compiling* kernels (each once), and *running* them. `Clocks` tells them apart for any piece of code and lists the
kernels it ran; `time_call` repeats one call and keeps every sample; `calls_of` and `counts_of` read what a captured
function will run. All of it looks at tinygrad from outside: what is measured is not changed, save that under `Clocks`
Python waits for the device after each realize, so that running is not hidden behind building.

Times are nanoseconds, memory is bytes, operations are additions and multiplications of numbers (not of addresses).
"""
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from statistics import median, quantiles
from typing import Any

from tinygrad import Device, Tensor, codegen
from tinygrad.device import Compiled
from tinygrad.dtype import AddrSpace
from tinygrad.engine import realize
from tinygrad.helpers import perf_counter_us
from tinygrad.uop.ops import Ops, UOp, sym_infer

# ---- one call, many times ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Samples of one call, in the order they were taken, in nanoseconds."""
    samples_ns: tuple[int, ...]

    @property
    def median_ns(self) -> float:
        return median(self.samples_ns)

    @property
    def spread_ns(self) -> float:
        """Distance between the quartiles: half of the samples lie within it."""
        if len(self.samples_ns) < 2:
            return 0.0
        low, _, high = quantiles(self.samples_ns, n=4, method="inclusive")
        return high - low

    @property
    def seconds(self) -> float:
        """The median, in seconds."""
        return self.median_ns * 1e-9


def synchronize() -> None:
    """Wait until every opened device has finished what was queued."""
    for name in tuple(Device._opened_devices):
        Device[name].synchronize()


def realized(result: Any) -> Any:
    """Run what `result` still owes, if it is a tensor or a collection of tensors."""
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            tensor.realize()
    return result


def time_call(call: Callable[..., Any], *args, repeats: int = 10, warmup: int = 3) -> Timing:
    """Time `call(*args)` `repeats` times, each to the end of its last kernel, after `warmup` calls that do not count.

    Three warm-up calls let a `TinyJit` run plainly, capture, and replay once before the first sample.
    Tensors that the call returns unrealized are realized within its time.
    """
    if repeats < 1:
        raise ValueError(f"repeats is at least 1, not {repeats}")
    for _ in range(warmup):
        realized(call(*args))
    samples = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter_ns()
        realized(call(*args))
        synchronize()
        samples.append(time.perf_counter_ns() - start)
    return Timing(tuple(samples))


# ---- what a graph does ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a graph. `kind` is kernel, or transfer (between devices); `bytes` is what tinygrad's own estimate
    adds up to (each buffer once, at most its size); `copy` says that it stores what it loads, unchanged."""
    name: str
    kind: str
    bytes: int
    ops: int
    copy: bool


@dataclass(frozen=True)
class Counts:
    """Sums over calls: kernels, bytes moved, operations, and copies (calls that store what they load, unchanged)."""
    kernels: int = 0
    bytes: int = 0
    ops: int = 0
    copies: int = 0

    @classmethod
    def of(cls, calls: list[Call]) -> "Counts":
        return cls(sum(call.kind == "kernel" for call in calls), sum(call.bytes for call in calls),
                   sum(call.ops for call in calls), sum(call.copy for call in calls))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _flat(linear: UOp) -> Iterator[UOp]:
    """The calls of a linear graph, out of the batches into which a device may have gathered them."""
    for call in linear.src:
        body = call.src[0]
        if body.op is Ops.CUSTOM_FUNCTION and body.arg == "graph":
            yield from _flat(body.src[0])
        elif body.op is Ops.CUSTOM_FUNCTION and body.arg == "hcq":
            raise RuntimeError("kernels inside a hardware queue cannot be counted: unset HCQ2")
        else:
            yield call


def _constant(value: UOp) -> bool:
    return value.op is Ops.CONST or (value.op in (Ops.CAST, Ops.STACK) and all(map(_constant, value.src)))


def _reads(value: UOp) -> set[UOp]:
    """The loads that a value depends on."""
    return {part for part in value.toposort() if part.op is Ops.LOAD}


def _moved(value: UOp) -> bool:
    """Whether a stored value is a loaded one: picked, put in place, reinterpreted or padded, but not computed."""
    if value.op is Ops.LOAD:
        place, *gate = value.src    # gated, it yields a constant outside: the gate may ask where, not what is there
        return place.addrspace is AddrSpace.GLOBAL and (
            not gate or (_constant(gate[0]) and _reads(gate[-1]) <= _reads(place)))
    if value.op in (Ops.INDEX, Ops.SHRINK, Ops.BITCAST):
        return _moved(value.src[0])
    if value.op is Ops.STACK:
        return all(_moved(part) or _constant(part) for part in value.src) and not _constant(value)
    if value.op is Ops.WHERE:
        chosen = value.src[1:]
        return not _reads(value.src[0]) and all(_moved(v) or _constant(v) for v in chosen) and any(map(_moved, chosen))
    return False


def is_copy(call: UOp) -> bool:
    """Whether a call stores what it loads, unchanged: a clone, a transpose written out, a `cat`, a padding, rows
    looked up by index. A cast, a sum or a masking by values computes something, so it is none; nor is a filling with
    a constant. (Where halves are emulated, as on PoCL, moving them flushes subnormals: no copy either.)"""
    body = call.src[0]
    if body.op is Ops.COPY:
        return True
    if body.op is not Ops.PROGRAM:
        return False
    stores = [u for u in body.src[0].toposort() if u.op is Ops.STORE and u.src[0].addrspace is AddrSpace.GLOBAL]
    return bool(stores) and all(_moved(store.src[1]) for store in stores)


def _read_call(call: UOp, values: dict[str, int]) -> Call:
    body, estimate = call.src[0], realize.estimate_uop(call)
    kind = {Ops.PROGRAM: "kernel", Ops.COPY: "transfer"}.get(body.op, "other")
    name = body.arg.function_name if kind == "kernel" else kind

    def number(total: int | UOp) -> int:
        largest = {v.expr: v.vmax for v in total.variables()} if isinstance(total, UOp) else {}
        return int(sym_infer(total, largest | values))
    return Call(name, kind, number(estimate.mem), number(estimate.ops), is_copy(call))


def calls_of(function: Callable[..., Any], *args, values: dict[str, int] | None = None) -> list[Call]:
    """The calls that `function` makes, in order.

    A captured `TinyJit` is read, not run; `values` gives its bound variables, by name (else each at its largest
    value). Anything else is called once, with `args`. Raises ValueError for a `TinyJit` that has not captured yet.
    """
    if hasattr(function, "captured"):
        if function.captured is None:
            raise ValueError("this TinyJit has captured nothing yet: call it twice first")
        return [_read_call(call, values or {}) for call in _flat(function.captured.linear)]
    with Clocks() as clocks:
        realized(function(*args))
    return clocks.calls


def counts_of(function: Callable[..., Any], *args, values: dict[str, int] | None = None) -> Counts:
    """Kernels, bytes, operations and copies of what `function` runs; arguments as for `calls_of`."""
    return Counts.of(calls_of(function, *args, values=values))


def seconds_of_calls(function: Callable[..., Any], *args, repeats: int = 5) -> list[float]:
    """Seconds of each call that `function(*args)` makes, in the order of `calls_of`: the median of several runs.

    The device is waited for after every call, so that each carries a launch and a wait of its own: the shares are what
    counts, and their sum is more than a run takes. Where a device replays calls in batches, a batch is one call:
    capture under `Context(JIT=2)`, which leaves them apart.
    """
    runs: list[list[float]] = []
    follow = realize.track_stats            # tinygrad calls it after each call, with the time at which that began

    def noted(ctx: Any, call: UOp, began: Any, *rest: Any) -> None:
        synchronize()
        runs[-1].append(float(perf_counter_us() - began) * 1e-6)
        follow(ctx, call, began, *rest)
    realized(function(*args))
    realize.track_stats = noted
    try:
        for _ in range(repeats):
            synchronize()
            runs.append([])
            realized(function(*args))
    finally:
        realize.track_stats = follow
    if len({len(run) for run in runs}) > 1:
        raise ValueError(f"the function does not make the same calls every time: {[len(run) for run in runs]}")
    return [median(samples) for samples in zip(*runs, strict=True)]


# ---- three clocks -----------------------------------------------------------------------------------------------

# The functions of tinygrad 0.14 at whose doors the clock changes hands. What happens outside all of them is building.
DOORS = {"run_linear": "run", "compile_linear": "build", "link_linear": "build", "get_graph_runtime": "build",
         "lower_and_compile": "compile"}


class Clocks:
    """`with Clocks() as clocks: ...` splits the block's time into `build`, `compile` and `run`, in nanoseconds.

    *compile* is lowering, rendering and compiling kernels that were not in memory yet, and loading them; *run* is
    launching kernels and waiting for them; *build* is all other Python. They add up to `total`. `calls` lists what was
    run. (PoCL finishes compiling a kernel at its first launch: on a first call a part of compiling shows as running.)
    """
    _active = False

    def __init__(self) -> None:
        self.build = self.compile = self.run = 0
        self.calls: list[Call] = []

    @property
    def total(self) -> int:
        return self.build + self.compile + self.run

    @property
    def counts(self) -> Counts:
        return Counts.of(self.calls)

    def __enter__(self) -> "Clocks":
        if Clocks._active:
            raise RuntimeError("Clocks are running already: they cannot be nested")
        Clocks._active = True
        self._undo: list[tuple[Any, str, Any]] = []
        self._values: dict[str, int] = {}
        for name, clock in DOORS.items():
            self._hook_everywhere(getattr(realize, name), clock)
        self._hook(Compiled, "runtime", self._timed(Compiled.runtime, "compile"))
        synchronize()
        self._stack, self._since = ["build"], time.perf_counter_ns()
        return self

    def __exit__(self, *_) -> None:
        self._tick()
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        Clocks._active = False

    def _tick(self) -> None:
        """Credit the time since the last change to the clock that had it."""
        now = time.perf_counter_ns()
        setattr(self, self._stack[-1], getattr(self, self._stack[-1]) + now - self._since)
        self._since = now

    def _timed(self, function: Callable, clock: str) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            self._tick()
            self._stack.append(clock)
            programs, compiled = len(codegen.to_program_cache), self.compile
            try:
                return self._noted(function, *args, **kwargs)
            finally:
                self._tick()
                self._stack.pop()
                if function.__name__ == "lower_and_compile" and len(codegen.to_program_cache) == programs:
                    self.build, self.compile = self.build + self.compile - compiled, compiled   # only looked up
        return timed

    def _noted(self, function: Callable, *args, **kwargs) -> Any:
        """Call a function of tinygrad and list the kernels that it runs."""
        if function.__name__ == "run_linear":
            self._values = dict(kwargs.get("var_vals") or (args[1] if len(args) > 1 else None) or {})
            if kwargs.get("jit"):
                self._list(args[0])
            result = function(*args, **kwargs)
            synchronize()
            return result
        result = function(*args, **kwargs)
        if function.__name__ == "compile_linear" and self._stack[-2] == "run":
            self._list(result)
        return result

    def _list(self, linear: UOp) -> None:
        """Listing is our own work: it is on nobody's clock."""
        self._tick()
        self.calls += [_read_call(call, self._values) for call in _flat(linear)]
        self._since = time.perf_counter_ns()

    def _hook(self, owner: Any, name: str, replacement: Callable) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)

    def _hook_everywhere(self, original: Callable, clock: str) -> None:
        """Put a timed version in place of a function, under every name by which a module of tinygrad knows it."""
        timed = self._timed(original, clock)
        for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "tinygrad"]:
            for name in [name for name, value in vars(module).items() if value is original]:
                self._hook(module, name, timed)


def clock_call(call: Callable[..., Any], *args, repeats: int = 5) -> Clocks:
    """The clocks of `call(*args)`: of several calls, the one whose total is the median. Nothing is warmed up."""
    if repeats < 1:
        raise ValueError(f"repeats is at least 1, not {repeats}")
    taken = []
    for _ in range(repeats):
        with Clocks() as clocks:
            realized(call(*args))
        taken.append(clocks)
    return sorted(taken, key=lambda clocks: clocks.total)[(repeats - 1) // 2]
