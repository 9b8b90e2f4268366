"""Checkpoints with a few things changed, put, taken away or copied, in each of their files."""

from __future__ import annotations

import json

from hypothesis import assume, given
from hypothesis import strategies as st

from ring_mlx.checkpoint.regex_cost import regex_problem
from tests.fuzz import folders
from tests.fuzz.folders import CONFIG, GENERATION, INDEX, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from tests.fuzz.profile import fuzz
from tests.fuzz.server import attempt
from tests.fuzz.values import NAMES, VALUES, changed, changes

CLI = "tests.fuzz.doors:cli"
TEXT = "Hello   world 123\n\n aaaa 你好"
CONFIG_JSON, TOKENIZER_JSON, HEADER = folders.toy_json(CONFIG), folders.toy_json(TOKENIZER), folders.header()
# Only keys of the whole: the modules' settings have a test of their own.
SIZES = {k: v for k, v in CONFIG_JSON.items() if not k.startswith("quantization")}
ROPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 32, "mscale": 1.0}
QUANTIZATION = {**dict(list(CONFIG_JSON["quantization"].items())[:5]), "lm_head": {"group_size": 64, "bits": 8}}
# Few tokens of the vocabulary, as the places are where the structure is.
SMALL = TOKENIZER_JSON | {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    },
    "truncation": {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0},
}
STEPS = [
    {"type": t}
    for t in (
        *("NFC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer", "ByteLevel", "Precompiled"),
        *(
            "Whitespace",
            "BertPreTokenizer",
            "Metaspace",
            "Digits",
            "Punctuation",
            "UnicodeScripts",
            "CharDelimiterSplit",
        ),
        *("RobertaProcessing", "BertProcessing", "Sequence", "WordPiece", "BPEDecoder", "CTC", "Fuse", "ByteFallback"),
        *("FixedLength", "Split", "Replace", "Prepend", "TemplateProcessing"),
    )
]
ATOMS = st.sampled_from(["a", "b", " ", ".", r"\s", r"\p{L}", "[ab]", "[^\\n]", "$", "^", r"\b", "(?=a)", "(?!b)"])
QUANTIFIERS = st.sampled_from(["", "", "*", "+", "?", "*?", "++", "{2}", "{0,9}", "{1,90}", "{3,}", "{0,9}+"])
PATTERNS = st.recursive(
    st.builds(str.__add__, ATOMS, QUANTIFIERS),
    lambda p: (
        st.lists(p, min_size=1, max_size=3).map("".join)
        | st.lists(p, min_size=2, max_size=3).map(lambda ps: f"({'|'.join(ps)})")
        | st.builds(lambda a, b, q: f"(?:{a}{b}){q}", p, p, QUANTIFIERS)
    ),
    max_leaves=8,
)
EXPRESSIONS = st.sampled_from(
    ["messages", "1", "'x'", "2", "tools", "none", "range(99999)", "messages[0]", "ns.s", "loop", "dict", "cycler"]
)
OPERATIONS = st.sampled_from(
    [
        *("{} * {}", "{} + {}", "{} ** {}", "{} ~ {}", "{} % {}", "{} // {}", "[{}, {}]", "{{'a': {}, 'b': {}}}"),
        *("{} | join({})", "{} | replace('', {})", "{} | indent({})", "{} | center({})", "{} | tojson(indent={})"),
        *(
            "{} | batch({}) | list",
            "{} | map(attribute={}) | list",
            "{} | sum(start={})",
            "{} | list == {}",
            "{}.format({})",
        ),
        *("{}[{}]", "{} | attr({})", "{} in {}", "{} | wordwrap({})", "{} | slice({}) | list", "namespace(s={}, t={})"),
    ]
)
TERMS = st.recursive(
    EXPRESSIONS | st.integers(-9, 10**12).map(str),
    lambda t: st.builds(lambda o, a, b: f"({o.format(a, b)})", OPERATIONS, t, t),
    max_leaves=5,
)
STATEMENTS = st.recursive(
    TERMS.map("{{{{ {} }}}}".format) | TERMS.map("{{% set ns.s = {} %}}".format),
    lambda s: (
        st.builds("{{% for i in {} %}}{}{{% endfor %}}".format, TERMS, s)
        | st.builds("{{% macro f(x) %}}{}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f(1) }}}}".format, s)
        | st.builds("{{% if {} %}}{}{{% endif %}}".format, TERMS, s)
        | st.lists(s, min_size=2, max_size=3).map("".join)
    ),
    max_leaves=5,
)


def generate(forks, files):
    with folders.folder(files) as model:
        attempt(forks, CLI, ["generate", "--model", str(model), "--prompt", TEXT, "--max-tokens", "2"])


def as_json(value):
    """As a file would have it, half surrogates and numbers that are none included."""
    return json.dumps(value, ensure_ascii=True)


@fuzz(examples=12)
@given(made=changes(SIZES))
def test_sizes(forks, made):
    generate(forks, {CONFIG: as_json(changed(CONFIG_JSON, made))})


@fuzz(examples=6)
@given(made=changes(ROPE), key=st.sampled_from(["rope_scaling", "rope_parameters"]))
def test_rope(forks, made, key):
    generate(forks, {CONFIG: as_json(CONFIG_JSON | {key: changed(ROPE, made)})})


@fuzz(examples=9)
@given(made=changes(QUANTIZATION), foreign=st.booleans())
def test_quantization(forks, made, foreign):
    settings = changed(QUANTIZATION, made)
    generate(forks, {CONFIG: as_json(CONFIG_JSON | {"quantization_config" if foreign else "quantization": settings})})


@fuzz(examples=6)
@given(value=VALUES, rest=st.dictionaries(NAMES, VALUES, max_size=3))
def test_generation_config(forks, value, rest):
    generate(forks, {GENERATION: as_json(rest | {"eos_token_id": value})})


@fuzz(examples=12)
@given(made=changes(SMALL))
def test_tokenizer(forks, made):
    generate(forks, {TOKENIZER: as_json(changed(SMALL, made))})


@fuzz(examples=9)
@given(
    step=st.sampled_from(["normalizer", "pre_tokenizer", "post_processor", "decoder"]),
    parts=st.lists(
        st.builds(dict.__or__, st.sampled_from(STEPS), st.dictionaries(NAMES, VALUES, max_size=2)), max_size=2
    ),
    kind=st.sampled_from(["BPE", "Unigram", "WordPiece", "WordLevel"]),
)
def test_tokenizer_steps(forks, step, parts, kind):
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    whole = parts[0] if len(parts) == 1 else {"type": "Sequence", inner.get(step, "decoders"): parts}
    model = TOKENIZER_JSON["model"] | {"type": kind}
    generate(forks, {TOKENIZER: as_json(TOKENIZER_JSON | {step: whole, "model": model})})


@fuzz(examples=9)
@given(made=changes(folders.toy_json(TOKENIZER_CONFIG) | {"chat_template": "x", "added_tokens_decoder": {"5": {}}}))
def test_tokenizer_config(forks, made):
    settings = folders.toy_json(TOKENIZER_CONFIG) | {"added_tokens_decoder": {"5": {"content": "<x>"}}}
    generate(forks, {TOKENIZER_CONFIG: as_json(changed(settings, made))})


@fuzz(examples=12)
@given(made=changes(HEADER), cut=st.none() | st.integers(-100, 100))
def test_safetensors_header(forks, made, cut):
    body = folders.data() if cut is None else folders.data()[:cut] if cut < 0 else folders.data() + b"x" * cut
    generate(forks, {WEIGHTS: folders.safetensors(as_json(changed(HEADER, made)).encode(), body)})


@fuzz(examples=6)
@given(made=changes({"metadata": {}, "weight_map": dict.fromkeys(list(HEADER)[:5], WEIGHTS)}))
def test_index(forks, made):
    index = {"metadata": {}, "weight_map": dict.fromkeys(HEADER, WEIGHTS)}
    generate(forks, {INDEX: as_json(changed(index, made))})


@fuzz(examples=12)
@given(
    name=st.sampled_from([CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, WEIGHTS, INDEX]), data=st.data()
)
def test_bytes(forks, name, data):
    """Bytes put, taken away or repeated at any place."""
    source = folders.demo_model_path() / name
    raw = source.read_bytes() if source.exists() else b'{"eos_token_id": 1, "weight_map": {"a": "b"}}'
    # Beyond the header of the weights every change is another number.
    at = data.draw(st.integers(0, min(len(raw), 20_000)))
    length = data.draw(st.sampled_from([0, 1, 2, 8, 1000]))
    put = data.draw(
        st.binary(max_size=4) | st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\\ud800", b"\xff"])
    )
    generate(forks, {name: raw[:at] + put + raw[at + length :]})


@fuzz(examples=12)
@given(body=STATEMENTS)
def test_template(forks, body):
    generate(forks, {TEMPLATE: "{% set ns = namespace(s='x') %}" + body})


@fuzz(examples=12)
@given(pattern=PATTERNS)
def test_patterns_that_pass_end_soon(forks, pattern):
    assume(regex_problem(pattern) is None)
    attempt(forks, "tests.fuzz.doors:encode", pattern)
