"""What data/ holds: the shipped model, its card, and the rules by which it was judged."""
import ast
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from minillama.config import ModelConfig, check_tensors
from minillama.export import model_config, tensor_shapes
from minillama.gguf import GGUF
from minillama.kernels import overlap
from minillama.quantize import choose_formats, quantize
from minillama.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))
import card  # noqa: E402
import completions  # noqa: E402
import kernel_profile  # noqa: E402
import quality  # noqa: E402
import timeline  # noqa: E402

REFERENCE = Path(os.environ.get("MINILLAMA_REFERENCE", Path(__file__).parent / "reference"))
CONVERTED = REFERENCE / "ref-a-F32.gguf"
OURS_TOO = {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token"}     # Qwen's own files have them
host = pytest.mark.host


# ---- the file ---------------------------------------------------------------------------------------------------


@host
def test_the_shipped_model_is_the_one_that_the_recipe_describes():
    file = GGUF(card.MASTER)
    config = ModelConfig.from_gguf(file)
    check_tensors(file, config)
    assert config == model_config("minillama-coder")
    assert file.metadata["general.name"] == "minillama-coder"
    found = {name: tuple(n for n in info.shape if n > 1) for name, info in file.tensors.items()}
    assert found == tensor_shapes(config)


@host
def test_its_metadata_has_the_keys_and_types_of_llama_cpp_s_converter():
    ours, theirs = GGUF(card.MASTER), GGUF(CONVERTED)
    assert {key: ours.types.get(key) for key in theirs.types} == theirs.types
    assert ours.types.keys() - theirs.types.keys() == OURS_TOO
    same = {"general.architecture", "general.type", "general.quantization_version", "tokenizer.ggml.model",
            "qwen3next.full_attention_interval", "qwen3next.nextn_predict_layers",
            "qwen3next.attention.recurrent_layers", "qwen3next.ssm.conv_kernel"}
    assert {key: ours.metadata[key] for key in same} == {key: theirs.metadata[key] for key in same}


@host
def test_its_vocabulary_is_the_tokenizer_that_lies_beside_it():
    from tokenizers import Tokenizer as Reference
    mine, theirs = Tokenizer.from_gguf(GGUF(card.MASTER)), Reference.from_file(str(DATA / "tokenizer.json"))
    text = (DATA / "quality.py").read_text() + "<|endoftext|>\t\u4f60\u597d \U0001f600\r\n"
    assert mine.encode(text) == theirs.encode(text).ids
    assert mine.decode(mine.encode(text)) == text and mine.eos == theirs.token_to_id("<|endoftext|>")


@host
def test_its_weights_are_neither_broken_nor_idle():
    file = GGUF(card.MASTER)
    for name in file.tensors:
        values = file.values(name)
        spread = values.std()
        assert np.isfinite(values).all() and (values.size < 64 or spread > 1e-3), f"{name}: spread {spread:.2e}"
    for name in (name for name in file.tensors if name.endswith("ffn_down_exps.weight")):
        sizes = np.linalg.norm(file.values(name), axis=(1, 2))
        assert sizes.min() > sizes.max() / 20, f"{name}: an expert has died, norms {sizes}"


@host
@pytest.mark.parametrize("format", ["F16", "Q4_0", "Q4_K_M", "Q6_K"])
def test_other_formats_are_as_small_as_the_card_says(format: str, tmp_path: Path):
    quantize(card.MASTER, tmp_path / "made.gguf", format)
    made = GGUF(tmp_path / "made.gguf")
    assert sum(info.nbytes for info in made.tensors.values()) == card.weight_bytes(format)
    assert {name: info.format for name, info in made.tensors.items()} == choose_formats(
        GGUF(card.MASTER), ModelConfig.from_gguf(made), format)
    down = made.tensors["blk.1.ffn_down_exps.weight"]
    assert down.shape[-1] == 128 and down.format.name == {"Q4_K_M": "Q5_0", "Q6_K": "Q8_0"}.get(format, format)


# ---- the card ---------------------------------------------------------------------------------------------------


@host
@pytest.mark.parametrize("part", card.PARTS)
def test_the_card_says_what_the_files_say(part: str):
    text = card.README.read_text(encoding="utf-8")
    assert card.with_part(text, part, card.PARTS[part]()) == text, f"{part}: run python data/evaluate.py card"


@host
def test_the_log_and_the_settings_are_of_one_run():
    about, log = json.loads(card.ABOUT.read_text()), [json.loads(line) for line in card.LOG.read_text().splitlines()]
    assert about["heldout"] == log[-1]["heldout"] and about["tokens"] == log[-1]["tokens"]
    run = card.row(card.stored("training"), "PyTorch, the run")
    assert run["heldout_bits_per_byte"] == about["heldout"]["bits_per_byte"] and run["steps"] == about["step"]


@host
def test_what_was_promised_is_reached():
    result = card.stored("quality")
    for format in ("F32", "Q8_0"):
        figures = card.row(result, format)
        assert figures["bits_per_byte"] <= 1.0 < card.row(result, "xz -9")["bits_per_byte"], figures
        assert figures["first_draft"] >= 0.65 and figures["second_given_first"] >= 0.5, figures
    assert sum(row.values["counts"] for row in card.stored("completions").rows) >= 60


@host
def test_the_completions_count_as_the_result_file_says():
    done, rows = completions.read_completions(), card.stored("completions").rows
    assert len(done) == len(rows) == completions.COUNT == len({c.prompt for c in done})
    assert [row.values for row in rows] == [c.verdict() for c in done]
    tokenizer = Tokenizer.from_gguf(GGUF(card.MASTER))
    for c in done:
        ast.parse(c.prompt + "    pass\n")
        assert completions.dedent_at(c.body) is None and c.tokens <= completions.LONGEST_BODY, c.name
        assert len(tokenizer.encode(c.prompt)) <= completions.LONGEST_PROMPT, c.name


# ---- the rules ----------------------------------------------------------------------------------------------------


@host
@pytest.mark.parametrize("body, counts", [
    ("    return x\n", True), ("    pass\n", False), ('    "another"\n    pass\n', False), ("    if x:\n", False),
    ("    x = (1,\n", False), ("", False), ("    return x\nprint(x)\n", False), ("    # nothing\n", False),
    ("    ...\n", True),
])
def test_a_body_counts_if_it_parses_and_does_something(body: str, counts: bool):
    assert completions.has_statement('def f(x):\n    """Do."""\n' + body) == counts


@host
def test_a_body_ends_before_the_first_line_that_is_not_indented():
    assert completions.dedent_at("    return x\n\n\ndef g") == len("    return x\n\n\n")
    assert completions.dedent_at("    x = 1\n\n  # odd\n    return x\n") is None


@host
def test_the_unfinished_line_of_a_body_cut_by_its_length_is_left_out():
    long = completions.Completion("f", "def f(x):\n", "    x = 1\n    return (x\n", completions.LONGEST_BODY)
    assert long.lines == "    x = 1\n" and long.verdict() == {"counts": 1.0, "counts_as_cut": 0.0}
    ended = completions.Completion("f", "def f(x):\n", "    x = 1\n    return (x\n", completions.LONGEST_BODY - 1)
    assert ended.verdict() == {"counts": 0.0, "counts_as_cut": 0.0}


@host
def test_the_list_holds_short_functions_with_a_documentation_string_and_a_body():
    tokenizer = Tokenizer.from_gguf(GGUF(card.MASTER))
    text = "import os\n\n\n" + "".join(f'def f{i}(x):\n    """Say {i}."""\n    {body}\n\n\n' for i, body in enumerate(
        ["return x", "pass", "x = 1\n    return [x" + ", x" * 200 + "]", '"more"\n    return 1']))
    text += 'def bare(x):\n    return x\n\n\nclass C:\n    def m(self):\n        """Method."""\n        return 1\n'
    found = completions.candidates([text], tokenizer)
    assert found == [(f"f{i}", f'def f{i}(x):\n    """Say {i}."""\n') for i in (0, 3)]


@host
def test_drafts_are_judged_against_what_the_trunk_says_later():
    ids = np.arange(100, 112)                               # 10 positions
    trunk = ids[1:11].copy()                                # says the text's next token everywhere
    first = ids[2:12].copy()                                # and so does the first draft of the token after
    second = ids[2:12].copy()                               # at p + 1: the second draft of position p, token p + 3
    assert quality.acceptance(np.stack([trunk, first, second]), ids, 0).tolist() == [8, 8, 8, 8, 8, 8]
    first[3] = 0                                            # one first draft is wrong: its second is not asked
    second[7] = 0                                           # and the second draft of position 6
    assert quality.acceptance(np.stack([trunk, first, second]), ids, 0).tolist() == [8, 7, 7, 6, 7, 6]
    trunk[4] = first[3]                                     # the trunk says what the text has not
    assert quality.acceptance(np.stack([trunk, first, second]), ids, 0).tolist() == [8, 8, 8, 6, 7, 5]
    assert quality.acceptance(np.stack([trunk, first, second]), ids, 5).tolist() == [3, 3, 3, 2, 3, 2]


@host
def test_bits_per_byte_is_of_all_windows_together():
    figures = quality.summary(np.array([10.0, 30.0]), np.array([[10, 4], [10, 4]]), np.array([8, 4, 4, 3, 2, 2]))
    assert figures["bits_per_byte"] == 2.0 and figures["bytes"] == 20
    assert math.isclose(figures["standard_error"], math.sqrt(100 + 100) / 20)
    assert (figures["first_draft"], figures["second_given_first"]) == (0.5, 0.75)


@host
@pytest.mark.slow
def test_a_window_reads_as_the_oracle_does():
    golden = np.load(REFERENCE / "ref-a.npz")
    tokens, every = golden["tokens_65"], golden["all_logits_65"].astype(np.float64)[:64]
    nats, said = quality.Reader(CONVERTED, window=64).read(np.append(tokens, 0))
    expected = np.log(np.exp(every).sum(axis=-1)) - every[np.arange(64), tokens[1:]]
    np.testing.assert_allclose(nats, expected, atol=5e-4)
    np.testing.assert_array_equal(said[0], every.argmax(-1))
    drafts = {n - 2: int(golden[f"mtp_logits_{n}"].argmax()) for n in (2, 5, 63, 64, 65)}
    assert {place: int(said[1][place]) for place in drafts} == drafts


@host
def test_a_profile_is_read_kernel_by_kernel_behind_whatever_stands_before_its_table(tmp_path):
    stalls = [f"{kernel_profile.STALL}{why}{kernel_profile.ENDS}" for why in ("long_scoreboard", "wait")]
    names = ["ID", "Kernel Name", kernel_profile.TIME, *kernel_profile.VALUES.values(), *stalls]
    lines = ["==PROF== Connected to process 1", names, [""] * len(names), [0, "a", "1,952", 16, 2, 32, 3, 1],
             [1, "b", 500, 8, 1, "1,024", 0, 0], [2, "a", 2048, 16, 2, 32, 1, 3]]
    text = "\n".join(line if isinstance(line, str) else ",".join(f'"{cell}"' for cell in line) for line in lines)
    (tmp_path / "profile.csv").write_text(text)
    a, b = kernel_profile.rows_of(tmp_path / "profile.csv", "now")
    assert (a.name, a.samples_ns, a.values["registers"]) == ("now: a", [1952, 2048], 16)
    assert a.values["waits_for_memory"] == 0.5
    assert (b.name, b.samples_ns, b.values["threads"], b.values["waits_for_memory"]) == ("now: b", [500], 1024, 0)


def test_a_kernel_notes_its_times_where_it_enters_is_released_and_ends():
    source = 'extern "C" __global__ void k(float* a) {\n  int b = 1;\n' + overlap.WAIT + "\n  a[0] = b;\n}"
    made = timeline.marked(source, [16, 24, 32, 40])
    assert made.index("0x10ULL") < made.index("int b") < made.index(overlap.WAIT) < made.index("0x18ULL")
    assert made.index("0x20ULL") < made.index("a[0] = b") < made.index("0x28ULL") and made.endswith("\n}")
    assert (made.count("atomicMin"), made.count("atomicMax")) == (2, 2)


def test_times_in_the_chain_count_from_the_end_of_the_kernel_before():
    times = np.array([[[0, 0, 0, 100], [90, 110, 120, 150], [140, 160, 170, 260]]] * 3)      # tokens, kernels, marks
    rows = timeline.rows_of("now", ["a", "b", "b"], times)
    assert [(row.name, row.samples_ns) for row in rows] == [("now: b", [50, 110])]
    assert rows[0].values == {"enter": -10, "release": 10, "last_release": 20, "end": 80}
