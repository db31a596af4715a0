"""Bugs of one line that chapter 17's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def context_alone(original):
    """The state has room for the text only, not for the padded batch behind it."""
    return lambda config, context: original(config, context - 512)


def routers_asleep(original):
    """Routers and shared experts are taken for experts, of which a token uses a few."""
    def part_of(name, config):
        part = original(name, config)
        return "experts" if part == "routers and shared experts" else part
    return part_of


def twice(original):
    """Weights are counted as if each were stored twice."""
    return lambda record: 2 * original(record)


def blind(original):
    """A token does not see itself."""
    return lambda q, k, v, start: original(q, k, v, start - 1)


BUGS = {
    "a token does not see itself": ("minillama.attention", "attend", blind),
    "no room for a padded batch is counted": ("minillama.describe", "state_bytes", context_alone),
    "routers and shared experts count as experts": ("minillama.describe", "part_of", routers_asleep),
    "weights are counted twice": ("minillama.shapes", "weight_bytes", twice),
}
