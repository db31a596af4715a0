"""Numbers for people: three digits and a unit in steps of a thousand."""
import math

PREFIXES = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T"}


def in_units(value: float, unit: str) -> str:
    """26.4 GB/s, 1.20 TFLOP/s, 85.3 µs; a dash for zero."""
    if value == 0:
        return "-"
    value = float(f"{value:.2e}")       # round first: 999.9 µs is 1.00 ms
    step = max(min(PREFIXES), min(max(PREFIXES), math.floor(math.log10(abs(value)) / 3)))
    digits = f"{value / 1000**step:#.3g}".rstrip(".")
    return f"{digits} {PREFIXES[step]}{unit}"
