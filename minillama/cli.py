"""The command line: `python -m minillama COMMAND`, installed as `minillama`.

Bad input ends in one line on stderr and exit status 2, Ctrl-C quietly in 130. What commands do is in `commands.py`,
and for those that measure, with their options, in `measure_commands.py`.
"""
import argparse
import os
import sys
import time
from collections.abc import Callable

from minillama import __version__


class Parser(argparse.ArgumentParser):
    """Options are spelled out, and a mistake is answered in one line."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def at_least(low: int) -> Callable[[str], int]:
    """An argument's type: an integer not below `low`."""
    def parse(text: str) -> int:
        try:
            if (value := int(text)) >= low:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} up")
    return parse


def token_ids(text: str) -> list[int]:
    """An argument's type: integers between spaces or commas."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a list of token ids such as \"1 2 3\"") from None


def add_engine_options(parser: Parser) -> None:
    parser.add_argument("--recipe", default="", metavar="NAME|FIELD=VALUE,…", help="a rung, or fields")
    parser.add_argument("-c", "--context", type=at_least(1), help="tokens there is room for (default: up to 4096)")


def add_draft_option(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--draft", type=at_least(0), metavar="N", help=f"{about} (0 to 4)")


def add_sampling_options(parser: Parser, count: int) -> None:
    parser.add_argument("-n", "--count", type=at_least(1), default=count, help=f"tokens at most (default: {count})")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature (default: 0, always the likeliest token)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest (default: 0, from all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that hold p (default: 1)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="fixes the text, without --draft (default: 0)")


def build_parser() -> Parser:
    """All commands with their options. (What they import takes a moment, in which Ctrl-C should be quiet already.)"""
    from minillama import commands, measure_commands, train_command
    parser = Parser(prog="minillama", description="A Qwen3-Next inference engine in tinygrad. "
                    "The environment variable DEV chooses the device: METAL, CUDA, CL or CPU.")
    parser.add_argument("--version", action="version", version=f"minillama {__version__}")
    kinds = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable, about: str, file: str | None = "a GGUF file, or any of its shards") -> Parser:
        made = kinds.add_parser(run.__name__, help=about, description=about)
        made.set_defaults(run=run)
        if file:
            made.add_argument("file", metavar="FILE", help=file)
        return made

    command(commands.devices, "the devices found here, measured, and what to install for the others", file=None)
    made = command(commands.tokenize, "text to token ids")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", metavar="TEXT")
    source.add_argument("-f", dest="text_file", metavar="TEXTFILE")
    made = command(commands.inspect, "metadata, tensors, formats, parameters, memory needed")
    made.add_argument("-c", "--context", type=at_least(1), help="tokens to plan memory for")
    guesses = "tokens that the multi-token-prediction block guesses at a time, at most"
    made = command(commands.generate, "continue a text")
    made.add_argument("-p", "--prompt", metavar="TEXT", required=True)
    add_sampling_options(made, count=128)
    add_engine_options(made)
    add_draft_option(made, guesses)
    made = command(commands.chat, "a conversation, by the file's own template")
    add_sampling_options(made, count=1024)
    add_engine_options(made)
    add_draft_option(made, guesses)
    made = command(commands.logits, "write logits as a float32 .npy file")
    made.add_argument("--tokens", type=token_ids, required=True, metavar="IDS", help='such as "1 2 3"')
    made.add_argument("-o", dest="output", required=True, metavar="OUT.npy")
    made.add_argument("--all", action="store_true", help="at every position, not only the last")
    made.add_argument("--mtp", action="store_true", help="of the multi-token-prediction block")
    add_engine_options(made)
    made = command(commands.perplexity, "how well a model predicts a text; each window of the context starts afresh")
    made.add_argument("-f", dest="text_file", required=True, metavar="TEXTFILE")
    add_engine_options(made)
    made = command(commands.ladder, "measure every rung of the ladder, each in a process of its own", file=None)
    model = made.add_mutually_exclusive_group()
    model.add_argument("-m", dest="model", metavar="FILE", help="default: the shipped model")
    model.add_argument("--shape", metavar="NAME", help="with --copies: random weights in a real model's shapes")
    made.add_argument("--layers", type=at_least(1), metavar="N", help="of the shape: as many, in the model's pattern")
    made.add_argument("--format", help="of the random weights (default: Q4_0)")
    made.add_argument("-o", dest="output", metavar="FILE", help="a copy of the result file")
    made.add_argument("-r", dest="repeats", type=at_least(1), default=10, help="samples of each pass (default: 10)")
    kind = made.add_mutually_exclusive_group()
    kind.add_argument("--ablate", dest="kind", action="store_const", const="ablate", default="ladder",
                      help="the last rung, with one field put back at a time")
    kind.add_argument("--copies", dest="kind", action="store_const", const="copies",
                      help="copies everywhere or none, on the grid that llama.cpp #19375 published")
    made.add_argument("--store", action="store_true", help="write to data/results, not data/results/local")
    made = command(commands.quantize, "write a model in another format")
    made.add_argument("output", metavar="OUT")
    made.add_argument("format", metavar="FORMAT", help="F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K …")
    measure_commands.add_parsers(kinds)
    train_command.add_parser(kinds)
    return parser


def one_line(error: Exception) -> str:
    """What went wrong, for someone who did not write this program."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename or repr(error.filename)}: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"standard input is not UTF-8 text ({error.reason})"
    if isinstance(error, MemoryError):
        return "there is not enough memory: lower --context, or take a smaller file"
    return " ".join(str(error).split())


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    began = time.perf_counter_ns()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")    # a terminal that cannot show a character is no reason to stop
    try:
        args = build_parser().parse_args(arguments)
        args.began = began
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:     # whoever read our output has seen enough; Python must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError) as error:
        print(f"minillama: {one_line(error)}", file=sys.stderr)
        return 2
