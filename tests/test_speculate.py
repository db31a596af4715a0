"""Drafting changes nothing but the speed: texts, states and distributions are those of the model alone."""
import os
from dataclasses import replace
from functools import cache

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import difference, prompt
from tinygrad import Tensor, TinyJit

from minillama.engine import Engine
from minillama.measure import Counts, calls_of
from minillama.pace import AGAIN, TRIALS, Pace
from minillama.recipe import DRAFTS, Recipe
from minillama.sampling import Sampler
from minillama.speculate import verify_greedy, verify_sampled

pytestmark = pytest.mark.timeout(1200)      # many graphs are built
host = pytest.mark.host
SHIPPED = oracle.HERE.parent.parent / "data" / "minillama-coder-Q8_0.gguf"
TEXTS = ("def fibonacci(n):\n", "import numpy as np\n\n\nclass Stack:\n    def __init__(self", "for key, value in ")
KEPT = 1e-4         # of states
# Numbers of drafts, in turn. Each is built as graphs of its own, which takes minutes with OpenCL.
ROUNDS = tuple(range(1, DRAFTS + 1)) if os.environ["DEV"] == "CPU" else (1, 3)


@cache
def shipped() -> tuple[Engine, Engine]:
    """The shipped model without drafts, and with as many as there may be."""
    plain = Engine.load(SHIPPED, context=160)
    return plain, plain.with_recipe(draft=DRAFTS)


@cache
def reference() -> tuple[Engine, Engine]:
    """Two layers of ref-a without drafts and with two, their steps captured."""
    plain = oracle.short_engine(oracle.load(oracle.HERE / "ref-a-F32.gguf"))
    drafting = plain.with_recipe(draft=2)
    for engine in (plain, drafting):
        for size in oracle.BATCHES:
            engine.feed(prompt(0, size))
        engine.clear()
    token = int(drafting.feed(prompt(0, 3), "greedy").item())
    forced(drafting, token, [1, 0])
    drafting.drafter.before_prompt(1)
    return plain, drafting


def forced(engine: Engine, token: int | None, matches: list[int]) -> list[int]:
    """A round that keeps drafts up to the first 0."""
    return engine.drafter.run(token, len(matches), "simulated", Tensor(matches, dtype="int32").realize())


def states_of(engine: Engine) -> list[np.ndarray]:
    """All that a text left behind: what lies in a ring behind other positions, or in a cache behind the text, is not
    part of it."""
    found, end = [], engine.position
    for part in engine.state.layers:
        if hasattr(part, "memories"):
            found.append(part.memories.numpy()[end % part.memories.shape[0]])
            rows = part.history.numpy()
            found += [rows[place % rows.shape[0]] for place in range(max(0, end - 3), end)]
        else:
            found += [tensor.numpy()[:end] for tensor in part.tensors()]
    return found


# ---- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_a_greedy_text_is_the_same_with_any_number_of_drafts(text):
    plain, drafting = shipped()
    ids, count = plain.tokenizer.encode(text), 40
    plain.clear()
    wanted = list(plain.generate(ids, count))
    drafting.clear()
    token, found, lengths = int(drafting.feed(ids, "greedy").item()), [], []
    found.append(token)
    while len(found) < count:
        lengths.append(ROUNDS[len(lengths) % len(ROUNDS)])
        found += drafting.drafter.run(token if len(lengths) == 1 else None, lengths[-1], "greedy")
    assert found[:count] == wanted
    assert len(lengths) < count - 1, "no draft was accepted at all"


def test_generate_stops_where_it_is_told_to_and_goes_on_from_there():
    """A caller may stop in the middle of a round; the next text starts behind the last token that was asked for."""
    plain, drafting = reference()
    for engine in (plain, drafting):
        engine.clear()
    ids, more = prompt(3, 5), prompt(4, 4)
    for count in (1, 2, 4):
        wanted, found = (list(engine.generate(ids, count)) for engine in (plain, drafting))
        assert found == wanted and drafting.position == plain.position
        ids = [wanted[-1], *more]
    assert list(drafting.generate(ids, 3)) == list(plain.generate(ids, 3))


def test_a_text_that_the_block_has_not_read_can_be_continued():
    """`all_logits` lengthens the text without the block, by more than a round's rows."""
    plain, drafting = reference()
    for engine in (plain, drafting):
        engine.clear()
        list(engine.generate(prompt(6, 5), 4))
        engine.all_logits(prompt(8, 9))
    assert list(drafting.generate([7], 6)) == list(plain.generate([7], 6))


def test_generate_ends_with_the_context():
    plain, drafting = reference()
    for engine in (plain, drafting):
        engine.clear()
    start = prompt(5, oracle.CONTEXT - 4)
    assert list(drafting.generate(start, 50, adapt=False)) == list(plain.generate(start, 50))
    assert drafting.position == oracle.CONTEXT


# ---- states -------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(rounds=st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=9),
       start=st.integers(1, 20))
def test_any_mixture_of_accepted_and_rejected_drafts_leaves_the_states_of_the_text(rounds, start):
    plain, drafting = reference()
    for engine in (plain, drafting):
        engine.clear()
    ids = prompt(start, start)
    token = int(drafting.feed(ids, "greedy").item())
    text, pending = list(ids), token
    for index, matches in enumerate(rounds):
        found = forced(drafting, pending if index == 0 else None, list(matches))
        assert len(found) == 1 + (matches[0] and 1 + matches[1])
        text += [pending, *found[:-1]]
        pending = found[-1]
    for place, token in enumerate(text):                    # one by one, as without drafts
        plain.feed([token]) if place >= start else None
        if place == start - 1:
            plain.feed(text[:start])
    assert drafting.position == plain.position == len(text)
    for got, want in zip(states_of(drafting), states_of(plain), strict=True):
        assert difference(got, want) <= KEPT
    drafting.drafter.before_prompt(pending)                 # the block has now read all positions but the last
    cache = [tensor.numpy()[:len(text)] for tensor in drafting.state.mtp.tensors()]
    drafting.clear()
    drafting.feed([*text, pending])
    for got, tensor in zip(cache, drafting.state.mtp.tensors(), strict=True):
        assert difference(got, tensor.numpy()[:len(text)]) <= KEPT


def test_no_state_is_copied_to_step_back():
    """A round's kernels touch the delta nets' memories only in the rule itself, once a token, and copy none."""
    _, drafting = reference()
    calls = calls_of(drafting.steps["round simulated", 2], values={"base": 5, "last": 1})
    memory = drafting.state.layers[0].memories
    slot = memory.nbytes() // memory.shape[0]
    assert memory.shape[0] == 4                             # two drafts, the token before them, and where all start
    rules = [call for call in calls if call.name.startswith("delta")]
    assert len(rules) == 3 and sum(call.bytes >= slot for call in calls if call.copy) == 0
    again = Counts.of(calls_of(drafting.steps["round simulated", 2], values={"base": 50, "last": 0}))
    assert again.kernels == len(calls) and again.copies == Counts.of(calls).copies


@pytest.mark.slow
def test_the_three_recipes_for_prompts_leave_the_same_cache_and_draft_the_same():
    plain, _ = reference()
    ids, found = prompt(7, 70), {}
    for recipe in ("kv", "hidden", "logits"):
        engine = plain.with_recipe(draft=2, mtp_prefill=recipe)
        token = int(engine.feed(ids, "greedy").item())
        cache = [tensor.numpy()[:len(ids) - 1] for tensor in engine.state.mtp.tensors()]
        sizes = sum(out.nbytes() for out in engine.outputs)
        assert sizes == (8 * engine.config.vocab * 4 if recipe == "logits" else 0)      # of the last batch
        found[recipe] = cache, engine.drafter.run(token, 2, "greedy"), engine.drafter.pending.tokens.numpy().tolist()
    for recipe in ("hidden", "logits"):
        for got, want in zip(found[recipe][0], found["kv"][0], strict=True):
            assert np.abs(want).max() > 0.1 and difference(got, want) <= 1e-5
        assert found[recipe][1:] == found["kv"][1:]


# ---- distributions ------------------------------------------------------------------------------------------------


def test_a_greedy_verdict_keeps_drafts_up_to_the_first_wrong_one():
    vocab, chosen = 6, [2, 4, 1, 5]
    logits = Tensor(np.eye(vocab, dtype=np.float32)[chosen])
    for drafts, kept in (([2, 4, 1], 3), ([2, 4, 0], 2), ([2, 0, 1], 1), ([0, 4, 1], 0)):
        found = verify_greedy(Tensor(drafts, dtype="int32"), logits).tolist()
        assert found[-1] == kept and found[:kept + 1] == chosen[:kept + 1]


def test_drawn_tokens_follow_the_models_distribution_whatever_was_drafted():
    """1,500 rounds with two drafts over five tokens, drafted from other distributions than the model's: chi-squared of
    the first token, of those behind kept drafts; and how many drafts are kept."""
    rng, rounds = np.random.default_rng(0), 1500
    model = np.array([[.5, .2, .15, .1, .05], [.1, .1, .3, .2, .3], [.2, .2, .2, .2, .2]], dtype=np.float32)
    guess = np.array([[.05, .3, .3, .3, .05], [.3, .1, .2, .2, .2]], dtype=np.float32)
    probs, guesses = ([Tensor(row).realize() for row in rows] for rows in (model, guess))
    step = TinyJit(lambda drafts, uniforms: verify_sampled(drafts, guesses, probs, uniforms).realize())
    found = []
    for _ in range(rounds):
        drafts = [int(rng.choice(5, p=row / row.sum())) for row in guess.astype(np.float64)]
        uniforms = Tensor(rng.random(3, dtype=np.float32)).realize()
        found.append(step(Tensor(drafts, dtype="int32").realize(), uniforms).tolist())
    firsts, kept = [row[0] for row in found], np.array([row[-1] for row in found])
    assert fits(firsts, model[0])
    assert fits([row[1] for row in found if row[-1] >= 1], model[1])
    assert fits([row[2] for row in found if row[-1] == 2], model[2])
    assert abs((kept >= 1).mean() - np.minimum(model[0], guess[0]).sum()) < 0.05


def fits(tokens: list[int], probs: np.ndarray) -> bool:
    """Whether the counts could come from these probabilities: chi-squared below its 99.99 % point for 4 degrees."""
    wanted = probs * len(tokens)
    return float(((np.bincount(tokens, minlength=5) - wanted) ** 2 / wanted).sum()) < 23.5


@pytest.mark.slow
def test_a_sampled_text_is_fixed_by_its_seed_where_the_number_of_drafts_is_fixed():
    _, drafting = shipped()
    ids, texts = drafting.tokenizer.encode(TEXTS[0]), []
    for seed in (1, 1, 2):
        drafting.clear()
        texts.append(list(drafting.generate(ids, 12, Sampler(0.9, seed=seed), adapt=False)))
    assert texts[0] == texts[1] != texts[2]


# ---- how many -----------------------------------------------------------------------------------------------------


@host
def test_drafts_are_given_up_where_they_lose_and_tried_again_later():
    pace = Pace(3)
    for _ in range(TRIALS):
        assert pace.choose() == 3
        pace.note(3, 0, 4.0)
    assert pace.choose() == 0                               # not timed yet
    pace.note(0, 0, 1.0)
    for _ in range(AGAIN - 1):
        assert pace.choose() == 0
        pace.note(0, 0, 1.0)
    assert pace.choose() == 3 and pace.without == AGAIN


@host
def test_the_longest_drafts_stay_where_all_are_accepted_at_little_cost():
    pace = Pace(3)
    for _ in range(TRIALS):
        pace.note(pace.choose(), 3, 1.2)
    pace.note(pace.choose(), 0, 1.0)
    assert pace.choose() == 3 and pace.accepted == pace.drafted == [TRIALS] * 3


@host
def test_a_length_between_is_taken_where_later_drafts_are_never_kept():
    pace = Pace(4)
    for _ in range(8):
        pace.note(4, 1, 3.0)
    pace.note(0, 0, 1.0)
    assert pace.choose() == 1 and pace.time(1) == 1.5


@host
def test_drafts_ask_for_what_they_need():
    assert Recipe(draft="3").draft == 3 and Recipe.parse("draft=2").names()["draft"] == "2"
    for wrong, said in (({"draft": 5}, "0 to 4"), ({"draft": 1, "delta": "chunked"}, "delta=fused"),
                        ({"draft": 1, "capture": "prune"}, "capture=jit"), ({"draft": "two"}, "0 to 4")):
        with pytest.raises(ValueError, match=said):
            Recipe(**wrong)
    engine = oracle.shared_engine()
    with pytest.raises(ValueError, match="no multi-token-prediction block"):
        Engine(replace(engine.weights, mtp=None), engine.config, Recipe(draft=1), context=oracle.CONTEXT)
