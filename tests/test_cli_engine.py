"""The commands that compute: their output equals the golden values, on one shared engine."""
import io
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import Ran
from tiny_model import write_tiny_model

from minillama import commands, describe
from minillama.config import ModelConfig
from minillama.engine import Engine
from minillama.gguf import GGUF
from minillama.shapes import weight_bytes
from minillama.tokenizer import Tokenizer

REFERENCE, DATA = Path(__file__).parent / "reference", Path(__file__).parent.parent / "data"
MODEL = REFERENCE / "ref-a-F32.gguf"
GOLDEN = np.load(REFERENCE / "ref-a.npz")
ROOM = 96       # tokens of context of the engine that the tests share


@pytest.fixture
def run(capsys):
    return lambda *arguments: Ran(capsys, *arguments)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """One engine for all tests, as the command line loads it, with batches of one token: a single size to compile."""
    load, kept = commands.load_engine, []

    def load_once(args, config, ids=None):
        if not kept:
            args.context = ROOM
            kept.append(load(args, config, ids))
            kept[0].batches = (1,)
        kept[0].clear()
        return kept[0]
    return load_once


@pytest.fixture
def engine(loaded, monkeypatch):
    monkeypatch.setattr(commands, "load_engine", loaded)


def test_the_memory_shown_for_the_state_is_what_the_engine_allocates():
    from minillama.engine import BATCHES, SLOTS
    from minillama.state import State
    config = ModelConfig.from_gguf(GGUF(MODEL))
    for context in (64, 4096):
        shown, used = describe.state_bytes(config, context), State.zeros(
            config, context + max(BATCHES), slots=SLOTS).nbytes()
        assert shown == used, f"context {context}: {shown} shown, {used} used"


@pytest.mark.parametrize("format", ("Q8_0", "Q4_K_M"))
def test_the_memory_shown_for_weights_is_what_the_engine_allocates(format):
    path = DATA / f"minillama-coder-{format}.gguf"
    if not path.exists():
        pytest.skip("made by `make data`")
    file = GGUF(path)
    shown, used = describe.device_bytes(file), weight_bytes(Engine.load(path, context=64).weights)
    assert shown == used <= 1.03 * sum(tensor.nbytes for tensor in file.tensors.values())


def prompt(name: str) -> str:
    return Tokenizer.from_gguf(GGUF(MODEL)).decode(GOLDEN[name])


def test_generate_streams_the_golden_text_and_reports_its_speed(run, engine):
    ran = run("generate", MODEL, "-p", prompt("greedy_prompt"), "-n", 48)
    expected = Tokenizer.from_gguf(GGUF(MODEL)).decode(GOLDEN["greedy_tokens"])
    assert (ran.status, ran.out) == (0, expected + "\n"), ran.err
    assert re.search(r"^setting up +building [\d.]+ s, compiling [\d.]+ s$", ran.err, re.M), ran.err
    assert re.search(r"^prompt +40 tokens in [\d.]+ s, [\d.,]+ tokens/s$", ran.err, re.M), ran.err
    assert re.search(r"^generation +47 tokens in [\d.]+ s, [\d.,]+ tokens/s$", ran.err, re.M), ran.err
    assert re.search(r"^first token +[\d.]+ s after the start$", ran.err, re.M), ran.err


def test_generate_stops_at_the_end_of_the_context_and_says_so(run, engine):
    ran = run("generate", MODEL, "-p", prompt("tokens_65") + prompt("tokens_5"), "-n", 1000)
    count = len(Tokenizer.from_gguf(GGUF(MODEL)).encode(prompt("tokens_65") + prompt("tokens_5")))
    assert ran.status == 0 and f"The context of {ROOM} tokens is full." in ran.err, ran.err
    assert f"generation  {ROOM - count} tokens" in ran.err, ran.err


def test_a_seed_gives_the_same_text_again_and_top_k_of_one_is_greedy(run, engine):
    def text(*options) -> str:
        return run("generate", MODEL, "-p", prompt("tokens_5"), "-n", 12, *options).out
    first = text("--temp", 1.5, "--seed", 1)
    assert first == text("--temp", 1.5, "--seed", 1) != text("--temp", 1.5, "--seed", 2)
    assert text() == text("--temp", 1.5, "--top-k", 1) == text("--temp", 1e-3)


@pytest.mark.parametrize("options, name, pick", [
    ((), "logits_5", np.s_[:]), (("--all",), "all_logits_65", np.s_[:]), (("--mtp",), "mtp_logits_5", np.s_[:]),
    (("--mtp", "--all"), "mtp_logits_5", np.s_[-1])])
def test_logits_writes_the_golden_values(run, engine, tmp_path: Path, options, name: str, pick):
    tokens = GOLDEN[f"tokens_{name.rsplit('_', 1)[1]}"]
    ran = run("logits", MODEL, "--tokens", " ".join(map(str, tokens)), "-o", tmp_path / "out", *options)
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    found, expected = np.load(tmp_path / "out"), GOLDEN[name]
    assert found.dtype == np.float32
    assert "--mtp" not in options or "--all" not in options or found.shape == (len(tokens) - 1, 512)
    difference = np.abs(found[pick] - expected).max()
    assert found[pick].shape == expected.shape and difference < 5e-4, f"{found.shape}, off by {difference:.1e}"


def golden_nats(tokens: np.ndarray) -> np.ndarray:
    logits = GOLDEN["all_logits_65"].astype(np.float64)[:-1]
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]


def test_perplexity_prints_what_the_golden_logits_give(run, engine, tmp_path: Path):
    (tmp_path / "text.txt").write_text(prompt("tokens_65"), encoding="utf-8", newline="")
    ran = run("perplexity", MODEL, "-f", tmp_path / "text.txt")
    nats, size = golden_nats(GOLDEN["tokens_65"]), len(prompt("tokens_65")) - len(prompt("tokens_1"))
    expected = np.exp(nats.mean()), nats.sum() / math.log(2) / size
    match = re.fullmatch(r"perplexity (\S+) bits/byte (\S+) tokens 64\n", ran.out)
    assert match and "100%" in ran.err, (ran.out, ran.err)
    assert np.allclose([float(number) for number in match.groups()], expected, rtol=1e-4), (ran.out, expected)


class Windowed:
    """An engine of random logits, which notes where its windows begin; batches of 8, padded."""
    device, context = None, 20

    def __init__(self):
        self.logits = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32) * 3
        self.windows, self.position, self.at = 0, 0, 0

    def clear(self):
        self.windows, self.position = self.windows + 1, 0

    def batches_of(self, ids):
        from tinygrad import Tensor
        for at in range(0, len(ids), 8):
            part = ids[at:at + 8]
            yield Tensor(part + [0] * (8 - len(part))), self.position, len(part), at
            self.position += len(part)

    def step(self, kind, batch, start, valid):
        from tinygrad import Tensor
        rows = np.full((8, 16), np.nan, dtype=np.float32)
        rows[:valid] = self.logits[self.at:self.at + valid]
        self.at += valid
        return Tensor(rows)


def test_perplexity_predicts_every_token_but_the_first_once_in_windows_of_the_context():
    from minillama.perplexity import windowed_surprise
    engine, ids, seen = Windowed(), np.random.default_rng(1).integers(0, 16, 54).tolist(), []
    found = windowed_surprise(engine, ids, lambda done, count: seen.append((done, count)))
    rows = engine.logits[:53].astype(np.float64)
    expected = (np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(53), ids[1:]]).sum()
    assert engine.windows == 3 and seen == [(0, 53), (20, 53), (40, 53), (53, 53)]
    assert abs(found - expected) < 1e-3, f"{found} nats, expected {expected}"


def turn(said: str) -> str:
    return f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"


def test_chat_keeps_its_state_and_goes_on_after_a_message_that_does_not_fit(run, engine, loaded, monkeypatch):
    lines = f"the\n\n{'a long story ' * 30}\nmore\n/clear\nthe\n/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    ran = run("chat", MODEL, "-n", 4)
    tokenizer = Tokenizer.from_gguf(GGUF(MODEL))
    first = tokenizer.encode(turn("the"))
    shared = loaded(None, None)
    replied = list(shared.generate(first, 4))
    second = [replied[-1], *tokenizer.encode("<|im_end|>\n" + turn("more"))]
    shared.clear()
    answered = list(shared.generate(first + replied[:-1] + second, 4))
    expected = [tokenizer.decode(ids) + "\n" for ids in (replied, answered, replied)]
    assert ran.out == "".join(expected), f"{ran.out!r}, not {expected}"
    assert ran.status == 2 and re.match(r"minillama: \d+ tokens do not fit[^\n]+/clear\n", ran.err), ran.err
    assert f"prompt      {2 * len(first) + len(second)} tokens" in ran.err, ran.err


@pytest.mark.slow
def test_the_program_as_installed_generates(tmp_path: Path):
    write_tiny_model(tmp_path / "tiny.gguf")
    command = [sys.executable, "-m", "minillama", "generate", "tiny.gguf", "-p", "t", "-n", "5", "-c", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
    assert re.search(r"^loading +[\d.]+ s$", done.stderr, re.M) and "generation  4 tokens" in done.stderr, done.stderr
