"""Damaged and hostile model folders by name: what has been tried and went wrong somewhere, here or elsewhere."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz import folders
from tests.fuzz.folders import (
    CONFIG,
    GENERATION,
    INDEX,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    put,
    safetensors,
    toy_json,
)

Damage = Callable[[Path], None]
GONE = object()
NESTED, NESTED_OBJECTS = b"[" * 200_000 + b"]" * 200_000, b'{"b":' * 100_000 + b"1" + b"}" * 100_000
HUGE, DIGITS = 10**400, b"9" * 5000

CONFIGS: dict[str, dict[str, Any]] = {
    "layers_1e9": {"num_hidden_layers": 10**9},
    "layers_9999": {"num_hidden_layers": 9999},
    "layers_1e30": {"num_hidden_layers": 10**30},
    "experts_1e9": {"num_experts": 10**9},
    "experts_1e5": {"num_experts": 100_000, "n_group": 1, "topk_group": 1},
    "heads_neg": {"num_attention_heads": -6},
    "heads_1e4": {"num_attention_heads": 9996},
    "heads_float": {"num_attention_heads": 6.0},
    "heads_str": {"num_attention_heads": "6"},
    "vocab_0": {"vocab_size": 0},
    "vocab_1e12": {"vocab_size": 10**12},
    "vocab_1e7": {"vocab_size": 10**7},
    "hidden_2": {"hidden_size": 2},
    "shared_width_0": {"moe_shared_expert_intermediate_size": 0},
    "hidden_1e6": {"hidden_size": 10**6},
    "hidden_1e18": {"hidden_size": 10**18},
    "head_dim_2e40": {"head_dim": 2**40},
    "head_dim_2e16": {"head_dim": 1 << 16},
    "intermediate_1": {"intermediate_size": 1},
    "intermediate_2e24": {"intermediate_size": 1 << 24},
    "moe_intermediate_2e20": {"moe_intermediate_size": 1 << 20},
    "positions_1e18": {"max_position_embeddings": 10**18},
    "positions_huge": {"max_position_embeddings": HUGE},
    "positions_1": {"max_position_embeddings": 1},
    "theta_nan": {"rope_theta": float("nan")},
    "theta_inf": {"rope_theta": float("inf")},
    "theta_huge": {"rope_theta": HUGE},
    "theta_1_yarn": {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 4}},
    "eps_0": {"rms_norm_eps": 0.0},
    "eps_neg": {"rms_norm_eps": -1},
    "scaling_factor_nan": {"routed_scaling_factor": float("nan")},
    "scaling_factor_huge": {"routed_scaling_factor": HUGE},
    "rotary_factor_nan": {"partial_rotary_factor": float("nan")},
    "rotary_factor_str": {"partial_rotary_factor": "0.5"},
    "rotary_factor_tiny": {"partial_rotary_factor": 1e-9},
    "rotary_str": {"rotary_dim": "16"},
    "rotary_nan": {"rotary_dim": 16, "partial_rotary_factor": float("nan")},
    "rotary_factor_x": {"rotary_dim": 16, "partial_rotary_factor": "x"},
    "rotary_only_str": {"rotary_dim": "16", "partial_rotary_factor": GONE},
    "rotary_only_huge": {"rotary_dim": 10**90, "partial_rotary_factor": GONE},
    "rope_list": {"rope_scaling": [1]},
    "rope_type_list": {"rope_scaling": {"type": [1], "factor": 2}},
    "yarn_original_str": {
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": "x"},
    },
    "yarn_beta_str": {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": "x"}},
    "yarn_original_0": {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}},
    "yarn_mscale_list": {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": [1]}},
    "rope_factor_tiny": {"rope_scaling": {"type": "linear", "factor": 1e-300}},
    "rope_parameters_str": {"rope_parameters": "x", "rope_theta": GONE},
    "model_type_list": {"model_type": ["bailing_moe_linear"]},
    "model_type_object": {"model_type": {"a": 1}},
    "eos_str": {"eos_token_id": "abc"},
    "eos_object": {"eos_token_id": {"a": 1}},
    "eos_nested": {"eos_token_id": [[1]]},
    "eos_1e30": {"eos_token_id": 10**30},
    "eos_neg": {"eos_token_id": -1},
    "eos_mixed": {"eos_token_id": [1, "x", None, 2.5]},
    "eos_null": {"eos_token_id": None},
    "quantization_str": {"quantization": "x"},
    "quantization_list": {"quantization": [1]},
    "quantization_bits_str": {"quantization": {"bits": "x", "group_size": 64}},
    "quantization_bits_0": {"quantization": {"bits": 0, "group_size": 0}},
    "quantization_bits_1e9": {"quantization": {"bits": 10**9, "group_size": 64}},
    "quantization_bits_7": {"quantization": {"bits": 7, "group_size": 64}},
    "quantization_mode": {"quantization": {"bits": 8, "group_size": 64, "mode": ["affine"]}},
    "quantization_module_null": {
        "quantization": {"bits": 8, "group_size": 64, "lm_head": {"bits": 8, "group_size": None}},
    },
    "quantization_module_bits": {
        "quantization": {"bits": 8, "group_size": 64, "lm_head": {"bits": 3, "group_size": 7}}
    },
    "quantization_none": {"quantization": GONE, "quantization_config": GONE},
    "foreign_str": {"quantization": GONE, "quantization_config": "x"},
    "foreign_list": {"quantization": GONE, "quantization_config": [1]},
    "foreign_method_list": {"quantization": GONE, "quantization_config": {"quant_method": ["\x1b[31m"]}},
    "foreign_method_long": {"quantization": GONE, "quantization_config": {"quant_method": {"a": "x" * 9000}}},
    "torch_dtype_list": {"torch_dtype": ["bfloat16"]},
    "torch_dtype_object": {"torch_dtype": {"a": 1}},
    "hidden_act_list": {"hidden_act": ["silu"]},
    "group_1e18": {"layer_group_size": 10**18},
    "group_1": {"layer_group_size": 1},
    "unknown_100k": {f"k{i}": 1 for i in range(100_000)},
    "unknown_long": {"k" * 100_000: 1},
    "tie_str": {"tie_word_embeddings": "yes"},
    "top_k_above": {"num_experts_per_tok": 100},
    "shared_1e9": {"num_shared_experts": 10**9},
    "first_dense_1e18": {"first_k_dense_replace": 10**18},
}
TEXT = json.dumps(toy_json(CONFIG)).encode()
RAW: dict[str, bytes] = {
    "bom": b"\xef\xbb\xbf" + TEXT,
    "utf16": TEXT.decode().encode("utf-16"),
    "utf32": TEXT.decode().encode("utf-32"),
    "empty": b"",
    "nul": b"\0" * 100,
    "nested": b'{"a":' + NESTED + b"," + TEXT[1:],
    "nested_objects": b'{"a":' + NESTED_OBJECTS + b"," + TEXT[1:],
    "nested_900": b'{"hidden_act":' + b"[" * 900 + b"]" * 900 + b"," + TEXT[1:],
    "key_twice": TEXT[:-1] + b',"num_hidden_layers":3}',
    "digits": TEXT[:-1] + b',"zzz":' + DIGITS + b"}",
    "layers_digits": TEXT[:-1] + b',"x":1,"num_shared_experts":' + b"9" * 4000 + b"}",
    "surrogate": TEXT[:-1] + b',"\\ud800":1}',
    "list": b"[1]",
    "null": b"null",
    "text": b'"x"',
    "40MB": b'{"a":"' + b"x" * 40_000_000 + b'",' + TEXT[1:],
    "8M_values": b'{"a":[' + b"1," * 8_000_000 + b"1]," + TEXT[1:],
}
GENERATIONS: dict[str, Any] = {
    "eos_str": {"eos_token_id": "x"},
    "eos_object": {"eos_token_id": {}},
    "eos_float": {"eos_token_id": 1.5},
    "eos_all": {"eos_token_id": list(range(1024))},
    "nan": b'{"temperature":NaN,"top_p":-5,"top_k":"x"}',
    "nested": b'{"a":' + NESTED + b"}",
    "list": [1],
    "utf16": json.dumps({"eos_token_id": 1}).encode("utf-16"),
    "digits": b'{"eos_token_id":' + DIGITS + b"}",
}
TOKENIZER_CONFIGS: dict[str, Any] = {
    "class_path": {"tokenizer_class": "../../evil"},
    "class_os": {"tokenizer_class": "os.system"},
    "class_list": {"tokenizer_class": ["x"]},
    "length_huge": {"model_max_length": HUGE},
    "eos_object": {"eos_token": {"content": ["x"], "__type": "AddedToken"}},
    "parser_path": {"tool_parser_type": "../../evil"},
    "parser_list": {"tool_parser_type": ["x"]},
    "template_list": {"chat_template": [1, {"name": 2}]},
    "template_number": {"chat_template": 5},
    "added_str": {"added_tokens_decoder": {"x": {"content": "y"}}},
    "added_long": {"added_tokens_decoder": {"5": {"content": "x" * 1_000_000}}},
    "added_huge": {"added_tokens_decoder": {"9999999999": {"content": "<z>", "special": True}}},
    "extra_number": {"extra_special_tokens": 7, "additional_special_tokens": [1]},
    "padding_side": {"padding_side": "up"},
}
TEMPLATES: dict[str, str | bytes] = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x=i*j %}{% endfor %}{% endfor %}",
    "long": "{{ 'x' * 10**11 }}",
    "doubled": "{% set n=namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "power": "{{ 9**9**9 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute": "{{ ''|attr('__class__') }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch PWNED').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "mutation": "{{ messages.append({'role':'user','content':'x'}) }}",
    "syntax": "{% for %}",
    "empty": "",
    "error": "{{ raise_exception('no\nway\r') }}",
    "deep": "{% if 1 %}" * 5000 + "x" + "{% endif %}" * 5000,
    "bom": "\ufeff{{ messages[0].content }}",
    "latin1": b"\xff\xfe{{ messages[0].content }}",
    "2MB": "x" * (2 << 20),
}


def _tokenizer(change: Callable[[dict[str, Any]], Any], path: Path) -> None:
    content = toy_json(TOKENIZER)
    made = change(content)
    put(path / TOKENIZER, content if made is None else made)


def _split(pattern: str) -> Callable[[dict[str, Any]], None]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda t: t.update(pre_tokenizer=step)


def _added(*numbers: int) -> Callable[[dict[str, Any]], None]:
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return lambda t: t["added_tokens"].extend({"id": n, "content": f"<{n}>", **rest} for n in numbers)


def _replace(text: str, times: int) -> Callable[[dict[str, Any]], None]:
    step = {"type": "Replace", "pattern": {"String": "h"}, "content": text}
    return lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [step] * times})


def _shift_ids(t: dict[str, Any]) -> None:
    vocab = t["model"]["vocab"]
    for token in list(vocab)[:300]:
        vocab[token] = 2**31 - 1 - vocab[token]


TOKENIZERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "truncated": lambda t: json.dumps(t)[:1000],
    "nested": lambda t: "[" * 500_000,
    "utf16": lambda t: json.dumps(t).encode("utf-16"),
    "redos": _split("(a+)+$|(x+x+)+y|((h|i)*)*z"),
    "regex_deep": _split("(" * 3000 + "a" + ")" * 3000),
    "regex_large": _split("(?:a{1000}){1000}"),
    "regex_wrong": _split("[z-a](?<"),
    "added_1e9": _added(10**9, 10**9 + 1),
    "added_neg": _added(-1),
    "ids_huge": _shift_ids,
    "vocabulary_empty": lambda t: t["model"].update(vocab={}),
    "vocabulary_list": lambda t: t["model"].update(vocab=[["a", 1]]),
    "merges_unknown": lambda t: t["model"].update(merges=[["zzzz", "yyyy"]]),
    "merges_numbers": lambda t: t["model"].update(merges=[1, 2]),
    "prefix_of_no_merge": lambda t: t["model"].update(continuing_subword_prefix="##"),
    "prefix_longer_than_a_part": lambda t: t["model"].update(continuing_subword_prefix="\u00e9" * 9),
    "merge_long": lambda t: t["model"].update(merges=[["a" * 5_000_000, "b"]]),
    **{
        f"precompiled_{n}": lambda t, table=table: t.update(
            normalizer={"type": "Precompiled", "precompiled_charsmap": b64encode(table).decode()}
        )
        for n, table in {"empty": b"", "no_trie": bytes(4) + b"abc", "too_short": b"\xff" * 100}.items()
    },
    **{
        f"replaces_{n}": lambda t, pattern=pattern: t.update(
            normalizer={"type": "Replace", "pattern": pattern, "content": "x" * 50}
        )
        for n, pattern in {"nothing": {"String": ""}, "edges": {"Regex": r"\b"}, "options": {"Regex": "(a|b*)"}}.items()
    },
    "bytes_of_bytes": lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}),
    "prepends": lambda t: t.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 4000}] * 900}
    ),
    "pieces_of_0": lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "strip_long": lambda t: t.update(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 9}),
    "template_of_two": lambda t: t.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "B", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "model_none": lambda t: t.pop("model") and None,
    "unknown_token": lambda t: t["model"].update(unk_token="<nothing>"),
    "replacement_long": _replace("h" * 5_000_000, 1),
    "replacement_grows": _replace("hh", 40),
    "padding_fixed": lambda t: t.update(
        padding={
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ),
    "truncation_0": lambda t: t.update(
        truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}
    ),
    "template_unknown": lambda t: t.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "decoder_unknown": lambda t: t.update(decoder={"type": "Nothing"}),
}


def _header(change: Callable[[dict[str, Any], list[str]], Any], path: Path) -> None:
    head = folders.header()
    made = change(head, [n for n in head if n != "__metadata__"])
    put(path / WEIGHTS, made if isinstance(made, bytes) else safetensors(head))


def _extra(name: str) -> Callable[[dict[str, Any], list[str]], None]:
    end = len(folders.data())
    return lambda h, n: h.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}})


def _swap(h: dict[str, Any], n: list[str]) -> None:
    h[n[3]]["data_offsets"].reverse()


def _with(**changes: Any) -> Callable[[dict[str, Any], list[str]], None]:
    return lambda h, n: h[n[3]].update(changes)


def _as_dtype(name: str, dtype: str) -> Callable[[dict[str, Any], list[str]], bytes]:
    """A tensor of zeros of its own shape, but another dtype."""

    def change(h: dict[str, Any], n: list[str]) -> bytes:
        (start, end), shape = h[name]["data_offsets"], h[name]["shape"]
        size = math.prod(shape) * {"U8": 1, "F32": 4}[dtype]
        h[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        for entry in (h[k] for k in n if k != name and h[k]["data_offsets"][0] >= end):
            entry["data_offsets"] = [at + size - (end - start) for at in entry["data_offsets"]]
        return safetensors(h, folders.data()[:start] + bytes(size) + folders.data()[end:])

    return change


def _many(h: dict[str, Any], n: list[str]) -> bytes:
    entry = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return safetensors(b"{" + b",".join(entry % i for i in range(400_000)) + b"}", b"")


HEADERS: dict[str, Callable[[dict[str, Any], list[str]], Any]] = {
    **{
        f"length_{n}": lambda h, names, n=n: safetensors(h, length=n)
        for n in (0, 1, 10**8, 2**32, 2**63 - 1, 2**64 - 1)
    },
    "overlap": lambda h, n: h[n[3]].update(data_offsets=h[n[2]]["data_offsets"]),
    "offsets_neg": _with(data_offsets=[-8, 0]),
    "offsets_swapped": _swap,
    "offsets_huge": _with(data_offsets=[2**63, 2**63 + 8]),
    "offsets_three": _with(data_offsets=[0, 1, 2]),
    "offsets_object": _with(data_offsets=[0, {}]),
    "shape_product": _with(shape=[2**62] * 100_000),
    "offsets_float": _with(data_offsets=[0.0, 8.0]),
    "shape_huge": _with(shape=[2**32, 2**32]),
    "shape_neg": _with(shape=[-1, -192]),
    "shape_true": _with(shape=[True, 1]),
    "shape_axes": _with(shape=[1] * 100_000),
    "shape_text": _with(shape="192"),
    "dtype_unknown": _with(dtype="XYZ"),
    "dtype_list": _with(dtype=["F32"]),
    "dtype_f8": _with(dtype="F8_E4M3"),
    "dtype_f64": lambda h, n: h[n[3]].update(dtype="F64", shape=[h[n[3]]["shape"][0], h[n[3]]["shape"][-1] // 2]),
    "norm_integers": _as_dtype("model.norm.weight", "U8"),
    "packed_as_float": _as_dtype("lm_head.weight", "F32"),
    "packed_experts_as_bytes": _as_dtype("model.layers.1.mlp.switch_mlp.up_proj.weight", "U8"),
    "entry_null": lambda h, n: h.update({n[3]: None}),
    "extra_empty": _extra("evil"),
    "layer_large": _extra("model.layers.99999999999999999999999999.mlp.experts.99999999999999999.gate_proj.weight"),
    "layer_digits": _extra("model.layers." + "9" * 5000 + ".mlp.x"),
    "layer_name": _extra("model.layers.x.mlp.x"),
    "expert_digits": _extra("model.layers.1.mlp.experts." + "9" * 5000 + ".gate_proj.weight"),
    "expert_beyond": _extra("model.layers.1.mlp.experts.500.gate_proj.weight"),
    "name_surrogate": _extra("\ud800"),
    "nested": lambda h, n: safetensors(b'{"a":' + b"[" * 10_000_000, b""),
    "many": _many,
    "metadata_long": lambda h, n: h.update(__metadata__={"x": "y" * 40_000_000}),
    "metadata_digests": lambda h, n: h.update(__metadata__={"expert_sha256": "zz"}),
    "metadata_list": lambda h, n: h.update(__metadata__=[1, 2]),
    "metadata_number": lambda h, n: h.update(__metadata__={"a": 1}),
    "truncated": lambda h, n: safetensors(h, folders.data()[: len(folders.data()) // 2]),
    "trailing": lambda h, n: safetensors(h, folders.data() + b"x" * 4096),
    "empty": lambda h, n: b"",
    "tensor_gone": lambda h, n: h.pop(n[3]) and None,
}


def _index(value: Any, path: Path) -> None:
    put(path / INDEX, {"weight_map": dict.fromkeys(folders.header(), value) if isinstance(value, str) else value})


def _outside(path: Path) -> None:
    shutil.copy(path / WEIGHTS, path.parent / "outside.safetensors")
    _index("../outside.safetensors", path)


INDICES: dict[str, Damage] = {
    "outside": _outside,
    "absolute": lambda path: _index(str((path / WEIGHTS).resolve()), path),
    "password": partial(_index, "../../../../../etc/passwd"),
    "zero": partial(_index, "../../../../../../dev/zero"),
    "nul": partial(_index, "a\0b"),
    "long": partial(_index, "a" * 5000),
    "surrogate": partial(_index, "\ud800"),
    "folder": partial(_index, ".."),
    "empty": partial(_index, ""),
    "list": partial(_index, ["a"]),
    "numbers": partial(_index, {"a": 1, "b": None, "c": [WEIGHTS]}),
    "missing": partial(_index, "model-00001-of-00002.safetensors"),
    "null": partial(_index, None),
}


def _second_shard(change: Callable[[dict[str, Any], list[str]], Any], path: Path) -> None:
    """A shard beside the first with a tensor of its own, of which another name may stand in the first."""
    head = folders.header()
    entry = dict(head["model.norm.weight"])
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    entry["data_offsets"] = [0, size]
    second = {change(head, list(head)): entry}
    put(path / "model-00002.safetensors", safetensors(second, bytes(size)))


def _sparse_vocabulary(path: Path) -> None:
    """An embedding of 3 GB that fits config.json, and takes no place on the disk."""
    head, rows, width = folders.header(), 1 << 22, toy_json(CONFIG)["hidden_size"]
    names = [n for n in head if n != "__metadata__" and not n.startswith("model.word_embeddings")]
    end = 0
    made = {}
    for name in sorted(names, key=lambda n: head[n]["data_offsets"]):
        size = head[name]["data_offsets"][1] - head[name]["data_offsets"][0]
        made[name] = head[name] | {"data_offsets": [end, end + size]}
        end += size
    size = 4 * rows * width
    made["model.word_embeddings.weight"] = {
        "dtype": "F32",
        "shape": [rows, width],
        "data_offsets": [end, end + size],
    }
    put(path / WEIGHTS, safetensors(made, b""))
    os.truncate(path / WEIGHTS, (path / WEIGHTS).stat().st_size + end + size)
    _configured({"vocab_size": rows, "tie_word_embeddings": True}, path)


SHARDS: dict[str, Damage] = {
    "twice": partial(_second_shard, lambda h, n: "model.norm.weight"),
    "twice_as_other_form": partial(_second_shard, lambda h, n: "model.layers.1.mlp.gate.weight"),
    "experts_twice": partial(_second_shard, lambda h, n: "model.layers.1.mlp.experts.0.up_proj.weight"),
    "sparse": _sparse_vocabulary,
}


def _fifo(name: str, path: Path) -> None:
    put(path / name, None)
    os.mkfifo(path / name)


def _socket(name: str, path: Path) -> None:
    put(path / name, None)
    before = Path.cwd()
    # The name of a socket is short, so it is made from inside.
    os.chdir(path)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    finally:
        os.chdir(before)


def _folder(name: str, path: Path) -> None:
    put(path / name, None)
    (path / name).mkdir()


def _link(name: str, target: str, path: Path) -> None:
    put(path / name, None)
    (path / name).symlink_to(target)


def _pickle(path: Path) -> None:
    put(path / WEIGHTS, None)
    put(path / "pytorch_model.bin", b"cos\nsystem\n(S'touch PWNED'\ntR.")


NAMES = (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, WEIGHTS, INDEX)
FILES: dict[str, Damage] = {
    **{f"fifo_{name}": partial(_fifo, name) for name in NAMES},
    **{f"folder_{name}": partial(_folder, name) for name in NAMES},
    **{f"device_{name}": partial(_link, name, "/dev/zero") for name in NAMES},
    f"socket_{CONFIG}": partial(_socket, CONFIG),
    f"socket_{WEIGHTS}": partial(_socket, WEIGHTS),
    f"loop_{CONFIG}": partial(_link, CONFIG, CONFIG),
    f"loop_{WEIGHTS}": partial(_link, WEIGHTS, WEIGHTS),
    f"dangling_{TOKENIZER}": partial(_link, TOKENIZER, "nowhere"),
    "fifo_special_tokens": partial(_fifo, "special_tokens_map.json"),
    "fifo_added_tokens": partial(_fifo, "added_tokens.json"),
    "pickle": _pickle,
}


def _configured(changes: dict[str, Any], path: Path) -> None:
    config = {k: v for k, v in (toy_json(CONFIG) | changes).items() if v is not GONE}
    put(path / CONFIG, config)


def _tokenizer_configured(changes: dict[str, Any], path: Path) -> None:
    put(path / TOKENIZER_CONFIG, toy_json(TOKENIZER_CONFIG) | changes)


def _put(name: str, content: Any, path: Path) -> None:
    put(path / name, content)


HOSTILE: dict[str, Damage] = {
    **{f"config_{n}": partial(_configured, c) for n, c in CONFIGS.items()},
    **{f"config_raw_{n}": partial(_put, CONFIG, c) for n, c in RAW.items()},
    **{f"generation_{n}": partial(_put, GENERATION, c) for n, c in GENERATIONS.items()},
    **{f"tokenizer_{n}": partial(_tokenizer, c) for n, c in TOKENIZERS.items()},
    **{f"tokenizer_config_{n}": partial(_tokenizer_configured, c) for n, c in TOKENIZER_CONFIGS.items()},
    **{f"template_{n}": partial(_put, TEMPLATE, c) for n, c in TEMPLATES.items()},
    **{f"header_{n}": partial(_header, c) for n, c in HEADERS.items()},
    **{f"shards_{n}": damage for n, damage in SHARDS.items()},
    **{f"index_{n}": damage for n, damage in INDICES.items()},
    **{f"file_{n}": damage for n, damage in FILES.items()},
}
