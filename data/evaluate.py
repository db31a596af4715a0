"""Measures the shipped model with the project's own engine, for the model card; writes data/results/.

    DEV=CL python data/evaluate.py quality          # bits per byte and acceptance of drafts, by format
    DEV=CL python data/evaluate.py completions      # function bodies
    python data/evaluate.py card                    # put the figures into data/README.md

The first two need the held-out text: `python data/corpus.py` makes it in build/corpus/.
"""
import argparse
import gzip
import lzma
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from minillama.commands import progress_bar  # noqa: E402
from minillama.config import ModelConfig  # noqa: E402
from minillama.gguf import GGUF  # noqa: E402
from minillama.quantize import quantize  # noqa: E402
from minillama.tokenizer import Tokenizer  # noqa: E402

NAME, MASTER = "minillama-coder", "Q8_0"
FORMATS = ["F32", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"]
EVERY = 60              # of the windows that cover the held-out text; 60 meets all five packages


def file_of(format: str) -> Path:
    return HERE / f"{NAME}-{format}.gguf"


def result(kind: str, rows: list):
    """A result file's content, about the master file, as of now."""
    from minillama.results import Model, Result
    return Result.here(kind, Model(NAME, MASTER, ModelConfig.from_gguf(GGUF(file_of(MASTER))).layers), rows)


def compressors(text: bytes, of: str = "") -> list:
    """What general compressors make of a text, in one piece; `of` says which text, where it is not what counted."""
    from minillama.results import Row
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    return [Row(name + of, values={"bits_per_byte": 8 * size / len(text), "bytes": len(text)})
            for name, size in sizes.items()]


def measure_quality(corpus: Path, formats: list[str], every: int) -> None:
    """Judge each format over the same windows; the result file is written anew after each."""
    import quality

    from minillama.results import Row, write_result
    tokenizer = Tokenizer.from_gguf(GGUF(file_of(MASTER)))
    documents = quality.documents(corpus)
    ids = quality.stream(documents, tokenizer)
    starts = quality.window_starts(len(ids), every)
    counted = np.concatenate(quality.counted(ids, starts))
    rows = compressors("".join(documents).encode(), of=" of all the held-out text")
    rows += compressors(b"".join(tokenizer.token_bytes(i) for i in counted if i != tokenizer.eos))
    reader = None
    for format in formats:
        with tempfile.TemporaryDirectory() as folder, progress_bar(f"{format:>6}") as update:
            path = file_of(format)
            if not path.exists():
                path = Path(folder) / path.name
                quantize(file_of(MASTER), path, format)
            if reader is None:
                reader = quality.Reader(path)
            else:
                reader.load(path)
            figures = quality.judge(reader, ids, starts, update)
        rows.append(Row(format, tokens=int(figures.pop("tokens")), values=figures | {"windows": len(starts)}))
        print(format, rows[-1].values, write_result(result("quality", rows), local=False), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("quality", "completions", "card"))
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--every", type=int, default=EVERY, help="read one window in so many")
    options = parser.parse_args()
    if options.what == "quality":
        measure_quality(options.corpus, options.formats, options.every)
    elif options.what == "completions":
        from completions import measure_completions
        measure_completions(options.corpus, file_of(MASTER), result)
    else:
        from card import update
        update()


if __name__ == "__main__":
    main()
