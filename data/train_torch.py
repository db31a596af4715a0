"""Trains the shipped model with PyTorch on one GPU: the recipe behind `data/minillama-coder-Q8_0.gguf`.

    python data/train_torch.py --corpus build/corpus --out /tmp/run --minutes 24     # train; parts and log in --out
    python data/train_torch.py --corpus build/corpus --trial                      # tokens a second of variants
    python data/train_torch.py --import-parts DIR --gguf OUT.gguf                     # parts -> GGUF; needs no torch

The maths is the engine's (`minillama/model.py`), for a batch of sequences, with the weights under their names in the
GGUF file; only ssm_a = -exp(A_log) is trained as A_log. Mixed precision: matrix products in bfloat16; the residual
stream, norms, router, softmax, decays and the delta rule's algebra in float32 (products in TF32, the triangular
inverse in float32 proper).

Loss: next token + MTP (the token after; then one further, the block fed with its own output and attending to the
keys of its first pass, as in drafting) + load balancing. The MTP targets are half the text's, half the trunk's own
distribution, since a draft is accepted where it agrees with the trunk. Optimizer: Muon for matrices, Adam for the
rest. The learning rate follows the wall clock, so that training ends annealed whatever the speed.
"""
import argparse
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", default="build/corpus")
    add("--cache", default="/tmp/minillama-tokens")
    add("--out", default="/tmp/run")
    add("--minutes", type=float, default=24, help="wall time from the start of this program to its end")
    add("--reserve", type=float, default=40, help="seconds of it for the last evaluation and saving")
    add("--steps", type=int, default=0, help="end after so many steps at the latest")
    add("--batch", type=int, default=64)
    add("--sequence", type=int, default=1024)
    add("--experts", choices=("dense", "grouped"), default="dense")
    add("--eager", action="store_true")
    add("--no-graph", action="store_true")
    add("--muon-lr", type=float, default=5e-3)
    add("--adam-lr", type=float, default=3e-3)
    add("--embed-lr", type=float, default=1e-2)
    add("--decay", type=float, default=0.1, help="weight decay of the matrices under Muon, times its learning rate")
    add("--dropout", type=float, default=0.1, help="of what each mixer and each experts layer adds")
    add("--clip", type=float, default=1.0)
    add("--first", type=float, default=0.3, help="weight of the first draft's loss")
    add("--second", type=float, default=0.15)
    add("--soft", type=float, default=0.5, help="share of the draft losses against the trunk's distribution")
    add("--balance", type=float, default=0.01)
    add("--seed", type=int, default=0)
    add("--log-seconds", type=float, default=20)
    add("--save-minutes", type=float, default=6)
    add("--eval-minutes", type=float, default=3)
    add("--trial", action="store_true")
    add("--trial-seconds", type=float, default=8)
    add("--variants", default="dense:64x1024:profile,grouped:64x1024,dense:128x1024")
    add("--import-parts", type=Path, metavar="DIR")
    add("--gguf", type=Path)
    add("--format", default="F32")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.import_parts:
        from training.parts import import_parts
        vocabulary = Path(__file__).parent / "tokenizer.json"
        return import_parts(options.import_parts, options.gguf, vocabulary, options.format)
    options.started = time.perf_counter()
    run(options)


def run(options: argparse.Namespace) -> None:
    """Read the text, then train or try."""
    import torch
    from training.device import CUDA, DEVICE
    from training.run import Run
    from training.step import check_kernels
    from training.text import load_tokens
    from training.trial import trial
    torch.manual_seed(options.seed)
    corpus, cache = Path(options.corpus), Path(options.cache)
    (train_text, _), (heldout, heldout_bytes) = (load_tokens(corpus, name, cache) for name in ("train", "heldout"))
    print(f"{len(train_text):,} tokens to train on, {len(heldout):,} held out, "
          f"{time.perf_counter() - options.started:.0f} s; "
          f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}", flush=True)
    end = int(heldout[-1])
    check_kernels()
    train_text, heldout = (torch.from_numpy(t).to(DEVICE) for t in (train_text, heldout))
    if options.trial:
        trial(options, train_text)
    else:
        Run(options, train_text, heldout, heldout_bytes, end).go()


if __name__ == "__main__":
    main()
