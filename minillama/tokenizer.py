"""Text to token ids and back, and the chat template: all of it read from a GGUF file's own metadata.

It knows byte-level BPE in the form that Qwen files carry (`tokenizer.ggml.model` = "gpt2"), and nothing about
tensors: a file with a vocabulary and no weights is enough.

A byte-level vocabulary stores each token as printable characters that stand for bytes (a space is "Ġ"). Encoding
cuts the text into words with a regular expression, then merges bytes within each word in the order of the merge
list. Text is never normalised, as in llama.cpp, so that decoding gives back exactly what was encoded.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cached_property

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as BPE

from minillama.gguf import GGUFError

# How text is cut into words before any merging; source: llama.cpp, llama-vocab.cpp. Digits stand alone. The newer
# pattern lets combining marks (\p{M}) belong to words.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "qwen2": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "qwen35": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
              rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
}
UNNAMED = (None, "default")  # old converters wrote no name, or this one: read as qwen2, the family's own

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type: both are matched whole, before any merging
STOP_TEXTS = ("<|im_end|>", "<|endoftext|>")  # these end a text even where the metadata names one of them only
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatError(ValueError):
    """A conversation that the chat template cannot or will not render; the message is one line."""


def byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (source: GPT-2's encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = byte_characters()


class Tokenizer:
    """A vocabulary with its merges, special tokens and chat template.

    `vocab_size` counts every entry; `eos`, `bos`, `pad` are ids or None; `stops` are the ids that end a generated
    text; `specials` maps the texts that are matched whole to their ids.
    """

    def __init__(self, tokens: list[str], merges: list[tuple[str, str]], types: list[int] | None = None,
                 pre: str = "qwen2", eos: int | None = None, bos: int | None = None, pad: int | None = None,
                 stops: Iterable[int] = (), template: str | None = None, source: str = "tokenizer"):
        """Raises ValueError if a merge makes a token that the vocabulary lacks."""
        self.tokens, self.eos, self.bos, self.pad = tokens, eos, bos, pad
        self.template, self.source = template, source
        self.vocab_size = len(tokens)
        types = types or [1] * len(tokens)
        added = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
                 if text and kind in (CONTROL, USER_DEFINED)}
        self.specials = added
        ends = {added[text] for text in STOP_TEXTS if text in added}
        self.stops = frozenset(ends | set(stops) | ({eos} if eos is not None else set()))
        self._bpe = _build_bpe(tokens, merges, PRE_TOKENIZERS[pre])
        # "special" tokens can be switched off in `encode`; user-defined ones are matched always, as in llama.cpp
        self._bpe.add_special_tokens([_whole(t) for t, i in added.items() if types[i] == CONTROL])
        self._bpe.add_tokens([_whole(t) for t, i in added.items() if types[i] == USER_DEFINED])

    @classmethod
    def from_gguf(cls, file) -> "Tokenizer":
        """Build the tokenizer of an open GGUF file; raises GGUFError, in one line, for what it cannot use."""
        read = _Reader(file)
        kind = read.value("model", str)
        if kind != "gpt2":
            raise read.error(f"tokenizer model {kind[:60]!r} is not supported (only 'gpt2', byte-level BPE)")
        pre = read.value("pre", str, None)
        pre = "qwen2" if pre in UNNAMED else pre
        if pre not in PRE_TOKENIZERS:
            raise read.error(f"pre-tokenizer {pre[:60]!r} is not supported (only {', '.join(PRE_TOKENIZERS)})")
        if read.value("add_bos_token", bool, False):
            raise read.error("tokenizer.ggml.add_bos_token is true, which is not supported")
        tokens = read.items("tokens", str)
        types = read.items("token_type", int, None)
        if types is not None and len(types) != len(tokens):
            raise read.error(f"{len(types)} token types for {len(tokens)} tokens")
        eos, bos, pad, eot, eom = (read.id(name, len(tokens)) for name in ("eos", "bos", "padding", "eot", "eom"))
        try:
            return cls(tokens, read.merges(), types, pre, eos, bos, pad, {eot, eom} - {None},
                       read.template(), read.source)
        except ValueError as problem:
            raise problem if isinstance(problem, GGUFError) else read.error(str(problem)) from None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`. With `special` False, texts such as "<|im_end|>" are plain characters."""
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise ValueError(f"the text is not valid Unicode: {problem.reason} at {problem.start}") from None
        self._bpe.encode_special_tokens = not special
        return self._bpe.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token id stands for; raises ValueError for an id outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        text = self.tokens[token]
        if text in self.specials or any(character not in BYTE_OF for character in text):
            return text.encode()
        return bytes(BYTE_OF[character] for character in text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as ids arrive. A character whose bytes span tokens is held back until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if piece := decoder.decode(self.token_bytes(int(token))):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True, **extra) -> str:
        """The prompt of a conversation, `[{"role": …, "content": …}, …]`, by the file's own template.

        `extra` reaches the template as variables (tools, enable_thinking, …). Raises GGUFError for a template that
        is missing or broken, ChatError for a conversation that it refuses or cannot render.
        """
        template = self._compiled_template
        try:
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                   bos_token=self._text(self.bos), eos_token=self._text(self.eos), **extra)
        except Exception as problem:            # a file's own program: it may fail in any way
            raise ChatError(f"{self.source}: the chat template failed: {_one_line(problem)}") from None

    @cached_property
    def _compiled_template(self):
        text = self.template
        if text is None:
            if not {"<|im_start|>", "<|im_end|>"} <= self.specials.keys():
                raise GGUFError(f"{self.source}: no chat template (tokenizer.chat_template), and no ChatML tokens")
            text = CHATML
        try:
            return _template_environment().from_string(text)
        except (TemplateSyntaxError, RecursionError) as problem:
            raise GGUFError(f"{self.source}: the chat template is broken: {_one_line(problem)}") from None

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.tokens[token]


class _Reader:
    """Typed access to the `tokenizer.` keys of one file; every failure is a GGUFError that names the file."""

    def __init__(self, file):
        self.metadata, self.source = file.metadata, str(file.path)

    def error(self, text: str) -> GGUFError:
        return GGUFError(f"{self.source}: {text}")

    def value(self, name: str, kind: type, *default):
        key = f"tokenizer.ggml.{name}"
        if key not in self.metadata:
            if default:
                return default[0]
            raise self.error(f"no vocabulary: {key} is missing")
        value = self.metadata[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{key} is not of type {kind.__name__}")
        return value

    def items(self, name: str, kind: type, *default) -> list:
        values = self.value(name, list, *default)
        if values is not None and not all(isinstance(v, kind) for v in values):
            raise self.error(f"tokenizer.ggml.{name} holds something that is not of type {kind.__name__}")
        return values

    def id(self, name: str, vocab: int) -> int | None:
        token = self.value(f"{name}_token_id", int, None)
        if token is not None and not 0 <= token < vocab:
            raise self.error(f"tokenizer.ggml.{name}_token_id is {token}, outside the vocabulary of {vocab}")
        return token

    def merges(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ")) for merge in self.items("merges", str)]
        if wrong := next((pair for pair in pairs if len(pair) != 2 or not all(pair)), None):
            raise self.error(f"merge {' '.join(wrong)[:60]!r} is not a pair of tokens")
        return pairs

    def template(self) -> str | None:
        text = self.metadata.get("tokenizer.chat_template")
        if text is not None and not isinstance(text, str):
            raise self.error("tokenizer.chat_template is not of type str")
        return text


def _whole(text: str) -> AddedToken:
    return AddedToken(text, normalized=False)


def _build_bpe(tokens: list[str], merges: list[tuple[str, str]], pattern: str) -> BPE:
    """The `tokenizers` library's byte-level BPE; raises ValueError for merges that do not fit the vocabulary."""
    vocab = {text: i for i, text in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"the vocabulary holds {len(tokens) - len(vocab)} tokens twice")
    missing = next((pair for pair in merges if not (vocab.keys() >= {*pair, "".join(pair)})), None)
    if missing:
        raise ValueError(f"merge {' '.join(missing)[:60]!r} needs a token that the vocabulary lacks")
    bpe = BPE(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return bpe


def _template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it (the settings of transformers' `apply_chat_template`), in its sandbox."""
    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = tojson
    return environment


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
