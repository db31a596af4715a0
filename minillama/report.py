"""The figures of README.md and RESULTS.md: drawn from data/results, between markers, so that text and measurements
cannot drift apart.

`make results` calls this; a test fails when a document and the result files differ.
"""
import re
from pathlib import Path
from statistics import median, quantiles

from matplotlib.figure import Figure

from minillama import show
from minillama.ladder import LADDER
from minillama.report_drafts import drafts_section
from minillama.results import SHIPPED, Result, Row, read_results
from minillama.tables import device_of, markdown, speed

ROOT = Path(__file__).parent.parent
README, RESULTS, PICTURE = ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "course" / "images" / "ladder.svg"
BEGIN, END = "<!-- results: made by `make results` -->", "<!-- end of results -->"
EXTRA = "naive, captured"
# Tokens a second before and after #19375, which published them: M2 Ultra, Metal, Q4_0.
PUBLISHED = {"pp1": (37.92, 51.99), "pp8": (137.75, 176.36), "pp512": (930.70, 1125.73), "pp2048": (1049.91, 1352.31),
             "tg32": (38.02, 50.39)}

# Tokens a second of llama.cpp b11434 (CUDA, flash attention) on one H100 80GB, 80B shapes, random Q4_0 weights with a
# Q6_K head, 48 layers: from two such machines, made for this project with llama-bench.
LLAMA_CPP = {"pp512": "4,140–4,390", "pp2048": "4,680", "tg32": "168", "tg128": "190–201", "pp512 @ d16384": "4,010",
             "pp2048 @ d16384": "4,210", "tg128 @ d16384": "186"}
BENCHED = "qwen3-next-80b-a3b"


def per_token(row: Row) -> float:
    """Microseconds a token: the median sample, building included where the graph is built every time."""
    return median(row.samples_ns) / row.tokens / 1e3


def row_of(result: Result, rung: str, kind: str) -> Row | None:
    """The row of a rung's prompt ("pp") or generation ("tg"); None where that machine has not measured it."""
    return next((row for row in result.rows if row.name.startswith(f"{rung} {kind}")), None)


def newest(results: list[Result], rung: str, kind: str) -> Row | None:
    """The row of a rung on whichever machine measured it last; None where none has."""
    rows = [(result.created, row) for result in results if (row := row_of(result, rung, kind))]
    return max(rows, key=lambda found: found[0])[1] if rows else None


def number(row: Row | None) -> str:
    """A row's microseconds a token."""
    if row is None:
        return "–"
    microseconds = per_token(row)
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def ladder_table(results: list[Result]) -> str:
    """Markdown: a line a rung; microseconds a token of generation and of prompts, on every stored machine."""
    heads = ["rung", "re-creates", "kernels", "copies",
             *(f"{result.device.backend} {kind}" for result in results for kind in ("tg", "pp"))]
    lines = [heads, ["---"] * 2 + ["--:"] * (len(heads) - 2)]
    rungs = [*((rung.name, rung.again) for rung in LADDER), (EXTRA, "the first rung, replayed: running alone")]
    for name, again in rungs:
        counts = newest(results, name, "tg")
        times = [number(row_of(result, name, kind)) for result in results for kind in ("tg", "pp")]
        counted = (f"{count / counts.tokens:.0f}" for count in (counts.counts.kernels, counts.counts.copies)
                   ) if counts else ("–", "–")
        lines.append([name, again, *counted, *times])
    return markdown(lines)


def gain(slow: Row, fast: Row) -> str:
    """How many times as fast, by the medians; marked ~ where the middle halves of the samples overlap."""
    a, b = (quantiles(row.samples_ns, n=4, method="inclusive") for row in (slow, fast))
    overlap = a[0] <= b[2] and b[0] <= a[2]
    return f"{'~' * overlap}{per_token(slow) / per_token(fast):.2f}×"


def chip(result: Result) -> str:
    """A short name for a machine: its backend's, but a GPU's own, since there are several."""
    found = re.search(r"\b[A-Z]+\d+\b", result.device.name) if result.device.backend == "CUDA" else None
    return found.group() if found else result.device.backend


def copies_table(results: list[Result]) -> str:
    """Markdown: copies everywhere against none, captured, on the grid of #19375, with its own gain beside; counts are
    those of whichever run is the newest."""
    counted = max(results, key=lambda result: result.created)
    columns = [f"{chip(result)} {result.model.format}" for result in results]
    heads = ["test", "kernels", "copies", "kB", *columns, "#19375, M2 Ultra, Q4_0"]
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1)]
    for test, (slow, fast) in PUBLISHED.items():
        rows = [row_of(counted, kind, test) for kind in ("everywhere", "none")]
        units = {"kernels": 1, "copies": 1, "bytes": 1000}
        cells = [" → ".join(f"{getattr(row.counts, what) / row.tokens / unit:,.1f}" for row in rows)
                 if all(rows) else "–" for what, unit in units.items()]
        pairs = [[row_of(result, kind, test) for kind in ("everywhere", "none")] for result in results]
        ratios = [gain(*pair) if all(pair) else "–" for pair in pairs]
        lines.append([test, *cells, *ratios, f"{fast / slow:.2f}×"])
    return markdown(lines)


def bench_table(results: list[Result]) -> str:
    """Markdown: tokens a second of the real model's shapes, all layers, beside llama.cpp's."""
    lines = [["machine", "format", "test", "tokens/s", "llama.cpp, Q4_0, H100"], ["---", "---", "---", "--:", "--:"]]
    for result in results:
        for row in result.rows:
            lines.append([device_of(result), result.model.format, row.name, f"{speed(row):,.0f}",
                          LLAMA_CPP.get(row.name, "–") if result.model.format == "Q4_0" else "–"])
    return markdown(lines)


def formats_table(results: list[Result]) -> str:
    """Markdown: tokens a second of a model's files in several formats, a line each."""
    backends = sorted({result.device.backend for result in results})
    tests = sorted({row.name for result in results for row in result.rows}, reverse=True)
    found = {(result.model.format, result.device.backend, row.name): row for result in results for row in result.rows}
    sizes = {result.model.format: result.rows[0].values["model_size"] for result in results}
    lines = [["format", "MB", *(f"{backend} {test}" for backend in backends for test in tests)],
             ["---"] + ["--:"] * (1 + len(backends) * len(tests))]
    for format in sorted(sizes, key=sizes.get, reverse=True):
        rows = [found.get((format, backend, test)) for backend in backends for test in tests]
        lines.append([format, f"{sizes[format] / 1e6:.1f}", *(f"{speed(row):,.0f}" if row else "–" for row in rows)])
    return markdown(lines)


def bandwidth_table(result: Result) -> str:
    """Markdown: GB/s of every format and kernel for one token, with the share of the copy's."""
    cells: dict[str, dict[str, str]] = {}
    for row in (row for row in result.rows if row.name.split()[0] not in ("copy", "launch")):
        kind, format, shape = re.fullmatch(r"(.+?) ([A-Z]+\d\w*) (.+)", row.name).groups()
        if row.tokens == 1:
            cells.setdefault(f"{kind} {shape}", {})[format] = (
                f"{row.values['gigabytes_a_second']:,.0f} ({100 * row.values['share_of_copy']:.0f} %)")
    formats = list(dict.fromkeys(format for row in cells.values() for format in row))
    return markdown([["kernel", *formats], ["---"] + ["--:"] * len(formats),
                     *([name, *(row.get(format, "–") for format in formats)] for name, row in cells.items())])


def tokens_table(result: Result) -> str:
    """Markdown: microseconds of the kernels that were measured with several tokens."""
    times: dict[str, dict[int, str]] = {}
    for row in result.rows[1:]:
        times.setdefault(row.name, {})[row.tokens] = f"{median(row.samples_ns) / 1e3:.1f}"
    several = {name: found for name, found in times.items() if len(found) > 1}
    counts = sorted({tokens for found in several.values() for tokens in found})
    return markdown([["kernel", *(f"{count} token{'s' * (count > 1)}" for count in counts)],
                     ["---"] + ["--:"] * len(counts),
                     *([name, *(found.get(count, "–") for count in counts)] for name, found in several.items())])


def bandwidth_section(result: Result) -> list[str]:
    """The two tables of one machine, and what they hold."""
    copy = result.rows[0].values["gigabytes_a_second"]
    launch = next((f" (that of a matrix of 4 KB takes {median(row.samples_ns) / 1e3:.1f} µs)" for row in result.rows
                   if row.name.startswith("launch")), "")
    early = any(row.values.keys() & {"nanoseconds_apart", "early"} for row in result.rows)
    shapes, _, state = result.model.name.partition(" ")
    machine = f"{state}, {device_of(result)}" if state else device_of(result)
    return [f"How fast packed weights are read, {machine}, {shapes}'s shapes: GB/s for one token and the share of "
            f"what a copy reads and writes here ({copy:,.0f} GB/s; –: not measured). Each launch waits for the one "
            f"before, as in the model{', and starts while that one ends (chapter 17)' * early}, and "
            f"its start is in its time{launch}; each reads other weights than the one "
            f"before, so that no cache holds them:", bandwidth_table(result),
            "Several tokens at once (drafts), microseconds a launch; experts are others for every token:",
            tokens_table(result)]


def real_shapes() -> list[str]:
    """The real model's shapes beside llama.cpp."""
    return ["The shapes of the real 80B model, all 48 layers, random weights (head Q6_K), and llama.cpp b11434 "
            "on an H100 (an H200 has the same arithmetic and faster memory):",
            bench_table([result for result in read_results("bench", local=False) if result.model.name == BENCHED])]


def factors(pairs: list[tuple[Result, Row | None, Row | None]]) -> str:
    """How many times as fast each machine became: "CPU 7.9×, CL 12.2×"; of several runs of one, the range."""
    found: dict[str, list[float]] = {}
    for result, slow, fast in pairs:
        if slow and fast:
            found.setdefault(chip(result), []).append(per_token(slow) / per_token(fast))
    return ", ".join(f"{name} {'–'.join(dict.fromkeys(f'{x:.2f}' for x in (min(times), max(times))))}×"
                     for name, times in sorted(found.items()))


def highlights() -> list[str]:
    """What the course is about, in a line each."""
    ladders, copies, drafts = (read_results(kind, local=False) for kind in ("ladder", "copies", "mtp"))
    whole = [(result, row_of(result, EXTRA, "tg"), row_of(result, "overlapped", "tg")) for result in ladders]
    prompts = [(result, row_of(result, EXTRA, "pp"), row_of(result, LADDER[-1].name, "pp")) for result in ladders]
    pairs = [(result, row_of(result, "everywhere", "pp2048"), row_of(result, "none", "pp2048")) for result in copies]
    moved = [pair for pair in pairs if pair[0].model.name == SHIPPED and pair[0].device.backend != "CUDA"]
    large = [pair for pair in pairs if pair[0].model.name == BENCHED]
    kept = {chip(result): speed(rows["pp512 kv"]) / speed(rows["pp512 without"]) for result in drafts
            for rows in [{row.name: row for row in result.rows}] if result.model.name == BENCHED}
    before, after = PUBLISHED["pp2048"]
    return ["\n".join([
        f"- From the first port to the last rung, both replayed, a generated token of the shipped model: "
        f"{factors(whole)}; a token of a prompt, of 8 tokens then and 64 now: {factors(prompts)}.",
        f"- Copies alone, prompts of 2,048 tokens, before these had kernels of their own: {factors(moved)} (llama.cpp "
        f"#19375 on an M2 Ultra: {after / before:.2f}×). In the 80B's shapes, where the first port's form also does "
        f"without the kernels for a prompt's chunks and its attention: {factors(large)}.",
        f"- What prompts of 512 tokens keep of their speed with multi-token prediction, 80B shapes: "
        f"{', '.join(f'{name} {share:.1%}' for name, share in kept.items())} (llama.cpp on an H100, 1,376 "
        f"tokens: 79–88 %)."])]


def readme_section() -> str:
    """What stands between the README's markers."""
    return "\n\n".join(["![Time per token of every rung, on every stored machine](course/images/ladder.svg)",
                        *highlights(), *real_shapes()])


def results_section() -> str:
    """What stands between the markers of RESULTS.md."""
    ladders, copies, benches, bandwidths = (read_results(kind, local=False)
                                            for kind in ("ladder", "copies", "bench", "bandwidth"))
    machines = "; ".join(f"{result.device.backend}: {device_of(result)}" for result in ladders)
    return "\n\n".join([
        "## The ladder",
        "![Time per token of every rung, on every stored machine](course/images/ladder.svg)",
        f"The shipped model, microseconds a token (tg: generating, pp: in a prompt), kernels and copies a token of "
        f"generation. {machines}. The rungs before `captured` build their graph in Python for every batch; prompts "
        f"are 64 tokens, 8 where the recurrence runs token by token.",
        ladder_table(ladders),
        "## Copies",
        "What copies alone cost (the ablation that re-creates #19375: the last rung, copies everywhere or none), as a "
        "gain in speed (~: the middle halves of the samples overlap), with kernels, copies and kB moved a token, as "
        "counted in the newest run. Copies everywhere is the first port's own code: it goes over the whole cache at "
        "once, and does without the kernels for a prompt's delta rule and attention, so on a GPU the gain of a prompt "
        "is that of all three. (The CPU's and OpenCL's runs are of the engine before it had such kernels there: "
        "copies alone.)",
        copies_table([result for result in copies if result.model.name == SHIPPED]),
        "The same in the 80B's shapes, all 48 layers, random weights. (A single token runs the same few kernels in "
        "both, which have no copies left to take away: what the model's first decode steps had is in the ladder.)",
        copies_table([result for result in copies if result.model.name == BENCHED]),
        "## Formats",
        "The shipped model's files, tokens a second (one process a device, sample by sample in turn):",
        formats_table([result for result in benches if result.model.name == SHIPPED]),
        "## The 80B's shapes",
        *real_shapes(),
        "## Packed weights",
        *(part for result in bandwidths for part in bandwidth_section(result)),
        "## Multi-token prediction",
        *drafts_section(read_results("drafts", local=False), read_results("mtp", local=False))])


DOCUMENTS = {README: readme_section, RESULTS: results_section}


def ladder_picture() -> Figure:
    """Bars, on a logarithmic scale: microseconds a generated token of every rung, a colour a machine."""
    results = read_results("ladder", local=False)
    names = [rung.name for rung in LADDER]
    figure, axes = show.canvas("One generated token of the shipped model, rung by rung", 8.5, 3.6)
    width = 0.8 / max(1, len(results))
    colours = (show.BLUE, show.ORANGE, show.GREEN, show.RED)
    for place, (result, colour) in enumerate(zip(results, colours, strict=False)):
        heights = [per_token(row) if (row := row_of(result, name, "tg")) else float("nan") for name in names]
        axes.bar([i + (place - (len(results) - 1) / 2) * width for i in range(len(names))], heights, width,
                 color=colour, label=device_of(result))
    show.logarithmic(axes, "y")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_ylabel("µs a token")
    axes.legend(fontsize=8)
    return figure


def with_section(text: str, section: str, name: str) -> str:
    """A document with its section made anew. Raises ValueError where the markers are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{name} has lost its markers {BEGIN} and {END}")
    return re.sub(re.escape(BEGIN) + ".*" + re.escape(END), lambda _: f"{BEGIN}\n{section}\n{END}", text, flags=re.S)


def main() -> None:
    for path, section in DOCUMENTS.items():
        path.write_text(with_section(path.read_text(encoding="utf-8"), section(), path.name), encoding="utf-8")
    import matplotlib
    matplotlib.rcParams["svg.hashsalt"] = "minillama"
    ladder_picture().savefig(PICTURE, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
