"""``python -m tests.clients_of_forms [NAME ...]``: structured output of other libraries against a server with the toy.

Not one of the tests that always run: the libraries are installed by hand (langchain-openai, pydantic-ai-slim[openai], instructor, smolagents, llm,
litellm, openai), also in an environment of their own, for which there is ``--url`` of a running ``ring-mlx serve``. Each asks for one object and is
given it as its own type, or says what it was told instead.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ASKED = "What is 27 + 35?"
EXTRA = {"thinking_budget": 8}


class Sum(BaseModel):
    """The answer to a sum."""

    model_config = ConfigDict(extra="forbid")
    total: int = Field(ge=0, le=99)
    unit: Literal["apples", "pears"]


def of_openai(url: str, model: str) -> object:
    client = importlib.import_module("openai").OpenAI(base_url=url, api_key="none")
    asked = [{"role": "user", "content": ASKED}]
    answer = client.chat.completions.parse(model=model, messages=asked, response_format=Sum, max_tokens=200)
    return answer.choices[0].message.parsed


def of_langchain(url: str, model: str) -> object:
    made = importlib.import_module("langchain_openai").ChatOpenAI(
        model=model, base_url=url, api_key="none", max_tokens=200, extra_body=EXTRA
    )
    found = [made.with_structured_output(Sum, method=m).invoke(ASKED) for m in ("json_schema", "function_calling")]
    return found[0] if all(isinstance(f, Sum) for f in found) else found


def of_pydantic_ai(url: str, model: str) -> object:
    ai, models = importlib.import_module("pydantic_ai"), importlib.import_module("pydantic_ai.models.openai")
    providers = importlib.import_module("pydantic_ai.providers.openai")
    chat = models.OpenAIChatModel(model, provider=providers.OpenAIProvider(base_url=url, api_key="none"))
    settings = {"extra_body": EXTRA, "max_tokens": 200}
    found = [
        ai.Agent(chat, output_type=kind, model_settings=settings).run_sync(ASKED).output
        for kind in (Sum, ai.NativeOutput(Sum))
    ]
    return found[0] if all(isinstance(f, Sum) for f in found) else found


def of_instructor(url: str, model: str) -> object:
    made, client = importlib.import_module("instructor"), importlib.import_module("openai").OpenAI
    asked = {"model": model, "messages": [{"role": "user", "content": ASKED}], "max_tokens": 200, "extra_body": EXTRA}
    found = [
        made.from_openai(client(base_url=url, api_key="none"), mode=mode).chat.completions.create(
            response_model=Sum, max_retries=0, **asked
        )
        for mode in (made.Mode.TOOLS, made.Mode.JSON_SCHEMA)
    ]
    return found[0] if all(isinstance(f, Sum) for f in found) else found


def of_smolagents(url: str, model: str) -> object:
    made = importlib.import_module("smolagents")
    chat = made.OpenAIServerModel(model_id=model, api_base=url, api_key="none", max_tokens=200)
    form = {"type": "json_schema", "json_schema": {"name": "sum", "strict": True, "schema": Sum.model_json_schema()}}
    asked = [{"role": "user", "content": [{"type": "text", "text": ASKED}]}]
    return Sum.model_validate_json(chat.generate(asked, response_format=form).content)


def of_litellm(url: str, model: str) -> object:
    made = importlib.import_module("litellm")
    asked = [{"role": "user", "content": ASKED}]
    answer = made.completion(
        model=f"openai/{model}", api_base=url, api_key="none", messages=asked, response_format=Sum, max_tokens=200
    )
    return Sum.model_validate_json(answer.choices[0].message.content)


def of_llm(url: str, model: str) -> object:
    """The command ``llm --schema``."""
    importlib.import_module("llm")
    with tempfile.TemporaryDirectory() as folder:
        known = f"- model_id: {model}\n  model_name: {model}\n  api_base: {url}\n  supports_schema: true\n"
        Path(folder, "extra-openai-models.yaml").write_text(known, encoding="utf-8")
        schema = json.dumps(Sum.model_json_schema())
        command = [sys.executable, "-m", "llm", "-m", model, "--no-stream", "--schema", schema]
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        done = subprocess.run(
            [*command, ASKED], check=False, env=environment, capture_output=True, text=True, timeout=120
        )
    return Sum.model_validate_json(done.stdout) if done.returncode == 0 else done.stderr


CLIENTS: dict[str, Callable[[str, str], object]] = {
    name.removeprefix("of_"): made for name, made in list(globals().items()) if name.startswith("of_")
}


def tried(url: str, names: list[str]) -> int:
    """Ask with each; returns how many did not get the object."""
    failed, model = 0, json.loads(urllib.request.urlopen(f"{url}/models").read())["data"][0]["id"]
    for name in names or CLIENTS:
        try:
            asyncio.set_event_loop(asyncio.new_event_loop())
            found = CLIENTS[name](url, model)
            said = f"works: {found!r}" if isinstance(found, Sum) else f"FAILED: {found!r}"
        except ModuleNotFoundError as e:
            said = f"not installed ({e.name})"
        except Exception as e:  # noqa: BLE001 each is told
            said = f"FAILED: {''.join(traceback.format_exception_only(e)).strip()[:500]}"
        failed += said.startswith("FAILED")
        print(f"{name}: {said}", flush=True)
    return failed


def main() -> int:
    """Start a server unless one is named, and try the clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a running server, such as http://127.0.0.1:8080/v1")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CLIENTS)} (all)")
    args = parser.parse_args()
    if args.url:
        return min(1, tried(args.url, args.names))
    serving = importlib.import_module("ring_mlx.serve.server"), importlib.import_module("ring_mlx.serve.engine")
    loading = importlib.import_module("ring_mlx.checkpoint.loading")
    server = serving[0].Server(serving[1].Settings(loading.demo_model_path(), "toy", store=False), port=0)
    server.start()
    try:
        server.engine.wait_until_loaded(60)
        return min(1, tried(f"http://127.0.0.1:{server.server_port}/v1", args.names))
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(main())
