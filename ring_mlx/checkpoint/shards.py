"""Which safetensors files of a folder are a checkpoint's weights, and which tensors are in them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from ring_mlx.checkpoint.safetensors_header import Tensor, read_header
from ring_mlx.errors import WeightsError
from ring_mlx.model.config_values import shown, some
from ring_mlx.system.regular_files import is_inside, is_litter, read_json

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
MAX_TENSORS = 400_000
OTHERS = (
    (
        (".bin", ".pt", ".pth", ".ckpt"),
        "pickled weights, which can run code when they are read",
        "load them where you trust them, with transformers, and save_pretrained writes safetensors",
    ),
    ((".gguf",), "GGUF", "download the safetensors that it was made of"),
    ((".npz",), "the form of MLX before safetensors", "convert the original again"),
)
_NUMBERED = re.compile(r"^model-([0-9]{5})-of-([0-9]{5})\.safetensors$")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, without its data; errors as `find_shards` and `read_headers`."""
    return read_headers(find_shards(folder))


def read_headers(shards: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of these files by name, without its data; a WeightsError names a damaged file."""
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        add_tensors(tensors, read_header(shard).tensors, shard)
    return tensors


def add_tensors(tensors: dict[str, Tensor], found: Mapping[str, Tensor], shard: Path) -> None:
    """Add the tensors of one file to those of others; a WeightsError if one is in both, or there are too many."""
    for name in found:
        if name in tensors:
            raise WeightsError(
                f"{shown(name)} is in {tensors[name].file.name} and in {shard.name} of {shard.parent}; remove the file "
                "that is not of this checkpoint."
            )
    tensors.update(found)
    if len(tensors) > MAX_TENSORS:
        raise WeightsError(f"{shard.parent} holds more than {MAX_TENSORS:,} tensors; give a checkpoint's folder.")


def safetensors_in(folder: Path) -> list[Path]:
    """All safetensors files of a folder, in order."""
    return sorted(f for f in folder.glob("*.safetensors") if not is_litter(f))


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order; a WeightsError if there are none or some are missing.

    An index that names missing files is ignored, with a warning, if other files are a whole set: quantizing tools leave
    it behind.
    """
    shards, missing, is_stale = look_up(folder)
    if missing:
        raise WeightsError(f"{folder} lacks {some(missing)} of {len(shards)} shards that {INDEX} names; download them.")
    if not shards:
        raise WeightsError(f"no .safetensors file in {folder}{_other_files(folder)}")
    if is_stale:
        warnings.warn(
            f"[weights] {INDEX} in {folder} names files that are not there; it is passed over, and {shards[0].name} is "
            "read.",
            stacklevel=2,
        )
    return shards


def _other_files(folder: Path) -> str:
    """What a folder without safetensors has in their place, and the remedy."""
    for ends, what, remedy in OTHERS:
        found = sorted(f.name for f in folder.glob("*") if f.name.endswith(ends))
        if found:
            return f", only {what} ({shown(found[0])}); {remedy}."
    return "; give the folder of a downloaded checkpoint."


def look_up(folder: Path) -> tuple[list[Path], list[str], bool]:
    """The files of the weights, the names of those that are missing, and whether the index is ignored.

    Raises a WeightsError if the index is damaged or names files that are not in the folder.
    """
    if not (folder / INDEX).exists():
        found = safetensors_in(folder)
        return [f for f in found if f.name.startswith("model")] or found, [], False
    names = _named(folder)
    missing = [name for name in names if not (folder / name).exists()]
    if missing and (others := _whole_set(folder, set(names))):
        return others, [], True
    return [folder / name for name in names], missing, False


def _named(folder: Path) -> list[str]:
    weight_map = read_json(folder / INDEX, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{folder / INDEX} has no weight_map; download the file again.")
    for name in weight_map.values():
        if not is_inside(name):
            raise WeightsError(f"{folder / INDEX} names {shown(name)}, which is no file of its folder; correct it.")
    return sorted(set(weight_map.values()))


def _whole_set(folder: Path, named: set[str]) -> list[Path]:
    """Files that the index does not name and that are complete by their names: one, or all of a count."""
    others = [f for f in safetensors_in(folder) if f.name not in named]
    numbered = {f: [int(n) for n in found.groups()] for f in others if (found := _NUMBERED.match(f.name))}
    for count in {of for _, of in numbered.values()}:
        found_files = [f for f, (_, of) in numbered.items() if of == count]
        if [numbered[f][0] for f in found_files] == [*range(1, count + 1)]:
            return found_files
    return [f for f in others if f.name == WHOLE]
