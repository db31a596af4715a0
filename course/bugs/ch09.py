"""Bugs of one line that chapter 09's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def frozen_position(original):
    """A captured step stays at the position at which it was captured: its number is used, not its variable."""
    def place_of(ids, start, valid):
        return original(ids, start if isinstance(start, int) else start.unbind()[1], valid)
    return place_of


def one_graph_for_all(original):
    """The state of the step before is gone: every token starts from an empty text."""
    def step(self, *given):
        self.state.clear()
        return original(self, *given)
    return step


def position_of_the_first(original):
    """The table keeps the variables with which it was captured."""
    return lambda self, values: ()


BUGS = {
    "a replay's position is frozen": ("minillama.model", "place_of", frozen_position),
    "the state is lost between replays": ("minillama.engine", "Engine.step", one_graph_for_all),
    "a CPU's graph stays at the first position": ("minillama.kernels.cpu_graph", "CPUGraph.updated_vars",
                                                  position_of_the_first),
}
