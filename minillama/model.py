"""The stack of layers: token ids in, hidden states out; the state is read and written on the way."""
from collections.abc import Callable
from dataclasses import dataclass, replace

from tinygrad import Tensor, UOp, dtypes, function

from minillama import attention, delta_net, first_port
from minillama.config import ModelConfig
from minillama.experts import experts_layer, few_tokens
from minillama.kernels import ring, tuning
from minillama.kernels.norm import rms_norm as kernel_norm
from minillama.kernels.product import Normed
from minillama.kernels.tuning import FEW
from minillama.layers import lookup, rms_norm
from minillama.mtp import mtp_input
from minillama.recipe import Recipe
from minillama.state import DeltaRings, DeltaState, KVCache, KVChain, State, after, stored
from minillama.weights import LayerWeights, ModelWeights


@dataclass(frozen=True)
class Place:
    """Where a batch of so many tokens stands: its first position, and how many of them are text (None: all).

    Kernels take no variables: for them, its first position and the one behind its text as int32 tensors (1,). These
    are made from the variables, or `given`: inputs of the graph, and then all that depends on a position depends on
    them, since pruning freezes what depends on a variable alone.
    """
    tokens: int
    start: int | UOp
    valid: int | UOp | None
    position: Tensor
    end: Tensor
    given: bool = False

    def rows(self, table: Tensor) -> Tensor:
        """The rows of a table by position (positions, ...) that belong to the batch, (tokens, ...)."""
        return table[self.position + Tensor.arange(self.tokens)] if self.given else (
            table[self.start:self.start + self.tokens])

    def mask(self) -> Tensor | None:
        """1 for text and 0 for padding, (tokens,) float32; None where all is text."""
        if self.valid is None:
            return None
        count = self.end - self.position if self.given else self.valid
        return (Tensor.arange(self.tokens) < count).float()


def place_of(ids: Tensor, start: int | UOp, valid: int | UOp | None) -> Place:
    """Where a batch of ids (tokens,) from `start` on stands."""
    def tensor(number: int | UOp) -> Tensor:
        return after(Tensor(number, dtype=dtypes.int32, device=ids.device).reshape(1))
    tokens = ids.shape[0]
    return Place(tokens, start, valid, tensor(start), tensor(start + (tokens if valid is None else valid)))


def norm_of(recipe: Recipe) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The form of the RMS norm."""
    return kernel_norm if recipe.weights == "packed" else rms_norm


def normed(x: Tensor | Normed) -> Tensor:
    """A norm that was left to kernels, taken before them."""
    return kernel_norm(x.x, x.weight, x.eps) if isinstance(x, Normed) else x


def mix(x: Tensor | Normed, w: LayerWeights, config: ModelConfig, recipe: Recipe,
        part: DeltaState | DeltaRings | KVCache, table: Tensor, at: Place, residual: Tensor,
        few: bool = False) -> Tensor:
    """residual + a layer's mixer on normed x (tokens, hidden), reading and writing that layer's state. `table`: the
    rotary angles of all positions. `few`: hand-written kernels may take over."""
    if isinstance(part, KVCache):
        return mix_attention(x, w, config, recipe, part, table, at, residual, few)
    tokens = at.tokens
    if isinstance(part, DeltaRings) and tokens < part.memories.shape[0] and at.valid is None:
        return delta_net.delta_net_step(x, w.mixer, config, part.history, part.memories, at.position, residual)
    x, count, mask = normed(x), tokens if at.valid is None else at.valid, at.mask()
    module, form = first_port if recipe.copies == "everywhere" else delta_net, recipe.form("delta")
    if isinstance(part, DeltaState):
        out, past, memory = module.delta_net(x, w.mixer, config, form, part.window, part.memory, mask)
        window = past[count:count + part.window.shape[0]]                   # the last inputs that were no padding
        if recipe.weights == "packed":      # `past` may be the window yet
            window = window.contiguous()
        return after(residual + out, stored(part.window, window), stored(part.memory, memory))
    width = config.conv_width - 1
    window, history = ring.read(part.history, at.position, -width, width)
    memory, memories = ring.read(part.memories, at.position, 0, 1)
    out, past, memory = module.delta_net(x, w.mixer, config, form, window, memory[0], mask)
    return after(residual + out, ring.write(history, past[count:count + width], at.end, -width),
                 ring.write(memories, memory.unsqueeze(0), at.end, 0))


def mix_attention(x: Tensor | Normed, w: LayerWeights, config: ModelConfig, recipe: Recipe, part: KVCache,
                  table: Tensor, at: Place, residual: Tensor, few: bool) -> Tensor:
    """`mix` of an attention layer: by kernels where they fit, else in the first port's tensor code or its own."""
    everywhere = recipe.copies == "everywhere"
    if few:         # a token's kernels have no copies to leave out
        by_hand = not everywhere or attention.can_step(config, part)
    else:
        by_hand = (recipe.weights == "packed" and not everywhere
                   and attention.can_flash(at.tokens, config, part))
    if by_hand:
        return attention.attention_step(x, w.mixer, config, table, part, at.position, residual, at.start)
    module = first_port if everywhere else attention
    return module.attention(normed(x), w.mixer, config, at.rows(table), at.start, part, residual)


def run_layer(x: Tensor, w: LayerWeights, config: ModelConfig, recipe: Recipe,
              part: DeltaState | DeltaRings | KVCache, table: Tensor, at: Place) -> Tensor:
    """One layer with its state. x and result (tokens, hidden).

    In plain tensor code it is a function that is scheduled once per kind of layer, however many there are. Kernels
    written by hand are scheduled quickly as they are, and a function would copy some of their results.
    """
    packed = recipe.weights == "packed"
    norm = norm_of(recipe)
    few = packed and x.shape[0] <= FEW and recipe.experts in ("gathered", "grouped")
    if few:
        norm = Normed if tuning.norms_inside(x.device, x.shape[0]) else norm
        h = mix(norm(x, w.norm, config.norm_eps), w, config, recipe, part, table, at, x, few)
        return few_tokens(norm(h, w.post_norm, config.norm_eps), w.experts, config, h)

    def layer(x: Tensor, start: int | UOp, valid: int | UOp | None, position: Tensor, end: Tensor) -> Tensor:
        place = replace(at, start=start, valid=valid, position=position, end=end)
        h = mix(norm(x, w.norm, config.norm_eps), w, config, recipe, part, table, place, x)
        y = norm(h, w.post_norm, config.norm_eps)
        return experts_layer(y, w.experts, config, recipe.form("experts"), h)[0].contiguous()
    by_hand = packed and tuning.shares_memory(x.device)
    if not isinstance(part, KVChain) and not by_hand:   # a chain must not keep tensors that live inside a function
        layer = function(layer, precompile=True, allow_implicit=True)
    return layer(x, at.start, at.valid, at.position, at.end)


def stack(ids: Tensor, w: ModelWeights, config: ModelConfig, recipe: Recipe, state: State, table: Tensor, at: Place,
          trace: list[Tensor] | None = None) -> Tensor:
    """Hidden states after the last layer, (tokens, hidden), of ids (tokens,) that stand at a place.

    Padding at the end leaves no trace in the state. `table`: the rotary angles of every position, (positions, 2,
    rope_dim // 2). `trace` collects the input of each layer. Where a batch's layers are no functions they are
    scheduled one by one: the time that scheduling takes grows faster than the graph.
    """
    x = lookup(w.embed, ids)                                                # (tokens, hidden)
    by_layer = recipe.weights == "packed" and tuning.shares_memory(x.device) and at.tokens > 1
    if by_layer:
        Tensor.realize(at.position, at.end)
    for layer, part in zip(w.layers, state.layers, strict=True):
        if trace is not None:
            trace.append(x)
        x = run_layer(x, layer, config, recipe, part, table, at)
        if by_layer:
            x.realize()
    return x


def forward(ids: Tensor, w: ModelWeights, config: ModelConfig, recipe: Recipe, state: State, table: Tensor, at: Place,
            trace: list[Tensor] | None = None) -> Tensor:
    """Hidden states after the last norm, (tokens, hidden); arguments as `stack`."""
    x = stack(ids, w, config, recipe, state, table, at, trace)
    return norm_of(recipe)(x, w.out_norm, config.norm_eps)


def forward_mtp(ids: Tensor, hidden: Tensor, w: ModelWeights, config: ModelConfig, recipe: Recipe, cache: KVCache,
                table: Tensor, at: Place) -> Tensor:
    """The MTP block's normed output (tokens, hidden); ids (tokens,) are one position ahead of hidden."""
    norm = norm_of(recipe)
    x = run_layer(mtp_input(ids, hidden, w.mtp, config, norm), w.mtp.layer, config, recipe, cache, table, at)
    return norm(x, w.mtp.out_norm, config.norm_eps)
