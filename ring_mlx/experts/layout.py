"""Where each routed expert lies in the files of a checkpoint.

The streamed layout is the Hugging Face form in a special order: the tensors of one expert are neighbours, wide types
first, and begin at a multiple of 16 KiB, for which a tensor called ``padding`` may follow. The header's metadata holds a
hash of each expert, in the order of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.safetensors_header import BITS, Header, Tensor, TensorSpec, read_header
from ring_mlx.checkpoint.shards import add_tensors, find_shards
from ring_mlx.errors import WeightsError
from ring_mlx.model.config import RingConfig

ALIGN_BYTES = 16384
PADDING = "padding"
DIGEST_CHARACTERS = 16
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_STACK = re.compile(r"^model\.layers\.([0-9]{1,6})\.mlp\.switch_mlp\.(.+)$")
_EXPERT = re.compile(r"^model\.layers\.([0-9]{1,6})\.mlp\.experts\.([0-9]{1,6})\.")


@dataclass(frozen=True)
class Piece:
    """Neighbouring parts of an expert, which one read gets; ``parts`` are their indices in the order of the file."""

    file: Path
    offset: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """An expert's pieces in the files, and the hash of its parts in their order, if the file has one."""

    pieces: tuple[Piece, ...]
    digest: str | None


@dataclass(frozen=True)
class LayerPlaces:
    """The experts of one layer, which have the same parts, such as ``up_proj.weight``."""

    parts: tuple[TensorSpec, ...]
    experts: tuple[Place, ...]


def find_experts(folder: Path, config: RingConfig) -> dict[int, LayerPlaces]:
    """Every routed expert by layer, of stacks, single tensors or the streamed layout; a WeightsError if not whole."""
    tensors: dict[str, Tensor] = {}
    bases: dict[Path, int] = {}
    digests: dict[str, str] = {}
    for file in find_shards(folder):
        header = read_header(file)
        add_tensors(tensors, header.tensors, file)
        bases[file] = len(header.raw)
        digests |= _digests(file, header)
    stacks: dict[int, dict[str, list[Tensor]]] = {}
    for name, entry in weights.canonical(tensors, config).items():
        found = _STACK.match(name)
        if found is None:
            continue
        count = config.num_experts
        each = weights.in_order(name, entry, count) if isinstance(entry, dict) else _cut(entry, count)
        stacks.setdefault(int(found[1]), {})[found[2]] = each
    return {i: _layer(i, stacks[i], bases, digests) for i in sorted(stacks)}


def _cut(stack: Tensor, count: int) -> list[Tensor]:
    """Each expert's part of a stack."""
    size, shape = stack.nbytes // count, stack.shape[1:]
    starts = [stack.start + e * size for e in range(count)]
    return [replace(stack, shape=shape, start=start, end=start + size) for start in starts]


def in_expert_order(stacks: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The stacks of a layer in the order in which an expert's tensors lie."""

    def key(stack: TensorSpec) -> tuple[int, int, str]:
        name = stack.name.partition(".switch_mlp.")[2]
        return -BITS[stack.dtype], next((i for i, p in enumerate(PROJECTIONS) if name.startswith(p)), 3), name

    return sorted(stacks, key=key)


def expert_name(stacked: str, expert: int) -> str:
    """The name of an expert's own tensor, from that of the stack."""
    return stacked.replace(".switch_mlp.", f".experts.{expert}.")


def _layer(
    layer: int, stacks: Mapping[str, Sequence[Tensor]], bases: Mapping[Path, int], digests: Mapping[str, str]
) -> LayerPlaces:
    names = sorted(stacks)
    parts = tuple(TensorSpec(name, stacks[name][0].dtype, stacks[name][0].shape) for name in names)
    places = []
    for e, tensors in enumerate(zip(*(stacks[name] for name in names), strict=True)):
        spots = [(t.file, bases[t.file] + t.start, i) for i, t in enumerate(tensors)]
        places.append(Place(_merge(spots, parts), digests.get(f"{layer}.{e}")))
    return LayerPlaces(parts, tuple(places))


def _merge(spots: Sequence[tuple[Path, int, int]], parts: Sequence[TensorSpec]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    end = -1
    for file, offset, i in sorted(spots):
        if pieces and pieces[-1].file == file and offset == end:
            pieces[-1] = Piece(file, pieces[-1].offset, (*pieces[-1].parts, i))
        else:
            pieces.append(Piece(file, offset, (i,)))
        end = offset + parts[i].nbytes
    return tuple(pieces)


def _digests(file: Path, header: Header) -> dict[str, str]:
    """Hashes by "layer.expert" from a file's metadata; none if it is not of the streamed layout."""
    listed = header.metadata.get(weights.EXPERT_DIGESTS)
    if listed is None:
        return {}
    order: dict[str, None] = {}
    for tensor in sorted(header.tensors.values(), key=lambda t: t.start):
        found = _EXPERT.match(tensor.name)
        if found:
            order[f"{found[1]}.{found[2]}"] = None
    digests = listed.split()
    if len(digests) != len(order) or any(len(d) != DIGEST_CHARACTERS for d in digests):
        raise WeightsError(f"{file} has {len(digests)} checksums for {len(order)} experts; convert again.")
    return dict(zip(order, digests, strict=True))
