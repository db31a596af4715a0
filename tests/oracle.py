"""Where the golden files are, and engines of sizes that all tests share, so that few graphs are built.

The small golden files stand in tests/reference; MINILLAMA_REFERENCE names a folder that holds them all (the other
formats, shards, the second model). A test that needs a file found in neither is skipped.
"""
import os
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from minillama.config import ModelConfig, check_tensors
from minillama.engine import Engine
from minillama.gguf import GGUF
from minillama.recipe import Recipe
from minillama.weights import ModelWeights, load_weights

HERE = Path(__file__).parent / "reference"
FORMATS = {"ref-a": ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
           "ref-k": ("Q4_K_M", "Q5_K_M", "Q6_K")}
LENGTHS = (1, 2, 5, 63, 64, 65, 130, 257)
BATCHES = (64, 8, 1)
CONTEXT = 320
TOLERANCE = 5e-4                # of logits in float32; a right engine lands within 1e-4 at most positions
FORMAT_TOLERANCE = 2e-3


def found(name: str) -> Path | None:
    """The golden file of that name, if this machine has it."""
    folders = [HERE, *([Path(os.environ["MINILLAMA_REFERENCE"])] if "MINILLAMA_REFERENCE" in os.environ else [])]
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def needed(name: str) -> Path:
    """The golden file of that name; the test is skipped where there is none."""
    path = found(name)
    if path is None:
        pytest.skip(f"{name} is not in tests/reference; MINILLAMA_REFERENCE names the folder of the larger files")
    return path


@cache
def golden(model: str) -> dict[str, np.ndarray]:
    """The golden values of "ref-a" or "ref-k" by name."""
    with np.load(needed(f"{model}.npz")) as arrays:
        return dict(arrays)


def read(path: Path, fused: bool = True, packed: bool = False) -> tuple[ModelWeights, ModelConfig]:
    """Open, check and load a model file."""
    file = GGUF(path)
    config = ModelConfig.from_gguf(file)
    check_tensors(file, config)
    return load_weights(file, config, fused, packed), config


def load(path: Path, recipe: Recipe = Recipe()) -> Engine:
    """An engine of the tests' sizes."""
    weights, config = read(path, recipe.projections == "fused", recipe.weights == "packed")
    return Engine(weights, config, recipe, context=CONTEXT, batches=BATCHES)


@cache
def shared_engine() -> Engine:
    """The engine on ref-a-F32 that all tests share, its steps captured: clear() it first, leave its weights alone.

    Property tests take it from a fixture, not first inside an example: hypothesis allows 2,000 frames there, and to
    capture a step takes more.
    """
    engine = load(HERE / "ref-a-F32.gguf")
    for size in BATCHES:
        engine.feed(prompt(0, size))
    engine.clear()
    return engine


@cache
def changing_engine(model: str) -> Engine:
    """An engine on plain weights of some file of that model; `take` replaces them: all formats share its graphs."""
    path = next(path for kind in FORMATS[model] if (path := found(f"{model}-{kind}.gguf")))
    return load(path, Recipe(weights="float", experts="gathered"))


def overwrite(old: object, new: object) -> None:
    """Put the values of one record of weights into the tensors of another of the same shapes: captured steps go on."""
    if isinstance(old, Tensor):
        old.assign(new).realize()
    elif isinstance(old, tuple):
        for mine, theirs in zip(old, new, strict=True):
            overwrite(mine, theirs)
    elif is_dataclass(old):
        for field in fields(old):
            overwrite(getattr(old, field.name), getattr(new, field.name))


def take(engine: Engine, path: Path) -> Engine:
    """Put the weights of another file of the same shapes into an engine, and clear it."""
    weights, config = read(path)
    assert replace(config, name="") == replace(engine.config, name=""), f"{path.name} is of another shape: {config}"
    overwrite(engine.weights, weights)
    engine.clear()
    return engine


def short_engine(engine: Engine, **recipe) -> Engine:
    """A new engine on two layers of another, a delta net and an attention: the same kernels, fewer of them."""
    first = engine.config.recurrent.index(False) - 1
    config = replace(engine.config, layers=2, recurrent=engine.config.recurrent[first:first + 2])
    weights = replace(engine.weights, layers=engine.weights.layers[first:first + 2])
    return Engine(weights, config, replace(engine.recipe, **recipe), context=CONTEXT, batches=BATCHES)


def prompt(seed: int, length: int, vocab: int = 512) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest |difference|; infinite where shapes differ or a value is not a number."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got.astype(np.float64) - want).max())
