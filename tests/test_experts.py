"""The mixture of experts: routing against a sort, the forms against numpy in float64."""
from dataclasses import fields

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import difference
from tinygrad import Tensor, TinyJit

from minillama.experts import dense, experts_layer, gathered, route
from minillama.weights import ExpertWeights

TOKENS, HIDDEN, EXPERTS, USED, WIDTH = 5, 16, 8, 3, 12
TOLERANCE = 1e-5
FORMS = {"dense": dense, "gathered": gathered}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def values(seed: int = 0) -> dict[str, np.ndarray | tuple[np.ndarray, ...]]:
    return {"router": numbers(EXPERTS, HIDDEN, seed=seed),
            "gate_up": tuple(numbers(EXPERTS, WIDTH, HIDDEN, seed=seed + i) for i in (1, 2)),
            "down": numbers(EXPERTS, HIDDEN, WIDTH, seed=seed + 3), "shared_gate": numbers(HIDDEN, seed=seed + 4),
            "shared_inputs": tuple(numbers(WIDTH, HIDDEN, seed=seed + i) for i in (5, 6)),
            "shared_down": numbers(HIDDEN, WIDTH, seed=seed + 7)}


def weights(fused: bool) -> ExpertWeights:
    def tensor(value):
        if isinstance(value, np.ndarray):
            return Tensor(value)
        return (Tensor(np.concatenate(value, axis=-2)),) if fused else tuple(map(Tensor, value))
    return ExpertWeights(**{name: tensor(value) for name, value in values().items()})


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def layer_in_numpy(x: np.ndarray) -> np.ndarray:
    """Token by token, expert by expert, in float64."""
    w = values()
    x = x.astype(np.float64)
    every = softmax(x @ w["router"].T)
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        chosen = np.argsort(-every[t], kind="stable")[:USED]
        for expert in chosen:
            act = silu(w["gate_up"][0][expert] @ row) * (w["gate_up"][1][expert] @ row)
            y[t] += every[t, expert] / every[t, chosen].sum() * (w["down"][expert] @ act)
        shared = w["shared_down"] @ (silu(w["shared_inputs"][0] @ row) * (w["shared_inputs"][1] @ row))
        y[t] += shared / (1 + np.exp(-row @ w["shared_gate"]))
    return y


class Shape:
    """The part of a ModelConfig that the layer reads."""
    hidden, experts_used, shared_width = HIDDEN, USED, WIDTH


@pytest.mark.parametrize("fused", (False, True), ids=("separate", "fused"))
@pytest.mark.parametrize("form", FORMS)
def test_the_layer_equals_numpy_in_every_form(form, fused):
    x = numbers(TOKENS, HIDDEN, seed=9) * 4
    got, every, chosen = experts_layer(Tensor(x), weights(fused), Shape, FORMS[form])
    assert difference(got.numpy(), layer_in_numpy(x)) <= TOLERANCE
    assert every.shape == (TOKENS, EXPERTS) and chosen.shape == (TOKENS, USED)


def test_gathered_equals_dense_where_a_token_counts_one_expert_alone():
    x, w = Tensor(numbers(TOKENS, HIDDEN, seed=3)), weights(True)
    ids = Tensor(np.array([[7, 0, 1]] * TOKENS, dtype=np.int32))
    probs = Tensor(np.array([[1, 0, 0]] * TOKENS, dtype=np.float32))
    one, other = (form(x, w, ids, probs).numpy() for form in FORMS.values())
    assert difference(one, other) <= TOLERANCE


def test_a_batch_of_sequences_is_routed_row_by_row():
    x = numbers(TOKENS, 3, HIDDEN, seed=5)
    got = experts_layer(Tensor(x), weights(True), Shape, gathered)[0].numpy()
    want = layer_in_numpy(x.reshape(-1, HIDDEN)).reshape(x.shape)
    assert difference(got, want) <= TOLERANCE


# ---- the router --------------------------------------------------------------------------------------------------


@TinyJit
def routed(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids, probs, every = route(x, router, USED)
    return ids.contiguous().realize(), probs.contiguous().realize(), every.realize()


def check_route(scores: np.ndarray) -> None:
    """With the identity as router, the rows of x are the scores themselves."""
    identity = Tensor(np.eye(EXPERTS, dtype=np.float32))
    ids, probs, every = (x.numpy() for x in routed(Tensor(scores).realize(), identity.realize()))
    want = np.argsort(-every, axis=-1, kind="stable")[:, :USED]             # ties go to the smaller index
    assert np.array_equal(ids, want), f"{ids.tolist()} where a sort gives {want.tolist()}"
    shares = np.take_along_axis(every, want, axis=-1)
    assert difference(probs, shares / shares.sum(axis=-1, keepdims=True)) <= 1e-6
    assert difference(every, softmax(scores.astype(np.float64))) <= 1e-6


@given(seed=st.integers(0, 9999), levels=st.sampled_from([1, 2, 3, 1000]), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_the_router_picks_what_a_stable_sort_picks(seed, levels, scale):
    """Few levels of scores make many ties; a large scale makes probabilities that vanish."""
    scores = np.random.default_rng(seed).integers(0, levels, (TOKENS, EXPERTS)) / levels * scale
    check_route(scores.astype(np.float32))


def test_the_router_picks_distinct_experts_where_all_are_equal():
    check_route(np.zeros((TOKENS, EXPERTS), dtype=np.float32))


# ---- weights of a real file --------------------------------------------------------------------------------------


def test_fused_and_separate_projections_hold_the_same_rows():
    """Over all layers of ref-a: what is stacked when fused is what stands apart otherwise."""
    fused, _ = oracle.read(oracle.HERE / "ref-a-F32.gguf", fused=True)
    separate, _ = oracle.read(oracle.HERE / "ref-a-F32.gguf", fused=False)
    for one, many in zip((*fused.layers, fused.mtp.layer), (*separate.layers, separate.mtp.layer), strict=True):
        for record, other in ((one.mixer, many.mixer), (one.experts, many.experts)):
            for name in (field.name for field in fields(record)):
                stacked, apart = getattr(record, name), getattr(other, name)
                if isinstance(stacked, tuple):
                    assert len(stacked) == 1 < len(apart)
                    joined = np.concatenate([part.numpy() for part in apart], axis=-2)
                    assert np.array_equal(stacked[0].numpy(), joined), name
