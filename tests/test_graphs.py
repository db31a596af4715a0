"""Captured steps as graphs of a CPU or an OpenCL device: the same numbers, without Python between kernels."""
import numpy as np
import pytest
from arrays import numbers, tensor
from tinygrad import Context, Device, Tensor, TinyJit, UOp
from tinygrad.uop.ops import Ops

from minillama.engine import Engine
from minillama.kernels import tuning
from minillama.kernels.steps import Steps
from minillama.measure import calls_of
from minillama.recipe import Recipe
from minillama.shapes import random_weights, shape_config

pytestmark = pytest.mark.skipif(Device.DEFAULT not in ("CPU", "CL"), reason="this device has a graph of tinygrad's")


def captured(form) -> TinyJit:
    """A function that its first call captures, as the engine's steps are."""
    jit = TinyJit(form)
    jit.cnt = 1
    return jit


def graphs(jit: TinyJit) -> list[int]:
    """Kernels in each graph of a captured function."""
    return [len(call.src[0].src[0].src) for call in jit.captured.linear.src if call.src[0].op is Ops.CUSTOM_FUNCTION]


def test_a_graph_follows_its_inputs_and_its_variables():
    cache = tensor(16, 8)

    def form(x: Tensor, at: UOp) -> Tensor:
        y = (x * 2).contiguous() + cache[at:at + 4].contiguous()
        return y.sum(0).contiguous().realize()
    jit, position = captured(form), UOp.variable("at", 0, 12)
    with tuning.launches(None, early=True):
        jit(tensor(4, 8), position.bind(0))
    assert sum(graphs(jit)) == len(calls_of(jit)) > 2, graphs(jit)
    for seed, at in ((1, 0), (2, 12), (3, 5)):
        want = (numbers(4, 8, seed=seed) * 2 + cache.numpy()[at:at + 4]).sum(0)
        assert np.abs(jit(tensor(4, 8, seed=seed), position.bind(at)).numpy() - want).max() < 1e-5


@pytest.mark.parametrize("count", (3, 9, 17, 31))
def test_kernels_with_few_and_many_arguments_get_them_all(count):
    def form(*parts: Tensor) -> Tensor:
        return (sum(x * (n + 1) for n, x in enumerate(parts)).contiguous() + 1).contiguous().realize()
    jit = captured(form)
    for seed in range(2):
        parts = [tensor(8, seed=count * seed + n) for n in range(count)]
        with tuning.launches(None, early=True):
            got = jit(*parts)
        want = sum(x.numpy() * (n + 1) for n, x in enumerate(parts)) + 1
        assert graphs(jit) and np.abs(got.numpy() - want).max() < 1e-4


@pytest.mark.parametrize("draft", (0, 2))
def test_an_engine_gives_the_same_logits_and_texts_with_and_without_graphs(draft):
    config = shape_config("tiny", mtp=bool(draft))
    weights = random_weights(config, "Q4_0", packed=True)
    found = []
    for launches in ("after", "early"):
        engine = Engine(weights, config, Recipe(launches=launches, draft=draft), context=128, batches=(32, 1))
        rows = [engine.feed(list(range(1, 41))).numpy(), *(engine.feed([token]).numpy() for token in (7, 8))]
        engine.clear()
        found.append((np.stack(rows), list(engine.generate([3, 4], 12))))
        assert bool(graphs(engine.steps["logits", 1])) == (launches == "early")
    assert np.array_equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="elsewhere a device shares kernels by itself")
@pytest.mark.parametrize("cores", (1, 2, 5))
def test_cores_that_share_kernels_do_each_part_once_and_in_order(cores):
    rows, columns = 48, 2048                            # so many that all cores come to have some

    def kernel(out: UOp, before: UOp, x: UOp) -> UOp:   # reads what other cores have written
        steps = Steps(Device.DEFAULT)
        row, column = steps.each(rows, shared=True), steps.loop(columns)
        value = before.index(rows - 1 - row, column).load() * 0.5 + x.index(row, column).load()
        steps.do((column,), out.index(row, column).store(value))
        return steps.kernel("test_parts")

    def form(x: Tensor) -> Tensor:
        y = (x * 0).contiguous()
        for _ in range(40):
            y = Tensor.empty(rows, columns).custom_kernel(y, x, fxn=kernel)[0]
        return (y + 1).contiguous().realize()
    jit = captured(form)
    with Context(NUM_CPU_THREADS=cores), tuning.launches(None, early=True):
        jit(tensor(rows, columns))
    assert sum(graphs(jit)) >= 42
    for seed in range(20):
        want, x = 0 * numbers(rows, columns), numbers(rows, columns, seed=seed)
        for _ in range(40):
            want = want[::-1] * 0.5 + x
        assert np.allclose(jit(tensor(rows, columns, seed=seed)).numpy(), want + 1, rtol=1e-4, atol=1e-4)


def test_a_device_is_left_as_it_was_also_after_an_error():
    before = Device[Device.DEFAULT].graph
    with tuning.launches(None, early=False):
        assert Device[Device.DEFAULT].graph is before
    with pytest.raises(ZeroDivisionError), tuning.launches(None, early=True):
        assert Device[Device.DEFAULT].graph is not before
        1 / 0  # noqa: B018
    assert Device[Device.DEFAULT].graph is before
