"""Ring-linear models on MLX: load, cache and generate; the front ends use only the names listed here.

Names are imported when they are first used, so that ``ring-mlx --help`` does not wait for MLX and transformers.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ring_mlx.system import quick_start

if TYPE_CHECKING:  # the same as _NAMES, for type checkers
    from mlx_lm.sample_utils import make_sampler

    from ring_mlx.checkpoint.hub import cached_models, each_cached_model
    from ring_mlx.checkpoint.loading import demo_model_path, load, load_model
    from ring_mlx.checkpoint.summary import Summary, summary_of
    from ring_mlx.doctor.models import Fit, known_fits
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
    from ring_mlx.generation.templates import render_chat
    from ring_mlx.generation.thinking import Thinking, end_note
    from ring_mlx.mlx_lm_plugin import register
    from ring_mlx.model.cache import HybridCache
    from ring_mlx.model.config import RingConfig
    from ring_mlx.model.kv_quantization import KVQuantization
    from ring_mlx.model.model import Model
    from ring_mlx.options import (
        Command,
        add_decay_option,
        add_draft_option,
        add_speculate_option,
        add_step_option,
        add_thinking_options,
        byte_count,
        thinking_of,
    )
    from ring_mlx.system.files import text_of, write_text
    from ring_mlx.system.regular_files import read_json
    from ring_mlx.system.terminal_text import for_output, harmless, harmless_json, whole_text

__version__ = "0.1.0"

_NAMES = {
    "mlx_lm.sample_utils": "make_sampler",
    "ring_mlx.checkpoint.hub": "cached_models each_cached_model",
    "ring_mlx.checkpoint.loading": "demo_model_path load load_model",
    "ring_mlx.checkpoint.summary": "Summary summary_of",
    "ring_mlx.system.regular_files": "read_json",
    "ring_mlx.doctor.models": "Fit known_fits",
    "ring_mlx.engine.events": "AnswerText Counters End Loading ModelInfo PrefillProgress Revised "
    "Sampling Statistics ThinkingText ToolCall",
    "ring_mlx.engine.session": "Reply Session",
    "ring_mlx.engine.stored.stores": "free_disk",
    "ring_mlx.errors": "RingError",
    "ring_mlx.generation.sampling_ranges": "value_range",
    "ring_mlx.generation.stream": "GenerationEvent generate stream_generate",
    "ring_mlx.generation.templates": "render_chat",
    "ring_mlx.generation.thinking": "Thinking end_note",
    "ring_mlx.mlx_lm_plugin": "register",
    "ring_mlx.model.cache": "HybridCache",
    "ring_mlx.model.config": "RingConfig",
    "ring_mlx.model.kv_quantization": "KVQuantization",
    "ring_mlx.model.model": "Model",
    "ring_mlx.options": "Command add_decay_option add_draft_option add_speculate_option add_step_option add_thinking_options byte_count thinking_of",
    "ring_mlx.system.files": "text_of write_text",
    "ring_mlx.system.terminal_text": "for_output harmless harmless_json whole_text",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)

quick_start.install()

# On M5 and NVIDIA GPUs MLX rounds the factors of float32 products to 10 bits unless told otherwise before the first one.
# The router's product is float32 so that the right experts are chosen. (ml-explore/mlx issues 3534 and 3860.)
os.environ.setdefault("MLX_ENABLE_TF32", "0")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ring_mlx' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError as e:
        # Not at the top: with -m a json.py of the present folder would be taken until __main__ has put it aside.
        from ring_mlx.system.install import explained

        raise explained(e) from e
