"""Kernels that start before the one before them has ended: what they may read before they wait. (CUDA's, rendered.)"""
import re
from types import SimpleNamespace

import pytest
from arrays import empty, unfilled
from tinygrad import dtypes
from tinygrad.device import Buffer
from tinygrad.uop.ops import Ops

from minillama.kernels import overlap, product
from minillama.kernels.layouts import LAYOUTS
from minillama.kernels.rendering import sources

IDS, SHARE, X = 1, 2, 3         # arguments of `product.gated`, behind its result


def product_source(format: str = "Q4_0") -> str:
    return sources(product.linear(empty(1, 2048), unfilled(format, 4096, 2048)))[0]


def gated_source() -> str:
    weights = unfilled("Q4_0", 16, 512, 2048), unfilled("Q4_0", 16, 512, 2048)
    return sources(product.gated(empty(1, 2048), *weights, empty(1, 4, dtype=dtypes.int32), empty(1, 4)))[0]


def parts_of(source: str) -> tuple[list[str], list[str]]:
    """The lines before the wait and those behind it."""
    before, behind = source.split(overlap.WAIT)
    return before.split("{\n", 2)[-1].split("\n")[:-1], behind.split("\n")


def reads(lines: list[str], argument: int) -> int:
    return sum(len(re.findall(rf"\bdata{argument}_", line)) for line in lines)


@pytest.mark.parametrize(("source", "fresh", "early"), (
    (product_source, {1}, {2, 3}), (gated_source, {IDS, SHARE}, {4, 5, 6, 7}), (gated_source, {X}, {4, 5, 6, 7})))
def test_a_kernel_with_the_wait_in_it_has_the_same_lines_and_each_in_reach_of_what_it_uses(source, fresh, early):
    source = source()
    made = overlap.waiting(source, frozenset(fresh), frozenset(early))
    lines = re.sub(r"__ldcg\((.*)\);", r"(*\1);", made).split("\n")
    assert sorted(line for line in lines if "griddepcontrol" not in line) == sorted(source.split("\n"))
    assert lines.count(overlap.WAIT) == 1
    known = set()
    names = set(re.findall(r"\b(?:val|alu|cast|[gl]idx)\d+\b", made))
    for line in made[made.index(") {\n"):].split("\n"):
        declared = re.match(r"\s*(?:for \()?[\w ]+ (\w+) = ", line)
        used = set(re.findall(r"\b\w+\b", line.split(" = ", 1)[-1])) & names
        assert used <= known, line
        known |= {declared[1]} if declared else set()


@pytest.mark.parametrize("format", ("Q4_0", "Q8_0", "Q6_K", "BF16", "F16"))
def test_weights_are_read_before_the_wait_and_what_is_fresh_behind_it(format):
    weight = range(2, 2 + len(LAYOUTS[format].parts))
    first, rest = parts_of(overlap.waiting(product_source(format), frozenset({1}), frozenset(weight)))
    assert all(reads(first, n) and not reads(rest, n) for n in weight) and not reads(first, 1) and not reads(first, 0)
    assert reads(rest, 1) and reads(rest, 0)


def test_what_is_found_by_a_fresh_number_is_not_read_early():
    """Weights of an expert that the kernel before has just chosen; but those of one that was chosen earlier are."""
    early = frozenset({4, 5, 6, 7})
    first, rest = parts_of(overlap.waiting(gated_source(), frozenset({IDS, SHARE}), early))
    assert first == []
    end = rest.index(overlap.AGAIN)
    soon, rest = rest[:end], rest[end:]         # asked for before all else but x
    assert all(reads(soon, n) and not reads(rest, n) for n in early) and not reads(soon, 0)
    assert max(n for n, line in enumerate(soon) if reads([line], X)) < min(
        n for n, line in enumerate(soon) if reads([line], 4))
    first, rest = parts_of(overlap.waiting(gated_source(), frozenset({X}), early))
    assert reads(first, 4) and reads(first, IDS) and not reads(first, X) and reads(rest, X)
    numbers, = (line for line in first if reads([line], IDS))
    assert "__ldcg(" in numbers and not any("__ldcg" in line for line in first if reads([line], 4))


def test_blocks_that_can_have_registers_in_plenty_are_promised_them():
    source = product_source()
    bound = int(overlap.BOUNDS.search(source)[1])
    few, many = (overlap.waiting(source, frozenset({1}), frozenset({2, 3}), share) for share in (2, 64))
    assert f"__launch_bounds__({bound}, 2)" in few and f"__launch_bounds__({bound})" in many


def test_of_many_reads_that_look_something_up_only_that_comes_early():
    """The sum over experts: over ten, in two groups, it reads weights early; fifteen of Q6_K are in one, and too many.
    """
    for format, used, reads_early in (("Q4_0", 10, True), ("Q6_K", 10, True), ("Q6_K", 15, False)):
        down = unfilled(format, 16, 512, 512)
        source = sources(product.mixed(empty(1, used, 512), down, empty(1, used, dtype=dtypes.int32)))[0]
        first, rest = parts_of(overlap.waiting(source, frozenset({1}), frozenset(range(3, 3 + len(down.arrays)))))
        assert reads(first, 2)                          # the experts' numbers
        assert bool(reads(first, 3)) == reads_early
        if not reads_early:                             # then behind the wait, and before any barrier
            end = rest.index(overlap.AGAIN)
            assert reads(rest[:end], 3) and not reads(rest[end:], 3)


def test_where_one_of_many_numbers_cannot_be_read_past_the_cache_nothing_is_read_early():
    lines = ["  int alu1 = (gidx0*512);", "  int val0 = ((gidx0<3)?*(data1_4+gidx0):0);"]
    lines += [f"  float val{n + 1} = (*(data2_9+(val0*100+alu1+{n})));" for n in range(overlap.MOST + 6)]
    assert overlap.hoisted(lines, {"data1_4", "data2_9"}, {"data3_4"}, {"data2_9"}) == ({}, [])


def buffer(nbytes: int, base: Buffer | None = None, offset: int = 0) -> Buffer:
    return Buffer("CPU", nbytes, dtypes.uint8, base=base, offset=offset)


def call(*buffers: Buffer, outs: tuple[int, ...] = (0,)):
    return 0, SimpleNamespace(op=Ops.PROGRAM, arg=SimpleNamespace(outs=outs)), buffers, {}


def test_buffers_touch_where_they_share_a_cache_line():
    arena = buffer(4096)
    a, near, far = buffer(100, arena), buffer(28, arena, 100), buffer(100, arena, 128)
    assert overlap.touches(a, near) and overlap.touches(near, a) and overlap.touches(a, a)
    assert not overlap.touches(a, far) and not overlap.touches(a, buffer(100))


def test_a_call_reads_early_what_no_recent_call_wrote():
    weight, x, y, z, w = (buffer(256) for _ in range(5))
    calls = [call(x, w), call(y, x, weight), call(z, y, x, weight)]
    assert overlap.written_by(calls[1:2], calls[2]) == {1}
    assert overlap.early_reads(calls, 2) == {0, 3}          # not x, which lies in the cache; z is its own
    old = [calls[0], *(call(z, w) for _ in range(overlap.RECENT)), call(y, x)]
    assert 1 in overlap.early_reads(old, len(old) - 1)
