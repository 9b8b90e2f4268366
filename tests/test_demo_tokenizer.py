"""The demo's tokenizer, and conversations rendered as its template does."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, load
from transformers import AutoTokenizer

from demo.data import (
    Conversation,
    Message,
    as_dicts,
    render,
    stream,
)
from demo.tokenizer import CONTROL_TOKENS, VISIBLE_TOKENS, VOCAB_SIZE, write_tokenizer


@pytest.fixture(scope="module")
def chat(tokenizer_folder):
    """transformers' tokenizer, which runs the real template."""
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def drawn(split, count):
    return list(islice(stream(11, split), count))


# Rendering


HISTORY = (
    Message("system", "Be brief."),
    Message("user", "What is 2 + 3?"),
    Message("assistant", "The sum is 5.", "2+3\n2+3+0=0:5"),
    Message("user", "And twice that?"),
    Message("assistant", "The sum is 10.", "that is 5"),
)


def test_render_equals_the_template(chat):
    for c in drawn("train", 400) + drawn("test", 200) + [Conversation(HISTORY, "x", "10")]:
        assert render(c)[0] == chat.apply_chat_template(as_dicts(c), tokenize=False), c
    literal = [
        {"role": m.role, "content": f"<think>\n{m.thinking}\n</think>\n\n{m.content}" if m.thinking else m.content}
        for m in HISTORY
    ]
    assert chat.apply_chat_template(literal, tokenize=False) == render(Conversation(HISTORY, "x", "10"))[0]


def test_render_and_spans():
    text, spans = render(Conversation(HISTORY, "x", "10"))
    head = (
        "<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>What is 2 + 3?<|role_end|>"
        "<role>ASSISTANT</role>The sum is 5.<|role_end|><role>HUMAN</role>And twice that?<|role_end|>"
        "<role>ASSISTANT</role>"
    )
    tail = "<think>\nthat is 5\n</think>\n\nThe sum is 10.<|role_end|>"
    assert text == head + tail
    assert [text[i:j] for i, j in spans] == [tail]
    unthought = (*HISTORY[:-1], Message("assistant", "The sum is 10."))
    text, spans = render(Conversation(unthought, "x", "10"))
    assert text == f"{head}<think>\n\n</think>\n\nThe sum is 10.<|role_end|>"
    assert [text[i:j] for i, j in spans] == ["The sum is 10.<|role_end|>"]


def test_spans_lie_on_token_bounds(tokenizer):
    for c in drawn("train", 500):
        text, [(start, end)] = render(c)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        inside = [i for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if start <= a and b <= end]
        assert tokenizer.decode(inside, skip_special_tokens=False) == text[start:end]


def test_generation_prompt(chat):
    users = [{"role": "user", "content": "Hi"}]
    prompt = "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role><think>\n"

    def rendered(messages=users, **options):
        return chat.apply_chat_template(messages, tokenize=False, **options)

    assert rendered(add_generation_prompt=True) == prompt
    assert rendered(add_generation_prompt=True, enable_thinking=True) == prompt
    assert rendered(add_generation_prompt=True, enable_thinking=False) == f"{prompt}\n</think>\n\n"
    c = Conversation((Message("user", "Hi"), Message("assistant", "Hello!", "a greeting")), "x", "Hello")
    assert render(c)[0].startswith(prompt)
    opened = [*users, {"role": "assistant", "content": "<think>\na gree"}]
    assert rendered(opened, continue_final_message=True) == f"{prompt}a gree"
    answered = [*users, {"role": "assistant", "content": "Hel", "reasoning_content": "a greeting"}]
    assert rendered(answered, continue_final_message=True) == f"{prompt}a greeting\n</think>\n\nHel"
    thinking = [*users, {"role": "assistant", "content": "", "reasoning_content": "a gree"}]
    assert rendered(thinking, continue_final_message="reasoning_content") == f"{prompt}a gree"
    interrupted = [*opened, {"role": "user", "content": "Bye"}]
    assert "gree" not in rendered(interrupted)
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    assert rendered(parts, add_generation_prompt=True) == prompt


def test_tools(chat):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "reasoning_content": "call it", "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "3"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    text = chat.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<role>SYSTEM</role># Tools")
    assert '\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n' in text
    one_call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    one_response = "\n<tool_response>\n3\n</tool_response>"
    assert text.endswith(
        f"<role>ASSISTANT</role><think>\ncall it\n</think>\n\n{one_call}\n{one_call}<|role_end|>"
        f"<role>OBSERVATION</role>{one_response}{one_response}<|role_end|><role>ASSISTANT</role><think>\n"
    )


# The tokenizer


def test_tokenizer_is_deterministic(tokenizer_folder, tmp_path):
    write_tokenizer(tmp_path)
    names = sorted(path.name for path in tokenizer_folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes() for name in names)


def test_vocabulary(tokenizer, chat):
    assert tokenizer.get_vocab_size() == len(chat) == VOCAB_SIZE == 1024
    assert chat.encode("<|role_end|><think></tool_call>") == [
        tokenizer.token_to_id(t) for t in ("<|role_end|>", "<think>", "</tool_call>")
    ]
    assert [tokenizer.token_to_id(t) for t in (*CONTROL_TOKENS, *VISIBLE_TOKENS)] == list(range(11))
    assert (chat.bos_token, chat.eos_token, chat.pad_token) == ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>")
    assert chat.decode(chat.encode("<think>5</think>6<|role_end|>"), skip_special_tokens=True) == "<think>5</think>6"
    letters = [token.removeprefix("Ġ") for token in tokenizer.get_vocab() if token[0] != "<"]
    assert max(map(len, letters)) <= 5
    assert all(len(tokenizer.encode(f" {c}").ids) == 1 for c in "abcdefghijklmnopqrstuvwxyz")


def test_digits_and_quoted_words_are_split(tokenizer):
    assert tokenizer.encode("x 4721+07").tokens == ["x", "Ġ", "4", "7", "2", "1", "+", "0", "7"]
    assert tokenizer.encode('Reversed: "that".').tokens[-7:] == ['Ġ"', "t", "h", "a", "t", '"', "."]
    assert tokenizer.encode(" that").tokens != ["Ġt", "h", "a", "t"]
    assert tokenizer.encode("letters: p1 l2").tokens[-5:] == [":", "Ġp", "1", "Ġl", "2"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text() | st.sampled_from((*CONTROL_TOKENS, *VISIBLE_TOKENS, "\n\n", " ", '"ab"', "🙂é")), max_size=8)
)
def test_round_trip(tokenizer, chat, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert chat.encode(text) == ids
    assert chat.decode(ids) == text


def test_mlx_lm_streams_it(tokenizer_folder):
    wrapper = load(tokenizer_folder)
    detokenizer = wrapper.detokenizer
    assert isinstance(detokenizer, BPEStreamingDetokenizer)
    assert wrapper.has_thinking
    assert wrapper.has_tool_calling
    for c in drawn("train", 20):
        text = render(c)[0]
        detokenizer.reset()
        for token in wrapper.encode(text, add_special_tokens=False):
            detokenizer.add_token(token)
        detokenizer.finalize()
        assert detokenizer.text == text
