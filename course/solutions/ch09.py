"""Solutions of chapter 09's exercises."""


def graphs(lengths: list[int], sizes: tuple[int, ...]) -> tuple[int, int]:
    """Sizes that some prompt needs, and different lengths."""
    needed = set()
    for tokens in lengths:
        while tokens > 0:
            size = next((size for size in sizes if tokens > size / 2), sizes[-1])
            needed.add(size)
            tokens -= size
    return len(needed), len(set(lengths))


def finished(kernels: int, first: int, encode: float, run: float) -> float:
    """The rest starts when the first part has run and the rest has been encoded, whichever is later."""
    ready = max(first * encode + first * run, kernels * encode)
    return ready + (kernels - first) * run


def groups(kernels: list) -> list[int]:
    """A new group wherever two kernels of one would touch the same thing, and one of them writes."""
    sizes, read, written = [], set(), set()
    for kernel in kernels:
        conflict = kernel.reads & written or kernel.writes & (read | written)
        if conflict or not sizes:
            sizes, read, written = [*sizes, 0], set(), set()
        sizes[-1] += 1
        read |= kernel.reads
        written |= kernel.writes
    return sizes
