"""How coding agents are told of a running server, each in its own way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

KEY = "RING_MLX_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """What a server says of a model.

    Args:
        url: Of the server, without ``/v1``.
        model: The name to ask for.
        key: What it wants, or a word that stands for none.
        context_tokens, most_tokens: Of a conversation, and of one answer.
    """

    url: str
    model: str
    key: str
    context_tokens: int
    most_tokens: int

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@dataclass(frozen=True)
class Recipe:
    """How a tool is started.

    Args:
        program: Its command.
        arguments: Of the command; ``{NAME}`` is the path of one of the files.
        variables: Of the environment, with paths as above.
        files: Texts of temporary files, by name.
        install: The command that installs the tool.
    """

    program: str
    install: str
    arguments: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def _opencode(s: Endpoint) -> Recipe:
    model = {
        "name": s.model,
        "reasoning": True,
        "tool_call": True,
        "limit": {"context": s.context_tokens, "output": s.most_tokens},
    }
    options = {"baseURL": s.v1, "apiKey": f"{{env:{KEY}}}"}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "ring-mlx", "options": options, "models": {s.model: model}}
    name = f"ring/{s.model}"
    settings = {"model": name, "small_model": name, "provider": {"ring": provider}}
    text = json.dumps({"$schema": "https://opencode.ai/config.json", **settings})
    return Recipe("opencode", "npm install -g opencode-ai", (), {KEY: s.key, "OPENCODE_CONFIG_CONTENT": text})


def _codex(s: Endpoint) -> Recipe:
    provider = {"name": "ring-mlx", "base_url": s.v1, "wire_api": "responses", "env_key": KEY}
    settings = {
        "model": json.dumps(s.model),
        "model_provider": '"ring"',
        "model_providers.ring": "{" + ", ".join(f"{k}={json.dumps(v)}" for k, v in provider.items()) + "}",
        "model_context_window": str(s.context_tokens),
    }
    arguments = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return Recipe("codex", "npm install -g @openai/codex", tuple(arguments), {KEY: s.key})


def _claude(s: Endpoint) -> Recipe:
    sizes = ("HAIKU", "SONNET", "OPUS")
    variables = {
        "ANTHROPIC_BASE_URL": s.url,
        "ANTHROPIC_AUTH_TOKEN": s.key,
        "ANTHROPIC_API_KEY": "",  # one of the user's own would come first
        "ANTHROPIC_MODEL": s.model,
        **{f"ANTHROPIC_DEFAULT_{size}_MODEL": s.model for size in sizes},
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(s.context_tokens),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(s.most_tokens),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return Recipe("claude", "npm install -g @anthropic-ai/claude-code", (), variables)


def _qwen(s: Endpoint) -> Recipe:
    settings = {"model": {"generationConfig": {"contextWindowSize": s.context_tokens}}}
    variables = {
        "OPENAI_BASE_URL": s.v1,
        "OPENAI_API_KEY": s.key,
        "OPENAI_MODEL": s.model,
        "QWEN_CODE_MAX_OUTPUT_TOKENS": str(s.most_tokens),
        "QWEN_CODE_SYSTEM_DEFAULTS_PATH": "{settings.json}",
    }
    arguments = ("--auth-type", "openai", "--model", s.model)
    files = {"settings.json": json.dumps(settings, indent=2)}
    return Recipe("qwen", "npm install -g @qwen-code/qwen-code", arguments, variables, files)


def _aider(s: Endpoint) -> Recipe:
    name = f"openai/{s.model}"
    limits = {"max_input_tokens": s.context_tokens, "max_output_tokens": s.most_tokens, "max_tokens": s.most_tokens}
    costs = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    metadata = {name: {**limits, **costs, "litellm_provider": "openai", "mode": "chat"}}
    arguments = ("--model", name, "--weak-model", name, "--model-metadata-file", "{metadata.json}")
    variables = {"OPENAI_API_BASE": s.v1, "OPENAI_API_KEY": s.key}
    files = {"metadata.json": json.dumps(metadata, indent=2)}
    return Recipe("aider", "pipx install aider-chat", arguments, variables, files)


def _continue(s: Endpoint) -> Recipe:
    model = {
        "name": s.model,
        "provider": "openai",
        "model": s.model,
        "apiBase": s.v1,
        "apiKey": s.key,
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use"],
        "contextLength": s.context_tokens,
        "defaultCompletionOptions": {"contextLength": s.context_tokens, "maxTokens": s.most_tokens},
    }
    settings = {"name": "ring-mlx", "version": "1.0.0", "schema": "v1", "models": [model]}
    # JSON is YAML.
    files = {"config.yaml": json.dumps(settings, indent=2)}
    return Recipe("cn", "npm install -g @continuedev/cli", ("--config", "{config.yaml}"), {}, files)


RECIPES: dict[str, Callable[[Endpoint], Recipe]] = {
    "opencode": _opencode,
    "codex": _codex,
    "claude": _claude,
    "qwen": _qwen,
    "aider": _aider,
    "continue": _continue,
}
