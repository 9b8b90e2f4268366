"""What single LaTeX commands and letters become; most symbols are pylatexenc's."""

from __future__ import annotations

import re
from functools import cache
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _pairs(text: str) -> dict[str, str]:
    """Names and what follows each of them."""
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


FUNCTIONS = _names(
    "arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf limsup ln log "
    "max min mod Pr sec sin sinh sup tan tanh argmax argmin"
)
LIMITS = frozenset(  # their scripts stand above and below
    [
        "sum",
        "prod",
        "coprod",
        "bigcup",
        "bigcap",
        "bigvee",
        "bigwedge",
        "bigoplus",
        "bigotimes",
        "bigsqcup",
        "biguplus",
        "lim",
        "liminf",
        "limsup",
        "max",
        "min",
        "sup",
        "inf",
        "det",
        "gcd",
        "Pr",
        "argmax",
        "argmin",
    ]
)
OPERATORS = LIMITS - FUNCTIONS | _names("int iint iiint oint")
SPACES = {**dict.fromkeys([",", ":", ";", " ", "~", "space", "enspace"], " "), "!": "", "quad": "  ", "qquad": "    "}
OWN = {  # what pylatexenc 2.11 has not, or has in another sense
    **_pairs(
        "ne ≠ neg ¬ land ∧ lor ∨ implies ⟹ impliedby ⟸ iff ⟺ Re ℜ Im ℑ triangle △ Box □ Diamond ◇ bot ⊥ models ⊨ "
        "vDash ⊨ ddagger ‡ S § P ¶ copyright © degree ° colon : leadsto ⇝ checkmark ✓ lhd ⊲ rhd ⊳ unlhd ⊴ unrhd ⊵ "
        "imath ı jmath ȷ clubsuit ♣ heartsuit ♡ spadesuit ♠ diamondsuit ♢ colonequals ≔ coloneqq ≔ eqqcolon ≕ "
        "lbrack [ rbrack ] euro € pounds £ yen ¥ lt < gt > thickapprox ≈ eqsim ≂ lll ⋘ ggg ⋙ prime ′ lvert | "
        "rvert | lVert ‖ rVert ‖ vert | Vert ‖ | ‖ mid | lbrace { rbrace } { { } } % % $ $ & & # # _ _ qed ∎ "
        "blacksquare ■ dotsc … dotso … dotsb ⋯ dotsm ⋯ dotsi ⋯ bmod mod ast ∗ bullet • llbracket ⟦ rrbracket ⟧ "
        "lgroup ( rgroup )"
    ),
    "backslash": "\\",
    "limsup": "lim sup",
    "liminf": "lim inf",
    "argmax": "arg max",
    "argmin": "arg min",
}
ACCENTS = {
    name: chr(int(code, 16))
    for name, code in _pairs(
        "hat 0302 widehat 0302 tilde 0303 widetilde 0303 bar 0304 vec 20d7 overrightarrow 20d7 overline 0305 "
        "underline 0332 dot 0307 ddot 0308 dddot 20db check 030c breve 0306 acute 0301 grave 0300 mathring 030a "
        "cancel 0338 bcancel 20e5 not 0338"
    ).items()
}
ALPHABETS = _names("mathbb mathcal mathscr mathfrak mathbf mathsf mathtt mathit boldsymbol bm")
TEXTS = _names("text textrm textnormal textit textbf texttt textsf textsc mbox hbox emph")
IGNORED = _names(
    "displaystyle textstyle scriptstyle scriptscriptstyle limits nolimits big Big bigg Bigg bigl Bigl biggl "
    "Biggl bigr Bigr biggr Biggr bigm Bigm biggm Biggm nonumber notag hline mathstrut strut allowbreak nobreak "
    "centering mathord mathbin mathrel mathop mathopen mathclose mathpunct mathinner ensuremath relax bf it rm"
)
LONG_ARROWS = {"xrightarrow": "→", "xleftarrow": "←", "xRightarrow": "⇒", "xleftrightarrow": "↔", "xmapsto": "↦"}
RELATIONS = frozenset("=<>:≤≥≠≈≡∼≃≅∝∈∉∋⊂⊆⊃⊇⊊⊋⊢⊣⊨≔≕≪≫⋘⋙≺≻⪯⪰≜≐≍⩽⩾≲≳∤⊴⊲⊳⊵⇝↝∥⊥")
BINARY = frozenset("+-*±∓×÷·⋅∗⋆∘•∙∪∩∖∧∨⊕⊖⊗⊘⊙⊎⊔⊓†‡")
OPEN, CLOSE = frozenset("([{⟨⌊⌈⟦"), frozenset(")]}⟩⌋⌉⟧")

_UP = "0123456789+-=()abcdefghijklmnoprstuvwxyzABDEGHIJKLMNOPRTUVWαβγδεθιφχ′″‴°"
_UPPER = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻᴬᴮᴰᴱᴳᴴᴵᴶᴷᴸᴹᴺᴼᴾᴿᵀᵁⱽᵂᵅᵝᵞᵟᵋᶿᶥᶲᵡ′″‴°"
_DOWN = "0123456789+-=()aehijklmnoprstuvxβγρφχ"
_LOWER = "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓᵦᵧᵨᵩᵪ"
SUPERSCRIPTS, SUBSCRIPTS = dict(zip(_UP, _UPPER, strict=True)), dict(zip(_DOWN, _LOWER, strict=True))


@cache
def _pylatexenc() -> Any:
    from pylatexenc.latex2text import LatexNodes2Text  # with the first formula: it takes a while

    return LatexNodes2Text(math_mode="text")


@cache
def symbol(name: str) -> str | None:
    """The text of a command without arguments, or None if it is none that is known."""
    if name in OWN or name in FUNCTIONS:
        return OWN.get(name, name)
    spec = _pylatexenc().latex_context.get_macro_spec(name) if name.isalpha() else None
    found = getattr(spec, "simplify_repl", None)
    return found if isinstance(found, str) and "%" not in found and found.strip() else None


@cache
def styled(alphabet: str, letter: str) -> str:
    """A letter of an alphabet such as ``mathbb``; others stay as they are."""
    name = {"boldsymbol": "mathbf", "bm": "mathbf"}.get(alphabet, alphabet)
    if not re.fullmatch("[A-Za-z0-9]", letter):
        return letter
    return str(_pylatexenc().latex_to_text(rf"\{name}{{{letter}}}").strip()) or letter
