"""The gated delta rule: its forms against a loop in float64, on easy and on hard inputs, in batches, padded, split."""
from functools import cache

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import difference
from tinygrad import Tensor, TinyJit

from minillama.delta_net import CHUNK, causal_conv, chunked, delta_net, inverse_of_unit_lower, recurrent
from minillama.layers import linear

K_HEADS, HEADS, DIM = 2, 4, 32      # as in ref-a
TOLERANCE = 1e-4                    # outputs and states are of size 1
FORMS = {"recurrent": (recurrent, 8), "chunked": (chunked, 2 * CHUNK)}      # and the tokens of one call
INPUTS = ("q", "k", "v", "g", "beta")


def loop(q, k, v, g, beta, state) -> tuple[np.ndarray, np.ndarray]:
    """The rule as the paper writes it, one head and one token at a time, in float64."""
    state, out = state.astype(np.float64), np.zeros(v.shape)
    for head in range(HEADS):
        mine = head // (HEADS // K_HEADS)
        memory = state[head]
        for t in range(len(v)):
            memory = memory * np.exp(np.float64(g[t, head]))
            missing = v[t, head] - k[t, mine] @ memory
            memory = memory + np.outer(k[t, mine], beta[t, head] * missing)
            out[t, head] = q[t, mine] @ memory / np.sqrt(DIM)
        state[head] = memory
    return out, state


@cache
def captured(form: str) -> TinyJit:
    """A form of the rule, captured at its size."""
    function, _ = FORMS[form]

    def run(*inputs: Tensor) -> list[Tensor]:
        return [x.contiguous().realize() for x in function(*inputs)]
    return TinyJit(run)


def run(form: str, inputs: dict[str, np.ndarray], state: np.ndarray, garbage: float = 1.0):
    """A form on inputs of any length: in pieces of its size, the last one padded with keys and values that are not
    written (g and beta are 0) and must leave no trace."""
    size, outs, noise = FORMS[form][1], [], np.random.default_rng(1)
    tokens = len(inputs["v"])
    for start in range(0, tokens, size):
        part = {name: x[start:start + size] for name, x in inputs.items()}
        valid = len(part["v"])
        for name, x in part.items():
            padding = noise.standard_normal((size - valid, *x.shape[1:])) * garbage * (name not in ("g", "beta"))
            part[name] = Tensor(np.concatenate([x, padding]).astype(np.float32)).realize()
        out, after = captured(form)(*(part[name] for name in INPUTS), Tensor(state).realize())
        outs.append(out.numpy()[:valid])
        state = after.numpy()
    return np.concatenate(outs), state


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_inputs(tokens: int, seed: int, decay: float = 1.0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs as a layer makes them: unit keys, decays around exp(-decay), tokens written fully, partly, not at all."""
    rng = np.random.default_rng(seed)
    inputs = {"q": unit(rng.standard_normal((tokens, K_HEADS, DIM))),
              "k": unit(rng.standard_normal((tokens, K_HEADS, DIM))),
              "v": rng.standard_normal((tokens, HEADS, DIM)), "g": -decay * rng.exponential(size=(tokens, HEADS)),
              "beta": rng.choice([0.0, 1.0, 0.5, rng.random()], size=(tokens, HEADS))}
    return ({name: x.astype(np.float32) for name, x in inputs.items()},
            rng.standard_normal((HEADS, DIM, DIM)).astype(np.float32))


def check(inputs: dict[str, np.ndarray], state: np.ndarray, forms=FORMS, tolerance: float = TOLERANCE) -> None:
    want_out, want_state = loop(**inputs, state=state)
    for form in forms:
        out, after = run(form, inputs, state)
        off = difference(out, want_out), difference(after, want_state)
        assert max(off) <= tolerance, f"{form}: outputs off by {off[0]:.1e}, state by {off[1]:.1e}"


# ---- the forms are equal -----------------------------------------------------------------------------------------


@given(tokens=st.integers(1, 200), seed=st.integers(0, 999), decay=st.sampled_from([0.0, 0.01, 1.0, 10.0]))
def test_recurrent_and_chunked_equal_the_loop_at_any_length(tokens, seed, decay):
    check(*random_inputs(tokens, seed, decay))


@pytest.mark.parametrize("tokens", (1, 7, 63, 64, 65, 127, 128, 129, 200))
def test_chunked_equals_recurrent_around_chunk_boundaries(tokens):
    inputs, state = random_inputs(tokens, tokens)
    (out, after), (want_out, want_after) = run("chunked", inputs, state), run("recurrent", inputs, state)
    assert difference(out, want_out) <= TOLERANCE
    assert difference(after, want_after) <= TOLERANCE


@pytest.mark.parametrize("beta", (0.5, 0.999, 1.0))
def test_one_key_repeated_over_a_whole_chunk(beta):
    """The series (I - L)(I + L^2)(I + L^4)... fails here: powers of this L reach 1e17 before they cancel."""
    inputs, state = random_inputs(192, 0)
    inputs["k"][:] = inputs["k"][0]
    inputs["beta"][:], inputs["g"][:] = beta, -1e-4
    check(inputs, state)


def test_two_keys_taking_turns_with_opposite_signs():
    inputs, state = random_inputs(128, 1)
    inputs["k"][0::2], inputs["k"][1::2] = inputs["k"][0], -inputs["k"][0]
    inputs["beta"][:], inputs["g"][:] = 0.99, 0
    check(inputs, state)


def test_a_very_strong_decay_forgets_and_makes_no_nan():
    inputs, state = random_inputs(130, 2)
    inputs["g"][:] = -50
    check(inputs, state)
    inputs["beta"][:] = 0
    _, after = run("chunked", inputs, state)
    assert np.abs(after).max() < 1e-20


def test_a_strong_decay_amid_weak_ones():
    """The sum of decays since the chunk began is large then, and what follows is a difference of two such sums."""
    inputs, state = random_inputs(128, 3, decay=0.01)
    inputs["g"][20::40] = -50
    check(inputs, state)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_without_decay_and_strength_leave_the_state_exactly_as_it_was(form):
    inputs, state = random_inputs(64, 4)
    inputs["g"][:], inputs["beta"][:] = 0, 0
    _, after = run(form, inputs, state)
    assert np.array_equal(after, state), f"changed by {difference(after, state):.1e}"


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_in_padding_changes_nothing_at_all(form):
    inputs, state = random_inputs(37, 5)
    out, after = run(form, inputs, state, garbage=1.0)
    other_out, other_after = run(form, inputs, state, garbage=1e3)
    assert np.array_equal(out, other_out) and np.array_equal(after, other_after)


@pytest.mark.parametrize("size", (1, 2, 64))
def test_the_inverse_of_a_unit_lower_triangle(size):
    lower = np.tril(np.random.default_rng(size).standard_normal((3, size, size)), -1) / max(size, 1) ** 0.5
    got = inverse_of_unit_lower(Tensor(lower.astype(np.float32))).numpy()
    want = np.linalg.inv(np.eye(size) + lower)
    assert difference(got, want) <= 1e-5 * np.abs(want).max()


# ---- the layer ---------------------------------------------------------------------------------------------------


def test_the_convolution_sees_its_token_and_three_before_it():
    rng = np.random.default_rng(0)
    past, weight = rng.standard_normal((3 + 5, 6)).astype(np.float32), rng.standard_normal((6, 4)).astype(np.float32)
    total = np.array([[past[t:t + 4, channel] @ weight[channel] for channel in range(6)] for t in range(5)])
    got = causal_conv(Tensor(past), Tensor(weight)).numpy()
    assert difference(got, total / (1 + np.exp(-total))) <= 1e-5


def layer_inputs(batch: int, tokens: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (tokens, batch, hidden), window (3, batch, channels), state (batch, v_heads, dim, dim)."""
    config, rng = oracle.shared_engine().config, np.random.default_rng(batch)
    shapes = ((tokens, batch, config.hidden), (config.conv_width - 1, batch, config.conv_channels),
              (batch, config.v_heads, config.state_dim, config.state_dim))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def layer(x: np.ndarray, window: np.ndarray, state: np.ndarray, valid: np.ndarray | None = None) -> list[np.ndarray]:
    engine = oracle.shared_engine()
    mask = None if valid is None else Tensor(valid.astype(np.float32))
    mixer = engine.weights.layers[0].mixer
    results = delta_net(Tensor(x), mixer, engine.config, chunked, Tensor(window), Tensor(state), mask)
    results = [result.contiguous() for result in results]
    Tensor.realize(*results)
    return [result.numpy() for result in results]


@pytest.mark.host       # only training has batches
def test_a_batch_of_sequences_gives_what_each_gives_alone():
    x, window, state = layer_inputs(batch=2)
    out, past, after = layer(x, window, state.reshape(-1, *state.shape[2:]))
    after = after.reshape(state.shape)
    for i in range(2):
        alone = layer(x[:, i], window[:, i], state[i])
        assert difference(out[:, i], alone[0]) <= TOLERANCE
        assert difference(past[:, i], alone[1]) <= TOLERANCE
        assert difference(after[i], alone[2]) <= TOLERANCE


def test_padding_of_a_layer_is_not_written():
    x, window, state = (part[:, 0] if part.ndim == 3 else part[0] for part in layer_inputs(batch=1))
    valid = np.arange(len(x)) < 5
    out, past, after = layer(x, window, state, valid)
    x[5:] = 7
    other = layer(x, window, state, valid)
    assert np.array_equal(after, other[2]) and np.array_equal(out[:5], other[0][:5])
    assert np.array_equal(past[5:5 + 3], other[1][5:5 + 3]), "the window after 5 tokens saw padding"


def test_the_window_goes_on_where_the_last_batch_ended():
    x, window, state = (part[:, 0] if part.ndim == 3 else part[0] for part in layer_inputs(batch=1))
    mixer, config = oracle.shared_engine().weights.layers[0].mixer, oracle.shared_engine().config
    _, past, _ = layer(x, window, state)
    channels = linear(Tensor(x), mixer.inputs[0]).numpy()[:, :config.conv_channels]
    assert difference(past, np.concatenate([window, channels])) <= TOLERANCE
