"""How many of its drafts the shipped model accepts, and what drafting is worth, on held-out functions.

    python data/acceptance.py [-p PROMPTS] [-n TOKENS]    writes data/results/drafts-minillama-coder-<device>.json

Each prompt is continued greedily without drafts, then with 1 to 4; all five texts must be the same. Then the question
of llama.cpp #24025: which hidden state should the block read, the one before the model's last norm or the one after?
"""
import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tinygrad import Tensor, TinyJit

from minillama.engine import Engine
from minillama.layers import linear
from minillama.model import forward_mtp, norm_of, place_of, stack
from minillama.recipe import DRAFTS, Recipe
from minillama.results import Model, Result, Row, write_result
from minillama.state import padded

HERE = Path(__file__).parent
WINDOW = 64         # tokens of a prompt for the two hidden states: a batch of the engine


def prompts(engine: Engine, count: int) -> list[list[int]]:
    """Ids of the heads of held-out functions."""
    lines = (HERE / "completions.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [engine.tokenizer.encode(json.loads(line)["prompt"]) for line in lines]


def continue_plainly(engine: Engine, ids: list[int], count: int) -> tuple[list[int], int]:
    """New ids, and the nanoseconds that those after the first took."""
    engine.clear()
    new = engine.generate(ids, count)
    first, began = next(new), time.perf_counter_ns()
    return [first, *new], time.perf_counter_ns() - began


def continue_with(engine: Engine, ids: list[int], count: int, length: int) -> tuple[list[int], int, np.ndarray]:
    """The same with `length` drafts in every round, and (2, length): drafts kept and looked at, by place."""
    engine.clear()
    token = int(engine.feed(ids, "greedy").item())
    new, places, began = [token], np.zeros((2, length), dtype=int), time.perf_counter_ns()
    while len(new) < count:
        found = engine.drafter.run(token if len(new) == 1 else None, length, "greedy")
        places[0, :len(found) - 1] += 1
        places[1, :len(found)] += 1
        new += found
    # what a last round found past the mark counts with its time
    spent = (time.perf_counter_ns() - began) * (count - 1) // (len(new) - 1)
    return new[:count], spent, places


def agreement(engine: Engine, texts: list[list[int]]) -> dict[str, float]:
    """How often the block's guess is the model's own choice, at the last half of windows of text, when it reads the
    hidden state before the last norm and after it."""
    e, w, recipe = engine, engine.weights, replace(engine.recipe, draft=0)

    def guesses(ids: Tensor, following: Tensor, before: bool) -> Tensor:
        at = place_of(ids, 0, None)
        x = stack(ids, w, e.config, recipe, e.state, e.table, at)
        hidden = norm_of(recipe)(x, w.out_norm, e.config.norm_eps)
        out = forward_mtp(following, x if before else hidden, w, e.config, recipe, e.state.mtp, e.table, at)
        return Tensor.stack(linear(hidden, w.head).argmax(-1), linear(out, w.mtp.head).argmax(-1)).realize()
    steps = {name: TinyJit(partial(guesses, before=name == "pre-norm")) for name in ("pre-norm", "post-norm")}
    hits, seen = dict.fromkeys(steps, 0), 0
    for text in texts:
        batch = e.input("window", padded(text[:WINDOW], WINDOW)), e.input("ahead", padded(text[1:WINDOW + 1], WINDOW))
        for name, step in steps.items():
            e.clear()
            said, guessed = step(*batch).numpy()
            hits[name] += int((guessed[WINDOW // 2:-1] == said[WINDOW // 2 + 1:]).sum())
        seen += WINDOW // 2 - 1
    return {name: count / seen for name, count in hits.items()} | {"tokens": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default=str(HERE / "minillama-coder-Q8_0.gguf"))
    parser.add_argument("-p", "--prompts", type=int, default=20)
    parser.add_argument("-n", "--tokens", type=int, default=200)
    args = parser.parse_args()
    plain = Engine.load(args.model, Recipe())
    drafting = plain.with_recipe(draft=DRAFTS)
    texts, rows = prompts(plain, args.prompts), []
    continue_plainly(plain, texts[0], 4)                    # captures
    found = [continue_plainly(plain, ids, args.tokens) for ids in texts]
    wanted, times = [text for text, _ in found], [spent for _, spent in found]
    speed = [(args.tokens - 1) / spent * 1e9 for spent in times]
    rows.append(Row("draft 0", plain.recipe.names(), args.tokens - 1, times,
                    values={"speed": float(np.median(speed))}))
    print(f"draft 0: {np.median(speed):.1f} tokens/s", flush=True)
    for length in range(1, DRAFTS + 1):
        continue_with(drafting, texts[0], 3 * length, length)
        found = [continue_with(drafting, ids, args.tokens, length) for ids in texts]
        kept, seen = sum(places for _, _, places in found)
        equal = sum(text == other for (text, _, _), other in zip(found, wanted, strict=True))
        speed = [(args.tokens - 1) / spent * 1e9 for _, spent, _ in found]
        values = {f"accepted {place + 1}": kept[place] / seen[place] for place in range(length)}
        values |= {f"drafted {place + 1}": float(seen[place]) for place in range(length)}
        values |= {"speed": float(np.median(speed)), "equal": float(equal), "prompts": float(len(texts)),
                   "faster": float(np.median([a / b for a, (_, b, _) in zip(times, found, strict=True)]))}
        rows.append(Row(f"draft {length}", replace(drafting.recipe, draft=length).names(), args.tokens - 1,
                        [spent for _, spent, _ in found], values=values))
        shares = ", ".join(f"{kept[place] / seen[place]:.3f}" for place in range(length))
        print(f"draft {length}: {np.median(speed):.1f} tokens/s, {values['faster']:.2f} times, accepted {shares}, "
              f"{equal} of {len(texts)} texts equal", flush=True)
    model = Model(plain.config.name, "Q8_0", plain.config.layers)
    write_result(Result.here("drafts", model, rows), local=False)           # in case that the rest takes too long
    long = [ids + text for ids, text in zip(texts, wanted, strict=True)]
    shares = agreement(plain, [text[at:at + WINDOW + 1] for text in long for at in (0, WINDOW)
                               if len(text) > at + WINDOW])
    rows.append(Row("hidden state", values=shares))
    print(shares)
    print(write_result(Result.here("drafts", model, rows), local=False))


if __name__ == "__main__":
    main()
