"""Function bodies that the shipped model writes, for signatures and documentation strings it has never seen.

The list: module-level functions of the held-out packages that have a documentation string and, below it, a body of at
least one statement that fits into the 128 tokens; the prompt, from "def" to the end of that string, has at most 384.
Of all these, 100 are drawn by a seeded generator. The model continues each at temperature 0; the body ends before the
first line that is not indented, at <|endoftext|>, or after 128 tokens. It counts if the whole function then parses and
the body has a statement that is neither a documentation string nor `pass`. 128 tokens mostly end inside a line: such a
body is judged twice, without the unfinished line and with it.
"""
import ast
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from minillama.tokenizer import Tokenizer

COUNT, SEED = 100, 0
LONGEST_PROMPT, LONGEST_BODY = 384, 128     # tokens
TEXTS = Path(__file__).parent / "completions.jsonl"


@dataclass(frozen=True)
class Completion:
    """A function's prompt and the body that the model wrote; `tokens` of it, those that end it included."""
    name: str
    prompt: str
    body: str
    tokens: int

    @property
    def lines(self) -> str:
        """The body without the line that was not finished when the tokens ran out."""
        return self.body if self.tokens < LONGEST_BODY else "".join(self.body.splitlines(keepends=True)[:-1])

    def verdict(self) -> dict[str, float]:
        """1 or 0: whether it counts by whole lines, and whether it does as it was cut."""
        return {"counts": float(has_statement(self.prompt + self.lines)),
                "counts_as_cut": float(has_statement(self.prompt + self.body))}


def functions(text: str) -> Iterator[tuple[str, str, str]]:
    """Name, prompt and body of the module-level functions with a documentation string and something below it."""
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            last = node.body[0].end_lineno
            if node.lineno <= last < node.body[1].lineno:
                yield node.name, "".join(lines[node.lineno - 1:last]), "".join(lines[last:node.end_lineno])


def candidates(texts: list[str], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(name, prompt) of every function of the list, in the text's order; each prompt once."""
    found = {}
    for text in texts:
        for name, prompt, body in functions(text):
            short = len(tokenizer.encode(prompt)) <= LONGEST_PROMPT and len(tokenizer.encode(body)) <= LONGEST_BODY
            if short and has_statement(prompt + body):
                found[prompt] = name
    return [(name, prompt) for prompt, name in found.items()]


def chosen(texts: list[str], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The hundred, in the order in which they were drawn."""
    return random.Random(SEED).sample(candidates(texts, tokenizer), COUNT)


def has_statement(source: str) -> bool:
    """Whether the source parses, as one function with a statement beside documentation strings and `pass`."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    body = tree.body[0].body if len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef) else []
    return any(not isinstance(node, ast.Pass) and not (isinstance(node, ast.Expr) and isinstance(
        node.value, ast.Constant) and isinstance(node.value.value, str)) for node in body)


def dedent_at(text: str) -> int | None:
    """Where the first line begins that is neither blank nor indented; None if there is no such line (yet)."""
    at = 0
    for line in text.splitlines(keepends=True):
        if not line[0].isspace():
            return at
        at += len(line)
    return None


def complete(engine, name: str, prompt: str) -> Completion:
    """Let the engine continue one prompt, up to the body's end."""
    engine.clear()
    tokenizer, text, count = engine.tokenizer, "", 0
    ids = engine.generate(tokenizer.encode(prompt), LONGEST_BODY)
    new = itertools.takewhile(lambda token: token not in tokenizer.stops, ids)
    counting = itertools.count()
    for piece in tokenizer.decode_stream(token for token, _ in zip(new, counting, strict=False)):
        text += piece
        if dedent_at(text) is not None:
            break
    count = next(counting)
    return Completion(name, prompt, text[:dedent_at(text)].rstrip() + "\n", count)


def read_completions() -> list[Completion]:
    return [Completion(**json.loads(line)) for line in TEXTS.read_text(encoding="utf-8").splitlines()]


def measure_completions(corpus: Path, model: Path, result) -> None:
    """Write all of them to data/completions.jsonl and what counts to data/results/."""
    from quality import documents

    from minillama.commands import progress_bar
    from minillama.engine import Engine
    engine = Engine.load(model, context=LONGEST_PROMPT + LONGEST_BODY)
    done = []
    with progress_bar("completions") as update:
        for name, prompt in chosen(documents(corpus), engine.tokenizer):
            update(len(done), COUNT)
            done.append(complete(engine, name, prompt))
    store(done, result)


def store(done: list[Completion], result) -> None:
    """The texts beside this file, what counts in data/results/."""
    from minillama.results import Row, write_result
    TEXTS.write_text("".join(json.dumps(asdict(c)) + "\n" for c in done), encoding="utf-8")
    rows = [Row(f"{i}: {c.name}", tokens=c.tokens, values=c.verdict()) for i, c in enumerate(done, 1)]
    print(sum(row.values["counts"] for row in rows), "of", len(rows), write_result(result("completions", rows), False))
