"""Bugs of one line that chapter 06's *Equal?* cells must catch: (module, attribute, original -> broken)."""
from tinygrad import Tensor


def not_renormalised(original):
    """The weights of the picked experts stay what the softmax made them: they no longer sum to 1."""
    def route(x, router, used):
        ids, probs, every = original(x, router, used)
        return ids, probs * every.gather(1, ids).sum(axis=-1, keepdim=True), every
    return route


def weights_of_the_neighbour(original):
    """Each picked expert gets the weight of the next one."""
    return lambda x, w, ids, probs: original(x, w, ids, Tensor.cat(probs[:, 1:], probs[:, :1], dim=1))


BUGS = {
    "the picked experts' weights are not renormalised": ("minillama.experts", "route", not_renormalised),
    "gathered experts get each other's weights": ("minillama.experts", "gathered", weights_of_the_neighbour),
}
