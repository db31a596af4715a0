"""The stack of layers: token ids in, hidden states out; the state is read and written on the way."""
from tinygrad import Tensor, UOp, function

from minillama import attention, delta_net, first_port
from minillama.config import ModelConfig
from minillama.experts import experts_layer
from minillama.layers import rms_norm
from minillama.mtp import mtp_block
from minillama.recipe import Recipe
from minillama.state import DeltaState, KVCache, State, after, stored
from minillama.weights import DeltaNetWeights, LayerWeights, ModelWeights


def mix(x: Tensor, w: LayerWeights, config: ModelConfig, recipe: Recipe, part: DeltaState | KVCache,
        table: Tensor, start: int | UOp, valid: int | UOp | None) -> Tensor:
    """A layer's mixer on normed x (tokens, hidden), reading and writing that layer's state."""
    if not isinstance(w.mixer, DeltaNetWeights):
        module = first_port if recipe.copies == "everywhere" else attention
        return module.attention(x, w.mixer, config, table, start, part)
    count = x.shape[0] if valid is None else valid
    mask = None if valid is None else (Tensor.arange(x.shape[0]) < count).float()
    module = first_port if recipe.copies == "everywhere" else delta_net
    out, past, memory = module.delta_net(x, w.mixer, config, recipe.form("delta"), part.window, part.memory, mask)
    window = past[count:count + part.window.shape[0]]                       # the last inputs that were no padding
    return after(out, stored(part.window, window), stored(part.memory, memory))


def run_layer(x: Tensor, w: LayerWeights, config: ModelConfig, recipe: Recipe, part: DeltaState | KVCache,
              table: Tensor, start: int | UOp, valid: int | UOp | None) -> Tensor:
    """One layer with its state, scheduled once per kind however many there are. x and result (tokens, hidden)."""
    @function(precompile=True, allow_implicit=True)
    def layer(x: Tensor, start: int | UOp, valid: int | UOp | None) -> Tensor:
        h = x + mix(rms_norm(x, w.norm, config.norm_eps), w, config, recipe, part, table, start, valid)
        y, _, _ = experts_layer(rms_norm(h, w.post_norm, config.norm_eps), w.experts, config, recipe.form("experts"))
        return (h + y).contiguous()
    return layer(x, start, valid)


def forward(ids: Tensor, w: ModelWeights, config: ModelConfig, recipe: Recipe, state: State, table: Tensor,
            start: int | UOp = 0, valid: int | UOp | None = None, trace: list[Tensor] | None = None) -> Tensor:
    """Hidden states after the last norm, (tokens, hidden), of ids (tokens,) at positions start...

    The first `valid` tokens are text, the rest padding that leaves no trace in the state; None means all. `table`: the
    rotary angles of every position, (positions, 2, rope_dim // 2). `trace` collects the input of each layer.
    """
    rows = table[start:start + ids.shape[0]]
    x = w.embed[ids]                                                        # (tokens, hidden)
    for layer, part in zip(w.layers, state.layers, strict=True):
        if trace is not None:
            trace.append(x)
        x = run_layer(x, layer, config, recipe, part, rows, start, valid)
    return rms_norm(x, w.out_norm, config.norm_eps)


def forward_mtp(ids: Tensor, hidden: Tensor, w: ModelWeights, config: ModelConfig, recipe: Recipe, state: State,
                table: Tensor, start: int | UOp = 0) -> Tensor:
    """The MTP block's normed output (tokens, hidden); ids (tokens,) are one position ahead of hidden."""
    rows = table[start:start + ids.shape[0]]
    return mtp_block(ids, hidden, w.mtp, config, recipe.form("experts"), rows, start, state.mtp)[0]
