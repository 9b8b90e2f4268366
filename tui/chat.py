"""``ring-mlx chat``: conversations in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import replace
from typing import Any

from ring_mlx import harmless, thinking_of
from tui import config, paths
from tui.answering import Engine
from tui.chat_settings import MODEL_PARTS, choice_of, is_same_model, raw_model, settings_of
from tui.commands import SETTINGS
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import ModelChoice
from tui.plain import Plain
from tui.signals import SignalledExit, ending_by_signals, undisturbed, wanted_by_terminal

UNSAVED, INTERRUPTED = 2, 130  # exit codes


def run(args: argparse.Namespace) -> int:
    """Open the chat; returns the exit code."""
    if args.web:
        from tui.web import serve  # Not at the top: it needs the extra "web".

        return serve(args)
    settings, wrong = config.load(paths.config_file())
    settings = with_options(settings, args)
    notes = [wrong] if wrong else []
    if not args.plain and (note := wanted_by_terminal()):
        args.plain = True
        notes.append(note)
    choice = ModelChoice(
        choice_of(settings.model).path,
        args.revision,
        args.adapter_path,
        args.expert_cache_bytes,
        thinking_of(args),
        args.prefill_step_size,
        args.decay_layer_offset,
        args.speculate,
        args.draft_model,
    )
    engine = Engine(choice)
    keeper = Keeper(paths.data_file("chats.db"), notes.append, make_room=_free_disk)
    talk = keeper.latest() if args.resume else None
    if talk is not None:
        resume(talk, args, engine, keeper, settings)
    try:
        if args.plain:
            with ending_by_signals():
                code = Plain(engine, keeper, settings, talk, notes).run()
        else:
            # Not at the top: a chat line by line does not wait for the screens.
            from tui.app import RingChat

            app = RingChat(engine, keeper, settings, talk, notes)
            keeper.tell_with(app.tell)
            with warnings.catch_warnings():  # a screen hides what is printed
                warnings.showwarning = app.show_warning
                app.run()
            code = app.return_code or 0
    except SignalledExit as e:
        code = e.code
    except KeyboardInterrupt:
        print("ring-mlx: interrupted.", file=sys.stderr)
        code = INTERRUPTED
    finally:
        with undisturbed():
            is_at_rest = engine.close()
            is_saved = keeper.close()
    if not is_saved:
        code = code or UNSAVED
        for line in keeper.report():
            print(f"ring-mlx: {harmless(line)}", file=sys.stderr)
    sys.stdout.flush()
    if not is_at_rest:
        os._exit(code)  # still loading: an ordinary exit would wait for it or abort
    return code


def resume(
    talk: Conversation, args: argparse.Namespace, engine: Engine, keeper: Keeper, settings: config.Config
) -> None:
    """Go on with a chat's model and settings, but for those that the command line gives, which are the chat's from now on."""
    changed = {name: getattr(args, name) for name in (*SETTINGS, "system_prompt") if getattr(args, name) is not None}
    own = settings_of(talk.chat.settings, settings)[0].model
    if any(getattr(args, name) is not None for name in ("model", "revision", "adapter_path", "decay_layer_offset")):
        changed["model"] = raw_model(engine.choice)
    elif own is not None and not is_same_model(own, engine.choice):
        engine.fallback = engine.choice
        engine.choice = replace(engine.choice, draft_model=None, **{name: getattr(own, name) for name in MODEL_PARTS})
    if talk.chat.settings and changed:
        keeper.keep_settings(talk, changed)


def _free_disk(nbytes: int) -> int:
    from ring_mlx import free_disk  # Not at the top: it brings MLX, for which the first screen does not wait.

    near = paths.data_file("chats.db")
    return free_disk(nbytes, near if near.exists() else near.parent, paths.snapshots())


def with_options(config: Any, args: argparse.Namespace) -> Any:
    """The configuration, overridden by the command line's options."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    config = replace(config, sampling=replace(config.sampling, **given))
    if args.system_prompt is not None:
        config = replace(config, system_prompt=args.system_prompt)
    return replace(config, model=args.model) if args.model else config
