"""What a chat has settled: its sampling, system prompt and model; as the store has it, and where it differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from tui.commands import SETTINGS
from tui.config import Config, with_setting
from tui.messages import ModelChoice, Sampling
from tui.models import TOY_NAME

MODEL_PARTS = ("path", "revision", "adapter_path", "decay_layer_offset")  # of a choice, those that make another model
MODELS_OWN = ("temp", "top_p", "top_k", "min_p")  # are what the model says where nothing is set
PROMPT_SHOWN, OPENING = 24, 200  # characters


@dataclass(frozen=True)
class Settings:
    """The settings of a chat; ``model`` None is any."""

    sampling: Sampling
    system_prompt: str = ""
    model: ModelChoice | None = None

    def as_raw(self) -> dict[str, Any]:
        """As the store and exports have them."""
        raw = {**vars(self.sampling), "system_prompt": self.system_prompt}
        return raw if self.model is None else {**raw, "model": raw_model(self.model)}


def default_settings(config: Config) -> Settings:
    """What new chats have."""
    return Settings(config.sampling, config.system_prompt, choice_of(config.model))


def settings_of(raw: Mapping[str, Any], config: Config) -> tuple[Settings, list[str]]:
    """A chat's settings, and what is wrong with those that it has; what it lacks is as the configuration says."""
    found, wrong = Settings(config.sampling, config.system_prompt), []
    for name in (name for name in SETTINGS if name in raw):
        try:
            found = replace(found, sampling=with_setting(found.sampling, name, raw[name]))
        except ValueError as e:
            wrong.append(str(e))
    prompt, model = raw.get("system_prompt", found.system_prompt), raw.get("model")
    if isinstance(prompt, str):
        found = replace(found, system_prompt=prompt)
    else:
        wrong.append("system_prompt is not a text")
    if _is_model(model):
        found = replace(found, model=ModelChoice(**{str(name): value for name, value in model.items()}))
    elif model is not None:
        wrong.append("model names none")
    return found, wrong


def choice_of(name: str) -> ModelChoice:
    """The model of a name as commands and the configuration have it; the path of a folder is made absolute."""
    if name in ("", TOY_NAME):
        return ModelChoice()
    try:
        folder = Path(name).expanduser()
        return ModelChoice(str(folder.absolute()) if folder.is_dir() else name)
    except (OSError, ValueError, RuntimeError):
        return ModelChoice(name)


def raw_model(choice: ModelChoice) -> dict[str, Any]:
    """A model as the store and exports have it; folders in the home are written so that they fit another one too."""
    parts = {name: getattr(choice, name) for name in MODEL_PARTS}
    return {name: _under_home(value) for name, value in parts.items() if value is not None} or {"path": None}


def is_same_model(one: ModelChoice, other: ModelChoice) -> bool:
    """Whether two choices name the same model."""
    return raw_model(one) == raw_model(other)


def model_name(choice: ModelChoice) -> str:
    """What to call a model, with what makes it another one."""
    name = Path(choice.path).name if choice.path else TOY_NAME
    adapter = Path(choice.adapter_path).name if choice.adapter_path else ""
    offset = f"decay {choice.decay_layer_offset}" if choice.decay_layer_offset is not None else ""
    return " + ".join(filter(None, [name, choice.revision, adapter, offset]))


def differences(own: Settings, default: Settings) -> list[str]:
    """What is otherwise in a chat than in new ones, in a few words each, what matters most first."""
    found = []
    if own.model and default.model and not is_same_model(own.model, default.model):
        found.append(model_name(own.model))
    if own.system_prompt != default.system_prompt:
        said = " ".join(own.system_prompt[:OPENING].split())
        said = said if len(said) <= PROMPT_SHOWN else f"{said[:PROMPT_SHOWN].rstrip()}…"
        found.append(f"“{said}”" if own.system_prompt else "no system prompt")
    for name in SETTINGS:
        value, words = getattr(own.sampling, name), name.replace("_", " ")
        if value == getattr(default.sampling, name):
            continue
        shown = f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"
        found.append(shown if value is not None else f"the model's {words}" if name in MODELS_OWN else f"no {words}")
    return found


def _is_model(raw: object) -> TypeGuard[dict[str, Any]]:
    """Whether a stored value can be a model."""
    if not isinstance(raw, dict) or "path" not in raw or not set(raw) <= set(MODEL_PARTS):
        return False
    return all(
        v is None or isinstance(v, str) or (n == "decay_layer_offset" and type(v) is int) for n, v in raw.items()
    )


def _under_home(value: Any) -> Any:
    home = str(Path.home())
    return f"~{value[len(home) :]}" if isinstance(value, str) and value.startswith(f"{home}/") else value
