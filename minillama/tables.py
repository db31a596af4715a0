"""What the tables of README.md and RESULTS.md share."""
from statistics import median

from minillama.results import Result, Row


def markdown(lines: list[list[str]]) -> str:
    """A table: heads, rules, rows."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def device_of(result: Result) -> str:
    return f"{result.device.name} ({result.device.backend})"


def speed(row: Row) -> float:
    """Tokens a second: the median of the samples' speeds."""
    return median(1e9 * row.tokens / sample for sample in row.samples_ns)
