"""Checkpoints that ask, in every way known, to have their own code run, and the doors that such a folder comes to."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ["evil.Tok", "evil.Tok"]
MAP = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"), "evil.Tok")
# What asks for it: changes of config.json and of tokenizer_config.json.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "auto_map": ({"auto_map": MAP}, {"auto_map": {"AutoTokenizer": NAMES}}),
    "old auto_map": ({}, {"auto_map": NAMES}),
    "another repository": (
        {"auto_map": {"AutoConfig": "owner/repo--evil.Tok"}},
        {"auto_map": {"AutoTokenizer": ["owner/repo--evil.Tok", "owner/repo--evil.Tok"]}},
    ),
    "unknown class": ({}, {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": NAMES}}),
    "a processor": ({"auto_map": MAP}, {"tokenizer_class": "AutoProcessor"}),
    "a model": ({"auto_map": MAP}, {"tokenizer_class": "AutoModel"}),
    "a tokenizer of tokenizers": ({"auto_map": MAP}, {"tokenizer_class": "RagTokenizer"}),
    "pipelines": ({"custom_pipelines": {"text-generation": {"impl": "evil.Tok", "pt": ["AutoModel"]}}}, {}),
    "generation": ({"custom_generate": "evil.py"}, {"custom_generate": "evil.py"}),
}


def make_evil(source: Path, folder: Path, way: str = "auto_map", **config: Any) -> Path:
    """A copy of a checkpoint that would write the file ``marker`` beside the folder if its code were run."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    changes, settings = WAYS[way]
    for name, values in (("config.json", changes | config), ("tokenizer_config.json", settings)):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": MAP, "processor_class": "Tok"}))
    part = folder / "question_encoder_tokenizer"
    part.mkdir(exist_ok=True)
    shutil.copy(folder / "tokenizer_config.json", part)
    code = f"open({str(folder.parent / 'marker')!r}, 'a').write(__name__)\nclass Tok:\n    pass\n"
    for name in ("evil.py", "json.py", "__init__.py"):
        (folder / name).write_text(code)
    return folder


def _serve(folder: str) -> int:
    from ring_mlx.serve.engine import Settings
    from ring_mlx.serve.server import Server

    server = Server(Settings(model=folder, name="evil", store=False), port=0)
    server.start()
    server.engine.wait_until_loaded(60)
    return 0 if server.close() else 1


def _session(folder: str) -> int:
    from ring_mlx import Session

    with Session(folder, store=False) as session:
        return 0 if list(session.send("hello", max_tokens=1)) else 1


def _plugin(folder: str) -> int:
    import mlx_lm

    from ring_mlx import mlx_lm_plugin

    mlx_lm_plugin.register()
    mlx_lm.load(folder, tokenizer_config={"trust_remote_code": True}, trust_remote_code=True)
    return 0


def _command(*args: str) -> Callable[[str], int]:
    def run(folder: str) -> int:
        from ring_mlx.cli import main

        return main([a.replace("FOLDER", folder) for a in args])

    return run


def _mlx_lm(command: str, *args: str) -> Callable[[str], int]:
    return _command("mlx-lm", command, "--model", "FOLDER", *args)


DOORS: dict[str, Callable[[str], int]] = {
    "generate": _command("generate", "--model", "FOLDER", "-m", "1"),
    "chat": _command("chat", "--plain", "--model", "FOLDER", "--max-tokens", "1"),
    "cache-prompt": _command(
        "cache-prompt", "--model", "FOLDER", "--prompt", "hello", "--prompt-cache-file", "FOLDER/saved.safetensors"
    ),
    "convert": _command("convert", "--model", "FOLDER", "--mlx-path", "FOLDER/out", "--report", "FOLDER/config.json"),
    "eval": _command("eval", "--model", "FOLDER", "--perplexity", "FOLDER/config.json", "--kl", "FOLDER"),
    "bench": _command("bench", "--model", "FOLDER", "-p", "4", "-g", "1", "-n", "1"),
    "doctor": _command("doctor", "--check-decay", "FOLDER", "--text", "FOLDER/config.json", "--tokens", "64"),
    "serve": _serve,
    "Session": _session,
    "plug-in": _plugin,
    "mlx-lm generate": _mlx_lm("generate", "-m", "1"),
    "mlx-lm perplexity": _mlx_lm("perplexity", "--trust-r"),
    "mlx-lm benchmark": _mlx_lm("benchmark", "-p", "4", "-g", "1", "-n", "1"),
    "mlx-lm convert": _command("mlx-lm", "convert", "--hf-path", "FOLDER", "--mlx-path", "FOLDER/theirs"),
}


def main() -> None:
    """Goes through doors on the present terminal: the folder, then the names of the doors; a line for each."""
    folder, *names = sys.argv[1:]
    marker = Path(folder).parent / "marker"
    os.chdir(folder)
    for name in names:
        try:
            code: object = DOORS[name](folder)
        except SystemExit as e:
            code = e.code
        except BaseException as e:  # noqa: BLE001 all that matters here is what ran
            code = f"{type(e).__name__}: {e}"
        ran = marker.exists()
        marker.unlink(missing_ok=True)
        print("\nDOOR " + json.dumps({"name": name, "code": code, "ran": ran}), flush=True)


if __name__ == "__main__":
    main()
