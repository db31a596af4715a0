"""The engine: prompts in fixed-size batches, decoding token by token, each step captured once and replayed.

It knows nothing of text; ids go in and ids come out. `Engine.tokenizer` is there for its callers.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tinygrad import Tensor, TinyJit, UOp, dtypes

from minillama import program_cache, sampling
from minillama.attention import BLOCK
from minillama.config import ModelConfig, check_tensors
from minillama.gguf import GGUF
from minillama.kernels import tuning
from minillama.kernels.packed import Packed
from minillama.layers import linear, rope_table
from minillama.model import Place, forward, forward_mtp, place_of
from minillama.recipe import LOADED, Recipe
from minillama.sampling import Sampler
from minillama.speculate import Drafter
from minillama.state import State, after, padded, put
from minillama.tokenizer import Tokenizer
from minillama.weights import ModelWeights, load_weights

program_cache.install()
BATCHES = (512, 64, 8, 1)
CONTEXT = 4096
SLOTS = 2           # of a ring of memories: the one that a token reads, the one that it writes; and one for each draft


class ContextError(ValueError):
    """The text does not fit into the context."""


class Engine:
    """One model, one recipe and the state of one text, which `feed` and `generate` lengthen and `clear` forgets."""

    def __init__(self, weights: ModelWeights, config: ModelConfig, recipe: Recipe = Recipe(), *,
                 context: int = CONTEXT, tokenizer: Tokenizer | None = None, device: str | None = None,
                 batches: tuple[int, ...] = BATCHES):
        self.weights, self.config, self.recipe, self.tokenizer = weights, config, recipe, tokenizer
        self.context, self.device, self.batches = min(context, config.context), device, batches
        positions = self.context + max(*batches, 2 * SLOTS + 2 * recipe.draft)  # a last batch may overrun the context
        positions += -positions % BLOCK         # whole blocks, for a prompt's attention
        self.state = State.zeros(config, positions, device, SLOTS + recipe.draft if recipe.delta == "fused" else 0)
        self.table = rope_table(positions, config.rope_dim, config.rope_base, device)
        self.start = UOp.variable("start", 0, self.context)
        self.steps: dict[tuple[str, int], Callable] = {}        # by what they do and the size of their batch
        self.inputs: dict[tuple[str, int], Tensor] = {}     # of steps, by name and size
        self.outputs: list[Tensor] = []             # what a step gives beside its result
        self.position = 0                           # tokens in the state
        self.drafter = Drafter(self) if recipe.draft else None

    @classmethod
    def load(cls, path: str | Path, recipe: Recipe = Recipe(), *, context: int = CONTEXT, device: str | None = None,
             progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> "Engine":
        """Open, check and load a GGUF file (or all shards of one). Raises GGUFError, in one line, for a bad file."""
        file = GGUF(path)
        config = ModelConfig.from_gguf(file)
        check_tensors(file, config)
        tokenizer = Tokenizer.from_gguf(file)
        weights = load_weights(file, config, recipe.projections == "fused", recipe.weights == "packed", device,
                               progress=progress)
        return cls(weights, config, recipe, context=context, tokenizer=tokenizer, device=device)

    def with_recipe(self, **changes) -> "Engine":
        """An engine of its own (new state) on the same weights: `engine.with_recipe(delta=my_chunked)`."""
        recipe = replace(self.recipe, **changes)
        for name in LOADED:
            if getattr(recipe, name) != getattr(self.recipe, name):
                raise ValueError(f"recipe: {name} are laid out when a file is loaded; use Engine.load for that one")
        return Engine(self.weights, self.config, recipe, context=self.context, tokenizer=self.tokenizer,
                      device=self.device, batches=self.batches)

    def clear(self) -> None:
        """Forget the text."""
        self.state.clear()
        self.position = 0
        if self.drafter:
            self.drafter.clear()

    # ---- one step -------------------------------------------------------------------------------------------------

    def hidden(self, ids: Tensor, at: Place) -> Tensor:
        """The model on one batch: ids (tokens,) -> hidden states after the last norm (tokens, hidden)."""
        return forward(ids, self.weights, self.config, self.recipe, self.state, self.table, at)

    def last_logits(self, hidden: Tensor, at: Place) -> tuple[Tensor, ...]:
        """Logits after the batch's last token, (vocab,): the head runs for that row, or for all (recipe.logits). Then
        those of all tokens, (tokens, vocab), where they go to the host (recipe.mtp_prefill)."""
        if at.tokens == 1:
            return (linear(hidden, self.weights.head).reshape(-1),)
        last = (at.tokens if at.valid is None else at.valid) - 1
        to_host = self.drafter is not None and self.recipe.mtp_prefill == "logits"
        if self.recipe.logits == "all" or to_host:
            every = linear(hidden, self.weights.head).contiguous()
            return every[last].contiguous(), *([every] if to_host else [])
        return (linear(hidden[last].contiguous(), self.weights.head),)

    def _run(self, kind: str, ids: Tensor, at: Place, *more: Tensor) -> tuple[Tensor, ...]:
        hidden = self.hidden(ids, at)
        if kind == "every":
            return (linear(hidden, self.weights.head).contiguous(),)
        if kind == "mtp":
            mtp = self.state.mtp
            return (forward_mtp(more[0], hidden, self.weights, self.config, self.recipe, mtp, self.table, at),)
        logits, *every = self.last_logits(hidden, at)
        if self.drafter:
            following, *more = more
            logits = after(logits, *self.drafter.follow(following, hidden, at))
        if kind == "greedy":
            logits = sampling.greedy(logits)
        elif kind == "sampled":
            uniform, *settings = more
            logits = sampling.draw(sampling.cut(logits, *settings), uniform)
        elif not isinstance(self.weights.head, Packed):
            logits = logits.contiguous()
        return logits, *every

    def step(self, kind: str, ids: Tensor, start: int, valid: int, *more: Tensor) -> Tensor:
        """Run a batch through the step of that kind and size; the first call captures it. Size one has no padding.

        Where the recipe drafts, the first of `more` is what the MTP block reads: each id's successor, (size,) int32.
        """
        size = ids.shape[0]

        def run(ids: Tensor, start: UOp, valid: UOp | None, more: tuple[Tensor, ...], given: list[Tensor],
                ) -> tuple[Tensor, ...]:
            at = Place(size, start, valid, *given, True) if given else place_of(ids, start, valid)
            out = self._run(kind, ids, at, *more)
            Tensor.realize(*out)
            return out
        bound = UOp.variable("valid", 1, size).bind(valid) if size > 1 else None
        given = [self.input(name, np.array([place], dtype=np.int32))
                 for name, place in (("start", start), ("end", start + valid))
                 ] if self.recipe.capture == "prune" else []
        out, *self.outputs = self.call((kind, size), run, ids, self.start.bind(start), bound, more, given)
        return out

    def call(self, key: tuple[str, int], run: Callable, *given):
        """Run what was captured under a key: `run` itself, at the first call, which must realize its result."""
        if key not in self.steps:
            if self.recipe.capture != "eager":
                run = TinyJit(run, prune=self.recipe.capture == "prune")
                run.cnt = 1         # capture at the first call: nothing in a step needs a plain run before
            self.steps[key] = run
        step = self.steps[key]
        if getattr(step, "captured", step) is not None:         # replayed; or eager, which captures nothing
            return step(*given)
        with tuning.launches(self.device, self.recipe.launches == "early", key[1]):
            return step(*given)

    # ---- a text ---------------------------------------------------------------------------------------------------

    def plan(self, tokens: int) -> list[int]:
        """Batch sizes for so many tokens: the largest that gets more than half full, then on with the rest."""
        sizes = []
        while tokens > 0:
            sizes.append(next((size for size in self.batches if size <= 2 * tokens - (size > 1)), self.batches[-1]))
            tokens -= sizes[-1]
        return sizes

    def _check(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if not ids:
            raise ValueError("there are no tokens to run: the prompt is empty")
        bad = next((i for i in ids if not 0 <= i < self.config.vocab), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is not in the vocabulary (0 to {self.config.vocab - 1})")
        if self.position + len(ids) > self.context:
            raise ContextError(f"{self.position + len(ids)} tokens do not fit into the context of {self.context}; "
                               "shorten the prompt or raise --context")
        return ids

    def batches_of(self, ids: list[int]) -> Iterator[tuple[Tensor, int, int, int]]:
        """Cut ids into padded batches: (ids (size,) int32, start, valid, index of the batch's first id).

        The next batch of a size overwrites the one before: use each before you ask for the next.
        """
        at = 0
        for size in self.plan(len(ids)):
            part = ids[at:at + size]
            yield self.input("ids", padded(part, size)), self.position, len(part), at
            at += len(part)
            self.position += len(part)

    def input(self, name: str, values: np.ndarray) -> Tensor:
        """Values for a step, in the tensor of that name and size: making one anew takes milliseconds of Python."""
        key = name, len(values)
        if key not in self.inputs:
            self.inputs[key] = Tensor(values, device=self.device).realize()
        return put(self.inputs[key], values)

    def feed(self, ids: Iterable[int], kind: str = "logits", *more: Tensor) -> Tensor:
        """Lengthen the text by ids; returns what the last batch's step of that kind gives."""
        ids, out = self._check(ids), None
        if self.drafter:
            self.drafter.before_prompt(ids[0])
        for batch, start, valid, at in self.batches_of(ids):
            following = [self._following(ids, at, batch, valid)] if self.drafter else []
            out = self.step(kind, batch, start, valid, *following, *more)
            for every in self.outputs:      # as llama.cpp copied them before #23198, though nobody reads them
                every.numpy()
        if self.drafter:
            self.drafter.after_prompt()
        return out

    def _following(self, ids: list[int], at: int, batch: Tensor, valid: int) -> Tensor:
        """What the MTP block reads with a batch of ids from `at` on: each one's successor, 0 where there is none."""
        return self.input("following", padded(ids[at + 1:at + 1 + valid], batch.shape[0]))

    def logits(self, ids: Iterable[int]) -> np.ndarray:
        """Logits after the last of ids, (vocab,) float32."""
        return self.feed(ids).numpy()

    def all_logits(self, ids: Iterable[int]) -> np.ndarray:
        """Logits after each of ids, (tokens, vocab) float32. The MTP block does not read these ids: drafts behind them
        are worse guesses."""
        if self.drafter:
            self.drafter.clear()
        return np.concatenate([self.step("every", batch, start, valid).numpy()[:valid]
                               for batch, start, valid, _ in self.batches_of(self._check(ids))])

    def mtp_hidden(self, ids: Iterable[int]) -> np.ndarray:
        """The MTP block's normed output at each of ids but the last, (tokens - 1, hidden) float32."""
        if self.weights.mtp is None:
            raise ValueError("this model has no multi-token-prediction block")
        ids, rows = self._check(ids), []
        if len(ids) < 2:
            raise ValueError("the multi-token-prediction block needs at least two tokens")
        if self.drafter:
            self.drafter.clear()
        for batch, start, valid, at in self.batches_of(ids):
            out = self.step("mtp", batch, start, valid, self._following(ids, at, batch, valid))
            rows.append(out.numpy()[:min(valid, len(ids) - 1 - at)])
        return np.concatenate(rows)

    def mtp_logits(self, ids: Iterable[int]) -> np.ndarray:
        """The block's logits at each of ids but the last, (tokens - 1, vocab): at p, a guess of the token at p + 2."""
        hidden = Tensor(self.mtp_hidden(ids), device=self.device)
        return linear(hidden, self.weights.mtp.head).numpy()

    def generate(self, ids: Iterable[int], count: int, sampler: Sampler = Sampler(), adapt: bool = True,
                 ) -> Iterator[int]:
        """Feed ids, then yield up to `count` new ids. The last one yielded is not yet part of the state.

        With drafts a greedy text is the same. A sampled one follows the same distribution, but a seed fixes it only
        with `adapt=False`: always as many drafts as the recipe says, also where they do not pay.
        """
        ids = self._check(ids)
        kind = "greedy" if sampler.greedy else "sampled"
        settings = [] if sampler.greedy else [
            Tensor([float(value)], dtype=dtypes.float32, device=self.device).realize()
            for value in (sampler.temperature, min(sampler.top_k, self.config.vocab), sampler.top_p)]
        uniforms = sampler.stream()

        def more() -> list[Tensor]:
            return [] if sampler.greedy else [
                self.input("uniforms", uniforms.random(1, dtype=np.float32)), *settings]
        token = self.feed(ids, kind, *more()) if count else None
        if self.drafter and count:
            yield (first := int(token.item()))
            if self.position < self.context:
                yield from self.drafter.generate(first, count - 1, sampler, settings, adapt)
            return
        for index in range(count):
            yield (value := int(token.item()))
            if index + 1 == count or self.position == self.context:
                return
            # not `token` itself: an input that a graph also writes is copied first, which takes longer than this
            token = self.step(kind, self.input("ids", padded([value], 1)), self.position, 1, *more())
            self.position += 1
