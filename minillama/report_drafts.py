"""The tables of multi-token prediction: what drafting gains on text, and what it costs in speed alone."""
from minillama.results import Result
from minillama.tables import device_of, markdown, speed

# Tokens a second of llama.cpp b11434 on one H100, 80B shapes of random Q4_0 weights, nearly every draft rejected; its
# plain speed is of that run too. Made for this project, as the figures in report.py.
LLAMA_CPP = {"tg128": "144–155", "tg128 draft=1 accept=0": "43", "tg128 draft=3 accept=0": "21"}


def text_table(results: list[Result]) -> str:
    """Markdown: a line a number of drafts and machine; held-out functions continued greedily by the shipped model."""
    lines = [["machine", "drafts", "accepted, by place", "tokens/s", "faster", "texts equal"],
             ["---", "--:", "---", "--:", "--:", "--:"]]
    for result in results:
        for row in result.rows:
            if not row.name.startswith("draft "):
                continue
            kept = [f"{row.values[name]:.2f}" for place in range(1, 9) if (name := f"accepted {place}") in row.values]
            equal = f"{row.values['equal']:.0f} of {row.values['prompts']:.0f}" if "equal" in row.values else "–"
            lines.append([device_of(result), row.name.split()[1], " ".join(kept) or "–",
                          f"{row.values['speed']:,.0f}", f"{row.values.get('faster', 1.0):.2f}×", equal])
    return markdown(lines)


def speed_table(result: Result) -> str:
    """Markdown: generation with drafts kept by chance, and prompts by recipe, of one model on one machine."""
    plain = {row.name.split()[0]: row for row in result.rows if row.name.split()[1:] in ([], ["without"])}
    lines = [["test", "tokens/s", "of plain", "llama.cpp"], ["---", "--:", "--:", "--:"]]
    for row in result.rows:
        test = row.name.split()[0]
        if test in plain:
            share = speed(row) / speed(plain[test])
            lines.append([row.name + (" (simulated)" if row.simulated else ""), f"{speed(row):,.0f}", f"{share:.1%}",
                          LLAMA_CPP.get(row.name, "–") if result.device.name.startswith("NVIDIA H100") else "–"])
    return markdown(lines)


def drafts_section(texts: list[Result], speeds: list[Result]) -> list[str]:
    """The paragraphs; none where nothing is stored."""
    parts = []
    if texts:
        parts += ["Multi-token prediction on text: held-out functions, continued greedily by the shipped model, "
                  "without drafts and with one to four. "
                  "*Accepted*: of the drafts at a place that were looked at, how many; *faster*: the median over "
                  "the texts. On the H100 a round's start outweighs so small a model's work, so its rows say little "
                  "about larger ones.",
                  text_table(texts)]
    for result in speeds:
        parts += [f"In speed alone: {result.model.name} ({result.model.format}) on {device_of(result)}. Drafts are "
                  "kept by chance, with probability `accept` at each place; llama.cpp's column is a run of its own, "
                  "behind a prompt of 1,376 tokens, with nearly every draft rejected: compare within the column.",
                  speed_table(result)]
    return parts
