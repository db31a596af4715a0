"""Checks of chapter 17's exercises."""
import math
from collections.abc import Callable

import numpy as np

from checks import examine, expects


def check_cards_needed(yours: Callable[[float, float, float, int, int, float], int]) -> bool:
    """(bytes of the weights, fixed bytes a text, bytes a token, tokens a text, texts, bytes of a card) -> cards."""
    def case(*given: float) -> str | None:
        weights, fixed, per_token, tokens, texts, card = given
        needed = weights + texts * (fixed + per_token * tokens)
        wanted = math.ceil(needed / card)
        got = yours(*given)
        if not isinstance(got, (int, np.integer)) or isinstance(got, bool):
            return f"cards come whole: expected {wanted}, got {got!r:.60}"
        return None if got == wanted else f"{needed:,.0f} bytes on cards of {card:,.0f}: expected {wanted}, got {got}"
    return examine("cards_needed", {
        "45 GB of weights, one short text, 80 GB": lambda: case(45e9, 1e8, 49152.0, 1000, 1, 80e9),
        "the same on cards of 24 GB": lambda: case(45e9, 1e8, 49152.0, 1000, 1, 24e9),
        "a hundred long texts": lambda: case(45e9, 1.6e8, 49152.0, 32768, 100, 80e9),
        "exactly full": lambda: case(60e9, 0.0, 1e6, 10000, 2, 80e9),
        "two bytes too many": lambda: case(60e9, 1.0, 1e6, 10000, 2, 80e9),
        "no text": lambda: case(160e9, 1e8, 49152.0, 1000, 0, 80e9)})


def check_experts_touched(yours: Callable[..., float]) -> bool:
    """(tokens, used, experts, few=0, common=0.0) -> experts that a batch touches on average."""
    def case(tokens: int, used: int, experts: int, few: int = 0, common: float = 0.0) -> str | None:
        choices = tokens * used
        wanted = sum(count * (1 - (1 - share / count) ** choices)
                     for count, share in ((few, common), (experts - few, 1 - common)) if count)
        got = yours(tokens, used, experts, few, common) if few else yours(tokens, used, experts)
        got = float(got) if isinstance(got, np.floating) else got
        complaint = expects(got, wanted, 0.02)
        return complaint and f"{choices} choices among {experts}" + (
            f", {100 * common:.0f} % of them on {few}" if few else "") + f": {complaint}"

    def simulated() -> str | None:
        rng = np.random.default_rng(0)
        seen = np.mean([len({expert for _ in range(20) for expert in rng.choice(64, 4, replace=False)})
                        for _ in range(400)])
        return expects(float(yours(20, 4, 64)), float(seen), 0.02)
    return examine("experts_touched", {
        "no token": lambda: case(0, 10, 512), "16 tokens": lambda: case(16, 10, 512),
        "512 tokens": lambda: case(512, 10, 512), "20 tokens, 4 of 64, against 400 throws of the dice": simulated,
        "half of the choices on 16 favourites": lambda: case(64, 10, 512, 16, 0.5),
        "nearly all of them": lambda: case(64, 10, 512, 16, 0.95)})


def check_worth_most(yours: Callable[[dict, dict], tuple[str, float]]) -> bool:
    """(seconds by part, at best so many times faster by part) -> the part worth most, and the whole step's gain."""
    def case(times: dict[str, float], factors: dict[str, float]) -> str | None:
        whole = sum(times.values())
        gains = {part: whole / (whole - seconds + seconds / factors[part]) for part, seconds in times.items()}
        wanted = max(gains, key=gains.get)
        got = yours(dict(times), dict(factors))
        if not isinstance(got, tuple) or len(got) != 2:
            return f"{times}: expected a pair (part, gain), got {got!r:.60}"
        if got[0] != wanted:
            return f"{times}, factors {factors}: expected {wanted!r}, got {got[0]!r}"
        return expects(float(got[1]), gains[wanted])
    return examine("worth_most", {
        "the largest part is the one": lambda: case({"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 2.0}),
        "the largest part is perfect already": lambda: case({"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 4.0}),
        "a small part, infinitely faster": lambda: case({"a": 9.0, "b": 1.0}, {"a": 1.05, "b": math.inf}),
        "three parts": lambda: case({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 1.2, "b": 1.9, "c": 2.5})})
