"""Checks a model's decay on a text, and writes the formula that was found into config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.loading import load
from ring_mlx.convert.folder_files import DecayChoice
from ring_mlx.convert.sources import Source
from ring_mlx.convert.writer import MANIFEST, amend, disk_errors
from ring_mlx.doctor import decay_check
from ring_mlx.doctor.decay_check import KEY, SECTION, Offset, Verdict
from ring_mlx.doctor.decay_text import packaged_parts, parts_of_file
from ring_mlx.doctor.finding import OK, PROBLEM, Finding
from ring_mlx.errors import ConfigError, OptionError, RingError
from ring_mlx.model.config_values import shown
from ring_mlx.model.model import Model
from ring_mlx.system.files import write_together
from ring_mlx.system.progress import Progress
from ring_mlx.system.regular_files import read_json
from ring_mlx.system.wired import Wired

Say = Callable[[str], None]
Watch = Callable[[str], AbstractContextManager[Progress | None]]


def check(
    model: Model,
    tokenizer: TokenizerWrapper,
    say: Say,
    text: Path | None = None,
    tokens: int | None = None,
    bar: Progress | None = None,
) -> Verdict:
    """Read about a minute's text under each formula, having said how long it takes.

    Args:
        text: A text file in place of the packaged conversations, which need a chat template.
        tokens: Read at most so many.
        bar: Called with (parts scored, all of all formulas).

    Raises:
        OptionError: If the model has no linear layer, or there is no text that fits.
    """
    decay_check.check_linear(model.config)
    tps = decay_check.tokens_a_second(model)
    context, most = model.config.context_tokens, tokens or decay_check.affordable(tps)
    parts = packaged_parts(tokenizer, context, most) if text is None else parts_of_file(text, tokenizer, context, most)
    say(decay_check.announcement(parts, tps))
    with Wired():
        return decay_check.compare(model, parts, bar)


def choose(
    source: Source,
    is_wanted: bool,
    say: Say,
    say_later: Say,
    watch: Watch = lambda what: nullcontext(),
    result: str = "FOLDER",
) -> DecayChoice | None:
    """What `ring_mlx.convert` writes of the decay: what the check finds on the source.

    Args:
        is_wanted: Whether to check in any case, and to fail where that cannot be; otherwise only where config.json says
            nothing and the source can be loaded, and to say so where it cannot.
        say, say_later: Take what is said before the check, and what came of it, if the conversion succeeds.
        watch: Gives the progress callable of a step, by the step's name.
        result: Where the conversion goes, which can be loaded where the source cannot.
    """
    try:
        if not is_wanted and (source.raw.get(KEY) is not None or not source.config.has_linear):
            return None
        decay_check.check_linear(source.config)
        if source.repo is not None:
            raise OptionError("the decay cannot be checked while shards are streamed; leave --stream out.")
        with watch("loading the source") as progress:
            model, tokenizer = load(source.folder, progress=progress)
        with watch("checking the decay") as progress:
            verdict = check(model, tokenizer, say, bar=progress)
    except RingError as e:
        if is_wanted:
            raise
        say_later(f"the decay was not checked: {e}")
        say_later(f"the result can be: ring-mlx doctor --check-decay {result} --write-decay")
        return DecayChoice(None, (f"not checked; {KEY} {shown(source.config.decay_layer_offset)}",), is_open=True)
    del model
    mx.clear_cache()
    return _chosen(verdict, source.config.decay_layer_offset, source.name, say_later)


def choose_by_result(folder: Path, choice: DecayChoice, say: Say, watch: Watch) -> bool:
    """Check a converted folder whose source could not be checked, and change its config.json and model card.

    ``choice`` is what the card says so far. Returns whether it could be checked; as it could not, nothing is changed.
    """
    said = list[str]()
    try:
        with watch("loading the result") as progress:
            model, tokenizer = load(folder, progress=progress)
        offset = model.config.decay_layer_offset
        with watch("checking the decay") as progress:
            found = _chosen(check(model, tokenizer, say, bar=progress), offset, folder.name, said.append)
    except RingError:
        return False
    del model
    mx.clear_cache()
    card = (folder / "README.md").read_text(encoding="utf-8").replace(choice.section, found.section)
    changed = {} if found.offset is None else {KEY: found.offset}
    raw = dict(sorted((read_json(folder / "config.json") | changed).items()))
    with disk_errors(folder):
        amend(folder, {"README.md": card, "config.json": json.dumps(raw, indent=4, ensure_ascii=False) + "\n"})
    say(said[0])
    return True


def _chosen(verdict: Verdict, offset: Offset, name: str, say: Say) -> DecayChoice:
    found = decay_check.findings(verdict, offset, name)
    end = f"{KEY} {shown(verdict.decided)} is written" if verdict.decided is not None else f"no {KEY} is written"
    say(f"{found[-1].seen}; {end}.")
    return DecayChoice(verdict.decided, (*(f"{f.name}: {f.seen}" for f in found), end))


def write_choice(folder: Path, verdict: Verdict) -> Finding:
    """Put the formula that was found into config.json, and say so; nothing is written where none was."""
    if verdict.decided is None:
        return Finding(SECTION, "config.json", PROBLEM, "not written: there is no verdict", "see its remedy")
    write_offset(folder, verdict.decided)
    return Finding(SECTION, "config.json", OK, f"{KEY} {shown(verdict.decided)} is written to {folder / 'config.json'}")


def write_offset(folder: Path, offset: Offset) -> None:
    """Set the key in a model's config.json, all of it or nothing; a link, as in the hub's cache, becomes a file."""
    file = folder / "config.json"
    text = json.dumps(read_json(file) | {KEY: offset}, indent=4, ensure_ascii=False) + "\n"
    try:
        if (folder / MANIFEST).is_file():
            amend(folder, {file.name: text})
        else:
            write_together(folder, {file.name: text})
    except OSError as e:
        seen = e.strerror or e
        raise ConfigError(
            f"{file} cannot be written ({seen}); make room, or copy the model to a folder of yours."
        ) from None
