"""Render every kernel of some steps as source for a GPU that is not here: run as a program, for test_render.py.

    python render.py CUDA|METAL RECIPE TOKENS SHAPE

The NULL device builds and renders as the real one would. Prints a JSON list of sources on its last line.
"""
import json
import os
import sys

os.environ |= {"DEV": "NULL", "CACHELEVEL": "0"}
BACKEND, RECIPE, TOKENS, SHAPE = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
sources: list[str] = []


def main() -> None:
    from tinygrad import Tensor, dtypes

    from minillama.engine import Engine
    from minillama.kernels.rendering import Keeper, acting_as
    from minillama.ladder import read_recipe
    from minillama.shapes import RandomWeights, shape_config, unfilled

    class Collector(Keeper):
        def compile(self, src: str) -> bytes:
            sources.append(src)
            return super().compile(src)
    recipe, config = read_recipe(RECIPE), shape_config(SHAPE, 4)
    packed = recipe.weights == "packed"
    with acting_as(BACKEND) as renderer:
        renderer.compiler = Collector()
        weights = RandomWeights(config, "Q4_0" if packed else "F32", recipe.projections == "fused", packed,
                                unfilled()).model()
        engine = Engine(weights, config, recipe, context=256, batches=(TOKENS,))
        engine.step("logits", Tensor.empty(TOKENS, dtype=dtypes.int32).realize(), 3, TOKENS)
    print(json.dumps(sources))


if __name__ == "__main__":
    main()
