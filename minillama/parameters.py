"""Parameters of a model to be trained: their names and shapes, first values, and the engine's records over them."""
import numpy as np
from tinygrad import Tensor, dtypes

from minillama.config import ModelConfig
from minillama.weights import AttentionWeights, DeltaNetWeights, ExpertWeights, LayerWeights, ModelWeights, MTPWeights


def layer_shapes(config: ModelConfig, recurrent: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's parameters, stacked as the engine's fused projections are."""
    c = config
    if recurrent:
        mixer = {"inputs": (c.conv_channels + c.value_width + 2 * c.v_heads, c.hidden),
                 "conv": (c.conv_channels, c.conv_width), "dt_bias": (c.v_heads,), "a_log": (c.v_heads,),
                 "delta_norm": (c.state_dim,), "out": (c.hidden, c.value_width)}
    else:
        mixer = {"inputs": (2 * (c.heads + c.kv_heads) * c.head_dim, c.hidden), "q_norm": (c.head_dim,),
                 "k_norm": (c.head_dim,), "out": (c.hidden, c.heads * c.head_dim)}
    return {"norm": (c.hidden,), **mixer, "post_norm": (c.hidden,), "router": (c.experts, c.hidden),
            "gate_up": (c.experts, 2 * c.expert_width, c.hidden), "down": (c.experts, c.hidden, c.expert_width),
            "shared_gate": (c.hidden,), "shared_inputs": (2 * c.shared_width, c.hidden),
            "shared_down": (c.hidden, c.shared_width)}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters; the MTP block is "mtp."."""
    table = config.vocab, config.hidden
    found = {"embed": table, "out_norm": (config.hidden,), "head": table}
    for index, recurrent in enumerate(config.recurrent):
        found |= {f"{index}.{name}": shape for name, shape in layer_shapes(config, recurrent).items()}
    if config.mtp_blocks:
        vector = (config.hidden,)
        found |= {"mtp.embed_norm": vector, "mtp.hidden_norm": vector, "mtp.last_norm": vector,
                  "mtp.project": (config.hidden, 2 * config.hidden)}
        found |= {f"mtp.{name}": shape for name, shape in layer_shapes(config, False).items()}
    return found


def initial(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """One parameter's first value: norms 1, matrices normal with 1/sqrt(columns), decays spread over time scales."""
    kind = name.rpartition(".")[2]
    if kind.endswith("norm"):
        return np.ones(shape)
    if kind == "a_log":
        return np.log(rng.uniform(1, 16, shape))
    if kind == "dt_bias":
        step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))
        return step + np.log(-np.expm1(-step))                              # softplus gives `step` back
    if kind == "embed":
        return rng.normal(0, 0.02, shape)
    return rng.normal(0, shape[-1] ** -0.5, shape) * (0.5 if kind in ("out", "down", "shared_down") else 1)


def parameters(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """All parameters, float32, on the default device."""
    rng = np.random.default_rng(seed)
    return {name: Tensor(initial(name, shape, rng).astype(np.float32)).realize().is_param_(True)
            for name, shape in shapes(config).items()}


def as_weights(p: dict[str, Tensor], config: ModelConfig, half) -> ModelWeights:
    """The engine's records over the parameters; matrices in format `half` for the products."""
    def layer(at: str, recurrent: bool) -> LayerWeights:
        def get(name: str) -> Tensor:
            return p[at + name]

        def matrix(name: str) -> Tensor:
            return p[at + name].cast(half).contiguous() if half != dtypes.float32 else p[at + name]
        if recurrent:
            mixer = DeltaNetWeights((matrix("inputs"),), get("conv"), get("dt_bias"), -get("a_log").exp(),
                                    get("delta_norm"), matrix("out"))
        else:
            mixer = AttentionWeights((matrix("inputs"),), get("q_norm"), get("k_norm"), matrix("out"))
        routed = ExpertWeights(get("router"), (matrix("gate_up"),), matrix("down"), get("shared_gate"),
                               (matrix("shared_inputs"),), matrix("shared_down"))
        return LayerWeights(get("norm"), mixer, get("post_norm"), routed)
    layers = tuple(layer(f"{index}.", recurrent) for index, recurrent in enumerate(config.recurrent))
    embed, head = p["embed"], p["head"].cast(half)
    mtp = None if not config.mtp_blocks else MTPWeights(
        p["mtp.embed_norm"], p["mtp.hidden_norm"], p["mtp.project"].cast(half), layer("mtp.", False),
        p["mtp.last_norm"], embed, head)
    return ModelWeights(embed, layers, p["out_norm"], head, mtp)


def as_gguf(p: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters under a GGUF file's names and in its row order: what `weights.Loader` undoes."""
    c = config
    plain = {"norm": "attn_norm", "post_norm": "post_attention_norm", "router": "ffn_gate_inp",
             "down": "ffn_down_exps", "shared_gate": "ffn_gate_inp_shexp", "shared_down": "ffn_down_shexp",
             "conv": "ssm_conv1d",
             "delta_norm": "ssm_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "embed_norm": "nextn.enorm",
             "hidden_norm": "nextn.hnorm", "last_norm": "nextn.shared_head_norm", "project": "nextn.eh_proj"}
    found = {"token_embd.weight": p["embed"], "output_norm.weight": p["out_norm"], "output.weight": p["head"]}

    def rows(at: str, value: np.ndarray, names: tuple[str, ...], widths: tuple[int, ...], axis: int = 0) -> None:
        for name, part in zip(names, np.split(value, np.cumsum(widths)[:-1], axis=axis), strict=True):
            found[f"{at}{name}.weight"] = part
    for full, value in p.items():
        layer, _, name = full.rpartition(".")
        if not layer:
            continue
        index = c.layers if layer == "mtp" else int(layer)
        recurrent, at = index < c.layers and c.recurrent[index], f"blk.{index}."
        if name in plain:
            found[f"{at}{plain[name]}.weight"] = value
        elif name == "out":
            found[f"{at}{'ssm_out' if recurrent else 'attn_output'}.weight"] = value
        elif name == "dt_bias":
            found[f"{at}ssm_dt.bias"] = value
        elif name == "a_log":
            found[f"{at}ssm_a"] = -np.exp(value)
        elif name == "gate_up":
            rows(at, value, ("ffn_gate_exps", "ffn_up_exps"), (c.expert_width,) * 2, axis=1)
        elif name == "shared_inputs":
            rows(at, value, ("ffn_gate_shexp", "ffn_up_shexp"), (c.shared_width,) * 2)
        elif recurrent:
            rows(at, value, ("attn_qkv", "attn_gate", "ssm_ba"), (c.conv_channels, c.value_width, 2 * c.v_heads))
            b, a = found[at + "ssm_ba.weight"].reshape(2, c.k_heads, -1, c.hidden)
            found[at + "ssm_ba.weight"] = np.concatenate([b, a], axis=1).reshape(-1, c.hidden)  # a k-head: [b b | a a]
        else:
            keys = c.kv_heads * c.head_dim
            rows(at, value, ("attn_q", "attn_k", "attn_v"), (2 * c.heads * c.head_dim, keys, keys))
    return found
