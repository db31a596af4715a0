"""The engine: prompts in fixed-size batches, decoding token by token, each step captured once and replayed.

It knows nothing of text; ids go in and ids come out. `Engine.tokenizer` is there for its callers.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes

from minillama import program_cache, sampling
from minillama.config import ModelConfig, check_tensors
from minillama.gguf import GGUF
from minillama.kernels.packed import Packed
from minillama.layers import linear, rope_table
from minillama.model import Place, forward, forward_mtp, place_of
from minillama.recipe import LOADED, Recipe
from minillama.sampling import Sampler
from minillama.state import State
from minillama.tokenizer import Tokenizer
from minillama.weights import ModelWeights, load_weights

program_cache.install()
BATCHES = (512, 64, 8, 1)
CONTEXT = 4096
SLOTS = 2           # of a ring of memories: the one that a token reads, the one that it writes


def put(tensor: Tensor, values: np.ndarray) -> Tensor:
    """Overwrite a realized tensor, which takes far less Python than a new one. Waits for whoever still reads it.
    values: as many of the same type, contiguous."""
    buffer = tensor.uop.buffer
    Device[buffer.device].synchronize()
    buffer.allocator._copyin(buffer._buf, memoryview(values).cast("B"))
    return tensor


class ContextError(ValueError):
    """The text does not fit into the context."""


class Engine:
    """One model, one recipe and the state of one text, which `feed` and `generate` lengthen and `clear` forgets."""

    def __init__(self, weights: ModelWeights, config: ModelConfig, recipe: Recipe = Recipe(), *,
                 context: int = CONTEXT, tokenizer: Tokenizer | None = None, device: str | None = None,
                 batches: tuple[int, ...] = BATCHES):
        self.weights, self.config, self.recipe, self.tokenizer = weights, config, recipe, tokenizer
        self.context, self.device, self.batches = min(context, config.context), device, batches
        positions = self.context + max(batches)     # a padded last batch may overrun the context
        self.state = State.zeros(config, positions, device, SLOTS if recipe.delta == "fused" else 0)
        self.table = rope_table(positions, config.rope_dim, config.rope_base, device)
        self.start = UOp.variable("start", 0, self.context)
        self.steps: dict[tuple[str, int], Callable] = {}
        self.inputs: dict[int, Tensor] = {}         # ids by the size of their batch
        self.position = 0                           # tokens in the state

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

    # ---- one step -------------------------------------------------------------------------------------------------

    def hidden(self, ids: Tensor, at: Place) -> Tensor:
        """The model on one batch: ids (tokens,) -> hidden states after the last norm (tokens, hidden)."""
        return forward(ids, self.weights, self.config, self.recipe, self.state, self.table, at)

    def last_logits(self, ids: Tensor, at: Place) -> Tensor:
        """Logits after the batch's last token, (vocab,): the head runs for that row, or for all (recipe.logits)."""
        hidden = self.hidden(ids, at)
        if at.tokens == 1:
            return linear(hidden, self.weights.head).reshape(-1)
        last = (at.tokens if at.valid is None else at.valid) - 1
        if self.recipe.logits == "all":
            return linear(hidden, self.weights.head).contiguous()[last].contiguous()
        return linear(hidden[last].contiguous(), self.weights.head)

    def _run(self, kind: str, ids: Tensor, at: Place, *more: Tensor) -> Tensor:
        if kind == "every":
            return linear(self.hidden(ids, at), self.weights.head).contiguous()
        if kind == "mtp":
            hidden = self.hidden(ids, at)
            return forward_mtp(more[0], hidden, self.weights, self.config, self.recipe, self.state, self.table, at)
        logits = self.last_logits(ids, at)
        if kind == "greedy":
            return sampling.greedy(logits)
        if kind == "sampled":
            uniform, *settings = more
            return sampling.draw(sampling.cut(logits, *settings), uniform)
        return logits if isinstance(self.weights.head, Packed) else logits.contiguous()

    def step(self, kind: str, ids: Tensor, start: int, valid: int, *more: Tensor) -> Tensor:
        """Run a batch through the step of that kind and size; the first call captures it. Size one has no padding."""
        size = ids.shape[0]
        key = kind, size
        if key not in self.steps:
            def run(ids: Tensor, start: UOp, valid: UOp | None, more: tuple[Tensor, ...], given: list[Tensor],
                    ) -> Tensor:
                at = Place(size, start, valid, *given, True) if given else place_of(ids, start, valid)
                return self._run(kind, ids, at, *more).realize()
            if self.recipe.capture != "eager":
                run = TinyJit(run, prune=self.recipe.capture == "prune")
                run.cnt = 1         # capture at the first call: nothing in a step needs a plain run before
            self.steps[key] = run
        bound = UOp.variable("valid", 1, size).bind(valid) if size > 1 else None
        given = [Tensor([place], dtype=dtypes.int32, device=self.device).realize() for place in (start, start + valid)
                 ] if self.recipe.capture == "prune" else []
        return self.steps[key](ids, self.start.bind(start), bound, more, given)

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
            padded = np.zeros(size, dtype=np.int32)
            padded[:len(part)] = part
            if size not in self.inputs:
                self.inputs[size] = Tensor(padded, device=self.device).realize()
            yield put(self.inputs[size], padded), self.position, len(part), at
            at += len(part)
            self.position += len(part)

    def feed(self, ids: Iterable[int], kind: str = "logits", *more: Tensor) -> Tensor:
        """Lengthen the text by ids; returns what the last batch's step of that kind gives."""
        out = None
        for batch, start, valid, _ in self.batches_of(self._check(ids)):
            out = self.step(kind, batch, start, valid, *more)
        return out

    def logits(self, ids: Iterable[int]) -> np.ndarray:
        """Logits after the last of ids, (vocab,) float32."""
        return self.feed(ids).numpy()

    def all_logits(self, ids: Iterable[int]) -> np.ndarray:
        """Logits after each of ids, (tokens, vocab) float32."""
        return np.concatenate([self.step("every", batch, start, valid).numpy()[:valid]
                               for batch, start, valid, _ in self.batches_of(self._check(ids))])

    def mtp_hidden(self, ids: Iterable[int]) -> np.ndarray:
        """The MTP block's normed output at each of ids but the last, (tokens - 1, hidden) float32."""
        if self.weights.mtp is None:
            raise ValueError("this model has no multi-token-prediction block")
        ids, rows = self._check(ids), []
        if len(ids) < 2:
            raise ValueError("the multi-token-prediction block needs at least two tokens")
        for batch, start, valid, at in self.batches_of(ids):
            ahead = np.zeros(batch.shape[0], dtype=np.int32)
            following = ids[at + 1:at + 1 + valid]
            ahead[:len(following)] = following
            out = self.step("mtp", batch, start, valid, Tensor(ahead, device=self.device).realize())
            rows.append(out.numpy()[:len(following)])
        return np.concatenate(rows)

    def mtp_logits(self, ids: Iterable[int]) -> np.ndarray:
        """The block's logits at each of ids but the last, (tokens - 1, vocab): at p, a guess of the token at p + 2."""
        hidden = Tensor(self.mtp_hidden(ids), device=self.device)
        return linear(hidden, self.weights.mtp.head).numpy()

    def generate(self, ids: Iterable[int], count: int, sampler: Sampler = Sampler()) -> Iterator[int]:
        """Feed ids, then yield up to `count` new ids. The last one yielded is not yet part of the state."""
        ids = self._check(ids)
        kind = "greedy" if sampler.greedy else "sampled"
        settings = [] if sampler.greedy else [
            Tensor([float(value)], dtype=dtypes.float32, device=self.device).realize()
            for value in (sampler.temperature, sampler.top_k, sampler.top_p)]
        uniforms = iter(sampler.draws(count, 0))

        def more() -> list[Tensor]:
            return [] if sampler.greedy else [Tensor([next(uniforms)], device=self.device).realize(), *settings]
        token = self.feed(ids, kind, *more()) if count else None
        for index in range(count):
            yield int(token.item())
            if index + 1 == count or self.position == self.context:
                return
            token = self.step(kind, token, self.position, 1, *more())
            self.position += 1
