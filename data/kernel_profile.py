"""A token of a real model's shapes under NVIDIA's profiler, kernel by kernel; on a machine that has `ncu`:

    JIT=2 DEV=CUDA ncu --profile-from-start off --section SpeedOfLight --section LaunchStats \\
        --section WarpStateStats --clock-control none --csv --page raw python data/kernel_profile.py run > profile.csv
    python data/kernel_profile.py keep profile.csv "a name for the state of the code"
    writes data/results/profile-<model>-<device>.json, beside what it holds under other names

The profiler runs each kernel by itself, several times, with caches emptied before. JIT=2: kernels are started one by
one, since it does not look into graphs. Random weights, four layers: three of the one kind and one of the other.
"""
import csv
import ctypes
import sys
from pathlib import Path

from minillama.bench import Bench
from minillama.engine import Engine
from minillama.measure import synchronize
from minillama.results import Model, Result, Row, beside_stored, write_result
from minillama.shapes import random_weights, shape_config

SHAPE, LAYERS, FORMAT = "qwen3-next-80b-a3b", 4, "Q4_0"
TIME, STALL, ENDS = "gpu__time_duration.sum", "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
WAITS = f"{STALL}long_scoreboard{ENDS}"     # for what was asked of memory
VALUES = {"registers": "launch__registers_per_thread", "blocks": "launch__grid_size", "threads": "launch__block_size"}


def run() -> None:
    """One token between the calls that start and stop the profiler; those before it compile."""
    config = shape_config(SHAPE, LAYERS)
    engine = Engine(random_weights(config, FORMAT, True, True), config, context=2176)
    bench, driver = Bench(engine), ctypes.CDLL("libcuda.so.1")
    bench.generate(4)
    synchronize()
    driver.cuProfilerStart()
    bench.generate(1)
    synchronize()
    driver.cuProfilerStop()


def rows_of(path: Path, name: str) -> list[Row]:
    """A row for each kind of kernel, in the order of their first launch; samples are their launches."""
    lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    start = next(n for n, line in enumerate(lines) if line and line[0] == "ID")
    launches: dict[str, list[dict[str, str]]] = {}
    for line in lines[start + 2:]:                                          # behind names and units
        launch = dict(zip(lines[start], line, strict=True))
        launches.setdefault(launch["Kernel Name"], []).append(launch)

    def number(text: str) -> float:
        return float(text.replace(",", "") or 0)

    def row(kernel: str, found: list[dict[str, str]]) -> Row:
        stalls = {key: sum(number(launch[key]) for launch in found) for key in found[0]
                  if key.startswith(STALL) and key.endswith(ENDS) and "not_issued" not in key}
        values = {what: number(found[0][key]) for what, key in VALUES.items()}
        return Row(f"{name}: {kernel}", tokens=1, samples_ns=[round(number(launch[TIME])) for launch in found],
                   values=values | {"waits_for_memory": stalls[WAITS] / (sum(stalls.values()) or 1)})
    return [row(kernel, found) for kernel, found in launches.items()]


def keep(path: str, name: str) -> None:
    new = rows_of(Path(path), name)
    model = Model(f"{SHAPE} {LAYERS} of {shape_config(SHAPE).layers} layers", FORMAT, LAYERS)
    result = beside_stored(Result.here("profile", model, new), lambda name: name.split(": ")[0])
    print("wrote", write_result(result, local=False))


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    elif sys.argv[1:2] == ["keep"] and len(sys.argv) == 4:
        keep(*sys.argv[2:])
    else:
        sys.exit(__doc__)
