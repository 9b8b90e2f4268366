"""The conversion from a source to a folder, a few rows at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.checkpoint.weights import dtype_name
from ring_mlx.convert import calibration, folder_files, remote, timing, writer
from ring_mlx.convert.calibration_time import SOLVED
from ring_mlx.convert.encoding import CHUNK_WEIGHTS, encode
from ring_mlx.convert.fit import EFFORTS
from ring_mlx.convert.folder_files import DecayChoice
from ring_mlx.convert.options import Options
from ring_mlx.convert.plan import SHARD_BYTES, Output, Plan, by_part, make_plan, stage_of, uses
from ring_mlx.convert.remarks import grid_note, mostly_float, remarks, said_before
from ring_mlx.convert.report import read_text
from ring_mlx.convert.shard_files import ExpertShardFile, ShardFile
from ring_mlx.convert.sources import Source, as_matrix, identity, open_source, samples, times
from ring_mlx.convert.target import RECIPE, find_recipe
from ring_mlx.errors import ConvertError
from ring_mlx.model.config import with_decay_offset
from ring_mlx.model.config_values import shown
from ring_mlx.model.memory import GB, PLAIN_CONTEXT, WORKSPACE_BYTES, budget_bytes, cache_bytes
from ring_mlx.model.quantization import settings
from ring_mlx.system.files import write_text
from ring_mlx.system.progress import Progress
from ring_mlx.system.regular_files import read_json

CACHE_LIMIT_BYTES = 64 << 20
FETCHED = "source"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    resume: bool = False,
    stream: bool = False,
    shard_bytes: int = SHARD_BYTES,
    choose_decay: Callable[[Source], DecayChoice | None] | None = None,
    text: Sequence[Mapping[str, Any]] | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Write ``source`` to a new folder ``target`` with stacked experts, loadable here and by mlx-lm.

    The router, norms and expert biases stay in float; every other matrix whose rows divide into groups is quantized.
    A source that is quantized keeps its form unless ``quantize`` or ``dequantize`` is given. The folder appears whole
    or not at all; an interrupted conversion leaves ``.NAME.partial`` beside it, from which ``resume`` goes on to the
    same bytes. Memory holds a few million weights at a time, whatever the model's size.

    Args:
        source: A folder, or owner/name on the hub.
        target: A folder that does not exist.
        revision: Branch, tag or commit of a hub repository.
        resume: Go on with an unfinished conversion of the same source, commit and options, or start one.
        stream: Fetch the shards of a repository one by one and drop each after use.
        shard_bytes: The most that a shard holds; an interruption loses at most one.
        choose_decay: Called with the source before anything is written, if no offset is given, to choose one.
        text: To calibrate on, from `report.read_text`; by default the packaged one.
        say: Called with each line on what will not be as in the source, or as asked for; what is worst, again at the end.
        progress: Called with (bytes written, all bytes, tensor, seconds left).
        **options: As in `Options`; a dtype may be MLX's.

    Returns:
        The folder.

    Raises:
        OptionError: If options contradict each other or the source.
        ConvertError: If the target exists, cannot be written, or was started otherwise.
        RingError: As for `ring_mlx.load_model`, and if the hub refuses.
    """
    dtype = options.get("dtype")
    chosen = Options(**options | {"dtype": dtype_name(dtype) if dtype else None})
    target = Path(os.path.expanduser(target))
    _check_name(target)
    if target.exists() and not resume:
        raise ConvertError(f"{target} exists already; name a folder that does not, or remove it.")
    if text is None and (chosen.calibrate or chosen.has_target):
        text = read_text(packaged=calibration.TEXT)
    known = (target if target.exists() else writer.partial_folder(target)) / RECIPE if resume else None
    opened, plan = convert_plan(
        source,
        chosen,
        revision=revision,
        remote_only=stream,
        shard_bytes=shard_bytes,
        text=text,
        known=known,
        progress=progress,
    )
    job = {
        "source": identity(opened.tensors),
        "source_samples": samples(opened),
        "source_commit": opened.commit,
        "source_config_sha256": hashlib.sha256(json.dumps(opened.raw, sort_keys=True).encode()).hexdigest(),
        "options": chosen.as_dict(),
        "shard_bytes": shard_bytes,
    }
    if chosen.calibrate and text is not None:
        job["calibration_text"] = calibration.digest(text)
    if plan.recipe is not None:
        job["recipe"] = hashlib.sha256(json.dumps(plan.recipe, sort_keys=True).encode()).hexdigest()
    if target.exists():
        return _finished(target, job)
    calibrated = _calibration(opened, plan, chosen, text)
    sample, expected = _expected(opened, plan, chosen, calibrated) if say or progress else (None, [])
    say = say or (lambda line: None)
    for line in [*expected, *said_before(opened, plan, chosen)]:
        say(line)
    with writer.disk_errors(target):
        _check_space(target, plan)
        partial = writer.PartialFolder(target, job | {writer.TIMES: times(opened)}, resume)
        try:
            if plan.recipe is not None:
                write_text(partial.folder / RECIPE, json.dumps(plan.recipe, indent=1) + "\n")
            decay = _decay(opened, chosen.decay_layer_offset, choose_decay)
            _write_shards(opened, plan, partial, chosen.fit, calibrated, sample, say, progress)
            notes = [grid_note({writer.GRID_STEPS: partial.grid_steps}), *remarks(opened, plan, chosen)]
            card = folder_files.card(opened, plan, chosen.as_dict(), decay, list(filter(None, notes)))
            names = folder_files.write_files(partial.folder, opened, plan, card, decay)
            partial.finish(names | ({RECIPE} if plan.recipe is not None else set()))
        finally:
            partial.close()
    if worst := mostly_float(plan):
        say(worst)
    return target


def convert_plan(
    source: str | os.PathLike[str],
    options: Options,
    *,
    revision: str | None = None,
    remote_only: bool = True,
    shard_bytes: int = SHARD_BYTES,
    text: Sequence[Mapping[str, Any]] | None = None,
    known: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Source, Plan]:
    """What `convert` would write; same arguments and errors. From headers alone, unless bits are to be chosen for a size.

    With ``remote_only`` the shards of a repository stay where they are. ``known`` is a recipe that was found for these options.
    """
    options.check()
    opened = open_source(source, revision, remote_only)
    with_decay_offset(opened.raw, options.decay_layer_offset)
    if text is None and options.has_target:
        text = read_text(packaged=calibration.TEXT)
    recipe = find_recipe(opened, options, known, text or [], progress)
    return opened, make_plan(opened, options, shard_bytes, recipe)


def describe(folder: Path) -> str:
    """One line on a written checkpoint: size and quantization."""
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    quantization = settings(read_json(folder / "config.json"))
    kind = f"{quantization.get('bits')}-bit {quantization.get('mode')}" if quantization else "not quantized"
    others = sum(isinstance(v, dict) for v in (quantization or {}).values())
    note = grid_note(writer.read_manifest(folder)) if (folder / writer.MANIFEST).is_file() else ""
    parts = [f"{size / 1e9:.3f} GB", kind, f"{others} modules otherwise" if others else "", note]
    return f"{folder}: {', '.join(filter(None, parts))}"


def _calibration(
    source: Source, plan: Plan, options: Options, text: Sequence[Mapping[str, Any]] | None
) -> calibration.Calibration | None:
    if not options.calibrate or text is None:
        return None
    return calibration.Calibration(source, plan, text, options.fit)


def _expected(
    source: Source, plan: Plan, options: Options, calibrated: calibration.Calibration | None
) -> tuple[timing.Sample | None, list[str]]:
    """A second's sample, and lines on how long a conversion takes and how good the result will be."""
    sample = timing.measure(source, plan, [options.fit] if calibrated else tuple(EFFORTS))
    lines = [calibrated.told()] if calibrated else [timing.told(sample, plan, options.fit)] if sample else []
    if sample and options.fit in sample.errors:
        lines.append(timing.quality(sample.errors[options.fit], calibrated is not None))
    if plan.recipe and (kl := plan.recipe.get("expected_kl")) is not None:
        lines.append(
            f"divergence: about {kl:.2g} nats a token from the source, the sum of what each module alone gives"
        )
    return sample, lines


def _decay(
    source: Source, offset: int | str | None, choose: Callable[[Source], DecayChoice | None] | None
) -> DecayChoice | None:
    if offset is not None:
        return DecayChoice(offset, (f"decay_layer_offset {shown(offset)}, as asked",))
    return choose(source) if choose is not None else None


def _check_name(target: Path) -> None:
    try:
        # Of the two names that are used, the longer.
        (writer.partial_folder(target) / writer.MANIFEST).exists()
    except OSError as e:
        raise ConvertError(f"{target} cannot be a folder ({e.strerror}); give another name.") from None


def _finished(target: Path, job: dict[str, Any]) -> Path:
    manifest = writer.read_manifest(target)
    changed = writer.differing(manifest, job)
    if changed:
        raise ConvertError(
            f"{target} exists already and was made otherwise (with another {' and '.join(changed)}); name another "
            "folder, or remove it."
        )
    writer.verify(target)
    return target


def _check_space(target: Path, plan: Plan) -> None:
    have = sum(f.stat().st_size for f in writer.partial_folder(target).glob("*.safetensors"))
    parent = next(p for p in (target.parent, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if plan.nbytes - have > free:
        raise ConvertError(
            f"{target} needs {plan.nbytes / 1e9:.3f} GB but {free / 1e9:.3f} GB are free; free some space and run "
            "again."
        )


def _write_shards(
    source: Source,
    plan: Plan,
    partial: writer.PartialFolder,
    fit: str,
    calibrated: calibration.Calibration | None,
    sample: timing.Sample | None,
    say: Callable[[str], None],
    progress: Progress | None,
) -> None:
    left = {shard: outputs for shard, outputs in plan.shards.items() if not partial.has(shard)}
    todo = [o for outputs in left.values() for o in outputs]
    read = uses(o.matrix for o in todo)
    stages = _stages(plan, left) if calibrated else [(0, left)]
    if calibrated:
        again = {stage for stage, shards in stages if shards}
        read += uses(o.matrix for o in plan.outputs if stage_of(o.name) in again)
    files = TensorFiles(remote.fetcher(source.repo, partial.folder / FETCHED), read)
    done = plan.nbytes - sum(o.nbytes for o in todo)
    if calibrated:
        calibrated.begin(files)
        time_left = calibrated.time_left(stage for stage, shards in stages if shards)
    else:
        time_left = timing.time_left(todo, sample, fit)
    cache_limit = mx.set_cache_limit(CACHE_LIMIT_BYTES)
    try:
        for stage, shards in stages:
            solved: dict[str, dict[str, mx.array]] = {}
            if calibrated and shards:
                solved = calibrated.solve(stage)
                time_left.did(calibrated.kind_of(stage), SOLVED)
            for shard, outputs in shards.items():
                for output, written in _write_shard(shard, outputs, plan, partial, files, fit, solved):
                    done += written
                    if not calibrated:
                        time_left.did(timing.kind_of(output), output.count * written / output.nbytes)
                    if progress:
                        progress(done, plan.nbytes, output.name, time_left.left_s())
                if not calibrated:
                    time_left.did(timing.FINISHING, sum(o.nbytes for o in outputs))
            if calibrated and any(later > stage and more for later, more in stages):
                names = [n for n, outputs in plan.shards.items() if stage_of(outputs[0].name) == stage]
                calibrated.advance(stage, [partial.folder / name for name in names])
            if calibrated and shards:
                time_left.did(calibrated.kind_of(stage), 1 - SOLVED)
        if calibrated and calibrated.unreached:
            say(
                f"{calibrated.unreached} matrices of experts were fitted without inputs, as hardly any token reached them"
            )
    finally:
        files.close()
        mx.set_cache_limit(cache_limit)


def _stages(plan: Plan, left: Mapping[str, list[Output]]) -> list[tuple[int, dict[str, list[Output]]]]:
    """What is left of each stage of a calibrated conversion, in their order."""
    found: dict[int, dict[str, list[Output]]] = {}
    for shard, outputs in plan.shards.items():
        found.setdefault(stage_of(outputs[0].name), {}).update({shard: outputs} if shard in left else {})
    return sorted(found.items())


def _write_shard(
    shard: str,
    outputs: Sequence[Output],
    plan: Plan,
    partial: writer.PartialFolder,
    files: TensorFiles,
    fit: str,
    solved: Mapping[str, Mapping[str, mx.array]],
) -> Iterator[tuple[Output, int]]:
    """Write a shard, yielding the bytes of each piece of each parameter."""
    unfinished = partial.folder / (shard + writer.UNFINISHED)
    kind = ExpertShardFile if shard in plan.streamed else ShardFile
    file = kind(unfinished, [t for o in outputs for t in o.stored])
    try:
        for output in outputs:
            ready = solved.get(output.path) if output.setting is not None else None
            for written, steps in _write_output(output, file, files, fit, ready):
                if steps:
                    partial.grid_steps[shard] = max(steps, partial.grid_steps.get(shard, 0.0))
                yield output, written
            files.release(output.matrix.files)
        file.close()
    except BaseException:
        file.abandon()
        raise
    partial.finish_shard(shard, unfinished)


def _write_output(
    output: Output, file: ShardFile, files: TensorFiles, fit: str, ready: Mapping[str, mx.array] | None
) -> Iterator[tuple[int, float]]:
    """Write a parameter by rows, yielding the bytes and `grid_steps` of each piece; ``ready`` is its packed form."""
    rows, cols = as_matrix(output.shape)
    step = max(1, CHUNK_WEIGHTS // cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        written, steps = 0, 0.0
        if ready is None:
            arrays, steps = encode(output, files, start, stop, fit)
        else:
            arrays = {suffix: array[start:stop] for suffix, array in ready.items()}
        for suffix, array in arrays.items():
            name = output.name if output.setting is None else f"{output.path}.{suffix}"
            row_bytes = array.shape[-1] * array.dtype.size
            written += file.write(name, start * row_bytes, array)
        mx.clear_cache()
        yield written, steps


# Float32 weights that are held at one time, times the arrays that the fit of scales keeps of them.
FIT_ARRAYS = 14


def size_table(
    source: Source, plan: Plan, options: Options | None = None, text: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """The answer to ``--dry-run``; ``options`` are those of the plan, ``text`` as of `convert`."""
    rows = by_part(plan)
    width = max(len(part) for part, _, _ in rows)
    lines = [f"{'part':{width}} {'weights':>16} {'bits/weight':>12} {'bytes':>16}"]
    for part, n, size in rows:
        lines.append(f"{part:{width}} {n:16,} {8 * size / n:12.3f} {size:16,}")
    before = source.nbytes
    # The same for every model; the program itself comes on top.
    converting = CHUNK_WEIGHTS * 4 * FIT_ARRAYS + CACHE_LIMIT_BYTES
    context = min(PLAIN_CONTEXT, source.config.context_tokens)
    running = plan.nbytes + cache_bytes(source.config, context) + WORKSPACE_BYTES
    lines += [
        (
            f"source {before / GB:.3f} GB in {len({t.file for t in source.tensors.values()})} files, "
            f"result {plan.nbytes / GB:.3f} GB in {len(plan.shards)} ({plan.nbytes / before:.2f} of the source)"
        ),
        (
            f"memory: about {converting / GB:.1f} GB to convert, {running / GB:.1f} GB to run with {context:,} tokens "
            f"(this machine can give {budget_bytes() / GB:.1f} GB)"
        ),
    ]
    options = options or Options()
    if options.calibrate and text is None:
        text = read_text(packaged=calibration.TEXT)
    lines += _expected(source, plan, options, _calibration(source, plan, options, text))[1]
    return "\n".join([*lines, *remarks(source, plan, options)])
