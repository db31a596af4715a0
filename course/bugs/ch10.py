"""Bugs of one line that chapter 10's *Equal?* cells must catch: (module, attribute, original -> broken)."""
from dataclasses import replace


def one_row_too_late(original):
    """The head runs for the row behind the text: the first one of the padding."""
    def last_logits(self, hidden, at):
        late = at if at.valid is None or self.recipe.logits == "all" else replace(at, valid=at.valid + 1)
        return original(self, hidden.cat(hidden[-1:]) if late is not at else hidden, late)
    return last_logits


def positions_stand_still(original):
    """Angles are those of the first rows, wherever the batch stands, as if the position had been frozen at capture."""
    return lambda self, table: table[:self.tokens] if self.given else original(self, table)


BUGS = {
    "the head takes the row behind the last": ("minillama.engine", "Engine.last_logits", one_row_too_late),
    "under prune the position is frozen": ("minillama.model", "Place.rows", positions_stand_still),
}
