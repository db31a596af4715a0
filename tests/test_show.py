"""The course's pictures are made from data and hold what they should; that they can be read, eyes must judge."""
import io
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image
from tinygrad import Context, Tensor, TinyJit

from minillama.ladder import LADDER
from minillama.measure import Call, calls_of, seconds_of_calls
from minillama.results import ClockTimes, Result, Row, read_results
from minillama.show import RED, compact, experts, running, steps, training
from minillama.show.steps import Step

pytestmark = pytest.mark.host

BEFORE = Step([Call("a", "kernel", 4000, 10, False), Call("b", "kernel", 1000, 0, True),
               Call("c", "kernel", 2000, 30, False)], [2e-6, 1e-6, 5e-6], ["router", "delta rule", "experts"])
AFTER = Step([BEFORE.calls[0], BEFORE.calls[2]], [2e-6, 5e-6], ["router", "experts"])


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert not plt.get_fignums(), "an open figure is shown twice in a notebook"


def texts(figure: Figure) -> str:
    figure.draw_without_rendering()
    found = [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, axes._left_title]]
    return "\n".join(found)


def bars(axes) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


# ---- a step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "widths"), [("bytes", [4000, 1000, 2000]), ("seconds", [2e-6, 1e-6, 5e-6]),
                                            ("kernels", [1, 1, 1])])
def test_every_call_is_a_bar_as_wide_as_its_bytes_or_its_time(by, widths):
    figure = steps.kernels({"before": BEFORE, "after": AFTER}, by)
    before, after = figure.axes
    assert bars(before) == pytest.approx(widths) and bars(after) == pytest.approx(widths[::2])
    assert [patch.get_x() for patch in before.patches] == pytest.approx([0, widths[0], widths[0] + widths[1]])
    assert before.get_xlim() == after.get_xlim(), "two steps are compared on one scale"


def test_a_step_says_what_it_adds_up_to():
    said = texts(steps.kernels({"before": BEFORE, "after": AFTER}))
    assert "before: 3 kernels, of these 1 copies; 7.00 kB, 8.00 µs" in said
    assert "after: 2 kernels, of these 0 copies; 6.00 kB, 7.00 µs" in said


def test_copies_have_a_colour_and_a_hatch_of_their_own():
    axes = steps.kernels({"before": BEFORE}).axes[0]
    assert [patch.get_facecolor() == to_rgba(RED) for patch in axes.patches] == [False, True, False]
    assert [bool(patch.get_hatch()) for patch in axes.patches] == [False, True, False]


def test_parts_have_colours_of_their_own_and_copies_are_marked_below():
    axes = steps.kernels({"before": BEFORE}, colour="part").axes[0]
    assert len({patch.get_facecolor() for patch in axes.patches}) == 3
    assert len(axes.lines) == 1 and list(axes.lines[0].get_xdata()) == [4000, 5000]
    parts = [style for name, style in steps.COLOURS.items() if name not in ("kernel", "copy")]
    assert len(set(parts)) == len(parts)


def test_parts_may_have_names_of_ones_own():
    mine = replace(BEFORE, parts=["mine", "yours", "mine"])
    axes = steps.kernels({"before": mine}, colour="part").axes[0]
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert colours[0] == colours[2] != colours[1]


def test_what_was_not_measured_is_not_drawn():
    bare = Step(BEFORE.calls)
    with pytest.raises(ValueError, match="not timed"):
        steps.kernels({"bare": bare}, "seconds")
    with pytest.raises(ValueError, match="parts"):
        steps.kernels({"bare": bare}, colour="part")
    assert bare.total() == "3 kernels, of these 1 copies; 7.00 kB"


@pytest.mark.parametrize(("colour", "pieces"), [("copy", [6000, 1000]), ("part", [1000, 4000, 2000])])
def test_bytes_before_and_after_are_stacked_by_what_moves_them(colour, pieces):
    figure = steps.bytes_moved({"before": BEFORE, "after": AFTER}, colour)
    axes = figure.axes[0]
    assert [width for width in bars(axes)[:len(pieces)]] == pytest.approx(pieces)
    assert sum(bars(axes)[len(pieces):]) == pytest.approx(6000)
    assert "7.00 kB" in texts(figure) and "6.00 kB" in texts(figure)


def test_the_calls_that_move_most_come_first():
    assert steps.longest(BEFORE, 2) == [("a", 4000.0), ("c", 2000.0)]
    assert steps.longest(BEFORE, 1, "seconds") == [("c", 5e-6)]


def test_every_call_of_a_replay_is_timed():
    x = Tensor.ones(64, 64).contiguous().realize()
    replay = TinyJit(lambda x: ((x + 1).contiguous() @ x).realize())
    for _ in range(2):
        replay(x)
    assert len(calls_of(replay)) == len(seconds_of_calls(replay, x)) == 2
    assert all(seconds > 0 for seconds in seconds_of_calls(replay, x))


def test_a_function_whose_calls_change_cannot_be_timed_call_by_call():
    made = iter(range(100))
    with pytest.raises(ValueError, match="the same calls"):
        seconds_of_calls(lambda: [(Tensor([1.0]).realize() + 1).realize() for _ in range(next(made))])


# ---- the ladder ---------------------------------------------------------------------------------------------------


def test_the_waterfall_has_a_bar_a_rung_and_a_marker_a_machine():
    results = read_results("ladder", local=False)
    figure = steps.waterfall(results)
    kernels, moved, times = figure.axes
    rows = steps.of_all(results, "tg")
    assert [rung.name for rung in LADDER if rung.name in rows] == [name for name in rows if ", " not in name]
    assert set(rows) == {name for result in results for name in steps.rows_of(result, "tg")}
    longest = max((steps.rows_of(result, "tg") for result in reversed(results)), key=len)
    assert all(rows[name] == row for name, row in longest.items())
    assert bars(kernels)[::2] == [row.counts.kernels / row.tokens for row in rows.values()]
    assert bars(kernels)[1::2] == [row.counts.copies / row.tokens for row in rows.values()]
    assert bars(moved) == [row.counts.bytes / row.tokens / 1e6 for row in rows.values()]
    marks = [line for line in times.lines if line.get_marker() not in ("None", "")]
    assert len(marks) == 2 * sum(len(steps.rows_of(result, "tg")) for result in results)
    names = [text.get_text() for text in times.get_legend().get_texts()]
    assert names == [f"{result.device.name} ({result.device.backend})" for result in results]


def test_the_waterfall_so_far_is_pale_below_the_rung_that_is_reached():
    results = read_results("ladder", local=False)
    axes = steps.waterfall(results, so_far="gathered").axes[1]
    names = list(steps.of_all(results, "tg"))
    pale = [name for name, patch in zip(names, axes.patches, strict=True) if patch.get_alpha() < 1]
    assert pale == [name for name in names[names.index("gathered") + 1:] if ", " not in name]
    with pytest.raises(ValueError, match="not among the rungs"):
        steps.waterfall(results, so_far="a rung that is not there")
    with pytest.raises(ValueError, match="no ladder"):
        steps.waterfall([])


def test_building_is_left_out_of_running_alone():
    clocks = ClockTimes(9_000, 0, 1_000)
    eager = Row("naive tg1", {"capture": "eager"}, 1, [10_000, 12_000, 14_000], clocks)
    assert steps.microseconds(eager) == (12.0, 1.0)
    replayed = Row("captured tg16", {"capture": "jit"}, 16, [160_000], clocks)
    assert steps.microseconds(replayed) == (10.0, 10.0)
    result = Result.here("ladder", None, [eager, replayed])
    assert steps.tokens_a_second(result) == pytest.approx({"naive": 1e6 / 12, "captured": 1e5})


# ---- experts, and an engine at work ------------------------------------------------------------------------------


def test_a_panel_a_layer_shows_which_experts_fire():
    ids, probs = np.array([[0, 2], [3, 1]]), np.array([[.75, .25], [.5, .5]])
    figure = experts.routing([" a", "b\n"], {"layer 0": (ids, probs), "layer 1": (ids, probs)}, 4)
    assert len(figure.axes) == 2
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (4, 2) and shown.filled(0).T.tolist() == [[.75, 0, .25, 0], [0, .5, 0, .5]]
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["␣a", "b↵"]


def test_picked_experts_carry_their_weight():
    figure = experts.probabilities(["x"], np.array([[.1, .6, .3]]), np.array([[1, 2]]), np.array([[.67, .33]]))
    axes = figure.axes[0]
    assert bars(axes) == [0.8] * 5 and [text.get_text() for text in axes.texts] == ["0.67", "0.33"]


def test_balance_is_in_equal_shares():
    shown = experts.balance(np.array([[1, 3], [2, 2]])).axes[0].images[0].get_array()
    assert shown.tolist() == [[.5, 1.5], [1, 1]]


def test_padding_is_drawn_as_what_a_batch_has_too_much():
    axes = running.plans({5: [8], 65: [64, 1]}).axes[0]
    assert bars(axes) == [5, 3, 64, 0, 1, 0]


def test_what_sampling_cuts_is_counted():
    probs = np.array([.5, .3, .2])
    figure = running.cuts(["a", "b", "c"], {"all": probs, "two": np.array([.6, .4, 0])}, count=3)
    assert "3 tokens left" in texts(figure) and "2 tokens left" in texts(figure)
    assert bars(figure.axes[1]) == [.6, .4, 0]


# ---- training -----------------------------------------------------------------------------------------------------


def test_every_place_shows_the_token_that_each_loss_wants_there():
    said = texts(training.targets(["a", "b", "c", "d", "e"], length=2)).splitlines()
    assert said[:11] == ["a", "b", "c", "d", "e", *"bc", *"cd", *"de"]


def test_a_step_is_split_into_forward_backward_and_update():
    weight, moment = (Tensor([2.0, 3.0]).contiguous().realize() for _ in range(2))

    def step(x: Tensor) -> Tensor:
        loss = (weight * x).square().sum().contiguous()
        grad = loss.gradient(weight)[0].contiguous()
        Tensor.realize(loss, moment.assign(moment + grad), weight.assign(weight - grad * moment))
        return loss
    replay = TinyJit(step)
    with Context(NO_MEMORY_PLANNER=1, JIT=2):
        for _ in range(2):
            loss = replay(Tensor([1.0, 1.0]).realize())
    parts = training.parts_of(replay, loss, [weight, moment])
    assert len(parts) == len(calls_of(replay)) and set(parts) == {"forward", "backward", "update"}
    assert parts[0] == "forward" and parts.count("forward") == 1 and parts[-1] == "update"


def test_a_log_has_lines_of_training_and_of_held_out_text():
    run, heldout = training.read_log(Path(__file__).parent.parent / "data" / "training" / "log.jsonl")
    figure = training.run(run, heldout, uniform=8.3)
    losses, rate = figure.axes
    assert [len(line.get_xdata()) for line in losses.lines[:4]] == [len(run)] * 3 + [len(heldout)]
    assert list(rate.lines[0].get_ydata()) == [line["lr"] for line in run]


def test_a_figure_in_a_notebook_is_a_small_png_of_the_same_size():
    figure = steps.kernels({"before": BEFORE}, colour="part")
    full = io.BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight")
    small = compact(figure)
    assert Image.open(io.BytesIO(small)).size == Image.open(full).size and 2 * len(small) < len(full.getvalue())
