"""The generated parts of the model card in data/README.md: every figure comes from a file beside it.

`python data/evaluate.py card` writes them, and the picture of the loss; a test holds them against the files.
"""
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from minillama.config import ModelConfig  # noqa: E402
from minillama.gguf import GGUF  # noqa: E402
from minillama.quantize import choose_formats  # noqa: E402
from minillama.results import Result, read_results  # noqa: E402

MASTER = HERE / "minillama-coder-Q8_0.gguf"
README, PICTURE = HERE / "README.md", HERE / "loss.png"
LOG, ABOUT = HERE / "training" / "log.jsonl", HERE / "training" / "about.json"
SHOWN = 5           # completions, the first ones


def stored(kind: str) -> Result:
    """The project's own result of that kind: one file."""
    (result,) = (r for r in read_results(kind, local=False) if r.model and r.model.name == "minillama-coder")
    return result


def row(result: Result, name: str) -> dict[str, float]:
    return next(row.values for row in result.rows if row.name == name)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; columns after the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def model() -> str:
    file = GGUF(MASTER)
    c = ModelConfig.from_gguf(file)
    routed = sum(file.values(name).size for name in file.tensors if "_exps." in name)
    total = sum(file.values(name).size for name in file.tensors)
    active = total - routed * (c.experts - c.experts_used) // c.experts
    facts = {
        "name": file.metadata["general.name"],
        "parameters": f"{total:,}; of these, {active:,} work on each token (the embedding table counted)",
        "layers": f"{c.layers}: {sum(c.recurrent)} Gated DeltaNet, {c.layers - sum(c.recurrent)} gated attention; "
                  f"and {c.mtp_blocks} MTP block",
        "hidden size": str(c.hidden),
        "attention": f"{c.heads} query heads, {c.kv_heads} key/value heads of {c.head_dim}; rotary embedding on "
                     f"{c.rope_dim}, base {c.rope_base:,.0f}",
        "Gated DeltaNet": f"{c.k_heads} key heads, {c.v_heads} value heads of {c.state_dim}; convolution over "
                          f"{c.conv_width} tokens",
        "experts": f"{c.experts} of width {c.expert_width}, {c.experts_used} used; a shared one of {c.shared_width}",
        "vocabulary": f"{c.vocab:,}, byte-level BPE, qwen2 pre-tokenizer, ChatML specials",
        "context": f"{c.context:,} tokens (trained on sequences of {options()['sequence']:,})",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def options() -> dict:
    return json.loads(ABOUT.read_text())["options"]


def training() -> str:
    about, o, run = json.loads(ABOUT.read_text()), options(), row(stored("training"), "PyTorch, the run")
    settings = " ".join(f"--{name} {o[name]}" for name in ("minutes", "experts", "batch", "sequence", "seed"))
    facts = {
        "command": f"`python data/train_torch.py {settings}`",
        "tokens seen": f"{about['tokens']:,} in {about['step']:,} steps of {o['batch']} × {o['sequence']:,}, "
                       f"{about['epochs']} epochs",
        "time": f"{run['seconds'] / 60:.1f} minutes on one {about['device']}, {run['tokens_per_second']:,} tokens/s",
        "losses": f"next token; {o['first']:g} × first draft, {o['second']:g} × second draft (the block on its own "
                  f"output), {o['soft']:g} of each against the trunk's own distribution; {o['balance']:g} × "
                  "balance of the experts",
        "optimizer": f"Muon for the matrices of the blocks (peak rate {o['muon_lr']:g}, weight decay {o['decay']:g}), "
                     f"Adam for the rest ({o['adam_lr']:g}; embedding {o['embed_lr']:g}); gradient norm at most "
                     f"{o['clip']:g}",
        "schedule": "warm-up, constant, then linear to zero over the last 60 % of the time",
        "dropout": f"{o['dropout']:g} of what each mixer and each experts layer adds",
        "precision": "bfloat16 products; float32 residual stream, norms, router and delta rule; stored in 16 bits",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def speeds() -> str:
    rows = [[r.name, f"{r.values['batch']:.0f} × {r.values['sequence']:.0f}", f"{r.values['tokens_per_second']:,.0f}"]
            for r in stored("training").rows]
    slow = [f"{r.name}: of a step's {r.values['step_ms']:,.0f} ms, {r.values['slowest_kernel_ms_a_step']:,.0f} went "
            "into one shape of kernel." for r in stored("training").rows if "slowest_kernel_ms_a_step" in r.values]
    return "\n\n".join([table(["training on one H100", "tokens a step", "tokens/s"], rows), *slow])


def weight_bytes(format: str) -> int:
    """Bytes of the tensors in a file of that format, made from the master."""
    master = GGUF(MASTER)
    formats = choose_formats(master, ModelConfig.from_gguf(master), format)
    return sum(fmt.nbytes(master.tensors[name].shape) for name, fmt in formats.items())


def quality() -> str:
    result = stored("quality")
    base, rows = row(result, "F32")["bits_per_byte"], []
    for r in result.rows:
        v = r.values
        if "first_draft" in v:
            rows.append([r.name, f"{weight_bytes(r.name) / 1e6:.1f}",
                         f"{v['bits_per_byte']:.4f} ± {v['standard_error']:.4f}", f"{v['bits_per_byte'] - base:+.4f}",
                         *(f"{v[name]:.3f}" for name in (
                             "first_draft", "second_given_first", "second_given_first_in_text"))])
        else:
            rows.append([r.name, "", f"{v['bits_per_byte']:.4f}", *[""] * 4])
    read = next(r for r in result.rows if r.name == "F32")
    size = row(result, "gzip -9")["bytes"]
    said = (f"Measured by minillama on {result.device.backend} ({result.host}): {read.values['windows']:.0f} windows, "
            f"{read.tokens:,} tokens, {size:,.0f} bytes.")
    return table(["format", "MB", "bits per byte", "against F32", "first draft", "second, given first",
                  "second, first in the text"], rows) + "\n\n" + said


def whole() -> str:
    run = row(stored("training"), "PyTorch, the run")
    return (f"All of the held-out text ({run['heldout_tokens']:,} tokens), measured by the training program at its "
            f"end (bfloat16 products, float32 weights): "
            f"**{run['heldout_bits_per_byte']:.4f}** bits per byte; first draft "
            f"{run['heldout_first_draft']:.3f}, second given first {run['heldout_second_given_first']:.3f} "
            f"({run['heldout_second_given_first_and_text']:.3f} where the first is also the text's).")


def completions() -> str:
    from completions import LONGEST_BODY, read_completions
    result, texts = stored("completions"), read_completions()
    whole, cut = (sum(r.values[name] for r in result.rows) for name in ("counts", "counts_as_cut"))
    short = sum(c.tokens < LONGEST_BODY for c in texts)
    parts = [f"**{whole:.0f} of {len(texts)}** bodies parse and do something by their whole lines, {cut:.0f} to the "
             f"last token: {short} end before the {LONGEST_BODY} tokens do, and the others mostly inside a line. The "
             f"first {SHOWN} of the list, as they came:"]
    for number, (c, r) in enumerate(zip(texts[:SHOWN], result.rows, strict=False), 1):
        said = ", ".join(f"{name}: {'yes' if yes else 'no'}" for name, yes in r.values.items()).replace("_", " ")
        parts.append(f"{number}. {c.tokens} tokens; {said}\n\n```python\n{c.prompt}{c.body.rstrip()}\n```")
    return "\n\n".join(parts)


PARTS = {"model": model, "training": training, "speeds": speeds, "quality": quality, "whole": whole,
         "completions": completions}


def with_part(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of that name replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"{README.name} lacks the markers of {name!r}")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2].lstrip()}", text)


def loss_picture() -> None:
    """Losses while training, and bits per byte on held-out text in between."""
    from minillama.show import BLUE, GREEN, ORANGE, canvas
    log = [json.loads(line) for line in LOG.read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    figure, axes = canvas("Training: cross-entropy, means over 20 s", height=3.4)
    for key, colour, label in (("loss", BLUE, "next token"), ("first", ORANGE, "first draft"),
                               ("second", GREEN, "second draft")):
        axes.plot([entry["tokens"] / 1e6 for entry in steps[1:]], [entry[key] for entry in steps[1:]], color=colour,
                  label=label)
    axes.set(xlabel="million tokens", ylabel="nats a token", ylim=(1, 4))
    axes.legend()
    figure.savefig(PICTURE, dpi=110)


def update() -> None:
    text = README.read_text(encoding="utf-8")
    for name, make in PARTS.items():
        text = with_part(text, name, make())
    README.write_text(text, encoding="utf-8")
    loss_picture()
