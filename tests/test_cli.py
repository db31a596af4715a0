"""The command line: what it prints, what it writes, and that bad input ends in one line and status 2."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import CONTEXT, vocabulary, write_tiny_model

from minillama import commands, describe
from minillama.cli import main
from minillama.config import ModelConfig
from minillama.gguf import GGUF
from minillama.tokenizer import Tokenizer


class Ran:
    """One command, run here: its exit status and what it printed."""

    def __init__(self, capsys, *arguments):
        capsys.readouterr()
        try:
            self.status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            self.status = stop.code
        self.out, self.err = capsys.readouterr()

    def refused(self, *words: str) -> None:
        """The bad end that the contract asks for, in words that say what was wrong."""
        assert self.status == 2 and not self.out, f"status {self.status}, stdout {self.out!r}, stderr {self.err!r}"
        assert re.fullmatch(r"minillama[^\n]+\n", self.err), f"not one line: {self.err!r}"
        assert all(word in self.err for word in words), f"{words} not in {self.err!r}"


@pytest.fixture
def run(capsys):
    return lambda *arguments: Ran(capsys, *arguments)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_model(path)
    return path


# ---- commands that need no device -------------------------------------------------------------------------------


@pytest.mark.host
def test_tokenize_prints_ids_and_leaves_a_file_s_line_ends_alone(run, tiny: Path, tmp_path: Path):
    ids = Tokenizer.from_gguf(GGUF(tiny)).encode("the thing\r\nis<|im_end|> é")
    (tmp_path / "text").write_bytes("the thing\r\nis<|im_end|> é".encode())
    for arguments in (("-p", "the thing\r\nis<|im_end|> é"), ("-f", tmp_path / "text")):
        ran = run("tokenize", tiny, *arguments)
        assert (ran.status, ran.out, ran.err) == (0, " ".join(map(str, ids)) + "\n", "")


@pytest.mark.host
def test_a_file_with_a_vocabulary_and_no_weights_can_be_tokenized_and_inspected_only(run, tmp_path: Path):
    write_tiny_model(tmp_path / "words.gguf", layers=0, mtp=False, drop=[
        "output.weight", "output_norm.weight", "token_embd.weight", "qwen3next.attention.recurrent_layers"])
    assert run("tokenize", tmp_path / "words.gguf", "-p", "the").out.split() == [str(vocabulary().index("the"))]
    ran = run("inspect", tmp_path / "words.gguf")
    assert ran.status == 0 and "without weights" in ran.out
    run("generate", tmp_path / "words.gguf", "-p", "the").refused("words.gguf", "without weights")


@pytest.mark.host
def test_inspect_shows_metadata_tensors_formats_parameters_and_memory(run, tmp_path: Path):
    write_tiny_model(tmp_path / "tiny.gguf", format="Q8_0", metadata_overrides={"general.name": "a [b]name\x1b[2J"})
    ran = run("inspect", tmp_path / "tiny.gguf", "-c", 100)
    assert (ran.status, ran.err) == (0, "")
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert "general.name a [b]name\\x1b[2J" in lines and "\x1b" not in ran.out
    file = GGUF(tmp_path / "tiny.gguf")
    assert f"blk.0.ffn_up_exps.weight Q8_0 4 × 32 × 64 {file.tensors['blk.0.ffn_up_exps.weight'].nbytes:,}" in lines
    total = sum(file.values(name).size for name in file.tensors)
    assert any(line.startswith(f"all {total:,} ") for line in lines), f"not {total:,} parameters"
    assert any(line.startswith("Q8_0 ") and line.endswith(" 8.5") for line in lines)
    assert any(re.fullmatch(r"100( [\d.]+ [kM]B){3}", line) for line in lines), lines[-6:]


@pytest.mark.host
def test_active_parameters_are_the_chosen_experts_one_embedding_row_and_no_mtp_block(tiny: Path):
    file = GGUF(tiny)
    config = ModelConfig.from_gguf(file)
    parts = describe.parameters(file, config)
    assert parts["experts"] == (4 * 3 * 4 * 32 * 64, 4 * 3 * 2 * 32 * 64)
    assert parts["embedding"] == (len(vocabulary()) * 64, 64)
    assert parts["head"][0] == parts["head"][1] == len(vocabulary()) * 64
    assert parts["MTP block"][1] == 0 < parts["MTP block"][0]


@pytest.mark.host
def test_a_tied_head_is_read_whole(tmp_path: Path):
    write_tiny_model(tmp_path / "tied.gguf", drop=["output.weight"])
    file = GGUF(tmp_path / "tied.gguf")
    parts = describe.parameters(file, ModelConfig.from_gguf(file))
    assert parts["embedding"][0] == parts["embedding"][1] and "head" not in parts


@pytest.mark.host
def test_quantize_writes_the_format_and_shows_its_progress(run, tiny: Path, tmp_path: Path):
    ran = run("quantize", tiny, tmp_path / "out.gguf", "q8_0")
    assert (ran.status, ran.out) == (0, "") and "100%" in ran.err
    assert GGUF(tmp_path / "out.gguf").tensors["token_embd.weight"].format.name == "Q8_0"


@pytest.mark.host
def test_devices_calls_the_devices_table(run, monkeypatch):
    from minillama import devices
    monkeypatch.setattr(devices, "print_devices", lambda: print("table") or [devices.Found("CPU", roofline={})])
    ran = run("devices")
    assert (ran.status, ran.out) == (0, "table\n")


@pytest.mark.host
def test_commands_that_need_no_device_do_not_import_tinygrad(tiny: Path, tmp_path: Path):
    script = "import sys; from minillama.cli import main; main(sys.argv[1:]); print('tinygrad' in sys.modules)"
    for arguments in (("tokenize", tiny, "-p", "x"), ("inspect", tiny), ("quantize", tiny, tmp_path / "q", "Q8_0")):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.stdout.endswith("False\n"), f"{arguments[0]}: {done.stdout[-50:]!r} {done.stderr}"


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, tiny: Path) -> Path:
    """A folder of things that cannot be used."""
    good = tiny.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(good[:-1000])
    (tmp_path / "magic.gguf").write_bytes(b"GGML" + good[4:])
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    write_tiny_model(tmp_path / "arch.gguf", metadata_overrides={"general.architecture": "llama9"})
    write_tiny_model(tmp_path / "template.gguf", metadata_overrides={"tokenizer.chat_template": "{% for %}"})
    write_tiny_model(tmp_path / "plain.gguf", mtp=False)
    return tmp_path


BAD = {
    "generate {}/none.gguf -p x": ("none.gguf", "No such file"),
    "generate {} -p x": ("directory",),
    "inspect {}/cut.gguf": ("cut.gguf", "truncated"),
    "tokenize {}/magic.gguf -p x": ("magic.gguf", "not a GGUF file"),
    "logits {}/empty.gguf --tokens 1 -o o.npy": ("empty.gguf", "empty"),
    "generate {}/arch.gguf -p x": ("unknown architecture", "llama9"),
    "chat {}/template.gguf": ("template",),
    "generate TINY -p ": ("prompt is empty",),
    "generate TINY -p x -c 513": ("513", str(CONTEXT)),
    "generate TINY -p xxxxxxxxx -c 8": ("9 tokens", "context of 8", "--context"),
    "generate TINY -p x -n 0": ("-n/--count", "'0'"),
    "generate TINY -p x --recipe speed=high": ("recipe", "speed", "delta"),
    "generate TINY -p x --recipe delta=wrong": ("recipe", "chunked", "wrong"),
    "generate TINY -p x --temp -1": ("temperature",),
    "generate TINY -p x --top-p 0": ("top-p",),
    "generate TINY -p x --seed -1": ("--seed",),
    "logits TINY --tokens 1,x -o {}/o.npy": ("'1,x'", "token ids"),
    "logits TINY --tokens 1,266 -o {}/o.npy": ("266", "vocabulary"),
    "logits TINY --tokens 1,-1 -o {}/o.npy": ("-1", "vocabulary"),
    "logits TINY --tokens 1 -o {}/none/o.npy": ("none/o.npy", "No such file"),
    "logits {}/plain.gguf --tokens 1,2 -o {}/o.npy --mtp": ("no multi-token-prediction",),
    "perplexity TINY -f {}/none.txt": ("none.txt", "No such file"),
    "perplexity TINY -f {}/latin.txt": ("latin.txt", "not a UTF-8"),
    "perplexity TINY -f {}/empty.txt": ("empty.txt", "two tokens"),
    "tokenize TINY -f {}": ("directory",),
    "tokenize TINY": ("-p/--prompt",),
    "ladder -o {}/none/x.json": ("none/x.json", "No such file"),
    "ladder --shape tiny": ("--shape", "--copies"),
    "ladder --copies --layers 4": ("--layers", "--shape"),
    "ladder --copies --shape huge": ("'huge'", "tiny"),
    "ladder --copies --shape tiny --format Q3_X": ("Q3_X", "Q4_K_M"),
    "logits TINY --tokens 1 -o ": ("''", "No such file"),
    "quantize TINY {}/q.gguf Q3_X": ("Q3_X", "Q4_K_M"),
    "quantize TINY {}/none/q.gguf Q8_0": ("none/q.gguf", "No such file"),
    "quantize TINY {} Q8_0": ("directory",),
    "dance": ("'dance'", "generate"),
    "generate TINY -p x --draught 3": ("--draught",),
    "": ("COMMAND",),
}


@pytest.mark.host
@pytest.mark.parametrize("line", BAD)
def test_bad_input_ends_in_one_line(run, tiny: Path, files: Path, line: str):
    before = sorted(files.iterdir())
    arguments = [part.replace("{}", str(files)).replace("TINY", str(tiny)) for part in line.split(" ") if line]
    run(*arguments).refused(*BAD[line])
    assert sorted(files.iterdir()) == before, "a file was left behind"


@pytest.mark.host
def test_inspect_plans_no_context_that_the_model_was_not_made_for(run, tiny: Path):
    ran = run("inspect", tiny, "-c", "513")
    assert ran.status == 2 and "blk.0.ssm_a" in ran.out and "513" in ran.err and ran.err.count("\n") == 1, ran.err


@pytest.mark.host
def test_inspect_shows_what_it_can_of_a_model_that_the_engine_refuses(run, files: Path):
    ran = run("inspect", files / "arch.gguf")
    assert ran.status == 2 and "llama9" in ran.out and "blk.0.ssm_a" in ran.out
    assert re.fullmatch(r"minillama: [^\n]*unknown architecture[^\n]*\n", ran.err), ran.err


@pytest.mark.host
@pytest.mark.parametrize("device, words", [
    ("METAL" if sys.platform != "darwin" else "CUDA", ("needs a",)), ("NOPE", ("devices are", "CPU")),
    ("CPU:NOPE", ("NOPE", "CPU")), ("A:B:C:D", ("too many",)), ("NULL", ("devices are",))])
def test_a_device_that_is_not_there_is_named_with_what_to_do(tiny: Path, device: str, words: tuple[str, ...]):
    done = subprocess.run([sys.executable, "-m", "minillama", "generate", tiny, "-p", "x"], capture_output=True,
                          text=True, env=os.environ | {"DEV": device})
    assert (done.returncode, done.stdout) == (2, ""), done
    assert re.fullmatch(rf"minillama: DEV={device} does not work here[^\n]+\n", done.stderr), done.stderr
    assert all(word in done.stderr for word in words), f"{words} not in {done.stderr}"


@pytest.mark.host
def test_a_reader_who_has_seen_enough_ends_it_quietly(tiny: Path):
    for command in ("inspect {}", "tokenize {} -p " + "x" * 100_000):
        process = subprocess.Popen([sys.executable, "-m", "minillama", *command.format(tiny).split()], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert (process.wait(), process.stderr.read()) == (1, ""), command
        process.stderr.close()


@pytest.mark.host
def test_ctrl_c_ends_quietly_with_130(run, tiny: Path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(commands, "GGUF", interrupted)
    ran = run("inspect", tiny)
    assert (ran.status, ran.out, ran.err) == (130, "", "")
