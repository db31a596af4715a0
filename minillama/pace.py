"""How many tokens to draft: what is accepted and what a round takes decide, both as seen so far."""

TRIALS = 4          # rounds with all drafts before anything is compared
AGAIN = 64          # rounds without drafts, after which one looks whether they pay by now
WORTH = 1.1         # what a length that was never run must promise, since its graph must be built first
KEPT = 0.95         # what one observation leaves of the weight of those before


class Pace:
    """Chooses the draft length that should give most tokens a second, 0 where drafting loses.

    A round with n drafts gives 1 + p_1 + p_1 p_2 + ... tokens, p_i the share of accepted drafts at place i among those
    that were looked at. The seconds of a length not tried yet are read off the line between its neighbours.
    """

    def __init__(self, most: int):
        self.most = most
        self.drafted, self.accepted = [0] * most, [0] * most       # by place: looked at, kept
        self.shares = [[0.5, 1.0] for _ in range(most)]             # by place: kept, looked at; faded, with a start
        self.seconds: dict[int, float] = {}
        self.rounds = self.without = self.idle = 0      # all; those without drafts, and how many of these came last

    def share(self, place: int) -> float:
        """Of the drafts at a place (from 0) that were looked at lately, how many were kept."""
        kept, seen = self.shares[place]
        return kept / seen

    def tokens(self, length: int) -> float:
        """Tokens to expect of a round."""
        total, reached = 1.0, 1.0
        for place in range(length):
            reached *= self.share(place)
            total += reached
        return total

    def time(self, length: int) -> float:
        """Seconds to expect of a round, where the ends have been timed."""
        below = max(n for n in self.seconds if n <= length)
        above = min(n for n in self.seconds if n >= length)
        if below == above:
            return self.seconds[below]
        part = (length - below) / (above - below)
        return self.seconds[below] * (1 - part) + self.seconds[above] * part

    def choose(self) -> int:
        """The length of the next round."""
        if self.rounds < TRIALS or self.most not in self.seconds or self.idle >= AGAIN:
            return self.most
        if 0 not in self.seconds:
            return 0
        best = max(self.seconds, key=self.speed)
        new = max(range(self.most + 1), key=self.speed)
        return new if self.speed(new) > WORTH * self.speed(best) else best

    def speed(self, length: int) -> float:
        """Tokens a second to expect."""
        return self.tokens(length) / self.time(length)

    def note(self, length: int, accepted: int, seconds: float | None) -> None:
        """What a round did; seconds are None where it was set up in them."""
        self.rounds += 1
        self.without += not length
        self.idle = 0 if length else self.idle + 1
        for place in range(min(accepted + 1, length)):
            kept = place < accepted
            self.drafted[place] += 1
            self.accepted[place] += kept
            self.shares[place] = [self.shares[place][0] * KEPT + kept, self.shares[place][1] * KEPT + 1]
        if seconds is not None:     # a round that was held up counts for little, a quick one for all
            self.seconds[length] = min(seconds, 0.8 * self.seconds.get(length, seconds) + 0.2 * seconds)
