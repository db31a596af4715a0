"""The commands that measure: `bench` and `count`. Their options, and the way from options to what the modules want.

As in `commands.py`, what needs tinygrad is imported when a command runs.
"""
import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

DEFAULT_FORMAT = {True: "Q4_0", False: "F16"}       # of random weights: packed, plain


def numbers(low: int, count: int | None = None) -> Callable[[str], list[int]]:
    """An argument's type: integers not below `low` between commas, `count` of them or any number."""
    def parse(text: str) -> list[int]:
        try:
            values = [int(part) for part in text.split(",")]
            if min(values) >= low and count in (None, len(values)):
                return values
        except ValueError:
            pass
        kind = {None: "integers between commas", 1: "an integer"}.get(count, f"{count} integers between commas")
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not {kind}, from {low} up")
    return parse


def one(low: int) -> Callable[[str], int]:
    return lambda text: numbers(low, 1)(text)[0]


def positive(text: str) -> float:
    """An argument's type: a number above 0."""
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number above 0")


def probability(text: str) -> float:
    """An argument's type: a number from 0 to 1."""
    try:
        if 0 <= (value := float(text)) <= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number from 0 to 1")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=one(1), metavar="N", help="as many layers, in the model's pattern")
    parser.add_argument("--format", help="of the random weights (default: Q4_0, or F16 with weights=float)")
    parser.add_argument("--mtp", action="store_true", help="with the multi-token-prediction block")
    parser.add_argument("--recipe", default="", metavar="NAME|FIELD=VALUE,…", help="a rung, or fields")


def add_parsers(kinds: argparse._SubParsersAction) -> None:
    """Add both commands to a parser's."""
    about = "speed of prompts and generation, by llama-bench's procedure and names"
    bench = kinds.add_parser("bench", help=about, description=about)
    bench.set_defaults(run=run_bench)
    model = bench.add_mutually_exclusive_group(required=True)
    model.add_argument("-m", "--model", metavar="FILE", help="a GGUF file, or any of its shards")
    model.add_argument("--shape", metavar="NAME", help="random weights in a real model's shapes, for example "
                       "qwen3-next-80b-a3b")
    add_shape_options(bench)
    many = "several values between commas"
    bench.add_argument("-p", "--n-prompt", type=numbers(0), default=[512], help=f"default: 512; {many}")
    bench.add_argument("-n", "--n-gen", type=numbers(0), default=[128], help=f"default: 128; {many}")
    bench.add_argument("-pg", type=numbers(0, 2), default=[], action="append", metavar="P,N",
                       help="a prompt and a generation timed together; may be repeated")
    bench.add_argument("-d", "--n-depth", type=numbers(0), default=[0], help=f"tokens before (default: 0); {many}")
    bench.add_argument("-ub", "--ubatch-size", type=numbers(1), default=[512], help=f"default: 512; {many}")
    bench.add_argument("--draft", type=one(0), metavar="N", help="tokens that the MTP block guesses at a time: 0 to 4")
    bench.add_argument("--accept", type=probability, metavar="P",
                       help="simulate, for the speed alone, that a draft is kept with this probability")
    bench.add_argument("-r", "--repetitions", type=one(1), default=5, help="default: 5")
    bench.add_argument("-o", "--output", choices=("md", "csv", "json", "jsonl"), default="md", help="default: md")
    bench.add_argument("--save", action="store_true", help="keep the result in data/results/local/")

    about = "kernels, bytes and operations of a real model's steps, with no GPU and no weights"
    count = kinds.add_parser("count", help=about, description=about)
    count.set_defaults(run=run_count)
    count.add_argument("--shape", metavar="NAME", required=True, help="qwen3-next-80b-a3b, qwen3-coder-next or tiny")
    add_shape_options(count)
    count.add_argument("-p", "--n-prompt", type=one(0), default=512,
                       help="tokens of the batch (default: 512; 0: no batch)")
    count.add_argument("-d", "--n-depth", type=one(0), default=0, help="tokens before (default: 0)")
    count.add_argument("--backend", choices=("CUDA", "METAL", "CL"),
                       help="the kernels of this backend, which need not be here; takes longer (default: a CPU's)")
    count.add_argument("--bandwidth", type=positive, metavar="GB/s", help="default: as measured on the project's GPU")
    count.add_argument("--speed", type=positive, metavar="TFLOP/s", help="default: as measured, in half precision")
    count.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")


# ---- bench --------------------------------------------------------------------------------------------------------


def bench_weights(args: Namespace, recipe, trials: list):
    """The weights to run, their config, and what they are: `bench.Subject`."""
    from minillama import bench, shapes
    from minillama.commands import open_model, with_layer_bar
    from minillama.results import Model
    fused, packed = recipe.projections == "fused", recipe.weights == "packed"
    if args.shape:
        config = shapes.shape_config(args.shape, args.layers, args.mtp or recipe.draft > 0)
        format = args.format or DEFAULT_FORMAT[packed]
        bench.check_room(trials, config, recipe.draft)
        weights = shapes.random_weights(config, format, fused, packed, progress=with_layer_bar)
        name = shapes.model_name(args.shape, config.layers)
        model, parameters = Model(name, format, config.layers), shapes.parameters(config)
    else:
        from minillama.gguf import GGUF
        from minillama.quantize import file_format
        from minillama.weights import load_weights
        config, _ = open_model(args.model)
        if recipe.draft and not config.mtp_blocks:
            raise ValueError(f"{args.model}: this model has no multi-token-prediction block to draft with")
        bench.check_room(trials, config, recipe.draft)
        file = GGUF(args.model)
        weights = load_weights(file, config, fused, packed, progress=with_layer_bar)
        model = Model(config.name, file_format(file), config.layers)
        parameters = shapes.parameters(config, file.tensors)
    size, batches = shapes.weight_bytes(weights), tuple(args.ubatch_size)
    return weights, config, bench.Subject(args.model or "", model, size, parameters, batches)


def run_bench(args: Namespace) -> None:
    from minillama.commands import open_device, open_model, say
    if args.model:
        if args.layers or args.format or args.mtp:
            raise ValueError("--layers, --format and --mtp go with --shape; a file has its own")
        open_model(args.model)      # a file that is none is found out before a device is opened
    open_device()
    from minillama import bench
    from minillama.ladder import read_recipe
    from minillama.results import write_result
    recipe = read_recipe(args.recipe)
    recipe = recipe if args.draft is None else replace(recipe, draft=args.draft)
    if args.accept is not None and not recipe.draft:
        raise ValueError("--accept says how many drafts are kept: it goes with --draft 1 to 4")
    trials = bench.trials(args.n_prompt, args.n_gen, args.pg, args.n_depth)
    if not trials:
        raise ValueError("there is nothing to measure: give -p, -n or -pg a number above 0")
    for batch in args.ubatch_size:
        bench.batches_for(batch)
    weights, config, subject = bench_weights(args, recipe, trials)
    done = []

    def watched():
        for m in bench.measure(weights, config, recipe, trials, subject.batches, args.repetitions, args.accept):
            done.append(m)
            say(f"{m.test.name}: set up before the first sample: building {m.clocks.build / 1e9:.2f} s, "
                f"compiling {m.clocks.compile / 1e9:.2f} s")
            yield m
    for text in bench.OUTPUTS[args.output](subject, watched()):
        print(text, end="", flush=True)
    if args.save:
        say(f"wrote {write_result(bench.as_result(subject, done))}")


# ---- count --------------------------------------------------------------------------------------------------------


def run_count(args: Namespace) -> None:
    if "tinygrad" not in sys.modules:
        os.environ["DEV"] = "NULL"          # nothing here needs a device, so none that is missing shall be in the way
    from rich.console import Console

    from minillama import count
    from minillama.ladder import read_recipe
    from minillama.shapes import check_format, parameters, shape_config
    from minillama.units import in_units
    config, recipe = shape_config(args.shape, args.layers, args.mtp), read_recipe(args.recipe)
    packed = recipe.weights == "packed"
    format = check_format(args.format or DEFAULT_FORMAT[packed], packed, mixes=())
    console = Console(stderr=True)
    steps = [(1, f"one token at position {args.n_depth}")]
    steps += [(args.n_prompt, f"a batch of {args.n_prompt} tokens")] if args.n_prompt > 1 else []
    roof, source = count.roof_for(args.bandwidth, args.speed)
    records = []
    for tokens, title in steps:
        with console.status(f"building {title}"):
            groups = count.count_step(config, recipe, format, tokens, args.n_depth, args.backend or "")
        sent = count.to_host(config, recipe, tokens)
        if args.output == "json":
            records.append({"tokens": tokens, "depth": args.n_depth, "bytes_to_host": sent}
                           | count.as_record(groups, roof))
        else:
            Console(highlight=False).print(count.as_table(title, groups, roof))
            print(*count.summary(groups, tokens, roof), f"to the host: {in_units(sent, 'B')}", sep="\n")
    if args.output == "json":
        print(json.dumps({"model": args.shape, "layers": config.layers, "format": format, "mtp": args.mtp,
                          "backend": args.backend or "CPU",
                          "parameters": parameters(config), "recipe": recipe.names(),
                          "roofline": None if roof is None else {"source": source, "bandwidth": roof.bandwidth,
                                                                 "speed": roof.speed, "launch": roof.launch},
                          "steps": records}, indent=2, ensure_ascii=False))
        return
    if roof:
        print(f"Time: every kernel in turn, at {count.limits(roof)} ({source}).")
    print(f"The kernels are those of {args.backend or 'a CPU; --backend CUDA counts what such a GPU runs'}.")
