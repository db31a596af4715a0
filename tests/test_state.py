"""A text may be fed in any pieces, padded or token by token, and forgotten: the state is the same, or gone."""
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import BATCHES, CONTEXT, TOLERANCE, difference, prompt

from minillama.engine import ContextError, Engine
from minillama.state import DeltaState


@pytest.fixture(scope="module", autouse=True)
def captured() -> None:
    oracle.shared_engine()


@pytest.fixture
def engine() -> Engine:
    engine = oracle.shared_engine()
    engine.clear()
    return engine


def fed(parts: list[list[int]]) -> np.ndarray:
    """Logits after a text fed in parts."""
    engine = oracle.shared_engine()
    engine.clear()
    for part in parts[:-1]:
        engine.feed(part)
    return engine.logits(parts[-1])


@given(seed=st.integers(0, 999), length=st.integers(5, 200), data=st.data())
def test_any_split_of_a_prompt_gives_the_same_logits(seed, length, data):
    """Five parts each time: batches of 64 and of 8 get padded in many ways, and padding must leave no trace."""
    ids = prompt(seed, length)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), min_size=4, max_size=4)))
    parts = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    off = difference(fed(parts), fed([ids]))
    assert off <= TOLERANCE, f"off by {off:.1e} when cut at {cuts}"


@given(seed=st.integers(0, 999), length=st.integers(1, 190), decoded=st.integers(1, 12))
def test_decoding_after_a_prompt_equals_the_prompt_of_the_whole(seed, length, decoded):
    ids = prompt(seed, length + decoded)
    parts = [ids[:length], *([token] for token in ids[length:])]
    assert difference(fed(parts), fed([ids])) <= TOLERANCE


def test_padding_leaves_windows_and_memories_as_single_steps_do(engine):
    """Of a padded batch, 40 tokens in 64 places, and of 40 steps without any padding."""
    def states() -> list[np.ndarray]:
        return [t.numpy() for layer in engine.state.layers if isinstance(layer, DeltaState) for t in layer.tensors()]
    ids = prompt(1, 40)
    assert engine.plan(40) == [64]
    engine.feed(ids)
    padded = states()
    engine.clear()
    for token in ids:
        engine.feed([token])
    assert engine.position == 40
    for one, other in zip(padded, states(), strict=True):
        assert difference(one, other) <= 1e-4 * max(1, np.abs(other).max())


def test_clear_forgets_everything(engine):
    ids, other = prompt(2, 5), prompt(3, 200)
    first = engine.logits(ids)
    engine.feed(other)
    engine.clear()
    assert engine.position == 0
    assert np.array_equal(engine.logits(ids), first), "something of the longer text is still there"


def test_without_clear_the_text_goes_on(engine):
    ids = prompt(2, 5)
    first = engine.logits(ids)
    assert difference(engine.logits(ids), first) > 0.1


def test_generation_goes_on_where_it_stopped(engine):
    """`generate` leaves the last token it gave unread; feeding it continues the text."""
    ids = prompt(4, 10)
    whole = list(engine.generate(ids, 12))
    engine.clear()
    start = list(engine.generate(ids, 5))
    assert start + list(engine.generate(start[-1:], 7)) == whole


def test_a_generator_that_is_dropped_leaves_a_state_to_go_on_from(engine):
    ids = prompt(4, 10)
    whole = list(engine.generate(ids, 8))
    engine.clear()
    some = []
    for token in engine.generate(ids, 8):
        some.append(token)
        if len(some) == 3:
            break
    assert engine.position == len(ids) + 2
    assert some + list(engine.generate(some[-1:], 5)) == whole


# ---- the context -------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_and_changes_nothing(engine):
    engine.feed([1, 2, 3])
    with pytest.raises(ContextError, match=rf"{CONTEXT + 1} tokens .* context of {CONTEXT}"):
        engine.feed(prompt(0, CONTEXT - 2))
    assert engine.position == 3
    engine.clear()
    with pytest.raises(ContextError):
        engine.logits(prompt(0, CONTEXT + 1))


def test_the_last_padded_batch_may_overrun_the_context(engine):
    ids = prompt(5, CONTEXT)
    assert engine.plan(63) == [64], "this test wants a batch that ends one position past the context"
    whole = fed([ids[:257], ids[257:]])
    steps = fed([ids[:257], *([token] for token in ids[257:])])
    assert difference(whole, steps) <= TOLERANCE
    with pytest.raises(ContextError):
        engine.feed([1])


def test_generation_ends_with_the_context(engine):
    ids = prompt(6, CONTEXT - 5)
    tokens = list(engine.generate(ids, 50))
    assert len(tokens) == 6 and engine.position == CONTEXT


@pytest.mark.parametrize("ids", ([], [512], [-1], [3, 1 << 40]), ids=str)
def test_ids_outside_the_vocabulary_and_empty_prompts_are_refused(engine, ids):
    with pytest.raises(ValueError, match="empty|not in the vocabulary"):
        engine.feed(ids)
    assert engine.position == 0


@given(tokens=st.integers(0, 3000))
def test_a_plan_of_batches_holds_all_tokens_and_none_but_the_last_is_padded(tokens):
    for sizes in (BATCHES, (512, 64, 8, 1)):
        plan = Engine.plan(type("Sizes", (), {"batches": sizes}), tokens)
        assert set(plan) <= set(sizes)
        assert sum(plan[:-1]) <= tokens <= sum(plan) and (sum(plan[:-1]) < tokens or not plan)
        assert sum(plan) <= 2 * tokens, "more padding than text"
