"""Text as tokens on the device, and the order in which they are read."""
import lzma
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training.device import DEVICE

END = "<|endoftext|>"


def load_tokens(corpus: Path, name: str, cache: Path) -> tuple[np.ndarray, int]:
    """Tokens of all documents, each followed by <|endoftext|>, as int16; and the number of bytes of their text."""
    path = cache / f"{name}.npz"
    if not path.exists():
        documents = lzma.decompress((corpus / f"{name}.txt.xz").read_bytes()).decode().split("\x00")
        tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
        end, pieces = tokenizer.token_to_id(END), []
        for i in range(0, len(documents), 512):
            for encoding in tokenizer.encode_batch(documents[i:i + 512], add_special_tokens=False):
                pieces.append(np.array([*encoding.ids, end], dtype=np.int16))
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, tokens=np.concatenate(pieces), bytes=sum(len(d.encode()) for d in documents))
    file = np.load(path)
    return file["tokens"], int(file["bytes"])


class Order:
    """Where sequences start: every epoch another cut of the text and another order, from one seed."""

    def __init__(self, length: int, tokens: int, batch: int, seed: int):
        self.length, self.tokens, self.batch, self.seed, self.epoch, self.queue = length, tokens, batch, seed, 0, None

    def next(self):
        if self.queue is None or len(self.queue) < self.batch:
            random = np.random.default_rng([self.seed, self.epoch])
            first = int(random.integers(self.tokens))
            starts = np.arange(first, self.length - self.tokens - 2, self.tokens)
            self.queue = torch.from_numpy(random.permutation(starts)).to(DEVICE)
            self.epoch += 1
        taken, self.queue = self.queue[:self.batch], self.queue[self.batch:]
        return taken
