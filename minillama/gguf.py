"""A reader of GGUF files: metadata and tensors, from one file or from several shards.

It maps the file and walks through its header: every count, length, offset and size is held against the size of the
file. Only when all of them agree are strings and lists made, and tensors not before they are asked for. So a damaged
file ends in one clear `GGUFError` and costs next to no memory. It knows nothing about models (`config.py` does). Read
are versions 2 and 3, little-endian. The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minillama.blocks import BY_CODE, FORMATS, Format, unpack

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 16
MAX_NAME = 1 << 12  # bytes of a key's or tensor's name
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
SMALLEST_KEY = 8 + 4 + 1  # bytes: length of the name, type, a one-byte value
SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: length of the name, rank, one dimension, format, offset
SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GGUFError(ValueError):
    """A file that cannot be used. The message is one line: which file, and what is wrong with it."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` is in numpy's order (rows × columns), `offset` bytes from its shard's start."""

    name: str
    shape: tuple[int, ...]
    format: Format
    shard: int
    offset: int
    nbytes: int


class GGUF:
    """An open GGUF file. Given any one of several shards, finds and merges them all.

    `metadata` maps keys to Python scalars, strings and lists; `types` maps them to their GGUF type codes, `(code,)` or
    `(9, element code)` for a list; `tensors` maps names to `TensorInfo`. Raises `GGUFError`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._shards = _open_shards(self.path)
        self.paths = tuple(shard.path for shard in self._shards)
        self.metadata: dict[str, Any] = self._shards[0].metadata
        self.types: dict[str, tuple[int, ...]] = self._shards[0].types
        self.tensors = _merge_tensors(self._shards)

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as they lie in the file: a read-only uint8 view of the map, (nbytes,)."""
        info = self._info(name)
        return np.frombuffer(self._shards[info.shard].data, np.uint8, info.nbytes, info.offset)

    def values(self, name: str) -> np.ndarray:
        """The tensor unpacked on the host: float32, of its `shape`."""
        info = self._info(name)
        return unpack(self.raw(name), info.format, info.shape)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: there is no tensor {_short(name)}")
        return self.tensors[name]


@dataclass(frozen=True)
class _Shard:
    path: Path
    data: mmap.mmap
    metadata: dict[str, Any]
    types: dict[str, tuple[int, ...]]
    tensors: list[TensorInfo]


class _Cursor:
    """Reads one value after another; every read is checked against the end of the file. `place` says where we are.

    Strings and lists come as functions that make them: whoever calls these has first seen that the header is whole.
    """

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size = path, data, len(data)
        self.position, self.place = 0, "header"

    def fail(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.path}: {self.place}: {problem}")

    def past_end(self, what: str, position: int) -> GGUFError:
        return self.fail(f"{what} at byte {position} runs past the end of the file ({self.size} bytes); truncated?")

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.position:
            raise self.past_end(what, self.position)

    def number(self, letter: str) -> Any:
        layout = struct.Struct("<" + letter)
        self.need(layout.size, "a number")
        (value,) = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return value

    def name(self) -> str:
        start, length = self.position, self.number("Q")
        if length > MAX_NAME:
            raise self.fail(f"the name at byte {start} has {length} bytes, more than {MAX_NAME}")
        self.position = start
        return self.strings(1)()[0]

    def strings(self, count: int) -> Callable[[], list[str]]:
        """`count` strings, each a 64-bit length and UTF-8 bytes. A tight loop: Qwen's vocabulary has 300,000."""
        self.need(8 * count, f"a list of {count} strings")
        data, size, position, length_at = self.data, self.size, self.position, struct.Struct("<Q").unpack_from
        make = partial(self.decoded, self.place, position, count)
        for _ in range(count):
            end = position + 8 + length_at(data, position)[0] if position + 8 <= size else position + 8
            if end > size:
                raise self.past_end("a string", position)
            position = end
        self.position = position
        return make

    def decoded(self, place: str, position: int, count: int) -> list[str]:
        """`count` strings from `position`, whose lengths have been checked."""
        data, length_at, strings = self.data, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            start = position + 8
            position = start + length_at(data, position)[0]
            try:
                strings.append(data[start:position].decode())
            except UnicodeDecodeError:
                self.place = place
                raise self.fail(f"the string at byte {start - 8} is not valid UTF-8") from None
        return strings

    def scalar(self, code: int) -> Any:
        value = self.number(SCALARS[code])
        if code == BOOL and value > 1:
            raise self.fail(f"a truth value is {value}, neither 0 nor 1")
        return bool(value) if code == BOOL else value

    def array(self) -> tuple[int, Callable[[], list]]:
        """The elements' type code, and what makes the list."""
        code, count = self.number("I"), self.number("Q")
        if code == STRING:
            return code, self.strings(count)
        if code not in SCALARS:  # lists of lists are refused, as llama.cpp refuses them
            raise self.fail(f"list elements have type {code}, which is neither a number nor a string")
        dtype = np.dtype("<" + SCALARS[code])
        self.need(dtype.itemsize * count, f"a list of {count} numbers")
        view = np.frombuffer(self.data, dtype, count, self.position)
        if code == BOOL and count and view.max() > 1:
            raise self.fail(f"a truth value is {view.max()}, neither 0 nor 1")
        self.position += view.nbytes
        return code, (view.view(np.bool_) if code == BOOL else view).tolist


def _open_shards(path: Path) -> list[_Shard]:
    """The shard at `path` and, where its metadata says that there are several, all its siblings in order."""
    first = _read_shard(path, 0)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return [first]
    match = SHARD_NAME.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise GGUFError(f"{path}: one of {count} shards, so its name must end in -0000i-of-{count:05d}.gguf")
    shards = []
    for i in range(count):
        sibling = path.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf")
        if not sibling.exists():
            raise GGUFError(f"{path}: shard {sibling.name} is missing beside it ({count} shards in all)")
        shards.append(_read_shard(sibling, i))
        if shards[i].metadata.get("split.count") != count or shards[i].metadata.get("split.no") != i:
            raise GGUFError(f"{sibling}: its split.no and split.count do not say shard {i} (from 0) of {count}")
    return shards


def _merge_tensors(shards: list[_Shard]) -> dict[str, TensorInfo]:
    """All shards' tensors by name; their number must be what each shard's `split.tensors.count` promises."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in tensors:
                raise GGUFError(f"{shard.path}: tensor {_short(info.name)} is there twice")
            tensors[info.name] = info
    for shard in shards:
        total = shard.metadata.get("split.tensors.count", len(tensors))
        if total != len(tensors):
            raise GGUFError(f"{shard.path}: split.tensors.count is {_short(total)}, the shards hold {len(tensors)}")
    return tensors


def _read_shard(path: Path, shard: int) -> _Shard:
    data = _map(path)
    cursor = _Cursor(path, data)
    tensor_count, key_count = _read_counts(cursor)
    metadata, types = _read_metadata(cursor, key_count)
    tensors = _read_tensors(cursor, tensor_count, _alignment(cursor, metadata, types), shard)
    metadata = {key: _made(value, types[key]) for key, value in metadata.items()}
    return _Shard(path, data, metadata, types, tensors)


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise GGUFError(f"{path}: the file is empty") from None
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Magic, version, and the numbers of tensors and of metadata keys, each possible in a file of this size."""
    if cursor.data[:4] != MAGIC:
        raise cursor.fail(f"not a GGUF file: it starts with {cursor.data[:4]!r}, not with {MAGIC!r}")
    cursor.position = 4
    version = cursor.number("I")
    if version and not version & 0xFFFF:
        raise cursor.fail("a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        age = "too old" if version < VERSIONS[0] else "unknown"
        raise cursor.fail(f"GGUF version {version} is {age}; versions {VERSIONS[0]} and {VERSIONS[-1]} are read")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    cursor.need(tensor_count * SMALLEST_TENSOR, f"a list of {tensor_count} tensors")
    cursor.need(key_count * SMALLEST_KEY, f"a list of {key_count} metadata keys")
    return tensor_count, key_count


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Key → its value, or the function that makes it, and key → its type codes."""
    metadata: dict[str, Any] = {}
    types: dict[str, tuple[int, ...]] = {}
    for i in range(count):
        cursor.place = f"metadata key {i + 1} of {count}"
        key = cursor.name()
        cursor.place = f"metadata key {_short(key)}"
        if key in metadata:
            raise cursor.fail("is there twice")
        code = cursor.number("I")
        types[key] = (code,)
        if code == ARRAY:
            element, metadata[key] = cursor.array()
            types[key] = (ARRAY, element)
        elif code == STRING:
            metadata[key] = cursor.strings(1)
        elif code in SCALARS:
            metadata[key] = cursor.scalar(code)
        else:
            raise cursor.fail(f"its value has the unknown type {code}")
    return metadata, types


def _made(value: Any, kind: tuple[int, ...]) -> Any:
    made = value() if callable(value) else value
    return made[0] if kind == (STRING,) else made


def _alignment(cursor: _Cursor, metadata: dict[str, Any], types: dict[str, tuple[int, ...]]) -> int:
    """Tensor data starts at multiples of this many bytes."""
    cursor.place = "metadata key 'general.alignment'"
    if types.get("general.alignment", (UINT32,)) != (UINT32,):
        raise cursor.fail("must be a 32-bit unsigned integer")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"is {alignment}, not a power of two from 8 to {MAX_ALIGNMENT}")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int, shard: int) -> list[TensorInfo]:
    """Tensors must follow each other as llama.cpp demands, nothing but zeros between them and nothing after the last.

    A wrong size or format is then found out: it leaves a gap, or data where padding should be.
    """
    found = [_read_tensor(cursor, f"tensor {i + 1} of {count}") for i in range(count)]
    base = _align(cursor.position, alignment)
    tensors, end = [], cursor.position
    for name, shape, fmt, offset, nbytes in found:
        cursor.place = f"tensor {_short(name)}"
        start = _align(end, alignment)
        if base + offset != start:
            fault = "overlaps the tensor before it" if base + offset < start else "leaves a gap before it"
            raise cursor.fail(f"its data at offset {offset} {fault}; offset {start - base} was expected")
        if any(cursor.data[end:start]):
            raise cursor.fail(f"the padding before it, bytes {end} to {start - 1}, is not zero")
        end = start + nbytes
        if end > cursor.size:
            raise cursor.fail(f"its data ends at byte {end}, the file at byte {cursor.size}; truncated?")
        tensors.append(TensorInfo(name, shape, fmt, shard, start, nbytes))
    if tensors and (cursor.size > _align(end, alignment) or any(cursor.data[end:])):
        raise cursor.fail(f"it is the last and ends at byte {end}, yet the file of {cursor.size} bytes goes on")
    return tensors


def _read_tensor(cursor: _Cursor, place: str) -> tuple[str, tuple[int, ...], Format, int, int]:
    """Name, shape, format, offset from the start of the data, and size in bytes of one tensor."""
    cursor.place = place
    name = cursor.name()
    cursor.place = f"tensor {_short(name)}"
    rank = cursor.number("I")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise cursor.fail(f"has {rank} dimensions, not 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]  # the file names columns first
    code, offset = cursor.number("I"), cursor.number("Q")
    if code not in BY_CODE:
        raise cursor.fail(f"format code {code} is not one of those read here: {' '.join(FORMATS)}")
    fmt = BY_CODE[code]
    values = 1
    for length in shape:
        values *= length
    if not values:
        raise cursor.fail(f"its shape {shape} is empty")
    if shape[-1] % fmt.block:
        raise cursor.fail(f"its rows have {shape[-1]} values, not a multiple of {fmt.name}'s {fmt.block}")
    return name, shape, fmt, offset, values // fmt.block * fmt.size


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _short(value: Any) -> str:
    """A name as it may stand in a message: quoted, control characters escaped, and not too long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:76] + "...'"
