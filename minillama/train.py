"""Training: the very functions that serve, with plain float weights, the chunked delta rule and autograd.

Axis 0 is the tokens and axis 1 the batch; every function of the model takes that as it is. The losses are next token,
the MTP block's token after next, the block's second step on its own output, and the balance of the experts.
"""
import json
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, TinyJit, dtypes, nn

from minillama import delta_net, experts, program_cache
from minillama.attention import attention
from minillama.config import ModelConfig
from minillama.experts import experts_layer
from minillama.export import model_config, write_model
from minillama.layers import linear, rms_norm, rope_table
from minillama.mtp import mtp_block
from minillama.parameters import as_gguf, as_weights, parameters
from minillama.weights import DeltaNetWeights, LayerWeights, ModelWeights

program_cache.install()
CHECKPOINT_EVERY = 20   # steps, of those that are reported
AHEAD = 3       # tokens past each position that some loss needs: the next, the block's, the block's second step


@dataclass(frozen=True)
class Training:
    """What a run needs to be repeated. Lengths in tokens, rates per step."""
    steps: int
    batch: int = 32
    length: int = 512
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.1              # weight decay, on matrices alone
    clip: float = 1.0               # largest norm of the gradient
    mtp: float = 0.3                # weights of the losses beside the first
    mtp_second: float = 0.15
    balance: float = 0.01
    seed: int = 0
    half: str = "float32"           # format of products: float32, or bfloat16 on a GPU

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


# ---- losses -------------------------------------------------------------------------------------------------------


def train_layer(x: Tensor, w: LayerWeights, config: ModelConfig, table: Tensor, delta: Callable,
                routed: Callable) -> tuple[Tensor, Tensor]:
    """One layer over whole sequences, states starting empty. x (tokens, batch, hidden); also the layer's balance."""
    batch, c = x.shape[1], config
    normed = rms_norm(x, w.norm, c.norm_eps)
    if isinstance(w.mixer, DeltaNetWeights):
        window = Tensor.zeros(c.conv_width - 1, batch, c.conv_channels)
        memory = Tensor.zeros(batch * c.v_heads, c.state_dim, c.state_dim)
        x = x + delta_net.delta_net(normed, w.mixer, c, delta, window, memory)[0]
    else:
        x = x + attention(normed, w.mixer, c, table)
    y, every, chosen = experts_layer(rms_norm(x, w.post_norm, c.norm_eps), w.experts, c, routed)
    return (x + y).contiguous(), balance(every, chosen)


def balance(every: Tensor, chosen: Tensor) -> Tensor:
    """1 when all experts get the same share of tokens and of probability, `experts` when one gets all.

    every (tokens, experts): the router's softmax; chosen (tokens, used). Source: Fedus et al. 2021, eq. 4.
    """
    experts = every.shape[-1]
    share = (chosen.unsqueeze(-1) == Tensor.arange(experts)).float().mean(axis=(0, 1)).detach()
    return (share * every.mean(axis=0)).sum() * experts


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean -log p(target) in nats. hidden (tokens, batch, hidden), targets (tokens, batch)."""
    logits = linear(hidden, head).contiguous()                              # (tokens, batch, vocab)
    return (logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()


def losses(ids: Tensor, w: ModelWeights, config: ModelConfig, table: Tensor,
           routed: Callable = experts.dense) -> tuple[Tensor, ...]:
    """The losses of ids (length + AHEAD, batch): next token, MTP, the block's second step (each in nats), balance.

    The second step runs the block over its own outputs alone: when drafting, it also sees the keys that the block made
    of true hidden states. A cheaper stand-in; `data/training/` trains the shipped model with the real ones.
    """
    length = ids.shape[0] - AHEAD
    x, balances = w.embed[ids[:length]], []                                 # (length, batch, hidden)
    for layer in w.layers:
        x, unbalance = train_layer(x, layer, config, table, delta_net.chunked, routed)
        balances.append(unbalance)
    hidden = rms_norm(x, w.out_norm, config.norm_eps)
    parts = [cross_entropy(hidden, w.head, ids[1:length + 1])]
    for ahead in (1, 2) if w.mtp else ():
        hidden, every, chosen = mtp_block(ids[ahead:length + ahead], hidden, w.mtp, config, routed, table)
        hidden = hidden.contiguous()
        balances.append(balance(every, chosen))
        parts.append(cross_entropy(hidden, w.mtp.head, ids[ahead + 1:length + ahead + 1]))
    return *parts, sum(balances) / len(balances)


def total(parts: tuple[Tensor, ...], t: Training) -> Tensor:
    """The weighted sum that is minimised."""
    first, *mtp, unbalance = parts
    return first + sum(weight * part for weight, part in zip((t.mtp, t.mtp_second), mtp, strict=False)) \
        + t.balance * unbalance


# ---- the run ------------------------------------------------------------------------------------------------------


class Trainer:
    """Parameters, the optimizer's moments and the captured step."""

    def __init__(self, config: ModelConfig, training: Training):
        length, chunk = training.length, delta_net.CHUNK
        if length % chunk and (length > chunk or length & (length - 1)):
            raise ValueError(f"a length of {length} tokens does not divide into chunks: take a multiple of {chunk}, "
                             "or a power of two below")
        self.config, self.training = config, training
        self.params = parameters(config, training.seed)
        matrices = [p for p in self.params.values() if p.ndim > 1]
        vectors = [p for p in self.params.values() if p.ndim == 1]
        self.optimizers = [nn.optim.AdamW(matrices, training.rate, b2=0.95, weight_decay=training.decay),
                           nn.optim.AdamW(vectors, training.rate, b2=0.95, weight_decay=0)]
        self.table = rope_table(training.length, config.rope_dim, config.rope_base)
        self.rate = Tensor([training.rate_at(0)]).contiguous().realize()
        self.done = 0
        self.step = TinyJit(self._step)
        self.step.cnt = 1               # capture at the first call; what the step keeps must be realized before
        Tensor.realize(*self.state().values())

    def _step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (length + AHEAD, batch): one update; the losses, and the gradient's norm before clipping."""
        half = getattr(dtypes, self.training.half)
        parts = losses(ids, as_weights(self.params, self.config, half), self.config, self.table)
        params = list(self.params.values())
        grads = [grad.contiguous() for grad in total(parts, self.training).gradient(*params)]
        norm = sum(grad.square().sum() for grad in grads).sqrt().contiguous()
        shrink = (self.training.clip / (norm + 1e-6)).minimum(1.0)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad * shrink
        updated = []
        for optimizer in self.optimizers:
            optimizer.lr = self.rate
            updated += optimizer.schedule_step()
        losses_now = Tensor.stack(*parts).contiguous()
        Tensor.realize(losses_now, norm, *updated)
        for param in params:
            param.grad = None
        return losses_now, norm

    def run(self, batches: Iterator[np.ndarray], report: Callable[[int, list[float], float], None] | None = None,
            every: int = 10) -> list[list[float]]:
        """Train to the last step; returns the losses of each reported step (next, MTP, second, balance)."""
        history = []
        while self.done < self.training.steps:
            self.rate.assign(Tensor([self.training.rate_at(self.done)])).realize()
            with Context(TRAINING=1):
                now, norm = self.step(Tensor(next(batches)).realize())
            self.done += 1
            if self.done % every == 0 or self.done == self.training.steps:
                history.append(now.tolist())
                if report:
                    report(self.done, history[-1], norm.item())
        return history

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds: parameters, moments, the count of steps."""
        moments = {f"optimizer.{i}.{j}": tensor for i, optimizer in enumerate(self.optimizers)
                   for j, tensor in enumerate([optimizer.b1_t, optimizer.b2_t, *optimizer.m, *optimizer.v])}
        return {f"param.{name}": tensor for name, tensor in self.params.items()} | moments

    def save(self, path: Path) -> None:
        """Write a checkpoint (safetensors), by way of a temporary file."""
        temporary = path.with_suffix(".part")
        metadata = {"done": str(self.done), "settings": self.settings}
        nn.state.safe_save(self.state(), str(temporary), metadata)
        temporary.replace(path)

    @property
    def settings(self) -> str:
        """What a checkpoint must agree with."""
        return json.dumps([asdict(self.config), asdict(self.training)])

    def load(self, path: Path) -> None:
        """Go on from a checkpoint: on the same machine to the bit. Raises ValueError for one of another run."""
        try:
            saved = nn.state.safe_load(str(path))
            metadata = nn.state.safe_load_metadata(path)[2]["__metadata__"]
        except Exception as error:      # whatever a file that is none makes tinygrad's reader raise
            raise ValueError(f"{path}: not a checkpoint ({type(error).__name__})") from error
        if metadata.get("settings") != self.settings or saved.keys() != self.state().keys():
            raise ValueError(f"{path}: a checkpoint of a run with other settings; remove it or take another folder")
        for name, tensor in self.state().items():
            tensor.assign(saved[name].to(tensor.device)).realize()
        self.done = int(metadata["done"])


def batches(tokens: np.ndarray, training: Training, start: int = 0) -> Iterator[np.ndarray]:
    """Windows of packed text, (length + AHEAD, batch) int32, each epoch shuffled by the seed; `start` skips steps."""
    length, batch = training.length, training.batch
    windows = (len(tokens) - AHEAD) // length
    if windows < batch:
        raise ValueError(f"the text has {len(tokens)} tokens: {batch} windows of {length} need more")
    for step in range(start, training.steps):
        epoch, place = divmod(step * batch, windows - windows % batch)
        order = np.random.default_rng((training.seed, epoch)).permutation(windows)[place:place + batch]
        yield np.stack([tokens[i * length:(i + 1) * length + AHEAD] for i in order], axis=1).astype(np.int32)


# ---- the command --------------------------------------------------------------------------------------------------


def read_documents(text: Path) -> list[str]:
    """The documents of a text file. Raises ValueError where it has none, or is not what it seems to be."""
    try:
        raw = lzma.open(text).read() if text.suffix == ".xz" else text.read_bytes()
        documents = [part for part in raw.decode("utf-8").split("\0") if part]
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{text}: not {'xz' if not isinstance(error, UnicodeDecodeError) else 'UTF-8'} text: "
                         f"{error}") from error
    if not documents:
        raise ValueError(f"{text}: no text in it")
    return documents


def tokenized(text: Path, tokenizer: Path) -> np.ndarray:
    """A text file (plain or .xz; documents end with a zero byte) as ids, documents followed by <|endoftext|>."""
    from tokenizers import Tokenizer
    vocabulary = Tokenizer.from_file(str(tokenizer))
    end = vocabulary.token_to_id("<|endoftext|>")
    documents = read_documents(text)
    return np.concatenate([np.array([*part.ids, end], dtype=np.uint16)
                           for part in vocabulary.encode_batch_fast(documents, add_special_tokens=False)])


def smoke_config(vocab: int) -> ModelConfig:
    """One layer of each kind and the MTP block, small: what `--smoke` trains on a CPU in a minute."""
    shipped = model_config("smoke", vocab, layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, rope_dim=8,
                           k_heads=1, v_heads=2, state_dim=32, experts=4, experts_used=2, expert_width=32,
                           shared_width=32)
    return replace(shipped, recurrent=(True, False))


def train(text: Path, tokenizer: Path, out: Path, config: ModelConfig, training: Training,
          checkpoint: Path | None = None, report: Callable[[int, list[float], float], None] | None = None,
          ) -> list[list[float]]:
    """Train a model on a text and write it as an F32 GGUF file; goes on from `checkpoint` where that exists.

    Returns the reported losses (next token, MTP, its second step, balance), each in nats but the last.
    """
    trainer = Trainer(config, training)
    if checkpoint and checkpoint.exists():
        trainer.load(checkpoint)

    def reported(step: int, losses: list[float], norm: float) -> None:
        if report:
            report(step, losses, norm)
        if checkpoint and (step % CHECKPOINT_EVERY == 0 or step == training.steps):
            trainer.save(checkpoint)
    history = trainer.run(batches(tokenized(text, tokenizer), training, trainer.done), reported)
    values = {name: tensor.numpy() for name, tensor in trainer.params.items()}
    write_model(out, config, as_gguf(values, config), tokenizer, name=config.name)
    return history
