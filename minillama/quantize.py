"""Quantize: one GGUF file → another, with its weights in another format.

Which tensor gets which format follows llama-quantize (src/llama-quant.cpp): small and sensitive tensors stay as they
are, the output head gets more bits, the mixes `_M` give more bits to some layers, and rows that do not divide into a
format's blocks fall back to a neighbouring one. The `gguf` package writes the file; `packers.py` makes the bytes.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import gguf
import numpy as np

from minillama.blocks import FORMATS, Format
from minillama.config import ModelConfig, check_tensors
from minillama.gguf import ARRAY, GGUF, GGUFError
from minillama.packers import pack

# target → the format of most tensors, and llama.cpp's number for such a file (general.file_type)
TARGETS = {
    "F32": ("F32", 0),
    "F16": ("F16", 1),
    "BF16": ("BF16", 32),
    "Q8_0": ("Q8_0", 7),
    "Q4_0": ("Q4_0", 2),
    "Q4_1": ("Q4_1", 3),
    "Q5_0": ("Q5_0", 8),
    "Q5_1": ("Q5_1", 9),
    "Q4_K": ("Q4_K", 14),
    "Q5_K": ("Q5_K", 16),
    "Q6_K": ("Q6_K", 18),
    "Q4_K_M": ("Q4_K", 15),
    "Q5_K_M": ("Q5_K", 17),
}
MIXES = ("Q4_K_M", "Q5_K_M")
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
PLAIN = ("F32", "F16", "BF16")
QUANTIZATION_VERSION = 2
WRITTEN_ANEW = ("general.architecture", "general.alignment", "general.quantization_version", "general.file_type")
LARGEST_HALF = 65504.0
Progress = Callable[[int, int], None]


def file_format(file: GGUF) -> str:
    """What a file says it was quantized to, Q4_K_M for example; else the format that holds most of its bytes."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.format.name] = sizes.get(tensor.format.name, 0) + tensor.nbytes
    named = {number: name for name, (_, number) in TARGETS.items()}
    number = file.metadata.get("general.file_type")
    return named.get(number if isinstance(number, int) else None, max(sizes, key=sizes.get))


def quantize(path_in: str | Path, path_out: str | Path, format: str, progress: Progress | None = None) -> None:
    """Writes `path_in` (one file or any of its shards) in the target format to `path_out`, one file.

    It is written beside `path_out` and renamed when it is whole, so a failure leaves what was there before.
    `progress(done, total)` is called after each tensor with numbers of values. Raises GGUFError.
    """
    if format not in TARGETS:
        raise GGUFError(f"unknown format {format!r:.40}; known are {' '.join(TARGETS)}")
    path_out, source = Path(path_out), GGUF(path_in)
    config = ModelConfig.from_gguf(source)
    check_tensors(source, config)
    formats = choose_formats(source, config, format)
    partial = path_out.with_name(f".{path_out.name}.{os.getpid()}.partial")
    try:
        _write(source, partial, formats, TARGETS[format][1], progress)
        os.replace(partial, path_out)
    except OSError as error:
        raise GGUFError(f"{path_out}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def choose_formats(source: GGUF, config: ModelConfig, target: str) -> dict[str, Format]:
    """Tensor name → its format in the quantized file, in the order in which they are written: by block, then name."""
    tensors = source.tensors
    chosen = quantized_formats({name: info.shape for name, info in tensors.items()}, config, target)
    return {name: FORMATS[chosen[name]] if name in chosen else tensors[name].format
            for name in sorted(tensors, key=lambda name: (_block(name), name))}


def quantized_formats(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, target: str) -> dict[str, str]:
    """Tensor name → the format that llama-quantize would give it, of those tensors that it quantizes."""
    names = sorted((_block(name), name) for name, shape in shapes.items() if _is_quantized(name, shape))
    valued = [name for _, name in names if name.endswith(("attn_v.weight", "attn_qkv.weight"))]     # one a layer
    formats = {}
    for block, name in names:
        place = (valued.index(name), len(valued)) if name in valued else (block, config.layers + config.mtp_blocks)
        chosen = _preferred(name, target, place, config.experts, tied="output.weight" not in shapes)
        formats[name] = _fallback(chosen, shapes[name][-1])
    return formats


def _block(name: str) -> int:
    """blk.7.attn_norm.weight → 7; tensors outside the blocks come first: -1."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices are, but for norms, the router and the convolution, which are small and sensitive."""
    if prod(shape[:-1]) == 1 or not name.endswith("weight"):
        return False
    return not name.endswith(("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight"))


def _preferred(name: str, target: str, place: tuple[int, int], experts: int, tied: bool) -> str:
    """The format by llama-quantize's rules; `place` is the tensor's number among its kind (or its block), of how many.

    The rules for 8 experts were made for Mixtral, but go by the number alone.
    """
    base = TARGETS[target][0]
    if base in PLAIN:
        return base
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q8_0" if base == "Q8_0" else "Q6_K"
    part = name.rsplit(".", 2)[-2]
    if experts == 8 and part in ("attn_v", "attn_qkv", "attn_k"):
        return "Q8_0"
    if experts == 8 and part == "attn_output" and target in ("Q4_K", "Q4_K_M"):
        return "Q5_K"
    more = part in ("attn_v", "attn_qkv") or part.startswith("ffn_down")
    return "Q6_K" if target in MIXES and more and _gets_more_bits(*place) else base


def _gets_more_bits(i: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2


def _fallback(name: str, columns: int) -> str:
    """The format itself where rows divide into its blocks, else its neighbour of 32, else F16."""
    if columns % FORMATS[name].block == 0:
        return name
    neighbour = FALLBACKS.get(name, name)
    return neighbour if columns % FORMATS[neighbour].block == 0 else "F16"


def _write(source: GGUF, path: Path, formats: dict[str, Format], file_type: int, progress: Progress | None) -> None:
    """Header first, then one tensor after another: never more than one tensor is in memory."""
    writer = gguf.GGUFWriter(path, source.metadata["general.architecture"])
    try:
        _copy_metadata(source, writer, file_type)
        for name, fmt in formats.items():
            shape = _matrix_shape(source.tensors[name].shape)
            code = gguf.GGMLQuantizationType(fmt.code)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), fmt.nbytes(shape), raw_dtype=code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in _with_progress(source, formats, progress):
            writer.write_tensor_data(_repacked(source, name, formats[name]))
    finally:
        writer.close()


def _copy_metadata(source: GGUF, writer: gguf.GGUFWriter, file_type: int) -> None:
    """Key by key with its type. How the source was split is left out, how its weights are packed is written anew."""
    for key, value in source.metadata.items():
        if key in WRITTEN_ANEW or key.startswith("split.") or value == []:  # the writer refuses empty lists
            continue
        code, *element = (gguf.GGUFValueType(code) for code in source.types[key])
        writer.add_key_value(key, value, code, sub_type=element[0] if code == ARRAY else None)
    if "general.alignment" in source.metadata:
        writer.add_custom_alignment(source.metadata["general.alignment"])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(file_type)


def _with_progress(source: GGUF, names: Iterable[str], progress: Progress | None) -> Iterable[str]:
    sizes = {name: prod(source.tensors[name].shape) for name in names}
    done, total = 0, sum(sizes.values())
    for name, size in sizes.items():
        yield name
        done += size
        if progress:
            progress(done, total)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without lengths of 1 in front, as llama-quantize writes them."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _repacked(source: GGUF, name: str, fmt: Format) -> np.ndarray:
    """The tensor's bytes in its new format; untouched where that is the old one."""
    if source.tensors[name].format == fmt:
        return source.raw(name)
    values = source.values(name)
    largest = np.abs(values).max()
    if not np.isfinite(largest):
        raise GGUFError(f"{source.path}: tensor '{name}' holds values that are not finite; it cannot be quantized")
    if largest > LARGEST_HALF and fmt.name not in ("F32", "BF16"):
        raise GGUFError(f"{source.path}: tensor '{name}' holds {largest:g}, which exceeds {fmt.name}'s half precision")
    return pack(values, fmt)
