"""Ring-linear models on MLX: load, cache and generate; the front ends know only the names listed here.

Names are imported when they are first used, so that ``ring-mlx --help`` does not wait for MLX and transformers.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ring_mlx.system import quick_start

quick_start.install()

# On M5 and NVIDIA GPUs MLX rounds the factors of float32 products to 10 bits unless told otherwise before the first one.
# The router's product is float32 so that the right experts are chosen. (ml-explore/mlx issues 3534 and 3860.)
os.environ.setdefault("MLX_ENABLE_TF32", "0")

if TYPE_CHECKING:
    from mlx_lm.sample_utils import make_sampler

    from ring_mlx.checkpoint.hub import cached_models
    from ring_mlx.checkpoint.loading import demo_model_path, load, load_model
    from ring_mlx.checkpoint.regular_files import read_json
    from ring_mlx.checkpoint.tokenizer import render_chat
    from ring_mlx.cli.options import add_decay_option, add_step_option, add_thinking_options, byte_count, thinking_of
    from ring_mlx.cli.table import Command
    from ring_mlx.engine.events import (
        AnswerText,
        Counters,
        End,
        Loading,
        ModelInfo,
        PrefillProgress,
        Revised,
        Sampling,
        Statistics,
        ThinkingText,
        ToolCall,
    )
    from ring_mlx.engine.session import Reply, Session
    from ring_mlx.engine.stored.stores import free_disk
    from ring_mlx.errors import RingError
    from ring_mlx.generation.sampling_ranges import value_range
    from ring_mlx.generation.stream import GenerationEvent, generate, stream_generate
    from ring_mlx.generation.thinking import Thinking, end_note
    from ring_mlx.mlx_lm_plugin import register
    from ring_mlx.model.cache import HybridCache
    from ring_mlx.model.config import RingConfig
    from ring_mlx.model.kv_quantization import KVQuantization
    from ring_mlx.model.model import Model
    from ring_mlx.system.files import text_of, write_text
    from ring_mlx.system.surrogates import whole_text
    from ring_mlx.system.terminal_text import for_output, harmless, harmless_json

__all__ = [
    "AnswerText",
    "Command",
    "Counters",
    "End",
    "GenerationEvent",
    "HybridCache",
    "KVQuantization",
    "Loading",
    "Model",
    "ModelInfo",
    "PrefillProgress",
    "Reply",
    "Revised",
    "RingConfig",
    "RingError",
    "Sampling",
    "Session",
    "Statistics",
    "Thinking",
    "ThinkingText",
    "ToolCall",
    "add_decay_option",
    "add_step_option",
    "add_thinking_options",
    "byte_count",
    "cached_models",
    "demo_model_path",
    "end_note",
    "for_output",
    "free_disk",
    "generate",
    "harmless",
    "harmless_json",
    "load",
    "load_model",
    "make_sampler",
    "read_json",
    "register",
    "render_chat",
    "stream_generate",
    "text_of",
    "thinking_of",
    "value_range",
    "whole_text",
    "write_text",
]

__version__ = "0.1.0"

_HOMES = {
    "AnswerText": "ring_mlx.engine.events",
    "Command": "ring_mlx.cli.table",
    "Counters": "ring_mlx.engine.events",
    "End": "ring_mlx.engine.events",
    "GenerationEvent": "ring_mlx.generation.stream",
    "HybridCache": "ring_mlx.model.cache",
    "KVQuantization": "ring_mlx.model.kv_quantization",
    "Loading": "ring_mlx.engine.events",
    "Model": "ring_mlx.model.model",
    "ModelInfo": "ring_mlx.engine.events",
    "PrefillProgress": "ring_mlx.engine.events",
    "Reply": "ring_mlx.engine.session",
    "Revised": "ring_mlx.engine.events",
    "RingConfig": "ring_mlx.model.config",
    "RingError": "ring_mlx.errors",
    "Sampling": "ring_mlx.engine.events",
    "Session": "ring_mlx.engine.session",
    "Statistics": "ring_mlx.engine.events",
    "Thinking": "ring_mlx.generation.thinking",
    "ThinkingText": "ring_mlx.engine.events",
    "ToolCall": "ring_mlx.engine.events",
    "add_decay_option": "ring_mlx.cli.options",
    "add_step_option": "ring_mlx.cli.options",
    "add_thinking_options": "ring_mlx.cli.options",
    "byte_count": "ring_mlx.cli.options",
    "cached_models": "ring_mlx.checkpoint.hub",
    "demo_model_path": "ring_mlx.checkpoint.loading",
    "end_note": "ring_mlx.generation.thinking",
    "for_output": "ring_mlx.system.terminal_text",
    "free_disk": "ring_mlx.engine.stored.stores",
    "generate": "ring_mlx.generation.stream",
    "harmless": "ring_mlx.system.terminal_text",
    "harmless_json": "ring_mlx.system.terminal_text",
    "load": "ring_mlx.checkpoint.loading",
    "load_model": "ring_mlx.checkpoint.loading",
    "make_sampler": "mlx_lm.sample_utils",
    "read_json": "ring_mlx.checkpoint.regular_files",
    "register": "ring_mlx.mlx_lm_plugin",
    "render_chat": "ring_mlx.checkpoint.tokenizer",
    "stream_generate": "ring_mlx.generation.stream",
    "text_of": "ring_mlx.system.files",
    "thinking_of": "ring_mlx.cli.options",
    "value_range": "ring_mlx.generation.sampling_ranges",
    "whole_text": "ring_mlx.system.surrogates",
    "write_text": "ring_mlx.system.files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ring_mlx' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError as e:
        # Not at the top: with -m a json.py of the present folder would be taken until __main__ has put it aside.
        from ring_mlx.system.install import explained

        raise explained(e) from e
