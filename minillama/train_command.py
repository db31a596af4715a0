"""The command `train`: a small model from a text, on this machine, with the model code that serves.

Everything lands in one folder: model.gguf, loss.png, log.jsonl, and checkpoint.safetensors, from which the same
command goes on after an interruption.
"""
import argparse
import json
import os
import tempfile
from argparse import Namespace
from pathlib import Path

from minillama.commands import open_device, progress_bar, say

PACKAGE = Path(__file__).parent
TOKENIZER = PACKAGE.parent / "data" / "tokenizer.json"
NAMES = ("next token", "first draft", "second draft")   # the losses that are drawn


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Add the command to a parser's."""
    from minillama.measure_commands import one, positive
    about = "train a small model on a text; goes on where an interrupted run of the same settings stopped"
    made = kinds.add_parser("train", help=about, description=about)
    made.set_defaults(run=train)
    made.add_argument("text", nargs="?", metavar="TEXT", help="UTF-8, plain or .xz; documents end with a zero byte")
    made.add_argument("-o", "--output", default="build/train", metavar="FOLDER", help="default: build/train")
    made.add_argument("--smoke", action="store_true",
                      help="a very small model, 50 steps, from the start; on minillama's own source without a TEXT")
    made.add_argument("--tokenizer", default=str(TOKENIZER), metavar="JSON", help="default: the shipped model's")
    for name, kind, what in (("steps", one(1), "default: 1000; with --smoke 50"),
                             ("batch", one(1), "sequences a step (default: 16; 4)"),
                             ("length", one(1), "tokens of a sequence (default: 256; 64)"),
                             ("rate", positive, "peak learning rate (default: 0.002)"),
                             ("seed", one(0), "default: 0")):
        made.add_argument(f"--{name}", type=kind, help=what)


def settings(args: Namespace):
    """The run that the options describe: minillama.train.Training."""
    from minillama.train import Training
    values = {"steps": 50, "batch": 4, "length": 64, "warmup": 5} if args.smoke else \
        {"steps": 1000, "batch": 16, "length": 256}
    given = {name: getattr(args, name) for name in ("steps", "batch", "length", "rate", "seed")}
    return Training(**values | {name: value for name, value in given.items() if value is not None})


def own_source() -> bytes:
    """minillama's own modules, as one text."""
    return b"\0".join(path.read_bytes() for path in sorted(PACKAGE.glob("*.py")))


def check(args: Namespace) -> int:
    """Raises, in one line, for what cannot work; returns the size of the vocabulary."""
    if not args.text and not args.smoke:
        raise ValueError("train needs a TEXT, or --smoke")
    if args.text:
        open(args.text, "rb").close()
    try:
        file = json.loads(Path(args.tokenizer).read_text(encoding="utf-8"))
        specials = [entry["content"] for entry in file["added_tokens"]]
        size = len(file["model"]["vocab"].keys() | set(specials))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{args.tokenizer}: not a tokenizer.json of the tokenizers library") from None
    if "<|endoftext|>" not in specials:
        raise ValueError(f"{args.tokenizer}: the vocabulary has no <|endoftext|> to end documents with")
    os.makedirs(args.output, exist_ok=True)
    return size


def loss_picture(log: Path, picture: Path) -> None:
    """The losses of a log, all in nats a token."""
    from minillama.show import BLUE, GREEN, ORANGE, canvas
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = canvas("Training", height=3.4)
    for index, (name, colour) in enumerate(zip(NAMES, (BLUE, ORANGE, GREEN), strict=True)):
        axes.plot([e["step"] for e in entries], [e["losses"][index] for e in entries], color=colour, label=name)
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend()
    figure.savefig(picture, dpi=110)


def train(args: Namespace) -> None:
    """Train, with a bar on stderr and a line of losses in the log every ten steps."""
    vocab = check(args)
    open_device()
    from minillama.export import model_config
    from minillama.train import read_documents, smoke_config
    from minillama.train import train as run
    folder, training = Path(args.output), settings(args)
    if args.text:
        read_documents(Path(args.text))     # what is no text is found out before an old run is cleared away
    log, checkpoint = folder / "log.jsonl", folder / "checkpoint.safetensors"
    if args.smoke or not checkpoint.exists():
        for old in (checkpoint, log):
            old.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile() as source, progress_bar("training") as update, \
            open(log, "a", encoding="utf-8") as lines:
        def report(step: int, losses: list[float], norm: float) -> None:
            update(step, training.steps)
            lines.write(json.dumps({"step": step, "losses": [round(x, 4) for x in losses], "norm": round(norm, 4)})
                        + "\n")
            lines.flush()
        if not args.text:
            source.write(own_source())
            source.flush()
        history = run(Path(args.text or source.name), Path(args.tokenizer), folder / "model.gguf",
                      smoke_config(vocab) if args.smoke else model_config("minillama-small", vocab), training,
                      checkpoint, report)
    loss_picture(log, folder / "loss.png")
    for name, first, last in zip(NAMES, *(history[:1] + history[-1:]), strict=False) if history else ():
        say(f"{name:<14}{first:.3f} -> {last:.3f} nats a token")
    print(folder / "model.gguf")
