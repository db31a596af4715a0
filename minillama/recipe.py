"""A recipe: one choice per decision the course discusses, by name. Every optimization is one field."""
import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from minillama import delta_net, experts

CHOICES: dict[str, tuple[str, ...]] = {
    "delta": ("recurrent", "chunked", "fused"),
    "experts": ("dense", "gathered", "grouped"),
    "copies": ("everywhere", "none"),
    "capture": ("eager", "jit", "prune"),
    "logits": ("all", "last"),
    "projections": ("separate", "fused"),
    "weights": ("float", "packed"),
    "launches": ("after", "early"),
    "mtp_prefill": ("logits", "hidden", "kv"),
}
DRAFTS = 4          # at most: a token more must fit into the kernels for few tokens
LOADED = ("projections", "weights")     # how weights are laid out when a file is loaded: an engine cannot change it
FORMS: dict[str, dict[str, Callable]] = {
    "delta": {"recurrent": delta_net.recurrent, "chunked": delta_net.chunked, "fused": delta_net.fused},
    "experts": {"dense": experts.dense, "gathered": experts.gathered, "grouped": experts.grouped},
}


@dataclass(frozen=True)
class Recipe:
    """How the engine computes. A field is a name out of CHOICES.

    A value fixes both the form for prompts and that for single tokens: `delta="fused"` means chunks for prompts (on
    CPUs one kernel that goes token by token) and two kernels for a few tokens, `experts="grouped"` gathers where there
    are few. `delta` and `experts` may be functions of your own, with the signatures of `delta_net.recurrent` and
    `experts.dense`, or "module:name" of one; an `experts` function that cannot read `Packed` weights goes with
    weights="float".
    `launches="early"` lets a few tokens' kernels overlap where a GPU can (`kernels.overlap`), and replays captured
    steps as graphs on a CPU, whose cores share a prompt's kernels, and with OpenCL (`kernels.cpu_graph`, `cl_graph`);
    on Metal it changes nothing.
    `draft`: tokens that the MTP block guesses before the model looks at them, at most; with any, `mtp_prefill` says
    what runs for prompts.
    """
    delta: str | Callable = "fused"
    experts: str | Callable = "grouped"
    copies: str = "none"
    capture: str = "jit"
    logits: str = "last"
    projections: str = "fused"
    weights: str = "packed"
    launches: str = "early"
    draft: int = 0
    mtp_prefill: str = "kv"

    def __post_init__(self):
        if str(self.draft).isdecimal():
            object.__setattr__(self, "draft", int(self.draft))      # from the command line or a file
        for field in fields(self):
            self.form(field.name) if field.name in FORMS else self._check(field.name)
        if self.draft and self.capture == "prune":
            raise ValueError("recipe: drafts go with capture=jit or eager; pruning would freeze where they stand")
        if self.draft and self.delta != "fused":
            raise ValueError("recipe: drafts need delta=fused, whose memories step back by an index")

    def _check(self, name: str) -> None:
        value = getattr(self, name)
        if name == "draft":
            if value not in range(DRAFTS + 1):
                raise ValueError(f"recipe: draft is a number from 0 to {DRAFTS}, not {value!r}")
        elif value not in CHOICES[name]:
            raise ValueError(f"recipe: {name} is one of {', '.join(CHOICES[name])}, not {value!r}")

    def form(self, name: str) -> Callable:
        """The function behind `delta` or `experts`: the form for prompts, where a value names two."""
        value = getattr(self, name)
        if callable(value):
            return value
        if isinstance(value, str) and ":" in value:
            module, _, attribute = value.partition(":")
            try:
                found = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(f"recipe: {name}={value!r} cannot be imported: {error}") from error
            if not callable(found):
                raise ValueError(f"recipe: {name}={value!r} is no function")
            return found
        self._check(name)
        return FORMS[name][value]

    def names(self) -> dict[str, str]:
        """The fields as JSON holds them: a function is stored as "module:name"."""
        def name(value) -> str:
            return f"{value.__module__}:{value.__qualname__}" if callable(value) else str(value)
        return {field.name: name(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """Read "field=value,field=value"; the rest keeps its default."""
        changes = {}
        known = [field.name for field in fields(cls)]
        for part in filter(None, text.split(",")):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name not in known:
                raise ValueError(f"recipe: {part!r} is not field=value with a field of {', '.join(known)}")
            changes[name] = value
        return replace(cls(), **changes)
