"""Counting without a device: multiplied counts are those of the whole model, and nothing is lost between parts."""
import argparse
import json
import os
import re
import sys
from dataclasses import replace

import pytest
from processes import processor_time
from tinygrad import Context, Tensor, dtypes

from minillama import count, measure_commands
from minillama.config import expected_tensors
from minillama.engine import Engine
from minillama.measure import Counts, counts_of
from minillama.recipe import Recipe
from minillama.roofline import Roofline
from minillama.shapes import RandomWeights, parameters, shape_config, unfilled
from minillama.state import State

pytestmark = pytest.mark.host

DEPTH = 5
ROOF = Roofline("given", bandwidth=1e12, speed=1e14, half_speed=0.0, launch=1e-6, eager=0.0)
MINUTES, GIBIBYTES = 3, 4       # what counting the 80B model may take


def unrolled(config, recipe: Recipe, format: str, tokens: int, depth: int) -> Counts:
    """One step of all layers, captured as the engine does."""
    with Context(DEV="NULL", JIT=2):
        weights = RandomWeights(config, format, recipe.projections == "fused", recipe.weights == "packed",
                                unfilled()).model()
        engine = Engine(weights, config, recipe, context=depth + tokens, batches=(tokens,))
        engine.step("logits", Tensor.empty(tokens, dtype=dtypes.int32).realize(), depth, tokens)
        return counts_of(engine.steps["logits", tokens], values={"start": depth, "valid": tokens})


@pytest.fixture(scope="module")
def groups():
    return count.count_step(shape_config("tiny", 8, mtp=True), Recipe(), "F32", 1, DEPTH)


def test_one_layer_of_each_kind_multiplied_is_exactly_eight_layers_unrolled(groups):
    whole = unrolled(shape_config("tiny", 8), Recipe(), "F32", 1, DEPTH)
    assert [(group.name, group.times) for group in groups] == [
        ("Gated DeltaNet", 6), ("gated attention", 2), ("embedding and head", 1), ("MTP block", 1)]
    assert count.total(groups[:-1]) == whole and whole.kernels > 100, whole


@pytest.mark.slow
def test_a_batch_multiplied_is_exactly_the_batch_unrolled_with_another_recipe_too():
    recipe = Recipe("chunked", "dense", logits="all", projections="separate", weights="float")
    config = shape_config("tiny", 8)
    assert count.total(count.count_step(config, recipe, "F16", 2)) == unrolled(config, recipe, "F16", 2, 0)


@pytest.mark.slow
def test_the_kernels_of_a_gpu_that_is_not_here_are_counted(groups):
    """Its threads share memory: a step of the delta rule is one kernel, and attention takes four where a CPU takes
    seven. What is counted afterwards is a CPU's again."""
    config = replace(shape_config("tiny", 8, mtp=True), head_dim=64, state_dim=64)
    there, here = (count.count_step(config, Recipe(), "F32", 1, DEPTH, backend) for backend in ("CUDA", ""))
    parts = [{part.name: part.counts.kernels for part in group.parts} for group in (*there[:2], *here[:2])]
    assert [found.get("delta rule", found.get("attention")) for found in parts] == [1, 4, 3, 7]
    assert count.count_step(shape_config("tiny", 8, mtp=True), Recipe(), "F32", 1, DEPTH) == groups


def test_every_part_has_kernels_and_moves_its_weights(groups):
    missing = [(group.name, part.name) for group in groups for part in group.parts if not part.calls]
    assert not missing
    for group in groups[:2]:
        parts = {part.name: part for part in group.parts}
        assert {"norm", "projections", "output projection", "router", "shared expert", "experts"} < set(parts), parts
        for name in ("projections", "output projection", "experts"):
            counted, ideal = parts[name].counts, parts[name]
            assert ideal.ideal_bytes <= counted.bytes < 2 * ideal.ideal_bytes, (group.name, name, counted.bytes)
            assert ideal.ideal_ops <= counted.ops < 3 * ideal.ideal_ops, (group.name, name, counted.ops)


def test_products_with_unpacked_weights_belong_to_the_weights_part():
    """A batch unpacks each matrix once and multiplies by the copy, in the part whose weight it is."""
    groups = count.count_step(shape_config("tiny"), Recipe(), "Q8_0", 64)
    for group in groups[:2]:
        parts = {part.name: part for part in group.parts}
        for name in ("projections", "output projection", "shared expert"):
            assert parts[name].counts.ops >= parts[name].ideal_ops, (group.name, name)


def test_ideal_bytes_are_active_weights_states_a_row_of_the_embedding_and_the_logits(groups):
    config = shape_config("tiny", 8)
    idle = sum(4 * shape[0] * shape[1] * shape[2] * (1 - config.experts_used / config.experts)
               for name, shape in expected_tensors(config, ()).items() if "_exps" in name)
    embedding = 4 * config.vocab * config.hidden
    attention = config.recurrent.count(False)
    rows = 2 * 4 * config.kv_heads * config.head_dim * attention        # bytes of one position in all caches
    inputs = 4 * config.conv_channels * config.recurrent.count(True)    # of one position of all convolutions
    states = 2 * (State.zeros(config, 1).nbytes() - rows) - 2 * inputs + rows * (DEPTH + 1)    # 3 are read, 1 written
    expected = 4 * parameters(config) - idle - embedding + 4 * config.hidden + states + 4 * config.vocab
    assert count.ideal(groups[:-1])[0] == expected


def test_a_roofline_takes_each_kernel_in_turn(groups):
    least = sum(group.times * (max(call.bytes / 1e12, call.ops / 1e14) + 1e-6)
                for group in groups for part in group.parts for call in part.calls)
    assert count.seconds(groups, ROOF) == pytest.approx(least)
    assert count.roof_for(3000, 400)[0].reachable(1e9) == 400e12 and count.roof_for(3000, 400)[1] == "as given"


def test_a_step_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="^4097 tokens do not fit into the model's context of 4096$"):
        count.count_step(shape_config("tiny"), Recipe(), "F16", 1, 4096)


def test_the_command_prints_a_table_or_json_of_the_same_counts(capsys, monkeypatch, groups):
    monkeypatch.setattr(count, "count_step", lambda *arguments: groups)
    parser = argparse.ArgumentParser()
    measure_commands.add_parsers(parser.add_subparsers())
    for output in ("table", "json"):
        args = parser.parse_args(["count", "--shape", "tiny", "--bandwidth", "1", "-p", "0", "-o", output])
        args.run(args)
    text = capsys.readouterr().out
    table, _, data = text.partition("\n{\n")
    record = json.loads("{" + data)
    step, whole = record["steps"][0], count.total(groups)
    assert re.search(rf"^ *total +{whole.kernels} +{whole.copies} ", table, re.M), table
    assert {name: step["total"][name] for name in ("kernels", "bytes", "ops", "copies")} == vars(whole)
    assert whole.bytes == sum(group["times"] * part["bytes"]
                              for group in step["groups"] for part in group["parts"].values())
    assert record["roofline"]["bandwidth"] == 1e9 and step["total"]["seconds"] >= whole.bytes / 1e9


@pytest.mark.slow
def test_the_80b_is_counted_in_three_minutes_and_four_gibibytes():
    code = ("import resource, sys; from minillama.cli import main; status = main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)")
    command = [sys.executable, "-c", code, "count", "--shape", "qwen3-next-80b-a3b", "-o", "json"]
    done, seconds = processor_time(command, os.environ | {"DEV": "NOSUCH"})
    assert done.returncode == 0, done.stderr
    kibibytes, steps = int(done.stderr.split()[-1]), json.loads(done.stdout)["steps"]
    assert seconds < 60 * MINUTES and kibibytes < GIBIBYTES * 2 ** 20, (seconds, kibibytes)
    assert [step["tokens"] for step in steps] == [1, 512]
    for step in steps:
        assert [group["times"] for group in step["groups"]] == [36, 12, 1]
        assert step["total"]["bytes"] > step["total"]["ideal_bytes"] > 2e9, step["total"]


@pytest.mark.host
@pytest.mark.slow
def test_for_a_prompt_the_mtp_block_costs_what_its_recipe_runs():
    """A batch of the 80B: `logits` sends 311 MB to the host, `hidden` runs the block in full, `kv` next to nothing."""
    config, found = shape_config("qwen3-next-80b-a3b", mtp=True), {}
    for recipe in ("hidden", "kv"):
        groups = count.count_step(config, Recipe(mtp_prefill=recipe), "Q4_0", 512)
        block = next(group for group in groups if group.name == "MTP block")
        found[recipe] = block.counts
        assert count.to_host(config, Recipe(mtp_prefill=recipe), 512) == 4
        if recipe == "kv":
            assert block.counts.ops <= 0.005 * count.ideal(groups)[1]
    assert 2 * found["kv"].kernels < found["hidden"].kernels and 8 * found["kv"].ops < found["hidden"].ops
    assert count.to_host(config, Recipe(mtp_prefill="logits"), 512) == 512 * 151_936 * 4
