"""The copy that memory is measured by, and the measuring of packed weights beside it."""
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Device, Tensor

from minillama.bandwidth import FORMATS, Cases, captured, line, measure_case
from minillama.kernels.copying import copied
from minillama.kernels.layouts import LAYOUTS
from minillama.shapes import shape_config

TINY = replace(shape_config("tiny"), hidden=256, expert_width=256)     # K formats divide its rows


@pytest.mark.parametrize("size", [1, 6, 4096])
def test_a_copy_is_one(size):
    source, target = Tensor(np.arange(size, dtype=np.float32)).realize(), Tensor.full((size,), -1.0).contiguous()
    assert np.array_equal(copied(source, target.realize()).numpy(), source.clone().numpy())
    assert np.array_equal(target.numpy(), source.numpy())


@pytest.mark.host       # test_kernels runs the same kernels on every device
def test_cases_of_every_format_and_several_tokens():
    cases = list(Cases(TINY, cache=1000).all())
    assert len({(case.name, case.tokens) for case in cases}) == len(cases)
    found = {(case.name.split()[0], case.tokens) for case in cases}
    assert found == {("linear", 1), ("linear", 2), ("linear", 4), ("linear", 8), ("experts", 1), ("experts", 2),
                     ("experts", 4), ("experts", 8), ("shared", 1), ("head", 1), ("router", 1), ("launch", 1)}
    assert all(any(f" {format} " in case.name for case in cases) for format in FORMATS)
    for case in cases:
        assert case.calls and case.bytes > 0


def test_bytes_are_those_of_the_chosen_experts():
    cases = Cases(TINY, cache=1000)
    for tokens in (1, 2, 8):
        pair, down = cases.experts("Q4_0", tokens)
        chosen = min(TINY.experts_used * tokens, TINY.experts)
        one = LAYOUTS["Q4_0"].nbytes(TINY.expert_width, TINY.hidden)
        assert (pair.bytes, down.bytes) == (2 * chosen * one, chosen * one)


def test_all_copies_are_gone_through_before_one_comes_again():
    cases = Cases(TINY, cache=100_000)
    linear = cases.linear("Q8_0", 128, 256)
    assert len(linear.calls) * linear.bytes >= 100_000
    pair, down = cases.experts("Q8_0")
    assert len(pair.calls) * pair.bytes >= 100_000 and len(down.calls) * down.bytes >= 100_000
    assert sorted(np.concatenate([ids.numpy() for ids in cases.chosen(2)]).ravel()) == list(range(TINY.experts))


@pytest.mark.skipif(Device.DEFAULT == "CL", reason="its buffers are never planned: there launches queue up anyway")
def test_each_launch_waits_for_the_one_before_since_all_write_to_one_place():
    cases = Cases(TINY, cache=1000)
    for case in (cases.linear("Q4_0", 128, 256), *cases.experts("Q4_0"), cases.shared("Q4_0")):
        calls = captured(case, 4).captured.linear.src
        assert len(calls) == 4 and len({call.src[1] for call in calls}) == 1, case.name


def test_a_row_says_what_was_read_and_how_fast():
    case = Cases(TINY, cache=1000).linear("Q4_0", 128, 256, 2)
    row = measure_case(case, copy=1e9, launches=5, repeats=3)
    values = row.values
    assert (row.tokens, len(row.samples_ns), values["launches"]) == (2, 3, 5)
    assert values["bytes"] == LAYOUTS["Q4_0"].nbytes(128, 256)
    assert values["gigabytes_a_second"] == pytest.approx(values["bytes"] / sorted(row.samples_ns)[1])
    assert values["share_of_copy"] == pytest.approx(values["gigabytes_a_second"])
    assert "GB/s" in line(row)
