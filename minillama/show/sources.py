"""What a hand-written kernel becomes on several devices, side by side; which lines of two sources differ."""
import difflib
import html
import re
from collections.abc import Mapping

from IPython.display import HTML


def tidy(source: str, words: Mapping[str, str] | None = None) -> str:
    """A rendered kernel for reading: without includes and definitions, buffers by `words` (data0_128 is the first)."""
    lines = [line for line in source.splitlines() if not line.startswith(("#", "typedef", "template", "using"))]
    text = "\n".join(lines)
    for place, word in (words or {}).items():
        text = re.sub(rf"\bdata{place}_\d+\b", word, text)
    return re.sub(r"__attribute__\(\(aligned\(16\)\)\) ?|__launch_bounds__\(\d+\) ?", "", text)


def side_by_side(sources: Mapping[str, str], width: int = 88) -> HTML:
    """Sources in columns, each under its name; long lines are cut."""
    def column(source: str) -> str:
        lines = [line if len(line) <= width else line[:width - 1] + "…" for line in source.splitlines()]
        return f"<pre style='font-size:9px;line-height:1.25;text-align:left'>{html.escape(chr(10).join(lines))}</pre>"
    heads = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in sources)
    cells = "".join(f"<td style='vertical-align:top'>{column(source)}</td>" for source in sources.values())
    return HTML(f"<table><tr>{heads}</tr><tr>{cells}</tr></table>")


def differences(one: str, other: str) -> None:
    """Print the lines in which two sources differ: - of the first, + of the second."""
    lines = [line for line in difflib.ndiff(one.splitlines(), other.splitlines()) if line[0] in "+-"]
    print(f"{len(one.splitlines())} lines, {sum(line[0] == '-' for line in lines)} of them differ")
    print("\n".join(line for line in lines))


def lines_with(sources: Mapping[str, str], words: Mapping[str, str]) -> None:
    """Print for each source the first line that matches each pattern, by what it is about."""
    for about, pattern in words.items():
        print(about)
        for name, source in sources.items():
            found = next((line.strip() for line in source.splitlines() if re.search(pattern, line)), "(none)")
            print(f"    {name:8} {found[:96]}")
