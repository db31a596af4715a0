"""Training on this machine: the smoke run from the command line, what it writes, and how it goes on."""
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from minillama import train
from minillama.cli import main
from minillama.config import ModelConfig, check_tensors
from minillama.gguf import GGUF
from minillama.parameters import as_weights
from minillama.tokenizer import Tokenizer
from minillama.train import Trainer, Training, batches
from minillama.train_command import TOKENIZER, own_source
from minillama.weights import load_weights

pytestmark = pytest.mark.timeout(1200)      # the smoke run is built in the first slow test: long on a busy machine


class Kept(Trainer):
    """A trainer that remembers itself and keeps all its checkpoints."""
    last: "Kept"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        Kept.last = self

    def save(self, path: Path) -> None:
        super().save(path)
        shutil.copy(path, path.with_name(f"at-{self.done}"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of one smoke run: the step is built once for all tests of this file."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", Kept)
        began = time.monotonic()
        assert main(["train", "--smoke", "-o", str(folder)]) == 0
        (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder


def tensors_of(record) -> list:
    from dataclasses import fields, is_dataclass
    if not is_dataclass(record):
        return [tensor for part in record for tensor in tensors_of(part)] if isinstance(record, tuple) else [record]
    return [tensor for field in fields(record) for tensor in tensors_of(getattr(record, field.name))]


@pytest.mark.slow
@pytest.mark.host
def test_fifty_steps_on_this_cpu_lower_every_loss(smoke: Path):
    log = [json.loads(line) for line in (smoke / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [10, 20, 30, 40, 50]
    first, last = log[0]["losses"], log[-1]["losses"]
    assert all(late < early - 0.3 for early, late in zip(first[:3], last[:3], strict=True)), f"{first} -> {last}"
    assert (smoke / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.host
def test_the_file_holds_the_very_weights_that_were_trained(smoke: Path):
    file = GGUF(smoke / "model.gguf")
    config = ModelConfig.from_gguf(file)
    check_tensors(file, config)
    assert config == train.smoke_config(4096) and Tokenizer.from_gguf(file).decode([295]) is not None
    trained = tensors_of(as_weights(Kept.last.params, config, train.dtypes.float32))
    for index, (mine, read) in enumerate(zip(trained, tensors_of(load_weights(file, config, fused=True)),
                                             strict=True)):
        np.testing.assert_allclose(read.numpy(), mine.numpy(), rtol=1e-6, err_msg=f"tensor {index}")


@pytest.mark.slow
@pytest.mark.host
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(smoke: Path, tmp_path: Path):
    trainer = Kept.last
    ends = {name: tensor.numpy().copy() for name, tensor in trainer.state().items()}
    trainer.load(smoke / "at-40")
    assert trainer.done == 40
    (tmp_path / "text").write_bytes(own_source())
    trainer.run(batches(train.tokenized(tmp_path / "text", TOKENIZER), trainer.training, 40))
    different = [name for name, tensor in trainer.state().items() if not np.array_equal(tensor.numpy(), ends[name])]
    assert not different, different


@pytest.mark.slow
@pytest.mark.host
def test_a_checkpoint_of_other_settings_is_refused_in_one_line(smoke: Path, capsys):
    (smoke / "text").write_bytes(own_source())
    capsys.readouterr()
    assert main(["train", str(smoke / "text"), "-o", str(smoke)]) == 2
    assert capsys.readouterr().err.strip().endswith("remove it or take another folder")


@pytest.mark.host
def test_bad_input_ends_in_one_line(tmp_path: Path, capsys):
    (tmp_path / "words.json").write_text("{}")
    (tmp_path / "text").write_text("a few words")
    (tmp_path / "text.xz").write_bytes(b"a few words")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "nothing").write_bytes(b"")
    for arguments, words in (([], "needs a TEXT"), ([str(tmp_path / "none")], "No such file"),
                             ([str(tmp_path / "text"), "--tokenizer", str(tmp_path / "words.json")], "tokenizer.json"),
                             ([str(tmp_path / "text"), "--tokenizer", str(tmp_path)], "directory"),
                             ([str(tmp_path / "text"), "--length", "100"], "length of 100"),
                             ([str(tmp_path / "text.xz")], "text.xz: not xz text"),
                             ([str(tmp_path / "latin")], "latin: not UTF-8 text"),
                             ([str(tmp_path / "nothing")], "no text in it")):
        assert main(["train", *arguments, "-o", str(tmp_path / "out")]) == 2
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out, said


@pytest.mark.host
def test_windows_are_shuffled_by_the_seed_and_every_epoch_reads_all_of_them():
    training, tokens = Training(steps=8, batch=2, length=10), np.arange(43)
    seen = list(batches(tokens, training))
    assert all(batch.shape == (10 + train.AHEAD, 2) for batch in seen)
    epochs = [sorted([*seen[i][0], *seen[i + 1][0]]) for i in range(0, 8, 2)]
    assert epochs == [[0, 10, 20, 30]] * 4
    assert len({tuple(batch[0]) for batch in seen}) > 2, "every epoch has the same order"
    np.testing.assert_array_equal(list(batches(tokens, training, 3))[0], seen[3])


@pytest.mark.host
def test_the_rate_warms_up_and_falls_to_a_tenth():
    training = Training(steps=1000, rate=1.0, warmup=10)
    rates = [training.rate_at(step) for step in (0, 9, 10, 505, 1000)]
    np.testing.assert_allclose(rates, [0.1, 1.0, 1.0, 0.55, 0.1], atol=1e-9)
