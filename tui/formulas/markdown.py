r"""Rules of markdown-it that find formulas: ``$a$``, ``\(a\)``, ``$$a$$``, ``\[a\]``, ``\begin{align}`` and ``\boxed{a}``.

What may be something else (money, a variable of a shell, an escaped bracket, a regular expression) stays what it is. No rule
looks further than the next delimiter of its kind, so that a long text without closers takes no longer than others.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

from tui.formulas.environments import NAMES
from tui.formulas.formula import shown

_BOXED = r"\\boxed\s?\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+\})*+\}"
_INLINE = re.compile(
    r"\\\((?P<paren>(?:[^\\`]|\\[^()])+)\\\)|\\\[(?P<bracket>(?:[^\\`]|\\[^\[\]])+)\\\]"
    r"|(?<!\$)\$\$(?P<two>(?:[^$\\`]|\\.)+)\$\$(?!\$)"
    r"|(?<![\w$])\$(?P<one>(?![\s$])(?:[^$\\`]|\\.)+)(?<!\s)\$(?![\d${])"
    rf"|(?P<boxed>{_BOXED})",
    re.DOTALL,
)
_IN_TEXT = re.compile(rf"(?P<code>(?<!`)(`+)(?!`)[^`]*\2(?!`))|\\[\\$]|{_INLINE.pattern}", re.DOTALL)
_OPENER = re.compile(r"\$\$(?!\$)|\\\[|\\begin\{(?P<name>[A-Za-z]+)\*?\}")
_AFTER = re.compile(r"\s*[.,;:!?]?\s*")
_LATEX = re.compile(r"[\\^_={}]")
_SIGN = re.compile(r"[\\^_={}<>+*/|\d~-]")
_WORDS = re.compile(r"[^\W\d_]{3,}[,.;:]?\s|\s\(?[^\W\d_]{2,}")
_PATTERN = re.compile(r"\.[*+]|\[\^|\(\?|\\[dwsb](?![A-Za-z])|\\\|(?:(?!\\\|).)*$", re.DOTALL)  # of regular expressions


def add_formulas(parser: MarkdownIt) -> None:
    """Let a parser find formulas: ``math_inline`` tokens have their text, ``math_block`` tokens their source in ``meta``."""
    parser.inline.ruler.before("escape", "math_inline", _inline)
    parser.block.ruler.before("fence", "math_block", _block, {"alt": ["paragraph", "reference", "blockquote", "list"]})


def with_formulas(text: str) -> str:
    """Plain text with its formulas shown, each on one line; code stays as it is."""
    return _IN_TEXT.sub(_in_text, text)


def _in_text(found: re.Match[str]) -> str:
    tex = _formula(found) if found.lastgroup not in (None, "code") else None
    return " ".join(shown(tex)) or found[0] if tex is not None else found[0]


def _formula(found: re.Match[str]) -> str | None:
    """The formula between delimiters, or None if they enclose something else."""
    kind = found.lastgroup or ""
    tex = found[kind]
    if kind == "boxed":
        return tex
    if not _seems_formula(tex):
        return None
    is_latex = bool(_LATEX.search(tex))
    if kind == "bracket" and re.fullmatch(r"\w+", tex):  # as in "\[1\]"
        return None
    if kind == "one":
        is_followed = found.string[found.end() :][:1].isalpha()
        if tex[-1] in "/:;,\"'" or (is_followed and not is_latex and len(tex) > 1):
            return None
    return tex


def _seems_formula(tex: str) -> bool:
    if not tex.strip() or "\n\n" in tex or _PATTERN.search(tex):
        return False
    if _LATEX.search(tex):
        return True
    return not _WORDS.search(tex) and bool(_SIGN.search(tex) or not re.search(r"[^\W\d_]{4}", tex))


def _inline(state: StateInline, silent: bool) -> bool:
    found = _INLINE.match(state.src, state.pos, state.posMax) if state.src[state.pos] in "\\$" else None
    tex = _formula(found) if found is not None else None
    if found is None or tex is None:
        return False
    is_apart = found.lastgroup in ("bracket", "two")
    after = _AFTER.match(state.src, found.end(), state.posMax)
    end = after.end() if is_apart and after is not None else found.end()
    if not silent:
        if is_apart and (state.tokens or state.pending.strip()):
            state.pending = state.pending.rstrip()
            state.push("hardbreak", "br", 0)
        lines = shown(tex)
        token = state.push("math_inline" if lines else "code_inline", "math", 0)
        token.content = (" ".join(lines) or found[0]) + state.src[found.end() : end].strip()
        if is_apart and state.src[end : state.posMax].strip():
            state.push("hardbreak", "br", 0)
    state.pos = end
    return True


def _block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    if state.is_code_block(start):
        return False
    line = _line(state, start)
    if re.fullmatch(rf"{_BOXED}\s*[.]?\s*", line):
        return silent or _push(state, start, start + 1, line.strip(), line)
    opener = _OPENER.match(line)
    name = opener["name"] if opener is not None else None
    if opener is None or (name is not None and name not in NAMES):
        return False
    closer = {"$$": "$$", "\\[": r"\]"}.get(opener[0], opener[0].replace("begin", "end", 1))
    rest = line[opener.end() :]
    if closer in rest:
        tex, _, after = rest.partition(closer)
        if not _AFTER.fullmatch(after) or not _is_set_apart(tex, name):
            return False
        return silent or _push(state, start, start + 1, _whole(opener[0], tex, closer, after), line)
    if rest.strip() and name is None and not _seems_formula(rest):
        return False
    return silent or _many_lines(state, start, end, opener[0], closer)


def _many_lines(state: StateBlock, start: int, end: int, opener: str, closer: str) -> bool:
    """Take the lines up to the closer; without one up to the end, as far as that may still come."""
    n = start + 1
    while n < end and not state.isEmpty(n) and state.sCount[n] >= state.blkIndent:
        line = _line(state, n)
        if closer in line:
            before, _, after = line.partition(closer)
            first = _line(state, start).removeprefix(opener)
            tex = "\n".join([first, *(_line(state, at) for at in range(start + 1, n)), before])
            name = opener if opener.startswith(r"\begin") else None
            if (opener in before and opener != closer) or not _AFTER.fullmatch(after) or not _is_set_apart(tex, name):
                return False
            source = state.getLines(start, n + 1, state.sCount[start], False)
            return _push(state, start, n + 1, _whole(opener, tex, closer, after), source)
        if opener in line:
            return False
        n += 1
    if n < end:
        return False
    return _push(state, start, end, "", state.getLines(start, end, state.sCount[start], False))


def _is_set_apart(tex: str, name: str | None) -> bool:
    return name is not None or (_seems_formula(tex) and not re.fullmatch(r"\w+", tex))


def _whole(opener: str, tex: str, closer: str, after: str) -> str:
    """The formula, with the delimiters of an environment, and the full stop after it."""
    return f"{opener}{tex}{closer}{after}" if opener.startswith(r"\begin") else f"{tex.rstrip()}{after.strip()}"


def _line(state: StateBlock, n: int) -> str:
    return state.src[state.bMarks[n] + state.tShift[n] : state.eMarks[n]]


def _push(state: StateBlock, start: int, end: int, tex: str, source: str) -> bool:
    token = state.push("math_block", "math", 0)
    token.block, token.map = True, [start, end]
    token.content, token.meta = tex, {"source": source}
    state.line = end
    return True
