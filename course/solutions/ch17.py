"""Solutions of chapter 17's exercises."""
import math


def cards_needed(weights: float, fixed: float, per_token: float, tokens: int, texts: int, card: float) -> int:
    """Weights once, states for every text, rounded up."""
    return math.ceil((weights + texts * (fixed + per_token * tokens)) / card)


def experts_touched(tokens: int, used: int, experts: int, few: int = 0, common: float = 0.0) -> float:
    """Of each of two groups of experts, those that are not missed by every choice."""
    groups = ((few, common), (experts - few, 1 - common))
    return sum(count * (1 - (1 - share / count) ** (tokens * used)) for count, share in groups if count)


def worth_most(times: dict[str, float], factors: dict[str, float]) -> tuple[str, float]:
    """What a part saves at best decides, not how long it takes."""
    saved = {part: seconds * (1 - 1 / factors[part]) for part, seconds in times.items()}
    part, whole = max(saved, key=saved.get), sum(times.values())
    return part, whole / (whole - saved[part])
