"""Hold the engine against the golden values on one device and write what was found as a result file.

    DEV=CUDA python tests/judge.py [FOLDER]

FOLDER holds the reference files: by default the one that MINILLAMA_REFERENCE names, else tests/reference.

One row a check: the largest |difference| of the logits, and the tolerance it must stay under. Stored rows of formats
that FOLDER does not hold stay in the file.
"""
import os
import sys
import time
from pathlib import Path

import numpy as np

from minillama.engine import Engine
from minillama.results import Model, Result, Row, beside_stored, write_result

TOLERANCE = {"F32": 5e-4}       # every other format: 2e-3
FORMATS = {"ref-a": ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
           "ref-k": ("Q4_K_M", "Q5_K_M", "Q6_K")}


def difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max())


def judge_f32(engine: Engine, golden) -> dict[str, float]:
    """Every golden value of the float32 file: name -> largest |difference|; greedy tokens count those that differ."""
    found = {}
    for name in golden.files:
        kind, _, length = name.rpartition("_")
        if kind in ("logits", "all_logits", "mtp_logits") and length.isdigit():
            engine.clear()
            run = {"logits": engine.logits, "all_logits": engine.all_logits, "mtp_logits": engine.mtp_logits}[kind]
            got = run(golden[f"tokens_{length}"])
            found[name] = difference(got[-1] if kind == "mtp_logits" else got, golden[name])
    engine.clear()
    greedy = list(engine.generate(golden["greedy_prompt"], len(golden["greedy_tokens"])))
    found["greedy_tokens"] = float(np.sum(greedy != golden["greedy_tokens"]))
    return found


def judge(folder: Path, model: str) -> Result:
    """All formats of one reference model that the folder holds."""
    golden, rows, engine = np.load(folder / f"{model}.npz"), [], None
    for kind in FORMATS[model]:
        path = folder / f"{model}-{kind}.gguf"
        if not path.exists():
            continue
        start = time.perf_counter()
        engine = Engine.load(path, context=512)
        if kind == "F32":
            found = judge_f32(engine, golden)
        else:
            found = {}
            for length in (65, 257):
                engine.clear()
                got = engine.logits(golden[f"tokens_{length}"])
                found[f"logits_{length}"] = difference(got, golden[f"logits_{length}_{kind}"])
        tolerance = TOLERANCE.get(kind, 2e-3)
        rows += [Row(f"{kind} {name}", engine.recipe.names(), values={"difference": worst, "tolerance": tolerance})
                 for name, worst in found.items()]
        worst = max(found.values())
        print(f"{model} {kind}: max |difference| {worst:.2e}, tolerance {tolerance:.0e}, {len(found)} checks, "
              f"{time.perf_counter() - start:.0f} s", flush=True)
    if engine is None:
        sys.exit(f"{folder} holds no {model}-*.gguf")
    return Result.here("oracle", Model(model, "all", engine.config.layers), rows)


def main(folder: str | None = None) -> None:
    here = Path(folder or os.environ.get("MINILLAMA_REFERENCE") or Path(__file__).parent / "reference")
    failed = 0
    for model in FORMATS:
        if (here / f"{model}.npz").exists():
            result = judge(here, model)
            failed += sum(row.values["difference"] > row.values["tolerance"] for row in result.rows)
            print("wrote", write_result(beside_stored(result, lambda name: name.split()[0]), local=False))
    sys.exit(f"{failed} checks failed" if failed else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
