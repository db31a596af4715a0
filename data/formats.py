"""How fast the shipped model is in each format: `python data/formats.py` runs its files in turn, sample by sample, in
one process on this device, and writes a result file of the kind bench for each to data/results/."""
import argparse
from pathlib import Path
from statistics import median

from minillama.bench import BATCHES, Bench, Measured, Subject, as_result, trials
from minillama.clocked import ClockedEngine
from minillama.gguf import GGUF
from minillama.quantize import file_format
from minillama.recipe import Recipe
from minillama.results import ClockTimes, Model, write_result
from minillama.shapes import parameters, weight_bytes

DATA = Path(__file__).parent
TESTS = trials([512], [128], [], [0])


def subject(path: Path, engine: ClockedEngine) -> Subject:
    file = GGUF(path)
    model = Model(engine.config.name, file_format(file), engine.config.layers)
    return Subject(path.name, model, weight_bytes(engine.weights), parameters(engine.config, file.tensors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-r", type=int, default=7, metavar="N", help="samples of each test (default: 7)")
    args = parser.parse_args()
    paths = sorted(DATA.glob("minillama-coder-*.gguf"))
    context = max(test.tokens for test in TESTS)
    benches = {path: Bench(ClockedEngine.load(path, Recipe(), context=context)) for path in paths}
    measured: dict[Path, list[Measured]] = {path: [] for path in paths}
    for test in TESTS:
        clocks, samples = {}, {path: [] for path in paths}
        for path, bench in benches.items():
            build, compile = bench.engine.build, bench.engine.compile
            warm = bench.warm_up(test)
            build, compile = bench.engine.build - build, bench.engine.compile - compile
            clocks[path] = ClockTimes(build, compile, max(0, warm - build - compile))
        for _ in range(args.r):
            for path, bench in benches.items():
                samples[path].append(bench.sample(test))
        for path in paths:
            measured[path].append(Measured(test, BATCHES[0], Recipe(), samples[path], clocks[path]))
            speed = test.tokens / median(samples[path]) * 1e9
            print(f"{path.name:<32}{test.name:<8}{speed:>8.1f} tokens/s", flush=True)
    for path, bench in benches.items():
        print(write_result(as_result(subject(path, bench.engine), measured[path]), local=False))


if __name__ == "__main__":
    main()
