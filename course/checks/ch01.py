"""Checks of chapter 01's exercises."""
from collections.abc import Callable

import numpy as np

from checks import examine
from minillama.blocks import FORMATS, unpack
from minillama.packers import pack


def _first_difference(got, wanted: np.ndarray, what: str) -> str | None:
    """None when two arrays are equal, else a sentence with the first place where they are not."""
    if not isinstance(got, np.ndarray):
        return f"expected an array, got {type(got).__name__}"
    if got.shape != wanted.shape:
        return f"expected the shape {wanted.shape}, got {got.shape}"
    wrong = np.flatnonzero(got.reshape(-1) != wanted.reshape(-1))
    if not wrong.size:
        return None
    at = int(wrong[0])
    return f"{what} {at} should be {wanted.reshape(-1)[at]}, is {got.reshape(-1)[at]}"


def _blocks(format: str, values: np.ndarray) -> np.ndarray:
    return pack(values, FORMATS[format]).reshape(-1, FORMATS[format].size)


def check_unpack_q8_0(yours: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Blocks (n, 34) uint8 -> values (n, 32) float32."""
    rng = np.random.default_rng(0)
    ramp = np.concatenate([np.array([0.5], "<f2").view(np.uint8), np.arange(32, dtype=np.uint8)])[None]
    below = np.concatenate([np.array([0.25], "<f2").view(np.uint8), np.arange(128, 160, dtype=np.uint8)])[None]
    many = _blocks("Q8_0", rng.standard_normal((100, 32), dtype=np.float32))
    tiny = _blocks("Q8_0", 1e-5 * rng.standard_normal((4, 32), dtype=np.float32))

    def same(blocks: np.ndarray) -> str | None:
        wanted = unpack(blocks.reshape(-1), FORMATS["Q8_0"], (len(blocks), 32))
        return _first_difference(yours(blocks), wanted, "value")

    return examine("unpack_q8_0", {
        "scale 0.5, bytes 0 to 31": lambda: same(ramp),
        "scale 0.25, bytes 128 to 159: signed, these are -128 to -97": lambda: same(below),
        "a hundred blocks at once": lambda: same(many),
        "very small scales": lambda: same(tiny),
    })


def check_pack_q4_0(yours: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Values (32,) float32 -> a block (18,) uint8."""
    rng = np.random.default_rng(1)
    cases = {
        "-8 to 7, twice": np.tile(np.arange(-8, 8), 2),
        "the largest value is positive, so the scale is negative": np.linspace(-1, 2, 32),
        "the largest value is negative": np.linspace(-2, 1, 32),
        "as large on the other side: 16 has to become 15": np.linspace(-1, 1, 32),
        "normal numbers": rng.standard_normal(32),
        "one large value among small ones": np.where(np.arange(32) == 5, 40.0, rng.standard_normal(32)),
    }

    def same(values: np.ndarray) -> str | None:
        values = values.astype(np.float32)
        got, wanted = yours(values), _blocks("Q4_0", values[None])[0]
        complaint = _first_difference(got, wanted, "byte")
        if complaint and isinstance(got, np.ndarray) and got.shape == wanted.shape:
            if (got[:2] != wanted[:2]).any():
                scales = [float(block[:2].astype(np.uint8).copy().view("<f2")[0]) for block in (wanted, got)]
                return f"the scale should be {scales[0]:.5g}, is {scales[1]:.5g} (the first two bytes)"
            return f"the quants: {complaint}"
        return complaint

    return examine("pack_q4_0", {name: (lambda values=values: same(values)) for name, values in cases.items()})


def check_to_bf16(yours: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Values float32 -> the 16 bits of each, uint16, rounded to the nearest."""
    rng = np.random.default_rng(2)

    def same(values) -> str | None:
        values = np.array(values, dtype=np.float32)
        wanted, got = pack(values, FORMATS["BF16"]).view(np.uint16), yours(values)
        complaint = _first_difference(got, wanted, "value")
        if complaint and isinstance(got, np.ndarray) and got.shape == wanted.shape:
            at = int(np.flatnonzero(got != wanted)[0])
            return f"{values[at]!r} should give {int(wanted[at]):#06x}, gives {int(got[at]):#06x}"
        return complaint

    return examine("to_bf16", {
        "1, -2, 0.5: nothing to round": lambda: same([1, -2, 0.5]),
        "1.005: up, to 1.0078125": lambda: same([1.005]),
        "1.003: down, to 1.0": lambda: same([1.003]),
        "-1.005: away from zero, to -1.0078125": lambda: same([-1.005]),
        "a thousand normal numbers": lambda: same(rng.standard_normal(1000)),
    })


def check_whole(yours: Callable[[bytes], tuple[str, bytes]]) -> bool:
    """Bytes that may end inside a character -> the text so far, and the bytes that must wait."""
    def splits(raw: bytes, wanted: tuple[str, bytes]) -> str | None:
        got = yours(raw)
        return None if got == wanted else f"{raw!r} should give {wanted!r}, gives {got!r}"

    def every_cut(text: str) -> str | None:
        for cut in range(len(text.encode()) + 1):
            raw, said = text.encode()[:cut], yours(text.encode()[:cut])
            if not (isinstance(said, tuple) and len(said) == 2 and isinstance(said[0], str)
                    and isinstance(said[1], bytes)):
                return f"{raw!r} should give a text and bytes, gives {said!r}"
            if said[0].encode() + said[1] != raw or not text.startswith(said[0]) or len(said[1]) > 3:
                return f"{raw!r} gives {said!r}"
        return None

    return examine("whole", {
        "b'def': all of it": lambda: splits(b"def", ("def", b"")),
        "nothing": lambda: splits(b"", ("", b"")),
        "the first byte of é waits": lambda: splits("né".encode()[:2], ("n", b"\xc3")),
        "three of the four bytes of 🦙 wait": lambda: splits("a🦙".encode()[:4], ("a", "🦙".encode()[:3])),
        "'naïve Ω 🦙', cut at every byte": lambda: every_cut("naïve Ω 🦙"),
    })
