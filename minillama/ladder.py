"""The ladder: from the first port onwards, one field a rung, each answering six questions.

`minillama ladder` measures every rung in a process of its own, in alternating order; `--ablate` measures the last
rung with one field put back at a time, which is how a single decision is judged.
"""
from dataclasses import dataclass, fields, replace

from minillama.recipe import Recipe


@dataclass(frozen=True)
class Ledger:
    """What each optimization must answer; the questions are those of tiny-llm's performance appendix."""
    invariant: str      # what must stay true
    faster: str         # why it should be faster
    wins: str           # where it wins
    loses: str          # where it loses
    fallback: str       # what one falls back to
    deceives: str       # how its benchmark could deceive


@dataclass(frozen=True)
class Rung:
    """One step of the ladder. `again`: the pull request or idea it re-creates; `chapter`: where it is derived."""
    name: str
    chapter: str
    again: str
    recipe: Recipe
    ledger: Ledger


NAIVE = Recipe(delta="recurrent", experts="dense", copies="everywhere", capture="eager", logits="all",
               projections="separate", weights="float", launches="after", mtp_prefill="logits")

STEPS: list[tuple[str, str, str, dict[str, str], Ledger]] = [
    ("naive", "07", "llama.cpp #16095: correctness only", {}, Ledger(
        "it is the judge of all that follows: logits within 5e-4 of transformers",
        "it is not", "reading it", "everywhere else", "nothing lies below it",
        "its time is Python's: compare counts, or capture it first")),
    ("chunked", "05", "the chunked form that #16095 already had for prompts", {"delta": "chunked"}, Ledger(
        "out and state equal the recurrence's, also across a chunk boundary and after padding",
        "64 dependent steps become a few products of matrices", "prompts: the longer, the more",
        "one token: the chunk's bookkeeping buys nothing, and the decode form stays the same work",
        "`delta=recurrent`", "short prompts are padded to a batch: time per token, at a stated batch")),
    ("gathered", "06", "ggml_mul_mat_id: only the experts that were picked", {"experts": "gathered"}, Ledger(
        "the weighted sum over the chosen experts is unchanged",
        "a token reads `used` experts of all", "decoding, and models with many experts",
        "batches that use every expert anyway: each token then reads its experts again", "`experts=dense`",
        "with few experts the two read nearly the same; count bytes on the real shapes")),
    ("no-copies", "08", "#19375", {"copies": "none"}, Ledger(
        "the same numbers pass through the same formulas, read where they lie",
        "a copy reads and writes everything and computes nothing", "prompts and decoding alike",
        "where a strided read is slower than copying once and reading straight many times", "`copies=everywhere`",
        "eager time hides it behind Python; a fusing compiler never makes most copies that ggml made")),
    ("captured", "09", "#19521, #19645: graphs that engage", {"capture": "jit"}, Ledger(
        "20 captured steps give what 20 plain steps give", "Python builds the graph once instead of every token",
        "decoding: hundreds of small kernels a token", "a shape that occurs once is captured for nothing",
        "`capture=eager`", "the first call of every size costs seconds: report it apart")),
    ("last-row", "10", "llama.cpp's output rows: the head for the last token only", {"logits": "last"}, Ledger(
        "the last row's logits", "the head is vocabulary × hidden for every row that nobody reads", "prompts",
        "nowhere: with one row it is the same work", "`logits=all`",
        "a small vocabulary makes the head look cheap")),
    ("pruned", "10", "constants computed once", {"capture": "prune"}, Ledger(
        "every kernel that depends on a token, a position or a state is replayed",
        "kernels that depend on weights alone run once, at capture", "graphs that prepare weights in every step",
        "graphs without such kernels, as ours today; in the stored run on CUDA it was slower, when every state was an "
        "input, and inputs are set anew at each replay (not measured there since)", "`capture=jit`",
        "a position or a state that is no input is frozen without a word: compare at several positions")),
    ("unpruned", "10", "what does not pay goes back", {"capture": "jit"}, Ledger(
        "the logits are the same", "on CUDA no input has to be set anew at each replay", "on CUDA",
        "packed prompts: each batch unpacks every matrix; pruned, that is done once, and kept as floats",
        "`capture=prune`",
        "a rung up that takes something back looks like progress: compare it with the rung before `pruned` as well")),
    ("fused-projections", "11", "one product per input, not one per weight", {"projections": "fused"}, Ledger(
        "rows of a product do not know of each other", "x is read once, and one kernel starts where four did",
        "decoding small models, where kernels are short", "batches, if slicing the result costs a copy",
        "`projections=separate`", "weights are stacked when loaded: the loading time is not in it")),
    ("fused-delta", "11", "#19504: one operation for the delta rule", {"delta": "fused"}, Ledger(
        "output, convolution window and memory equal the recurrence's, wherever the text is cut",
        "the memory is written once, and read once where threads share memory; a few kernels start where many did",
        "decoding; prompts, where two kernels carry the memory through all chunks",
        "where threads share none, a second pass and a norm remain, and prompts take the chunks as before",
        "`delta=chunked`", "a small model's memory stays in the cache: bytes saved there are not time saved")),
    ("packed", "12", "llama.cpp's quantized products: blocks unpacked in the kernel", {"weights": "packed"}, Ledger(
        "each format gives its own golden logits", "a weight of 4.5 bits is read as 4.5 bits, not as 32",
        "decoding, where reading weights is nearly all of the time",
        "a few to sixteen tokens at once, where sums cost more than bytes; a prompt without tensor cores unpacks all",
        "`weights=float`",
        "a model that fits into the cache is not read from memory at all")),
    ("grouped", "13", "ggml_mul_mat_id for batches: rows sorted by expert", {"experts": "grouped"}, Ledger(
        "each token's weighted sum over its experts is unchanged, however skewed the routing",
        "tokens that picked the same expert share one reading of it", "prompts",
        "short batches: tiles are mostly padding; a kernel that multiplies worse than one that gathers",
        "`experts=gathered`",
        "random tokens spread over the experts more evenly than text does")),
    ("overlapped", "17", "programmatic dependent launch; graphs on CPUs and OpenCL", {"launches": "early"}, Ledger(
        "no kernel reads what the one before it writes until that has ended",
        "on a CPU and with OpenCL hardly any Python runs between kernels; on a GPU a kernel starts, and asks for its "
        "weights, while the one before it ends",
        "decoding, where kernels are short: on CPUs, with OpenCL, on NVIDIA's GPUs from Hopper on",
        "prompts on a GPU, whose kernels are long: they start one after the other; and where early reads take too "
        "many registers: these stay where they are", "`launches=after`",
        "a kernel repeated alone overlaps with itself: measure whole tokens")),
    ("draft", "14", "#22673: the MTP block guesses, the model verifies", {"draft": 3}, Ledger(
        "a greedy text stays the same, token by token; a sampled one keeps its distribution",
        "one pass of the model over a few tokens costs less than as many passes, where reading weights is what costs",
        "decoding on a GPU, with text that is easy to guess",
        "where a token more costs nearly a pass more, and where drafts are rejected; every prompt pays for the block",
        "`draft=0`", "random weights accept nothing, a text that repeats itself accepts everything: say which text")),
    ("mtp-hidden", "16", "#23198: the block needs hidden states, not logits", {"mtp_prefill": "hidden"}, Ledger(
        "the drafts after a prompt are the same", "the head runs for one row, and no logits travel to the host",
        "prompts with drafting on, large vocabularies", "nowhere", "`mtp_prefill=logits`",
        "with a small vocabulary, or where host and device share memory, there is little to save")),
    ("mtp-kv", "16", "of a prompt token only keys and values are ever read", {"mtp_prefill": "kv"}, Ledger(
        "the block's cache and the drafts after a prompt are the same",
        "no query, no attention, no experts for tokens that the block does not guess after",
        "prompts with drafting on", "nowhere for one block; stacked blocks would need more rows",
        "`mtp_prefill=hidden`", "a short prompt is one padded batch: the saving drowns in what the batch costs")),
]


def build_ladder() -> tuple[Rung, ...]:
    """The rungs in order, each the one before with one field changed."""
    recipe, rungs = NAIVE, []
    for name, chapter, again, change, ledger in STEPS:
        recipe = replace(recipe, **change)
        rungs.append(Rung(name, chapter, again, recipe, ledger))
    return tuple(rungs)


LADDER = build_ladder()


def read_recipe(text: str) -> Recipe:
    """A rung's recipe by its name, or "field=value,field=value" on top of the default one. Raises ValueError."""
    named = {rung.name: rung.recipe for rung in LADDER}
    if text and "=" not in text and text not in named:
        raise ValueError(f"recipe: {text!r} is neither a rung ({', '.join(named)}) nor field=value")
    return named[text] if text in named else Recipe.parse(text)


def ablations(last: Recipe) -> dict[str, Recipe]:
    """A recipe as "last", and it with one field at a time put back to the naive one; names are "-field".

    `delta` is put back too, though prompts then take very long graphs: measure it with a short prompt. Drafts go where
    a field is put back that they need.
    """
    back = {}
    for name in (field.name for field in fields(Recipe) if getattr(last, field.name) != getattr(NAIVE, field.name)):
        plain = {"draft": 0} if name == "delta" else {}
        back[f"-{name}"] = replace(last, **plain | {name: getattr(NAIVE, name)})
    return {"last": last} | back
