"""Sampling on the device equals plain numpy, cuts what it should, and repeats with its seed."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit

from minillama.sampling import Sampler, cut, draw, greedy, threshold

VOCAB = 32
EIGHTHS = st.lists(st.integers(0, 8), min_size=VOCAB, max_size=VOCAB)    # few values: ties, and sums without rounding
LOGITS = np.random.default_rng(7).standard_normal((3, VOCAB)).astype(np.float32) * 2


def one(value: float) -> Tensor:
    return Tensor([float(value)]).realize()


def numpy_cut(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Temperature, top-k, top-p by sorting, in float64."""
    probs = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-probs, kind="stable")
    probs[order[top_k or len(order):]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]         # what weighs more than each entry
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


def device_cut(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    return cut(Tensor(logits).realize(), one(temperature), one(top_k), one(top_p)).numpy()


@given(EIGHTHS, EIGHTHS, st.integers(1, 40))
def test_a_threshold_is_the_largest_value_whose_equals_and_betters_weigh_enough(values, weights, goal):
    probs, weight = (np.array(v, dtype=np.float32) / 8 for v in (values, weights))
    found = threshold(Tensor(probs).realize(), Tensor(weight).realize(), one(goal / 8)).item()
    enough = [value for value in probs if weight[probs >= value].sum() >= goal / 8]
    assert found == max(enough, default=0), f"probs {probs.tolist()}, weights {weight.tolist()}, goal {goal / 8}"


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.3, 0, 1.0), (4.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 1, 1.0), (1.0, VOCAB, 1.0), (1.0, 999, 1.0),
    (1.0, 0, 0.6), (1.0, 0, 1e-6), (1.0, 0, 0.9999999), (0.7, 8, 0.8), (1e-6, 0, 1.0)])
def test_cuts_equal_sorting_in_numpy(temperature: float, top_k: int, top_p: float):
    for logits in LOGITS:
        expected = numpy_cut(logits, temperature, top_k, 2.0 if top_p == 1 else top_p)
        found = device_cut(logits, temperature, top_k, top_p)
        error = np.abs(found - expected).max()
        assert error < 1e-5 and abs(found.sum() - 1) < 1e-5, f"error {error:.2e}, sum {found.sum():.6f}"
        assert top_p > 0.99 or ((found > 0) == (expected > 0)).all(), (found.nonzero(), expected.nonzero())


def test_equals_of_the_last_one_kept_are_kept_too():
    logits = np.log(np.array([0.1, 0.2, 0.2, 0.2, 0.3] + [1e-9] * (VOCAB - 5), dtype=np.float32))
    kept = device_cut(logits, 1.0, 2, 1.0).nonzero()[0].tolist()
    assert kept == [1, 2, 3, 4], f"top-k 2 kept {kept}"
    kept = device_cut(logits, 1.0, 0, 0.45).nonzero()[0].tolist()
    assert kept == [1, 2, 3, 4], f"top-p 0.45 kept {kept}"


def test_greedy_takes_the_smallest_of_equal_ids_and_top_k_of_one_agrees_with_it():
    assert greedy(Tensor([0.0, 3.0, 1.0, 3.0])).tolist() == [1]
    for logits in LOGITS:
        best = greedy(Tensor(logits).realize()).item()
        probs = Tensor(device_cut(logits, 1.5, 1, 1.0)).realize()
        found = [draw(probs, one(uniform)).item() for uniform in (0.0, 0.5, 0.99999994)]
        assert found == [best] * 3 == [int(logits.argmax())] * 3, f"greedy {best}, top-k 1 {found}"


def test_a_draw_inverts_the_cumulative_distribution_and_never_takes_what_was_cut():
    probs = np.array([0, 0, 4, 0, 2, 1, 0, 1] + [0] * (VOCAB - 8), dtype=np.float32) / 8
    device, jitted = Tensor(probs).realize(), TinyJit(lambda p, u: draw(p, u).realize())
    for uniform in (0.0, 0.25, 0.49, 0.5, 0.7, 0.75, 0.874, 0.875, 0.99999994):
        expected = int(np.searchsorted(np.cumsum(probs), uniform, side="right"))
        found = jitted(device, one(uniform)).item()
        assert found == expected, f"uniform {uniform}: id {found}, expected {expected}"


def test_draws_follow_the_distribution_and_a_seed_repeats_them():
    probs, jitted = Tensor(device_cut(LOGITS[0], 1.0, 6, 1.0)).realize(), TinyJit(lambda p, u: draw(p, u).realize())
    uniforms = Sampler(1.0, seed=3).stream().random(1500, dtype=np.float32)
    drawn = [jitted(probs, one(uniform)).item() for uniform in uniforms]
    expected = probs.numpy() * len(drawn)
    counts = np.bincount(drawn, minlength=VOCAB)
    assert not counts[expected == 0].any(), f"ids that were cut: {counts[expected == 0]}"
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 25.7, f"chi-square {chi_square:.1f} with 5 degrees of freedom: {counts}, not {expected}"
    again = Sampler(0.5, seed=3).stream()
    assert drawn[:50] == [jitted(probs, one(again.random(1, dtype=np.float32)[0])).item() for _ in range(50)]


@pytest.mark.slow
def test_a_vocabulary_of_qwen_s_size_is_cut_to_exactly_k_and_drawn_from():
    logits = np.random.default_rng(1).standard_normal(151_936).astype(np.float32)
    probs = Tensor(device_cut(logits, 1.0, 20, 1.0)).realize()
    kept = set(probs.numpy().nonzero()[0])
    assert kept == set(np.argsort(-logits)[:20])
    drawn = {draw(probs, one(uniform)).item() for uniform in np.linspace(0, 0.9999999, 12)}
    assert drawn <= kept and {min(kept), max(kept)} <= drawn, f"drawn {sorted(drawn)} of {sorted(kept)}"


@pytest.mark.host
def test_seeds_differ_and_one_by_one_gives_the_same_as_all_at_once():
    first, again, other = (Sampler(seed=seed).stream().random(8, dtype=np.float32).tolist() for seed in (1, 1, 2))
    assert first == again != other
    stream = Sampler(seed=1).stream()
    assert [stream.random(1, dtype=np.float32)[0] for _ in range(8)] == first
    assert all(0 <= number < 1 for number in first)


@pytest.mark.host
def test_impossible_settings_are_refused_and_a_temperature_near_zero_is_greedy():
    for settings in ({"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1},
                     {"top_p": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(settings)).replace("_", "-")):
            Sampler(**settings)
    assert Sampler().greedy and Sampler(1e-38).greedy and not Sampler(1e-6).greedy
