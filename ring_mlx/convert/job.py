"""The conversion from a source to a folder, a few rows at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.regular_files import read_json
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.convert import folder_files, remote
from ring_mlx.convert.expert_shards import ExpertShardFile
from ring_mlx.convert.fit import FITS, quantize
from ring_mlx.convert.folder_files import DecayChoice
from ring_mlx.convert.plan import LAYOUTS, SHARD_BYTES, Output, Plan, make_plan, quantisable_paths, uses
from ring_mlx.convert.settings import make_rule, make_setting, unmatched
from ring_mlx.convert.sources import Source, as_matrix, identity, matrices, open_source, source_dtype
from ring_mlx.convert.writer import (
    MANIFEST,
    UNFINISHED,
    ShardFile,
    Workplace,
    disk_errors,
    partial_folder,
    read_manifest,
    verify,
)
from ring_mlx.errors import ConvertError, OptionError, WeightsError
from ring_mlx.model.config import with_decay_offset
from ring_mlx.model.config_values import shown
from ring_mlx.model.quantization import settings
from ring_mlx.system.pace import Progress

# Weights that are in float32 at one time; the fit of scales holds about twelve times that.
CHUNK_WEIGHTS = 2 << 20
CACHE_LIMIT_BYTES = 64 << 20
FETCHED = "source"


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the result, besides the source."""

    quantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    dtype: str | None = None
    dequantize: bool = False
    recipe: str | None = None
    overrides: list[str] = field(default_factory=list)
    fit: str = "search"
    expert_layout: str = "stacked"
    decay_layer_offset: int | str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For manifest and card; what is newer is not named where it is not used, as it was not before."""
        plain = {"expert_layout": "stacked", "decay_layer_offset": None}
        return {k: v for k, v in asdict(self).items() if k not in plain or v != plain[k]}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    quantize: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: mx.Dtype | str | None = None,
    dequantize: bool = False,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    fit: str = "search",
    resume: bool = False,
    stream: bool = False,
    shard_bytes: int = SHARD_BYTES,
    expert_layout: str = "stacked",
    decay_layer_offset: int | str | None = None,
    choose_decay: Callable[[Source], DecayChoice | None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write ``source`` to a new folder ``target`` with stacked experts, loadable here and by mlx-lm.

    The router, norms and expert biases stay in float; every other matrix whose rows divide into groups is quantised.
    A source that is quantised keeps its form unless ``quantize`` or ``dequantize`` is given. The folder appears whole
    or not at all; an interrupted conversion leaves ``.NAME.partial`` beside it, from which ``resume`` goes on to the
    same bytes. Memory holds a few million weights at a time, whatever the model's size.

    Args:
        source: A folder, or owner/name on the hub.
        target: A folder that does not exist.
        revision: Of a hub repository.
        quantize: Whether to quantise.
        bits, group_size, mode: As for ``mx.quantize``.
        dtype: Of floating tensors, or its name; by default the source's.
        dequantize: Whether to store everything in float.
        recipe: One of ``settings.RECIPES``, or None for the same bits everywhere.
        overrides: "pattern=bits" or "pattern=none", the last that matches a module's path counts.
        fit: "search" for least squared error, "rtn" for rounding to nearest as ``mx.quantize`` does.
        resume: Go on with an unfinished conversion of the same source, commit and options, or start one.
        stream: Fetch the shards of a repository one by one and drop each after use.
        shard_bytes: The most that a shard holds; an interruption loses at most one.
        expert_layout: "streamed" puts the three matrices of an expert side by side, in one shard a layer, to be read
            on demand; see `ring_mlx.experts.layout`.
        decay_layer_offset: What config.json says of the decay's layers; None leaves the source's word.
        choose_decay: Called with the source before anything is written, where the offset is None, to choose one.
        progress: Called with (bytes written, all bytes, tensor).

    Returns:
        The folder.

    Raises:
        OptionError: If options contradict each other or the source.
        ConvertError: If the target exists, cannot be written, or was started otherwise.
        RingError: As for `ring_mlx.load_model`, and if the hub refuses.
    """
    name = str(dtype).removeprefix("mlx.core.") if dtype else None
    options = Options(
        *(quantize, bits, group_size, mode, name, dequantize, recipe, list(overrides), fit, expert_layout),
        decay_layer_offset,
    )
    target = Path(os.path.expanduser(target))
    _check_name(target)
    if target.exists() and not resume:
        raise ConvertError(f"{target} exists already; name a folder that does not, or remove it.")
    opened, plan = convert_plan(source, options, revision=revision, remote_only=stream, shard_bytes=shard_bytes)
    job = {
        "source": identity(opened.tensors),
        "source_commit": opened.commit,
        "source_config_sha256": hashlib.sha256(json.dumps(opened.raw, sort_keys=True).encode()).hexdigest(),
        "options": options.as_dict(),
        "shard_bytes": shard_bytes,
    }
    if target.exists():
        return _finished(target, job)
    with disk_errors(target):
        _check_space(target, plan)
        place = Workplace(target, job, resume)
        try:
            decay = _decay(opened, decay_layer_offset, choose_decay)
            _write_shards(opened, plan, place, options, progress)
            names = folder_files.write_files(place.folder, opened, plan, options.as_dict(), decay)
            return place.finish(names)
        finally:
            place.close()


def _decay(
    source: Source, offset: int | str | None, choose: Callable[[Source], DecayChoice | None] | None
) -> DecayChoice | None:
    if offset is not None:
        return DecayChoice(offset, (f"decay_layer_offset {shown(offset)}, as asked",))
    return choose(source) if choose is not None else None


def convert_plan(
    source: str | os.PathLike[str],
    options: Options,
    *,
    revision: str | None = None,
    remote_only: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Source, Plan]:
    """What `convert` would write, from headers alone.

    Args:
        source: A folder, or owner/name on the hub.
        options: As for `convert`.
        revision: Of a repository.
        remote_only: Leave the shards of a repository where they are.
        shard_bytes: As for `convert`.

    Raises:
        OptionError, HubError, ConfigError, WeightsError: As for `convert`.
    """
    _check_options(options)
    default = make_setting(options.bits, options.group_size, options.mode) if options.quantize else None
    opened = open_source(source, revision, remote_only)
    with_decay_offset(opened.raw, options.decay_layer_offset)
    rule = None
    if default is not None:
        rule = make_rule(default, options.recipe, options.overrides, opened.config.num_hidden_layers)
        useless = unmatched(options.overrides, sorted(quantisable_paths(opened.config)))
        if useless:
            raise OptionError(f"--q-override {useless[0]!r} matches no module; see the names in config.json's form.")
    dtype = getattr(mx, options.dtype) if options.dtype else source_dtype(opened)
    # A recipe's default names no setting that it uses.
    named = None if options.recipe else default
    plan = make_plan(
        opened, matrices(opened), rule, named, dtype, options.dequantize, shard_bytes, options.expert_layout
    )
    return opened, plan


def describe(folder: Path) -> str:
    """One line on a written checkpoint: size and quantisation."""
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    quantization = settings(read_json(folder / "config.json"))
    kind = f"{quantization.get('bits')}-bit {quantization.get('mode')}" if quantization else "not quantised"
    others = sum(isinstance(v, dict) for v in (quantization or {}).values())
    return f"{folder}: {size / 1e9:.3f} GB, {kind}{f', {others} modules otherwise' if others else ''}"


def _check_options(o: Options) -> None:
    if o.quantize and o.dequantize:
        raise OptionError("-q and -d contradict each other; give one.")
    given = {
        "--quant-predicate": bool(o.recipe),
        "--q-override": bool(o.overrides),
        f"--q-mode {o.mode}": o.mode != "affine",
        "--q-bits": o.bits is not None,
        "--q-group-size": o.group_size is not None,
    }
    useless = [flag for flag, is_given in given.items() if is_given]
    if not o.quantize and useless:
        raise OptionError(f"{useless[0]} needs --quantize; add -q.")
    if o.recipe and o.bits is not None:
        raise OptionError(f"--q-bits {o.bits} has no effect on --quant-predicate {o.recipe}; leave one out.")
    if o.fit not in FITS:
        raise OptionError(f"--q-fit {o.fit!r} is not one of {', '.join(FITS)}; choose one.")
    if o.expert_layout not in LAYOUTS:
        raise OptionError(f"--expert-layout {o.expert_layout!r} is not one of {', '.join(LAYOUTS)}; choose one.")


def _check_name(target: Path) -> None:
    try:
        # Of the two names that are used, the longer.
        (partial_folder(target) / MANIFEST).exists()
    except OSError as e:
        raise ConvertError(f"{target} cannot be a folder ({e.strerror}); give another name.") from None


def _finished(target: Path, job: dict[str, Any]) -> Path:
    manifest = read_manifest(target)
    changed = [key for key, value in job.items() if manifest.get(key) != value]
    if changed:
        raise ConvertError(
            f"{target} exists already and was made otherwise (with another {' and '.join(changed)}); name another "
            "folder, or remove it."
        )
    verify(target)
    return target


def _check_space(target: Path, plan: Plan) -> None:
    partial = partial_folder(target)
    have = sum(f.stat().st_size for f in partial.glob("*.safetensors")) if partial.is_dir() else 0
    parent = next(p for p in (target.parent, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if plan.nbytes - have > free:
        raise ConvertError(
            f"{target} needs {plan.nbytes / 1e9:.3f} GB but {free / 1e9:.3f} GB are free; free some space and run "
            "again."
        )


def _write_shards(source: Source, plan: Plan, place: Workplace, options: Options, progress: Progress | None) -> None:
    left = {shard: outputs for shard, outputs in plan.shards.items() if not place.has(shard)}
    fetch = remote.fetcher(source.repo, place.folder / FETCHED)
    files = TensorFiles(fetch, uses(o.matrix for outputs in left.values() for o in outputs))
    done = plan.nbytes - sum(o.nbytes for outputs in left.values() for o in outputs)
    cache_limit = mx.set_cache_limit(CACHE_LIMIT_BYTES)
    try:
        for shard, outputs in left.items():
            unfinished = place.folder / (shard + UNFINISHED)
            kind = ExpertShardFile if shard in plan.streamed else ShardFile
            file = kind(unfinished, [t for o in outputs for t in o.stored])
            try:
                for output in outputs:
                    for written in _write_output(output, file, files, options.fit):
                        done += written
                        if progress:
                            progress(done, plan.nbytes, output.name)
                    files.release(output.matrix.files)
                file.close()
            except BaseException:
                file.abandon()
                raise
            place.finish_shard(shard, unfinished)
    finally:
        files.close()
        mx.set_cache_limit(cache_limit)


def _write_output(output: Output, file: ShardFile, files: TensorFiles, fit: str) -> Any:
    """Write a parameter by rows, yielding the bytes of each piece."""
    rows, cols = as_matrix(output.shape)
    step = max(1, CHUNK_WEIGHTS // cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        written = 0
        for suffix, array in encode(output, files, start, stop, fit).items():
            name = output.name if output.setting is None else f"{output.path}.{suffix}"
            row_bytes = array.shape[-1] * array.dtype.size
            written += file.write(name, start * row_bytes, array)
        mx.clear_cache()
        yield written


def encode(output: Output, files: TensorFiles, start: int, stop: int, fit: str) -> dict[str, mx.array]:
    """Some rows of a parameter as they are stored, by suffix.

    Raises:
        WeightsError: If they are not finite, or would not be in the dtype that is stored.
    """
    if output.copied:
        packed = output.matrix.read_packed(files, start, stop)
        out = {k: v.astype(output.dtype) if mx.issubdtype(v.dtype, mx.floating) else v for k, v in packed.items()}
        read = [v for v in packed.values() if mx.issubdtype(v.dtype, mx.floating)]
    else:
        rows = output.matrix.read(files, start, stop)
        read = [rows]
        if output.setting is None:
            out = {"weight": rows.astype(output.dtype)}
        else:
            out = quantize(rows, output.setting, output.dtype, fit)
    if not all(mx.isfinite(a).all().item() for a in read):
        raise WeightsError(f"{output.name} holds values that are not finite; download the checkpoint again.")
    if not all(mx.isfinite(v).all().item() for v in out.values() if mx.issubdtype(v.dtype, mx.floating)):
        name = str(output.dtype).removeprefix("mlx.core.")
        raise WeightsError(f"{output.name} holds values that are too large for {name}; use --dtype bfloat16.")
    mx.eval(out)
    return out
