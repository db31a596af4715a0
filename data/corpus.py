"""Collect the Python source that the shipped model is trained on: `python data/corpus.py --out build/corpus`.

Reads `packages.toml` (pinned packages, permissive licences), fetches their wheels with `pip download` (nothing is
built or run), adds the standard library of the running interpreter, keeps what a person wrote to be read, and writes

    train.txt.xz, heldout.txt.xz   documents (one file each) in shuffled order, separated by a NUL byte
    manifest.json                  per package: version, licence, files and bytes kept, why others were left out
    tokenizer.json                 byte-level BPE with the qwen2 pre-tokenizer, trained on the training text

and the table of packages into `data/README.md`. The same wheels and the same interpreter give the same bytes.
"""

import argparse
import ast
import json
import lzma
import random
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from email.parser import Parser
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minillama.tokenizer import PRE_TOKENIZERS

HERE = Path(__file__).parent
SEPARATOR = "\x00"
VOCABULARY = 4096
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # after the base vocabulary, as Qwen has them
TOKENIZER_SAMPLE = 60_000_000  # bytes of training text that the tokenizer is trained on

SMALLEST, LARGEST = 400, 400_000  # bytes of a file
LONGEST_LINE = 400
WINDOW = 5  # lines of a shingle: the unit in which copies are recognised
SEEN_ELSEWHERE = 0.3  # a training file with a larger share of known shingles is a copy
SEEN_IN_HELD_OUT = 0.02  # and the same, more strictly, of what is held out

NOT_SOURCE = re.compile(
    r"(^|/)(tests?|testing|_tests?|_testing|unittests?|test_?data|test_?suites?|fixtures?|locales?|_?vendor(ed)?"
    r"|_vendored?|_?externals?|extern|third_party|thirdparty|generated|_?gen|protos?|migrations|site-packages"
    r"|idle_test|lib2to3|ensurepip|pip/_internal/distlib)/"
    r"|(^|/)(test_\w*|\w*_tests?|conftest|_?version|\w*_pb2(_grpc)?|_?lextab|\w*_?yacctab|parsetab)\.py$")
GENERATED = re.compile(
    r"^(#|[\"']{3}).*(auto-?\s?(matically )?generated|generated (by|from|with|automatically)|do not (edit|modify))",
    re.I | re.M)
COPYLEFT = re.compile(r"\bL?GPL|GNU (Lesser |Affero )?General Public", re.I)


@dataclass
class Package:
    """One package: where its files are, which were kept (`documents`), and why the others were not (`dropped`)."""

    name: str
    version: str
    licence: str
    held_out: bool
    source: Path
    cap: int = sys.maxsize  # bytes
    declared: str = ""
    documents: list[str] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)

    def row(self) -> dict:
        size = sum(len(text.encode()) for text in self.documents)
        return {"name": self.name, "version": self.version, "licence": self.licence, "declared": self.declared,
                "held_out": self.held_out, "files": len(self.documents), "bytes": size, "dropped": dict(self.dropped)}


def read_list() -> tuple[int, list[Package]]:
    """The seed and the packages of `packages.toml`; each package's `source` is not known yet."""
    data = tomllib.loads((HERE / "packages.toml").read_text())
    caps = {"held_out": sys.maxsize, "train": data["corpus"]["cap"]}
    packages = [Package(name, version, licence, group == "held_out", Path(), cap)
                for group, cap in caps.items() for name, (version, licence) in data[group].items()]
    return data["corpus"]["seed"], packages


def fetch(packages: list[Package], folder: Path) -> None:
    """Download the pinned wheels that `folder` lacks, and note each package's wheel as its source."""
    folder.mkdir(parents=True, exist_ok=True)

    def wheel(package):
        stem = re.sub(r"[-_.]+", "_", package.name).lower()
        found = [p for p in folder.glob("*.whl") if p.name.lower().startswith(f"{stem}-{package.version}-")]
        return found[0] if found else None

    missing = [f"{p.name}=={p.version}" for p in packages if not wheel(p)]
    if missing:
        print(f"fetching {len(missing)} wheels", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                        "-d", str(folder), *missing], check=True)
    for package in packages:
        package.source = wheel(package)


def standard_library() -> Package:
    version = ".".join(map(str, sys.version_info[:3]))
    return Package("python", version, "PSF-2.0", False, Path(sysconfig.get_path("stdlib")),
                   declared="standard library")


def files_of(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every Python file of a wheel or a folder, tests and vendored copies left out."""
    if source.is_dir():
        for path in sorted(source.rglob("*.py")):
            name = path.relative_to(source).as_posix()
            if not NOT_SOURCE.search(name):
                yield name, path.read_bytes()
        return
    with zipfile.ZipFile(source) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".py") and not NOT_SOURCE.search(name) and ".data/" not in name:
                yield name, wheel.read(name)


def declared_licence(wheel: Path) -> str:
    """What the wheel's own metadata says about its licence, in one short line."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        meta = Parser().parsestr(archive.read(name).decode("utf-8", "replace"))
    classifiers = [c.rsplit(" :: ")[-1] for c in meta.get_all("Classifier", []) if c.startswith("License")]
    text = meta.get("License-Expression") or (meta.get("License") or "").strip() or "; ".join(classifiers)
    return text.split("\n")[0][:80] or "see the licence file in the wheel"


def clean(raw: bytes) -> tuple[str, str]:
    """(text, "") for a file worth learning from, else ("", reason). The licence header's comments are cut off."""
    if not SMALLEST <= len(raw) <= LARGEST:
        return "", "size"
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return "", "not Python or not UTF-8"
    if GENERATED.search(text[:3000]):
        return "", "generated"
    if COPYLEFT.search(text):
        return "", "mentions a copyleft licence"
    text = strip_header(text)
    reason = unreadable(text) or table_like(text, tree)
    return ("", reason) if reason else (text, "")


def strip_header(text: str) -> str:
    """Drop the comments and blank lines at the top: licence headers repeat thousands of times."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "\n".join(lines[first:]).rstrip() + "\n"


def unreadable(text: str) -> str:
    """Why the text does not read as plain source (a reason), or ""."""
    lines = text.split("\n")
    if len(text) < SMALLEST:
        return "size"
    if sum(not c.isascii() for c in text) > 0.01 * len(text) or re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
        return "not ASCII"
    if re.search(r"^ *\t", text, re.M) or sum(bool(re.match(r"  \S", line)) for line in lines) > 0.05 * len(lines):
        return "not indented by four spaces"
    if max(map(len, lines)) > LONGEST_LINE or sum(len(line) > 120 for line in lines) > 0.05 * len(lines):
        return "long lines"
    return ""


def table_like(text: str, tree: ast.Module) -> str:
    """Whether literals (tables of numbers, word lists) make up much of the file."""
    digits = sum(c.isdigit() for c in text)
    if digits > 0.12 * len(text):
        return "tables"
    literal = (ast.List, ast.Dict, ast.Set, ast.Tuple)
    covered = 0
    for node in ast.walk(tree):
        if isinstance(node, literal):
            elements = len(node.keys if isinstance(node, ast.Dict) else node.elts)
            if elements > 200:
                return "tables"
        if isinstance(node, ast.Assign) and isinstance(node.value, (*literal, ast.Constant)):
            covered += node.end_lineno - node.lineno if node.end_lineno - node.lineno > 20 else 0
    return "tables" if covered > 0.4 * text.count("\n") else ""


def read_package(package: Package, seed: int) -> Package:
    """Clean the package's files in a seeded order, until half as much again as the cap is there (copies go later)."""
    files = list(files_of(package.source))
    random.Random(f"{seed} {package.name}").shuffle(files)
    room = package.cap * 1.5
    for _, raw in files:
        if room <= 0:
            package.dropped["over the cap"] += 1
            continue
        text, reason = clean(raw)
        if reason:
            package.dropped[reason] += 1
        else:
            package.documents.append(text)
            room -= len(text)
    if package.source.is_file():
        package.declared = declared_licence(package.source)
    return package


def shingles(text: str) -> set[int]:
    """Hashes of every run of `WINDOW` lines that are not blank, indentation and spacing ignored."""
    lines = ["".join(line.split()) for line in text.split("\n")]
    lines = [line for line in lines if len(line) > 3]
    return {hash(tuple(lines[i:i + WINDOW])) for i in range(max(1, len(lines) - WINDOW + 1))}


def drop_copies(packages: list[Package]) -> float:
    """Keep each document that is new: held-out packages first, then the others against them and against each other.

    Returns the share of the held-out shingles that training text still holds.
    """
    held_out, training = set(), set()
    for package in sorted(packages, key=lambda p: not p.held_out):
        seen = held_out if package.held_out else training
        kept, room = [], package.cap
        for text in package.documents:
            marks = shingles(text)
            if not package.held_out and len(marks & held_out) > SEEN_IN_HELD_OUT * len(marks):
                package.dropped["shared with held-out text"] += 1
            elif len(marks & seen) > SEEN_ELSEWHERE * len(marks):
                package.dropped["copy"] += 1
            elif len(text) > room:
                package.dropped["over the cap"] += 1
            else:
                kept.append(text)
                room -= len(text)
                seen |= marks
        package.documents = kept
    return len(held_out & training) / max(1, len(held_out))


def write_text(path: Path, documents: list[str]) -> dict:
    """Join and compress; returns the sizes."""
    raw = SEPARATOR.join(documents).encode()
    packed = lzma.compress(raw, preset=9)
    path.write_bytes(packed)
    return {"file": path.name, "documents": len(documents), "bytes": len(raw), "xz": len(packed),
            "xz_bits_per_byte": round(8 * len(packed) / len(raw), 4),
            "gzip_bits_per_byte": round(8 * len(zlib.compress(raw, 9)) / len(raw), 4)}


def train_tokenizer(documents: list[str], entries: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE of `entries` tokens; the ChatML specials take the last ids, as in Qwen's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=entries - len(SPECIALS), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def sample(documents: list[str], size: int) -> list[str]:
    """The first documents of `size` characters in all: they are shuffled already."""
    taken = []
    for text in documents:
        if size <= 0:
            break
        taken.append(text)
        size -= len(text)
    return taken


def update_readme(rows: list[dict]) -> None:
    """Write the table of packages between the markers in `data/README.md`."""
    lines = ["| package | version | licence | files | MB | |", "|---|---|---|---:|---:|---|"]
    lines += [f"| {r['name']} | {r['version']} | {r['licence']} | {r['files']} | {r['bytes'] / 1e6:.2f} "
              f"| {'held out' if r['held_out'] else ''} |" for r in rows]
    path = HERE / "README.md"
    before, after = "<!-- packages -->\n", "\n<!-- /packages -->"
    head, _, rest = path.read_text().partition(before)
    tail = rest.partition(after)[2]
    path.write_text(head + before + "\n".join(lines) + after + tail)


def write(texts: dict[str, list[str]], folder: Path, seed: int) -> dict[str, dict]:
    """Shuffle and write both texts, and the tokenizer meanwhile; returns what there is to say about each text."""
    folder.mkdir(parents=True, exist_ok=True)
    for documents in texts.values():
        random.Random(seed).shuffle(documents)
    with ThreadPoolExecutor() as pool:  # the compressor leaves Python's lock free
        jobs = {name: pool.submit(write_text, folder / f"{name}.txt.xz", text) for name, text in texts.items()}
        tokenizer = train_tokenizer(sample(texts["train"], TOKENIZER_SAMPLE))
        sizes = {name: job.result() for name, job in jobs.items()}
    for path in (folder / "tokenizer.json", HERE / "tokenizer.json"):
        tokenizer.save(str(path), pretty=False)
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts["heldout"]))
    sizes["heldout"]["bytes_per_token"] = round(sizes["heldout"]["bytes"] / tokens, 4)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/corpus"))
    parser.add_argument("--wheels", type=Path, default=Path("build/wheels"), help="where wheels are kept")
    arguments = parser.parse_args()
    seed, packages = read_list()
    fetch(packages, arguments.wheels)
    packages.insert(0, standard_library())
    with ProcessPoolExecutor() as pool:
        packages = list(pool.map(read_package, packages, [seed] * len(packages)))
    leaked = drop_copies(packages)
    texts = {"train": [text for p in packages for text in p.documents if not p.held_out],
             "heldout": [text for p in packages for text in p.documents if p.held_out]}
    sizes = write(texts, arguments.out, seed)
    sizes["heldout"]["shingles_in_train"] = round(leaked, 5)
    rows = [p.row() for p in packages]
    (arguments.out / "manifest.json").write_text(json.dumps({"texts": sizes, "packages": rows}, indent=1) + "\n")
    update_readme(rows)
    print(json.dumps(sizes, indent=1))


if __name__ == "__main__":
    main()
