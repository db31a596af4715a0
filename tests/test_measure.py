"""Counts, clocks, rooflines and result files: what measures must itself be right."""
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes
from tinygrad.engine import jit, realize
from tinygrad.uop.ops import Ops

from minillama import devices, measure, results
from minillama.measure import Call, Clocks, Counts, Timing, calls_of, clock_call, counts_of, time_call
from minillama.results import ClockTimes, Model, Result, ResultError, Row, read_result, read_results, write_result
from minillama.roofline import Roofline, as_result, from_result
from minillama.units import in_units

ROOF = Roofline("CPU", bandwidth=10e9, speed=40e9, half_speed=0.0, launch=2e-6, eager=1e-3)


def numbers(*shape: int, dtype=dtypes.float32) -> Tensor:
    return Tensor(np.arange(np.prod(shape), dtype=np.float32).reshape(shape)).cast(dtype).contiguous().realize()


def captured(function, *args) -> TinyJit:
    replay = TinyJit(function)
    for _ in range(3):
        replay(*args)
    return replay


# ---- counts -------------------------------------------------------------------------------------------------------

COPIES = {
    "clone": lambda x, ids: x.clone(),
    "transpose written out": lambda x, ids: x.T.contiguous(),
    "rows reversed": lambda x, ids: x.flip(0).contiguous(),
    "slice of columns": lambda x, ids: x[:, 3:11].contiguous(),
    "repeat": lambda x, ids: x.repeat(2, 1).contiguous(),
    "cat along rows": lambda x, ids: x.cat(x.flip(0)),
    "cat along columns": lambda x, ids: x.cat(x, dim=1),
    "padding": lambda x, ids: x.pad(((1, 1), (0, 0))).contiguous(),
    "rows looked up": lambda x, ids: x[ids],
    "bits read as another type": lambda x, ids: x.bitcast(dtypes.int32).T.contiguous(),
}
COMPUTATIONS = {
    "addition": lambda x, ids: x + 1,
    "transpose and negation": lambda x, ids: -x.T,
    "cast": lambda x, ids: x.cast(dtypes.int32),
    "sum of rows": lambda x, ids: x.sum(axis=0),
    "rectifier": lambda x, ids: x.relu(),
    "masking by its own values": lambda x, ids: (x > 7).where(x, 0),
    "masking by other values": lambda x, ids: (ids.reshape(-1, 1) > 3).where(x[:4], 0),
    "product": lambda x, ids: x @ x.T,
    "zeros": lambda x, ids: x.zeros_like().contiguous(),
    "cat of computed rows": lambda x, ids: (x + 1).cat(x),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_call_that_stores_what_it_loads_is_a_copy(name):
    x, ids = numbers(16, 24), Tensor([3, 5, 2, 7]).realize()
    calls = calls_of(captured(lambda x, ids: COPIES[name](x, ids).realize(), x, ids))
    assert [call.copy for call in calls] == [True], calls


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_a_call_that_computes_is_no_copy(name):
    x, ids = numbers(16, 24), Tensor([3, 5, 2, 7]).realize()
    calls = calls_of(captured(lambda x, ids: COMPUTATIONS[name](x, ids).realize(), x, ids))
    assert [call.copy for call in calls] == [False], calls


@pytest.mark.parametrize("dtype", [dtypes.uint8, dtypes.int32, dtypes.float16])
def test_copies_are_seen_in_other_types_too(dtype):
    x = numbers(16, 24, dtype=dtype)
    emulated = dtype not in Device[Device.DEFAULT].renderer.supported_dtypes()  # then moving changes subnormals
    assert counts_of(captured(lambda x: x.T.contiguous().realize(), x)).copies == (0 if emulated else 1)


def test_a_masking_by_position_is_a_copy_only_when_it_fills_with_constants():
    x = numbers(16, 16)
    assert counts_of(captured(lambda x: x.tril().contiguous().realize(), x)).copies == 1
    assert counts_of(captured(lambda x: (x.tril() + x.triu().T).realize(), x)).copies == 0


def test_counts_of_a_product_are_those_on_paper():
    a, b = numbers(64, 256), numbers(48, 256)
    counts = counts_of(captured(lambda a, b: (a @ b.T).realize(), a, b))
    assert (counts.kernels, counts.bytes, counts.copies) == (1, 4 * (64 * 256 + 48 * 256 + 64 * 48), 0), counts
    assert counts.ops == pytest.approx(2 * 64 * 256 * 48, rel=0.01), counts     # the first of the sums adds nothing


def three_kernels(x: Tensor) -> Tensor:
    y = x.T.contiguous()
    return (y @ x + 1).softmax().realize()


def test_counts_are_the_same_for_captured_and_plain_calls_and_on_every_run():
    x = numbers(32, 32)
    plain, again, replayed = counts_of(three_kernels, x), counts_of(three_kernels, x), captured(three_kernels, x)
    assert plain == again == counts_of(replayed) and plain.copies == 1, (plain, again, counts_of(replayed))


def test_kernels_that_a_device_gathered_into_one_graph_are_counted_one_by_one():
    replay = captured(three_kernels, numbers(32, 32))
    linear = replay.captured.linear
    plain = Counts.of([call for call in calls_of(replay)])
    if not any(call.src[0].op is Ops.CUSTOM_FUNCTION for call in linear.src):
        replay.captured.linear = UOp(Ops.LINEAR, src=(jit.create_graph_call(list(linear.src[:-1])), linear.src[-1]))
        assert len(replay.captured.linear.src) == 2
    assert counts_of(replay) == plain and plain.kernels > 2


def test_bytes_follow_a_bound_variable():
    cache, end = numbers(100, 8), UOp.variable("end", 1, 100)
    total = captured(lambda cache, end: cache[:end].sum(axis=0).realize(), cache, end.bind(3))
    few, all_of_it = counts_of(total, values={"end": 3}), counts_of(total)
    assert (few.bytes, all_of_it.bytes) == (4 * 8 * 4, 4 * 8 * 101), (few, all_of_it)


def test_a_transfer_between_devices_is_a_copy_but_no_kernel():
    with Clocks() as clocks:
        numbers(4, 4).numpy()
    transfers = [call for call in clocks.calls if call.kind == "transfer"]
    assert transfers and all(call.copy and call.bytes == 64 for call in transfers), clocks.calls


def test_a_function_that_captured_nothing_yet_cannot_be_counted():
    with pytest.raises(ValueError, match="captured nothing yet"):
        counts_of(TinyJit(lambda x: (x + 1).realize()))


# ---- clocks -------------------------------------------------------------------------------------------------------


def test_only_the_first_call_compiles():
    x = numbers(33, 7)
    with Clocks() as first:
        (x * 1.2345 + 5.4321).realize()     # numbers that no other test uses: this kernel is new
    with Clocks() as second:
        (x * 1.2345 + 5.4321).realize()
    assert first.compile > 0 and first.build > 0 and first.run > 0, vars(first)
    assert second.compile == 0 and second.build > 0 and second.run > 0, vars(second)
    assert first.counts == second.counts and first.counts.kernels == 1


def test_the_clocks_add_up_to_the_time_inside_less_that_of_listing(monkeypatch: pytest.MonkeyPatch):
    x, seen, listed = numbers(33, 7), [], []

    def now() -> int:
        seen.append(2 ** len(seen))     # no two sets of intervals have the same sum
        return seen[-1]

    def listing(clocks: Clocks, *args) -> None:
        start = len(seen)
        of_clocks(clocks, *args)
        listed.append(seen[-1] - seen[start])

    of_clocks = Clocks._list
    monkeypatch.setattr(Clocks, "_list", listing)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter_ns=now))
    with Clocks() as clocks:
        (x * 2.3456 + 6.5432).realize()
    assert len(seen) > 5 and len(listed) == 1
    assert clocks.total == seen[-1] - seen[0] - sum(listed), (vars(clocks), seen, listed)


def python_calls(function: Callable, *args) -> int:
    """How many Python functions a call enters: its building, counted instead of timed."""
    entered = 0

    def profile(frame, event, argument) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return entered


def test_a_replay_hardly_builds():
    x = numbers(32, 32)
    replay = captured(three_kernels, x)
    three_kernels(x)
    eager, replayed = python_calls(three_kernels, x), python_calls(replay, x)
    assert clock_call(replay, x).compile == 0 and 5 * replayed < eager, (replayed, eager)


def test_clocks_leave_tinygrad_as_they_found_it():
    doors = (realize.run_linear, realize.compile_linear, jit.compile_linear, type(Device[Device.DEFAULT]).runtime)
    with pytest.raises(ZeroDivisionError), Clocks():
        _ = 1 / 0
    assert doors == (realize.run_linear, realize.compile_linear, jit.compile_linear,
                     type(Device[Device.DEFAULT]).runtime)
    with Clocks(), pytest.raises(RuntimeError, match="cannot be nested"), Clocks():
        pass


def test_a_timed_call_is_repeated_warmed_up_and_realized():
    made = []

    def call(x: Tensor) -> Tensor:
        made.append(x + 1)
        return made[-1]

    timing = time_call(call, numbers(8), repeats=4, warmup=2)
    assert len(made) == 6 and len(timing.samples_ns) == 4
    assert all(tensor.uop.is_realized for tensor in made)
    with pytest.raises(ValueError, match="at least 1"):
        time_call(call, numbers(8), repeats=0)


@pytest.mark.host
def test_a_timing_reports_its_median_and_the_middle_half_of_its_samples():
    timing = Timing((10, 50, 20, 40, 30))
    assert (timing.median_ns, timing.spread_ns, Timing((7,)).spread_ns) == (30, 20, 0.0)
    assert timing.seconds == pytest.approx(30e-9)


@pytest.mark.host
def test_counts_add_up():
    calls = [Call("a", "kernel", 10, 1, False), Call("b", "kernel", 20, 0, True), Call("c", "transfer", 5, 0, True)]
    assert Counts.of(calls) == Counts(kernels=2, bytes=35, ops=1, copies=2)
    assert Counts.of(calls[:1]) + Counts.of(calls[1:]) == Counts.of(calls)


# ---- rooflines and devices ----------------------------------------------------------------------------------------


@pytest.mark.host
def test_a_roofline_allows_the_slower_of_memory_and_arithmetic_plus_launches():
    assert ROOF.ridge == 4
    assert ROOF.seconds(10e9, 1) == 1 and ROOF.seconds(1, 80e9) == 2
    assert ROOF.seconds(10e9, 0, kernels=1000) == pytest.approx(1.002)
    assert (ROOF.reachable(1), ROOF.reachable(4), ROOF.reachable(100)) == (10e9, 40e9, 40e9)


@pytest.mark.host
def test_a_device_is_found_or_says_what_to_install():
    assert devices.works("CPU") and not devices.works("NOSUCH")
    missing = devices.find("NOSUCH")
    assert not missing.works and missing.problem.startswith("not here")
    found = devices.Found("CPU", {"name": "a processor"}, vars(ROOF))
    assert devices.device_table([found, missing]).row_count == 1


@pytest.mark.host
@pytest.mark.parametrize(("here", "opencl_on_a_cpu", "best"), (
    ("METAL CL CPU", False, "METAL"), ("CUDA CL CPU", False, "CUDA"), ("CL CPU", False, "CL"), ("CL CPU", True, "CPU"),
    ("CL", True, "CL"), ("", False, None)))
def test_the_best_device_is_a_gpu_then_the_cpu_itself_then_opencl_on_it(here, opencl_on_a_cpu, best, monkeypatch):
    monkeypatch.setattr(devices, "works", lambda name: name in here.split())
    monkeypatch.setattr(devices, "_run", lambda code, name: SimpleNamespace(returncode=int(not opencl_on_a_cpu)))
    assert devices.best() == best


@pytest.mark.host
@pytest.mark.parametrize("value, unit, text", [
    (0, "s", "-"), (26.44e9, "B/s", "26.4 GB/s"), (999.96e-6, "s", "1.00 ms"), (200, "s", "200 s"),
    (1.2e12, "FLOP/s", "1.20 TFLOP/s"), (8.5e-5, "s", "85.0 µs"), (1e-12, "s", "0.00100 ns")])
def test_numbers_for_people_have_three_digits_and_a_prefix(value, unit, text):
    assert in_units(value, unit) == text


# ---- result files -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def example() -> Result:
    row = Row("decode", {"delta": "chunked"}, 1, [5, 6, 7], ClockTimes(1, 2, 3), Counts(4, 5, 6, 7), False, {"x": 1.5})
    return replace(Result.here("ladder", Model("ref-a", "Q4_0", 8), [row, Row("empty")]), commit="abc1234+")


def test_a_result_survives_writing_and_reading(folder):
    written, path = example(), write_result(example(), local=False)
    assert path.parent == folder and read_result(path) == replace(written, created=read_result(path).created)
    assert path.name.startswith("ladder-ref-a-" + Device.DEFAULT.lower()), path.name
    assert write_result(as_result(ROOF)).parent == folder / "local"
    assert [from_result(result) for result in read_results("roofline")] == [replace(ROOF, device=Device.DEFAULT)]
    assert read_results("roofline", local=False) == []


BROKEN = {
    "missing versions": lambda data: data.pop("versions"),
    "unknown extra": lambda data: data.update(extra=1),
    "schema 99": lambda data: data.update(schema=99),
    "rows: should be list": lambda data: data.update(rows="none"),
    "rows[0]: samples_ns[1]: should be int": lambda data: data["rows"][0].update(samples_ns=[1, "2"]),
    "rows[0]: simulated: should be bool": lambda data: data["rows"][0].update(simulated=0),
    "rows[0]: counts: missing copies": lambda data: data["rows"][0]["counts"].pop("copies"),
    "rows[0]: tokens: should be int": lambda data: data["rows"][0].update(tokens=True),
    "model: layers: should be int": lambda data: data["model"].update(layers=8.5),
    "recipe.delta: should be str": lambda data: data["rows"][0]["recipe"].update(delta=1),
}


@pytest.mark.host
@pytest.mark.parametrize("complaint", BROKEN)
def test_a_result_file_that_is_wrong_says_so_in_one_line(complaint, folder):
    path = write_result(example())
    data = json.loads(path.read_text())
    BROKEN[complaint](data)
    path.write_text(json.dumps(data))
    with pytest.raises(ResultError) as error:
        read_result(path)
    message = str(error.value)
    assert "\n" not in message and path.name in message, message
    assert complaint.replace("]: ", "] ") in message.replace("]: ", "] "), message


@pytest.mark.host
def test_what_is_no_result_file_is_refused(folder):
    (folder / "not.json").write_text("{")
    for name, complaint in (("not.json", "not JSON"), ("none.json", "No such file")):
        with pytest.raises(ResultError, match=complaint):
            read_result(folder / name)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_result(replace(example(), rows=[Row("nan", values={"x": float("nan")})]))


@pytest.mark.host
def test_the_stored_results_are_all_readable():
    for path in results.RESULTS.glob("*.json"):
        assert read_result(path).filename == path.name


def test_what_a_run_does_not_measure_stays_beside_what_it_does(folder):
    def result(**values: int) -> Result:
        rows = [Row(name.replace("_", " "), values={"n": n}) for name, n in values.items()]
        return Result.here("oracle", None, rows)
    assert results.beside_stored(result(Q4_0=1)).rows == result(Q4_0=1).rows        # nothing is stored
    write_result(result(F16_a=1, F16_b=2, F32_a=3), local=False)
    names = results.beside_stored(result(F16_b=5, F32_c=6)).rows
    assert [(row.name, row.values["n"]) for row in names] == [("F16 a", 1), ("F32 a", 3), ("F16 b", 5), ("F32 c", 6)]
    formats = results.beside_stored(result(F16_c=7), lambda name: name.split()[0]).rows
    assert [(row.name, row.values["n"]) for row in formats] == [("F32 a", 3), ("F16 c", 7)]
