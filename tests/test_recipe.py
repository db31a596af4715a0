"""Every recipe gives the same logits; captured steps equal eager ones; recipes have names that files can hold."""
import json
import sys

import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, difference, prompt
from tinygrad import Tensor

from minillama.delta_net import recurrent
from minillama.recipe import CHOICES, Recipe
from minillama.sampling import Sampler

host = pytest.mark.host
PROMPT = prompt(0, 7)       # a padded batch of 8: the recurrent form of a longer one is a long graph
calls = []


def my_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What a learner may plug in."""
    calls.append(v.shape)
    return recurrent(q, k, v, g, beta, state)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Of the default recipe, on one delta net and one attention layer."""
    return oracle.short_engine(oracle.shared_engine()).logits(PROMPT)


@host       # on other devices test_ladder holds every form against golden logits, captured
@pytest.mark.parametrize(("field", "value"), (("delta", "recurrent"), ("experts", "dense"), ("copies", "everywhere"),
                                              ("logits", "all")))
def test_every_form_gives_the_same_logits(field, value, logits):
    assert value != getattr(Recipe(), field), "this is the default, which is what the others are held against"
    engine = oracle.short_engine(oracle.shared_engine(), **{field: value})
    assert difference(engine.logits(PROMPT), logits) <= TOLERANCE


@host       # on other devices test_ladder holds every form against golden logits, captured
def test_separate_projections_give_the_same_logits(logits):
    engine = oracle.load(oracle.HERE / "ref-a-F32.gguf", Recipe(projections="separate"))
    assert difference(oracle.short_engine(engine).logits(PROMPT), logits) <= TOLERANCE


def test_a_function_of_your_own_can_be_plugged_in(logits):
    calls.clear()
    engine = oracle.short_engine(oracle.shared_engine()).with_recipe(delta=my_delta)
    assert difference(engine.logits(PROMPT), logits) <= TOLERANCE
    engine.feed([1])
    heads, dim = engine.config.v_heads, engine.config.state_dim
    assert (8, heads, dim) in calls and (1, heads, dim) in calls, f"it was called with v of shapes {set(calls)}"


def test_an_engine_with_another_recipe_has_a_state_of_its_own():
    engine = oracle.short_engine(oracle.shared_engine())
    engine.feed(PROMPT)
    other = engine.with_recipe(experts="dense")
    assert other.position == 0 and engine.position == len(PROMPT)
    assert other.weights is engine.weights and other.recipe.experts == "dense"
    assert not any(one is theirs for one, theirs in zip(engine.state.tensors(), other.state.tensors(), strict=True))
    with pytest.raises(ValueError, match="when a file is loaded"):
        engine.with_recipe(projections="separate")


# ---- capture -----------------------------------------------------------------------------------------------------


STEPS = 20
SAMPLERS = {"greedy": Sampler(), "sampled": Sampler(temperature=1.0, top_k=40, top_p=0.9, seed=3)}


def short_run(capture: str) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Logits over 20 steps after a prompt, and texts generated in every way."""
    engine = oracle.short_engine(oracle.shared_engine(), capture=capture)
    engine.feed(PROMPT)
    logits = np.stack([engine.logits([token]) for token in prompt(1, STEPS)])
    texts = {}
    for name, sampler in SAMPLERS.items():
        engine.clear()
        texts[name] = list(engine.generate(PROMPT, 3, sampler))
    return logits, texts


@pytest.fixture(scope="module")
def eager() -> tuple[np.ndarray, dict[str, list[int]]]:
    return short_run("eager")


@host       # on other devices test_ladder holds every form against golden logits, captured
@pytest.mark.slow
@pytest.mark.parametrize("capture", ("jit", "prune"))
def test_captured_steps_equal_eager_ones_over_twenty_tokens(capture, eager):
    """Captured forms that are misused go wrong without a word: what is not an input freezes."""
    logits, texts = short_run(capture)
    off = np.abs(logits - eager[0]).max(axis=1)
    assert len(off) == STEPS and off.max() <= 1e-5, f"off by step: {off}"
    assert texts == eager[1]


def test_captured_steps_of_two_sizes_take_turns_on_one_state():
    ids, engine = prompt(2, 54), oracle.shared_engine()
    engine.clear()
    want, got = engine.all_logits(ids)[8::9], []
    engine.clear()
    for start in range(0, 54, 9):
        engine.feed(ids[start:start + 8])
        got.append(engine.logits(ids[start + 8:start + 9]))
    assert difference(np.stack(got), want) <= TOLERANCE


# ---- names -------------------------------------------------------------------------------------------------------


@host
def test_a_recipe_is_read_from_a_command_line():
    assert Recipe.parse("") == Recipe()
    assert Recipe.parse("delta=recurrent, capture=eager") == Recipe(delta="recurrent", capture="eager")


@host
@pytest.mark.parametrize(("text", "message"), (
    ("delta", "not field=value"), ("speed=11", "with a field of delta"), ("delta=quantum", "one of recurrent"),
    ("capture=json:dumps", "one of eager"), ("delta=no_such_module:f", "cannot be imported"),
    ("experts=json:no_such_name", "cannot be imported"), ("experts=os:sep", "no function"),
    ("experts=:x", "cannot be imported")))
def test_a_recipe_that_means_nothing_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.parse(text)
    assert str(caught.value).startswith("recipe: ") and "\n" not in str(caught.value)


@host
def test_names_go_into_json_and_come_back():
    for field, choices in CHOICES.items():
        for value in choices:
            names = json.loads(json.dumps(Recipe(**{field: value}).names()))
            assert names[field] == value and Recipe(**names) == Recipe(**{field: value})


@host
def test_a_function_is_stored_by_module_and_name_and_found_again(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_kernels", sys.modules[__name__])
    assert Recipe(delta=my_delta).names()["delta"] == f"{__name__}:my_delta"
    assert Recipe.parse("delta=my_kernels:my_delta").form("delta") is my_delta
    assert Recipe.parse("delta=my_kernels:my_delta").names()["delta"] == "my_kernels:my_delta"
