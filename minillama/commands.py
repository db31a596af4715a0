"""The commands of the command line, one function each; `cli.py` reads the arguments and reports errors.

Text goes to stdout, progress and statistics to stderr. What needs tinygrad is imported inside the commands that
compute, after `open_device`, so that the others answer at once.
"""
import contextlib
import itertools
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from minillama.config import ModelConfig, check_tensors
from minillama.gguf import GGUF, GGUFError
from minillama.tokenizer import Tokenizer


class DeviceError(ValueError):
    """There is no device to compute on, or not the one that was asked for; the message is one line."""


# ---- what commands share ----------------------------------------------------------------------------------------


def say(line: str) -> None:
    """One line of statistics or bad news."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, all): the bar appears on stderr when it is first called."""
    bar = Progress(TextColumn(text), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True))
    task = bar.add_task(text)

    def update(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


def with_layer_bar(layers: Iterable[int]) -> Iterator[int]:
    """The layers, with a bar for whoever watches a terminal."""
    layers = list(layers)
    with progress_bar("loading layers") as update:
        for done, layer in enumerate(layers, 1):
            yield layer
            if sys.stderr.isatty():
                update(done, len(layers))


def read_text(path: str) -> str:
    """A text file as it is: UTF-8, line ends untouched."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None


def check_place(path: str) -> None:
    """Raises OSError if a file cannot be written there; leaves one that is there as it is."""
    new = not os.path.exists(path)
    open(path, "ab").close()
    if new:
        os.unlink(path)


def open_model(path: str) -> tuple[ModelConfig, Tokenizer]:
    """Check a model file without reading its weights."""
    file = GGUF(path)
    if not file.tensors:
        raise GGUFError(f"{path}: a vocabulary without weights; only tokenize and inspect work on it")
    config = ModelConfig.from_gguf(file)
    check_tensors(file, config)
    return config, Tokenizer.from_gguf(file)


def check_context(context: int, config: ModelConfig) -> None:
    """Raises ValueError for more tokens than the model was made for."""
    if context > config.context:
        raise ValueError(f"--context {context} is more than the {config.context} tokens the model was made for")


def check_ids(ids: list[int], config: ModelConfig, context: int) -> None:
    """What the engine would say too, but only after it has loaded the weights."""
    if not ids:
        raise ValueError("the prompt is empty: there are no tokens to run")
    bad = next((i for i in ids if not 0 <= i < config.vocab), None)
    if bad is not None:
        raise ValueError(f"token id {bad} is not in the vocabulary (0 to {config.vocab - 1})")
    if len(ids) > context:
        hint = f"raise --context (up to {config.context}) or shorten it" if context < config.context else "shorten it"
        raise ValueError(f"the prompt has {len(ids)} tokens, more than the context of {context}: {hint}")


def open_device() -> None:
    """Compute something where DEV says, so that a device that is not there is found out before anything is loaded.

    Comes before every other import of tinygrad, which fails already there if it cannot read DEV. Raises DeviceError.
    """
    wanted = os.environ.get("DEV", "")
    os.environ.setdefault("POCL_EXTRA_BUILD_FLAGS", "-w")   # else PoCL counts its compiler's warnings on our stderr
    try:
        from tinygrad import Tensor
        if (Tensor([1, 2, 3]) + 1).tolist() != [2, 3, 4]:
            raise RuntimeError("it computes wrong results")
    except Exception as problem:    # whatever a driver, a compiler or tinygrad raises: there are many kinds
        from minillama.devices import DEVICES, advice
        while isinstance(problem, ExceptionGroup):
            problem = problem.exceptions[-1]
        reason = " ".join(str(problem).split())[:150] or type(problem).__name__
        name = wanted.upper() or "CPU"
        hint = f"{name} needs {advice(name)}" if name in DEVICES else f"the devices are {', '.join(DEVICES)}"
        fault = f"DEV={wanted} does not work here" if wanted else "there is no device to compute on"
        raise DeviceError(f"{fault} ({reason}); {hint}") from None


def load_engine(args: Namespace, config: ModelConfig, ids: list[int] | None = None):
    """Check what was asked for against the model, then load it: a `ClockedEngine` on a device that was opened."""
    from minillama.clocked import ClockedEngine
    from minillama.engine import CONTEXT
    from minillama.ladder import read_recipe
    recipe, context = read_recipe(args.recipe), args.context or min(CONTEXT, config.context)
    if getattr(args, "draft", None) is not None:
        recipe = replace(recipe, draft=args.draft)
    if recipe.draft and not config.mtp_blocks:
        raise ValueError(f"{args.file}: this model has no multi-token-prediction block to draft with")
    check_context(context, config)
    if ids is not None:
        check_ids(ids, config, context)
    return ClockedEngine.load(args.file, recipe, context=context, progress=with_layer_bar)


def make_sampler(args: Namespace):
    """The Sampler that the options describe; raises ValueError for impossible ones."""
    from minillama.sampling import Sampler
    return Sampler(args.temp, args.top_k, args.top_p, args.seed)


# ---- commands ---------------------------------------------------------------------------------------------------


def devices(args: Namespace) -> int:
    from minillama.devices import main
    return main([])


def tokenize(args: Namespace) -> None:
    text = read_text(args.text_file) if args.prompt is None else args.prompt
    print(*Tokenizer.from_gguf(GGUF(args.file)).encode(text))


def inspect(args: Namespace) -> None:
    """Shows what can be read, and then refuses what the engine would refuse."""
    from minillama import describe
    file, console = GGUF(args.file), Console(highlight=False)
    console.print(describe.metadata_table(file))
    if not file.tensors:
        console.print("A vocabulary without weights: it can be used to tokenize.")
        return
    console.print(describe.tensor_table(file), describe.format_table(file))
    config = ModelConfig.from_gguf(file)
    check_tensors(file, config)
    check_context(args.context or 1, config)
    console.print(describe.parameter_table(file, config), describe.memory_table(file, config, args.context))


def generate(args: Namespace) -> None:
    config, tokenizer = open_model(args.file)
    ids = tokenizer.encode(args.prompt)
    open_device()
    sampler, engine = make_sampler(args), load_engine(args, config, ids)
    from minillama.clocked import Report
    report = Report(engine, args.began)
    new = report.watch(engine.generate(ids, args.count, sampler), len(ids))
    for piece in tokenizer.decode_stream(itertools.takewhile(lambda token: token not in tokenizer.stops, new)):
        print(piece, end="", flush=True)
    print()
    if engine.position == engine.context:
        say(f"The context of {engine.context} tokens is full.")
    for line in report.lines():
        say(line)


def lines_said() -> Iterator[str]:
    """What the user types, or what is piped in, up to /exit."""
    if not sys.stdin.isatty():
        yield from itertools.takewhile(lambda line: line != "/exit", (line.strip() for line in sys.stdin))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its editing keys
    say("Type a message; /clear forgets the conversation, /exit ends it.")
    with contextlib.suppress(EOFError):
        while (line := input("> ").strip()) != "/exit":
            yield line


def chat(args: Namespace) -> int:
    """A conversation. A message that no longer fits is refused, and the conversation can go on without it."""
    config, tokenizer = open_model(args.file)
    tokenizer.render_chat([{"role": "user", "content": "Hello"}])       # a broken template should say so now
    open_device()
    sampler, engine = make_sampler(args), load_engine(args, config)
    from minillama.chat import Conversation
    from minillama.clocked import Report
    from minillama.engine import ContextError
    report, status = Report(engine, args.began), 0
    conversation = Conversation(engine)
    for line in filter(None, lines_said()):
        if line == "/clear":
            conversation = Conversation(engine)
            continue
        try:
            for piece in conversation.say(line, args.count, sampler, report.watch):
                print(piece, end="", flush=True)
            print(flush=True)
        except ContextError as error:
            say(f"minillama: {error}, or start afresh with /clear")
            status = 2
    for line in report.lines():
        say(line)
    return status


def logits(args: Namespace) -> None:
    config, _ = open_model(args.file)
    if args.mtp and not config.mtp_blocks:
        raise ValueError(f"{args.file}: this model has no multi-token-prediction block")
    check_place(args.output)
    open_device()
    engine = load_engine(args, config, args.tokens)
    read = engine.mtp_logits if args.mtp else engine.all_logits if args.all else engine.logits
    values = read(args.tokens)                          # (rows, vocab) or (vocab,)
    with open(args.output, "wb") as file:               # np.save would add .npy to another name
        np.save(file, values if args.all or values.ndim == 1 else values[-1])


def perplexity(args: Namespace) -> None:
    config, tokenizer = open_model(args.file)
    ids = tokenizer.encode(read_text(args.text_file))
    if len(ids) < 2:
        raise ValueError(f"{args.text_file}: perplexity needs two tokens or more, this text has {len(ids)}")
    open_device()
    engine = load_engine(args, config)
    from minillama.perplexity import windowed_surprise
    with progress_bar("perplexity") as update:
        nats = windowed_surprise(engine, ids, update)
    count, size = len(ids) - 1, sum(len(tokenizer.token_bytes(token)) for token in ids[1:])
    print(f"perplexity {math.exp(nats / count):.4f} bits/byte {nats / math.log(2) / size:.4f} tokens {count}")


def ladder(args: Namespace) -> None:
    """Measure the ladder."""
    if args.output:
        check_place(args.output)
    open_device()
    from minillama import climb
    climb.ladder(args)


def quantize(args: Namespace) -> None:
    from minillama.quantize import quantize
    check_place(args.output)
    with progress_bar("quantizing") as update:
        quantize(args.file, args.output, args.format.upper(), update)
