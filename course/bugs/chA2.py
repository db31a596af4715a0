"""Bugs of one line that appendix A2's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def own_token(original):
    """The loss asks for the token that was read, not for the one behind it."""
    def cross_entropy(hidden, head, targets):
        return original(hidden, head, targets[:1].cat(targets[:-1]))
    return cross_entropy


def gate_and_up_swapped(original):
    """The file's gate and up projections of the experts are exchanged."""
    def as_gguf(p, config):
        found = original(p, config)
        return {name.replace("gate_exps", "*").replace("up_exps", "gate_exps").replace("*", "up_exps"): value
                for name, value in found.items()}
    return as_gguf


BUGS = {
    "the loss looks one token too far back": ("minillama.train", "cross_entropy", own_token),
    "gate and up are exchanged in the file": ("minillama.parameters", "as_gguf", gate_and_up_swapped),
}
