"""Trained weights as files small enough to travel: 16 bits, no torch needed."""
import json
import os
import sys
from pathlib import Path

import numpy as np

PART_BYTES = 14_500_000
NAME = "minillama-coder"


def save_parts(folder: Path, tensors: dict[str, np.ndarray], about: dict) -> None:
    """Float16 matrices and float32 vectors, in files of at most PART_BYTES; `about` goes into about.json, last."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, size = [{}], 0
    for name, values in tensors.items():
        kept = values.astype(np.float16 if values.ndim > 1 else np.float32)
        if size + kept.nbytes > PART_BYTES:
            parts, size = [*parts, {}], 0
        parts[-1][name] = kept
        size += kept.nbytes
    for i, part in enumerate(parts):
        np.savez(folder / f".weights-{i}.npz", **part)
        os.replace(folder / f".weights-{i}.npz", folder / f"weights-{i}.npz")
    (folder / "about.json").write_text(json.dumps(about | {"parts": len(parts)}, indent=1))


def import_parts(folder: Path, path: Path, tokenizer_json: Path, format: str) -> None:
    """Write the parts of `folder` as one GGUF file."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))        # a clone need not be installed
    from minillama.export import model_config, write_model
    tensors = {}
    for part in sorted(folder.glob("weights-*.npz")):
        with np.load(part) as file:
            tensors |= {name: file[name].astype(np.float32) for name in file.files}
    write_model(path, model_config(NAME), tensors, tokenizer_json, name=NAME, format=format)
    print(f"{path}: {len(tensors)} tensors, {sum(v.size for v in tensors.values()):,} parameters")
