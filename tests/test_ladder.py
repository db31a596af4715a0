"""The ladder: every rung is one field from the one before, gives the same logits, and costs what it cost before."""
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
from oracle import golden, needed
from tinygrad import Tensor

from minillama.delta_net import recurrent
from minillama.engine import Engine
from minillama.first_port import chunked_with_copies, recurrent_with_copies
from minillama.ladder import LADDER, ablations, read_recipe
from minillama.measure import Counts, calls_of
from minillama.recipe import Recipe

host = pytest.mark.host
STEPS = 20
# Kernels and copies of one decode step of ref-a (8 layers, embedding and head), captured: a regression shows here.
EXPECTED = {
    "naive": (409, 157),
    "chunked": (409, 157),
    "gathered": (401, 157),
    "no-copies": (221, 13),
    "captured": (221, 13),
    "last-row": (221, 13),
    "pruned": (221, 15),
    "unpruned": (221, 13),
    "fused-projections": (219, 21),
    "fused-delta": (177, 3),
    "packed": (122, 1),
    "grouped": (122, 1),
    "overlapped": (122, 1),
    "draft": (148, 6),
    "mtp-hidden": (148, 6),
    "mtp-kv": (132, 5),
}


def changed(a: Recipe, b: Recipe) -> list[str]:
    return [field.name for field in fields(Recipe) if getattr(a, field.name) != getattr(b, field.name)]


@host
def test_every_rung_is_one_field_away_from_the_one_before():
    steps = [changed(before.recipe, after.recipe) for before, after in zip(LADDER, LADDER[1:], strict=False)]
    assert all(len(step) == 1 for step in steps), steps
    assert LADDER[-1].recipe != LADDER[0].recipe


@host
def test_every_rung_answers_all_six_questions():
    silent = [(rung.name, field.name) for rung in LADDER for field in fields(rung.ledger)
              if len(getattr(rung.ledger, field.name)) < 5]
    assert not silent


@host
def test_an_ablation_puts_one_field_back():
    last = LADDER[-1].recipe
    found = ablations(last)
    assert found.pop("last") == last
    assert found["-delta"].draft == 0                       # which need memories that step back
    found["-delta"] = replace(found["-delta"], draft=last.draft, delta="fused")
    assert changed(last, found.pop("-delta")) == []
    assert all(changed(last, recipe) == [name[1:]] for name, recipe in found.items())
    assert len(found) + 1 == len(changed(LADDER[0].recipe, last))


@host
def test_a_recipe_is_read_by_the_name_of_its_rung():
    assert read_recipe("captured") == next(rung.recipe for rung in LADDER if rung.name == "captured")
    assert read_recipe("delta=recurrent") == Recipe(delta="recurrent")
    with pytest.raises(ValueError, match="neither a rung"):
        read_recipe("fastest")


@pytest.mark.parametrize("form", [recurrent_with_copies, lambda *a: chunked_with_copies(*a, chunk=4)])
def test_the_first_ports_forms_equal_the_recurrence(form):
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(8, 2, 16), normal(8, 2, 16)))
    g, beta = -np.abs(normal(8, 2)), 1 / (1 + np.exp(-normal(8, 2)))
    arrays = q, k, normal(8, 2, 16), g, beta, normal(2, 16, 16)
    tensors = [Tensor(array.astype(np.float32)).realize() for array in arrays]
    for got, want in zip(form(*tensors), recurrent(*tensors), strict=True):
        worst = np.abs(got.numpy() - want.numpy()).max()
        assert worst < 1e-5, worst


@cache
def decoded(recipe: Recipe) -> tuple[float, Counts]:
    """20 decode steps of ref-a: the largest difference from the golden logits, and what one captured step counts."""
    wanted = golden("ref-a")
    engine = Engine.load(needed("ref-a-F32.gguf"), recipe, context=64)
    worst = 0.0
    for step, token in enumerate(wanted["tokens_65"][:STEPS]):
        worst = max(worst, float(np.abs(engine.logits([token]) - wanted["all_logits_65"][step]).max()))
    return worst, Counts.of(calls_of(engine.steps["logits", 1], values={"start": STEPS}))


@pytest.mark.slow
@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
def test_a_captured_rung_gives_the_golden_logits_over_twenty_steps(rung):
    recipe = rung.recipe if rung.recipe.capture != "eager" else replace(rung.recipe, capture="jit")
    worst, counts = decoded(recipe)
    assert worst < 5e-4, worst
    assert (counts.kernels, counts.copies) == EXPECTED[rung.name], (rung.name, counts)
