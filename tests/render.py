"""Render every kernel of some steps as source for a GPU that is not here: run as a program, for test_render.py.

    python render.py CUDA|METAL RECIPE TOKENS SHAPE

The NULL device builds and renders as the real one would; a stand-in takes the place of the compiler and keeps what it
is given. Prints a JSON list of sources on its last line.
"""
import json
import os
import sys
import types

BACKEND, RECIPE, TOKENS, SHAPE = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
TARGET = {"CUDA": "NULL:CUDA:sm_90", "METAL": "NULL:METAL:Apple9"}[BACKEND]
os.environ |= {"DEV": TARGET, "CACHELEVEL": "0", "PARALLEL": "0"}
sources: list[str] = []


def stand_in(module: str, *names: str) -> None:
    """A module whose compilers keep the source."""
    from minillama.kernels.rendering import Keeper

    class Collector(Keeper):
        def compile(self, src: str) -> bytes:
            sources.append(src)
            return super().compile(src)
    made = types.ModuleType(module)
    for name in names:
        setattr(made, name, Collector)
    sys.modules[module] = made


def main() -> None:
    stand_in("tinygrad.runtime.support.compiler_cuda", "NVRTCCompiler", "NVCCCompiler", "PTXCompiler")
    stand_in("tinygrad.runtime.ops_metal", "MetalCompiler")
    from tinygrad import Tensor, dtypes

    from minillama.engine import Engine
    from minillama.kernels import tuning
    from minillama.ladder import read_recipe
    from minillama.shapes import RandomWeights, shape_config, unfilled
    tuning.backend = lambda device: BACKEND
    recipe, config = read_recipe(RECIPE), shape_config(SHAPE, 4)
    packed = recipe.weights == "packed"
    weights = RandomWeights(config, "Q4_0" if packed else "F32", recipe.projections == "fused", packed,
                            unfilled()).model()
    engine = Engine(weights, config, recipe, context=256, batches=(TOKENS,))
    engine.step("logits", Tensor.empty(TOKENS, dtype=dtypes.int32).realize(), 3, TOKENS)
    print(json.dumps(sources))


if __name__ == "__main__":
    main()
