"""Ring-linear models on MLX: load, cache and generate; the front ends know only the names listed here.

Names are imported when they are first used, so that ``ring-mlx --help`` does not wait for MLX and transformers.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ring_mlx import quick_start

quick_start.install()

# On M5 and NVIDIA GPUs MLX rounds the factors of float32 products to 10 bits unless told otherwise before the first one.
# The router's product is float32 so that the right experts are chosen. (ml-explore/mlx issues 3534 and 3860.)
os.environ.setdefault("MLX_ENABLE_TF32", "0")

if TYPE_CHECKING:
    from mlx_lm.sample_utils import make_sampler

    from ring_mlx.cache import HybridCache
    from ring_mlx.checkpoint_files import read_json
    from ring_mlx.cli.options import add_decay_option, add_step_option, add_thinking_options, byte_count, thinking_of
    from ring_mlx.cli.table import Command
    from ring_mlx.config import RingConfig
    from ring_mlx.errors import RingError
    from ring_mlx.files import text_of, write_text
    from ring_mlx.generation import GenerationEvent, generate, stream_generate
    from ring_mlx.hub import cached_models
    from ring_mlx.kv_quantization import KVQuantization
    from ring_mlx.loading import demo_model_path, load, load_model
    from ring_mlx.mlx_lm_plugin import register
    from ring_mlx.model import Model
    from ring_mlx.sampling_ranges import value_range
    from ring_mlx.session import Reply, Session
    from ring_mlx.session_events import (
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
    from ring_mlx.snapshots.stores import free_disk
    from ring_mlx.surrogates import whole_text
    from ring_mlx.terminal_text import for_output, harmless, harmless_json
    from ring_mlx.thinking import Thinking, end_note
    from ring_mlx.tokenizer import render_chat

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
    "AnswerText": "ring_mlx.session_events",
    "Command": "ring_mlx.cli.table",
    "Counters": "ring_mlx.session_events",
    "End": "ring_mlx.session_events",
    "GenerationEvent": "ring_mlx.generation",
    "HybridCache": "ring_mlx.cache",
    "KVQuantization": "ring_mlx.kv_quantization",
    "Loading": "ring_mlx.session_events",
    "Model": "ring_mlx.model",
    "ModelInfo": "ring_mlx.session_events",
    "PrefillProgress": "ring_mlx.session_events",
    "Reply": "ring_mlx.session",
    "Revised": "ring_mlx.session_events",
    "RingConfig": "ring_mlx.config",
    "RingError": "ring_mlx.errors",
    "Sampling": "ring_mlx.session_events",
    "Session": "ring_mlx.session",
    "Statistics": "ring_mlx.session_events",
    "Thinking": "ring_mlx.thinking",
    "ThinkingText": "ring_mlx.session_events",
    "ToolCall": "ring_mlx.session_events",
    "add_decay_option": "ring_mlx.cli.options",
    "add_step_option": "ring_mlx.cli.options",
    "add_thinking_options": "ring_mlx.cli.options",
    "byte_count": "ring_mlx.cli.options",
    "cached_models": "ring_mlx.hub",
    "demo_model_path": "ring_mlx.loading",
    "end_note": "ring_mlx.thinking",
    "for_output": "ring_mlx.terminal_text",
    "free_disk": "ring_mlx.snapshots.stores",
    "generate": "ring_mlx.generation",
    "harmless": "ring_mlx.terminal_text",
    "harmless_json": "ring_mlx.terminal_text",
    "load": "ring_mlx.loading",
    "load_model": "ring_mlx.loading",
    "make_sampler": "mlx_lm.sample_utils",
    "read_json": "ring_mlx.checkpoint_files",
    "register": "ring_mlx.mlx_lm_plugin",
    "render_chat": "ring_mlx.tokenizer",
    "stream_generate": "ring_mlx.generation",
    "text_of": "ring_mlx.files",
    "thinking_of": "ring_mlx.cli.options",
    "value_range": "ring_mlx.sampling_ranges",
    "whole_text": "ring_mlx.surrogates",
    "write_text": "ring_mlx.files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ring_mlx' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError as e:
        # Not at the top: with -m a json.py of the present folder would be taken until __main__ has put it aside.
        from ring_mlx.install import explained

        raise explained(e) from e
