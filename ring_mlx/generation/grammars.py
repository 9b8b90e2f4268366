"""Grammars of answers, as llguidance reads them: compiled once, and tested before a token is generated.

What a client sends becomes one grammar for the whole answer after its thought. Calls of tools have the model's form::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

All JSON is written as ``json.dumps`` and the template's ``tojson`` write it, on one line with a space after commas and colons:
keys and separators are forced then, so that they need not be generated one by one, and no model can write blanks for ever.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.vocabulary import token_bytes
from ring_mlx.errors import GrammarError
from ring_mlx.generation.forms import ANY_OBJECT, CallForm, Form, TextForm
from ring_mlx.generation.schemas import blamed, tidied
from ring_mlx.generation.thought_end import CALL_END, CALL_START

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

KEPT = 32  # grammars: agents send the same tools with each request
MOST_CHARACTERS = 1 << 18
MOST_SAID = 300  # characters of an error, which may repeat the whole grammar
# All options, so that no later version lets a schema choose one.
OPTIONS: JsonCompileOptions = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
# What may come before an answer: after a thought line breaks, which are no part of its text, and else, before JSON, a space.
BREAKS, SPACE = r"/\n{1,3}/", r"/[ \n]/"
# Symbols of a grammar, and of one row of its parser, where an optional property has four; work on its patterns at first, and for
# a mask. They bound what one request costs to about a second.
MOST_SYMBOLS, MOST_WORK, MOST_STEP_WORK = 30_000, 300_000, 50_000


@dataclass(frozen=True)
class Compiled:
    """A grammar at its start, and the paths of what it does not hold answers to."""

    matcher: LLMatcher
    left_out: tuple[str, ...]


class Grammars:
    """The grammars of one model's answers; any thread may ask for one.

    Args:
        rows: Of the model's logits; ids that the tokenizer does not have never come.
    """

    def __init__(self, tokenizer: TokenizerWrapper, rows: int) -> None:
        self._tokenizer, self.rows = tokenizer, rows
        self.stops = frozenset(tokenizer.eos_token_ids)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Form, bool], Compiled] = OrderedDict()
        self._tokens: LLTokenizer | None = None

    @property
    def tokens(self) -> LLTokenizer:
        """llguidance's view of the tokenizer, made at the first use: it takes seconds for a large vocabulary."""
        if self._tokens is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            given = TokenizerWrapper(_Vocabulary(self._tokenizer, self.rows))
            self._tokens = LLTokenizer(given, n_vocab=self.rows, eos_token=sorted(self.stops))
        return self._tokens

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text."""
        return token_bytes(self._tokenizer, token)

    def compiled(self, form: Form, is_thinking: bool) -> Compiled:
        """The grammar of answers of a form; after a thought blanks may come before it.

        Raises GrammarError, which names the part, if nothing can meet the form, or it is not understood.
        """
        with self._lock:
            if (form, is_thinking) not in self._kept:
                self._kept[form, is_thinking] = self._compile(form, is_thinking)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((form, is_thinking))
            return self._kept[form, is_thinking]

    def _compile(self, form: Form, is_thinking: bool) -> Compiled:
        parts, left_out = [], list[str]()
        if form.text is not None:
            part, told = self._text(form.text)
            parts.append({"name": "answer", **part})
            left_out += told
        for i, call in enumerate(form.calls):
            schema, told = _schema(call.schema, call.origin)
            if not call.is_strict and self._problem_of(schema):
                schema, told = json.loads(ANY_OBJECT), [call.origin]
            parts.append({"name": f"arguments_{i}", "json_schema": {**schema, "x-guidance": OPTIONS}})
            left_out += told
        is_json = form.text is not None and form.text.kind == "schema"
        blank = BREAKS if is_thinking else SPACE if is_json else ""
        lark = _whole(form, blank)
        matcher = self._matcher(json.dumps({"grammars": [{"lark_grammar": lark}, *parts]}))
        begun = matcher.deep_copy()
        if blank:
            begun.consume_tokens(self.tokens.tokenize_bytes(b"\n\n\n" if is_thinking else b"\n"))
        if problem := _problem(begun):
            raise self._blame(form, problem)
        return Compiled(matcher, tuple(left_out))

    def _text(self, form: TextForm) -> tuple[dict[str, Any], list[str]]:
        if len(form.text) > MOST_CHARACTERS:
            raise GrammarError(
                f"{form.origin} has {len(form.text)} characters, more than {MOST_CHARACTERS}; shorten it.", form.origin
            )
        if form.kind == "schema":
            schema, told = _schema(form.text, form.origin)
            return {"json_schema": {**schema, "x-guidance": OPTIONS}}, told
        return {"lark_grammar": self._lark(form)}, []

    def _blame(self, form: Form, problem: str) -> GrammarError:
        """The error that names the part of a form with a problem."""
        schemas = [(call.schema, call.origin) for call in form.calls if call.is_strict]
        if form.text is not None and form.text.kind == "schema":
            schemas.insert(0, (form.text.text, form.text.origin))
        elif form.text is not None and (found := _problem(self._matcher(self._lark(form.text)))):
            return GrammarError(f"{form.text.origin}: {found}; correct it.", form.text.origin)
        for text, origin in schemas:
            schema, _ = _schema(text, origin)
            if found := self._problem_of(schema):
                path = blamed(schema, found, self._problem_of)
                why = f"{origin}{path}: {found}; answers cannot be held to it, so say it in another way."
                return GrammarError(why, origin)
        origin = form.text.origin if form.text is not None else "tools"
        return GrammarError(f"{origin}: {problem}; simplify it.", origin)

    def _problem_of(self, schema: dict[str, Any]) -> str:
        from llguidance import LLMatcher

        return _problem(self._matcher(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=OPTIONS)))

    def _lark(self, form: TextForm) -> str:
        from llguidance import regex_to_lark
        from llguidance.gbnf_to_lark import any_to_lark

        if form.kind == "regex":
            return f"start: /{regex_to_lark(form.text)}/"
        try:
            return str(any_to_lark(form.text))
        except Exception as e:  # noqa: BLE001 its reader of GBNF says in many ways that a text is none
            raise GrammarError(f"{form.origin} is neither GBNF nor Lark ({e}); correct it.", form.origin) from None

    def _matcher(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_items_in_row=MOST_SYMBOLS,
            max_grammar_size=MOST_SYMBOLS,
            initial_lexer_fuel=MOST_WORK,
            step_lexer_fuel=MOST_STEP_WORK,
            verbose_errors=False,
        )
        return LLMatcher(self.tokens, grammar, log_level=0, limits=limits)


def _schema(text: str, origin: str) -> tuple[dict[str, Any], list[str]]:
    """A schema, tidied, and the paths of what was left out of it. Raises GrammarError as `tidied`, or for 1e999 and the like."""
    schema = json.loads(text)
    try:
        json.dumps(schema, allow_nan=False)
    except ValueError:
        raise GrammarError(f"{origin} has a number that is not finite; correct it.", origin) from None
    return schema, tidied(schema, origin)


class _Vocabulary:
    """A tokenizer as llguidance wants it. Added tokens are text unless they are special, which no text contains."""

    bos_token_id = None

    def __init__(self, tokenizer: TokenizerWrapper, rows: int) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id = min(tokenizer.eos_token_ids, default=0)
        self.tokens = [token_bytes(tokenizer, i) for i in range(rows)]
        added = tokenizer._tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self.special_token_ids = [i for i, token in added.items() if token.special and i < rows]

    def __call__(self, text: str) -> Sequence[int]:
        if isinstance(text, bytes):
            raise TypeError("text is wanted")  # so llguidance gives no halves of characters
        return [int(i) for i in self._encode(text, add_special_tokens=False)]


def _problem(matcher: LLMatcher) -> str:
    """Why nothing can come of a grammar, in a line, or ""."""
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return said(matcher)
    return "nothing can meet it" if matcher.is_stopped() and not matcher.is_accepting() else ""


def said(matcher: LLMatcher) -> str:
    """What a matcher says of its error, in a line."""
    text = " ".join(matcher.get_error().partition("<non-verbose/>")[0].partition(". Enable ")[0].split())
    return "nothing can meet it" if text.startswith("NoExtension") else text[:MOST_SAID]


def _whole(form: Form, blank: str) -> str:
    """The grammar of a whole answer in Lark, which ``blank`` may precede, without those of its parts."""
    any_call = " | ".join(f"call_{i}" for i in range(len(form.calls)))
    lines = [
        "%llguidance {}",
        f"start: {'BLANK? ' if blank else ''}whole",
        *([f"BLANK: {blank}"] if blank else []),
        *(f"call_{i}: {_quoted(_head(call))} @arguments_{i} " + _quoted("}") for i, call in enumerate(form.calls)),
    ]
    if not form.calls:
        return "\n".join([*lines, "whole: @answer"])
    if form.text is None and not form.must_call:  # text, and calls where the tag comes
        begun = [r"TEXT: /(.|\n)*/", f"open[lazy]: TEXT {_quoted(CALL_START)}"]
        call = f'open "\\n" ({any_call}) {_quoted(chr(10) + CALL_END)}'
        return "\n".join([*lines, *begun, f"whole: ({call})* TEXT"])
    call = f"{_quoted(CALL_START + chr(10))} ({any_call}) {_quoted(chr(10) + CALL_END)}"
    calls = f"calls: {'call' if form.is_single else 'call (NEXT call)*'}"
    more = [] if form.is_single else [r"NEXT: /\n/"]
    whole = "whole: calls" if form.must_call else "whole: @answer | calls"
    return "\n".join([*lines, f"call: {call}", *more, calls, whole])


def _head(call: CallForm) -> str:
    return f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": '


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
