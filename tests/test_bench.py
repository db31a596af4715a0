"""The bench: llama-bench's names, procedure and columns."""
import argparse
import csv
import io
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from minillama import bench, measure_commands, results
from minillama.bench import Bench, Measured, Subject, Trial, batches_for, trials
from minillama.recipe import Recipe
from minillama.results import ClockTimes, Model, read_result

MODEL = Path(__file__).parent / "reference" / "ref-a-F32.gguf"
SUBJECT = Subject("a.gguf", Model("a", "F16", 8), 3 * 2**29, 80_000_000)
SAMPLES = [1_000_000_000, 2_000_000_000, 4_000_000_000]
PROMPT = Measured(Trial(512, 0), 512, Recipe(), SAMPLES, ClockTimes(1, 2, 3))
BOTH = Measured(Trial(64, 16, 4096), 512, Recipe(), SAMPLES[:1], ClockTimes(0, 0, 3))
# what tools that read llama-bench's output look for
FIELDS = ("build_commit cpu_info gpu_info backends model_filename model_type model_size model_n_params n_batch "
          "n_ubatch type_k type_v n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts").split()


def text_of(output: str, subject: Subject = SUBJECT, measured=(PROMPT, BOTH)) -> str:
    return "".join(bench.OUTPUTS[output](subject, iter(measured)))


# ---- names and columns --------------------------------------------------------------------------------------------


@pytest.mark.host
def test_tests_have_llama_benchs_names_and_order():
    names = [test.name for test in trials([512, 0], [128], [(512, 128)], [0, 4096])]
    assert names == ["pp512", "tg128", "pp512+tg128", "pp512 @ d4096", "tg128 @ d4096", "pp512+tg128 @ d4096"]


@pytest.mark.host
def test_batches_go_up_to_the_one_asked_for_and_chunks_divide_them():
    assert batches_for(512) == (512, 64, 8, 1) and batches_for(16) == (16, 8, 1) and batches_for(1) == (1,)
    assert batches_for(2048)[:2] == (2048, 512)
    for bad in (12, 100):
        with pytest.raises(ValueError, match=f"-ub {bad}: a batch is 1, 2, 4"):
            batches_for(bad)


@pytest.mark.host
def test_json_has_the_fields_of_llama_bench_and_right_statistics():
    first, second = json.loads(text_of("json"))
    assert [json.loads(line) for line in text_of("jsonl").splitlines()] == [first, second]
    assert [name for name in FIELDS if name not in first] == []
    speeds = [512.0, 256.0, 128.0]
    assert first["samples_ns"] == SAMPLES and first["samples_ts"] == speeds
    assert (first["avg_ns"], first["stddev_ns"]) == (round(statistics.mean(SAMPLES)), round(statistics.stdev(SAMPLES)))
    assert (first["avg_ts"], first["stddev_ts"]) == (statistics.mean(speeds), statistics.stdev(speeds))
    assert (second["n_prompt"], second["n_gen"], second["n_depth"]) == (64, 16, 4096)
    assert (second["avg_ts"], second["stddev_ts"]) == (80.0, 0.0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["test_time"])


@pytest.mark.host
def test_csv_quotes_every_value_under_the_same_names():
    rows = list(csv.DictReader(io.StringIO(text_of("csv"))))
    assert [row["n_prompt"] for row in rows] == ["512", "64"] and list(rows[0])[:len(FIELDS)] == FIELDS
    assert all(line.startswith('"') and line.endswith('"') for line in text_of("csv").splitlines()[1:])


@pytest.mark.host
def test_markdown_is_llama_benchs_table():
    header, rule, first, second, _, build = text_of("md").splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", "size", "params", "backend", "test",
                                                                        "t/s"]
    assert re.fullmatch(r"\|( -+[-:] \|){6}", rule) and build.startswith("build: ")
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:3] == ["a F16", "1.50 GiB", "80.00 M"] and cells[4:] == ["pp512", "298.67 ± 195.52"]
    assert "pp64+tg16 @ d4096" in second and len({len(line) for line in (header, rule, first)}) == 1
    other = Measured(Trial(8, 0), 64, Recipe(logits="all"), SAMPLES, ClockTimes(0, 0, 0))
    wide = text_of("md", Subject("", SUBJECT.model, 1, 1, (64,)), [other]).splitlines()
    assert "n_ubatch" in wide[0] and "logits=all" in wide[2], wide


@pytest.mark.host
@pytest.mark.parametrize("arguments, problem", [
    (["--shape", "tiny", "-m", "x"], "not allowed with"),
    ([], "one of the arguments -m/--model --shape is required"),
    (["--shape", "tiny", "-p", "8,x"], "'8,x' is not integers between commas, from 0 up"),
    (["--shape", "tiny", "-pg", "8"], "'8' is not 2 integers between commas, from 0 up"),
    (["--shape", "tiny", "-r", "0"], "'0' is not an integer, from 1 up")])
def test_impossible_options_are_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit):
        parsed("bench", *arguments)
    assert problem in capsys.readouterr().err


# ---- procedure ----------------------------------------------------------------------------------------------------


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    measure_commands.add_parsers(parser.add_subparsers())
    return parser.parse_args(list(map(str, arguments)))


def test_a_file_is_measured_reported_and_saved(capsys, monkeypatch, tmp_path):
    """One batch size, so that there is one graph to build."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    made = []
    monkeypatch.setattr(bench, "Bench", lambda engine, accept: made.append(Bench(engine, accept)) or made[0])
    args = parsed("bench", "-m", MODEL, "-p", 3, "-n", 2, "-pg", "1,2", "-d", "0,4", "-r", 2, "-ub", 1, "-o", "jsonl",
                  "--save")
    args.run(args)
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    names = ["pp3", "tg2", "pp1+tg2", "pp3 @ d4", "tg2 @ d4", "pp1+tg2 @ d4"]
    saved = read_result(next((tmp_path / "local").glob("bench-*.json")))
    assert [row.name for row in saved.rows] == names and len(records) == len(names)
    assert all(row.samples_ns == record["samples_ns"] and len(row.samples_ns) == 2 and row.tokens
               == record["n_prompt"] + record["n_gen"] for row, record in zip(saved.rows, records, strict=True))
    assert records[0]["model_type"] == "Ref A Hf F32" and records[0]["model_filename"] == str(MODEL)
    assert saved.rows[0].clocks.build > 0 and saved.rows[1].clocks.build == 0, "only the first test captures"
    assert re.search(r"^pp3: set up before the first sample: building [\d.]+ s", err, re.M), err
    depths_are_restored(made[0])


def depths_are_restored(runner: Bench) -> None:
    """The kept state is the one that was computed, and a repetition leaves no trace in the next."""
    runner.go_to(4)
    first = runner.engine.logits([7])
    runner.generate(2)
    assert runner.engine.position == 7
    runner.go_to(4)
    again = runner.engine.logits([7])
    assert runner.engine.position == 5 and np.array_equal(first, again), np.abs(first - again).max()
    runner.go_to(0)
    assert runner.engine.position == 0 and not np.allclose(first, runner.engine.logits([7]))


def test_a_text_that_does_not_fit_is_refused_before_anything_runs():
    from minillama.shapes import shape_config
    config = shape_config("tiny")
    with pytest.raises(ValueError, match="^4097 tokens do not fit into the model's context of 4096$"):
        list(bench.measure(None, config, Recipe(), [Trial(0, 1, 4096)], (512,), 1))
