"""Formulas in LaTeX as text: what is shown of them, what is none, and that no text takes long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.cells import cell_len

from tui.formulas.formula import shown
from tui.formulas.markdown import with_formulas
from tui.widgets.answer import parser

ON_ONE_LINE = {
    r"a^2+b^2=c^2": "a²+b² = c²",
    r"E = mc^2": "E = mc²",
    r"x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}": "x = (-b ± √(b² - 4ac))/(2a)",
    r"\frac{1}{2}y": "(1/2)y",
    r"\frac12 + \frac{1}{ab}": "1/2 + 1/(ab)",
    r"2\frac{1}{3}": "2(1/3)",
    r"\frac{dy}{dx}\Big|_{x=0}": "(dy/dx)|ₓ₌₀",
    r"\sum_{i=1}^{n} i = \frac{n(n+1)}{2}": "∑ᵢ₌₁ⁿ i = n(n+1)/2",
    r"\int_0^1 x^2 \, dx = \frac{1}{3}": "∫₀¹ x² dx = 1/3",
    r"\int_{-\infty}^{\infty} e^{-x^2} dx = \sqrt{\pi}": "∫_(-∞)^∞ e^(-x²) dx = √π",
    r"\lim_{x \to 0} \frac{\sin x}{x} = 1": "lim_(x→0) (sin x)/x = 1",
    r"e^{i\pi} + 1 = 0": "e^(iπ) + 1 = 0",
    r"\sqrt[3]{x+1} \sqrt{2} \sqrt{ab} \sqrt[n]{x}": "∛(x+1) √2 √(ab) ⁿ√x",
    r"\binom{n}{k} = \frac{n!}{k!(n-k)!}": "C(n, k) = n!/(k!(n-k)!)",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}^T": "(1 2; 3 4)ᵀ",
    r"\begin{bmatrix} x \\ y \end{bmatrix}": "[x; y]",
    r"|x| = \begin{cases} x & \text{if } x > 0 \\ -x & \text{otherwise} \end{cases}": "|x| = { x if x > 0; -x otherwise",
    r"\boxed{\frac{a}{b}}": "[a/b]",
    r"\mathbb{R}^n, \mathcal{O}(n \log n)": "ℝⁿ, 𝒪(n log n)",
    r"\vec{v} \cdot \hat{x} + \bar{y} + \dot{z}": "v\u20d7 · x̂ + ȳ + ż",
    r"f'(x) + f''(x) + f'''(x) = g'^2 + h^{\prime}": "f′(x) + f″(x) + f‴(x) = g′² + h′",
    r"x_{ij}^2 + T_{\max} + a_{n+1} + x_{AB}": "xᵢⱼ² + Tₘₐₓ + aₙ₊₁ + x_(AB)",
    r"\forall \epsilon > 0 \, \exists \delta > 0": "∀ϵ > 0 ∃δ > 0",
    r"\alpha x + \beta\cdot\gamma \times \Omega": "αx + β·γ × Ω",
    r"\log_2 n \leq \ln n \ne \sin^2\theta": "log₂ n ≤ ln n ≠ sin² θ",
    r"10\% \text{ of } \$5": "10% of $5",
    r"n \equiv 1 \pmod{5}": "n ≡ 1 (mod 5)",
    r"\left\{ x \in \mathbb{Z} \mid x \ne 0 \right\}": "{x ∈ ℤ | x ≠ 0}",
    r"\left( \frac{a}{b} \right)^2": "(a/b)²",
    r"a \implies b \iff \neg c \land d \lor e": "a ⟹ b ⟺ ¬c ∧ d ∨ e",
    r"A \xrightarrow{f} B": "A →ᶠ B",
    r"\overline{AB} \parallel CD \perp EF": "A̅B̅ ∥ CD ⊥ EF",
    r"90^\circ, x^*, A^\dagger": "90°, x*, A†",
    r"\not= \not\in \not\subset": "≠ ∉ ⊄",
    r"\operatorname{lcm}(a, b) = \mathrm{d}x": "lcm(a, b) = dx",
    r"\text{the $x^2$ of \textbf{it}}": "the x² of it",
    r"x % a comment" + "\n+ 1": "x + 1",
    r"\textcolor{red}{x} + \color{blue} y": "x + y",
    r"a \, b \; c \quad d \! e": "a b c  de",
    r"P(A|B) = \frac{P(B|A) P(A)}{P(B)}": "P(A|B) = (P(B|A) P(A))/P(B)",
    r"x^{2^{n}} + y_{i_j}": "x^(2ⁿ) + y_(iⱼ)",
    r"\prod_{p\text{ prime}} \frac{1}{1-p^{-s}}": "∏_(p prime) 1/(1-p⁻ˢ)",
    r"\cfrac{1}{1+\cfrac{1}{x}}": "1/(1+1/x)",
    r"\nabla \times \mathbf{E} = -\frac{\partial \mathbf{B}}{\partial t}": "∇ × 𝐄 = -∂𝐁/∂t",
    r"\max(a, b) \geq \det A": "max(a, b) ≥ det A",
    r"f: X \to Y, x \mapsto x^2": "f : X → Y, x ↦ x²",
    r"\underbrace{a+b}_{c} + \overset{!}{=}": "(a+b)_c + =^!",
    r"\begin{aligned} a &= b \\ &= c \end{aligned}": "a = b; = c",
    r"a \\ b": "a; b",
    r"\frac{a}{b}^2 \tag{1}": "(a/b)²    (1)",
    r"x \text{ 你好}": "x 你好",
}  # fmt: skip
SET_APART = {
    r"x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}": """\
     -b ± √(b² - 4ac)
x = ──────────────────
            2a""",
    r"\sum_{i=1}^{n} i": """\
 n
 ∑  i
i=1""",
    r"f(x) = \begin{cases} x^2 & \text{if } x > 0 \\ -x & \text{otherwise} \end{cases}": """\
f(x) = ⎧ x²  if x > 0
       ⎩ -x  otherwise""",
    r"A = \begin{pmatrix} 1 & 2 \\ 33 & 4 \\ 5 & 6 \end{pmatrix}^T": """\
    ⎛1   2⎞ᵀ
A = ⎜33  4⎟
    ⎝5   6⎠""",
    r"\begin{align*} a &= b + c \\ &= d \end{align*}": """\
a = b + c
  = d""",
    r"\boxed{x = \frac{1}{2}}": """\
┌─────────┐
│      1  │
│ x = ─── │
│      2  │
└─────────┘""",
    r"\left( \frac{a}{b} \right)^2 c": """\
⎛ a ⎞²
⎜───⎟  c
⎝ b ⎠""",
    r"\binom{n}{k}": "⎛n⎞\n⎝k⎠",
    r"\underbrace{a + b}_{\text{sum}}": "a + b\n╰─┬─╯\n sum",
    r"\cfrac{1}{1+\cfrac{1}{2}}": "   1\n───────\n    1\n 1+───\n    2",
    r"\lim_{n\to\infty} a_n": "lim aₙ\nn→∞",
    r"a = b": "a = b",
}
UNSHOWN = [
    "", "  ", r"\foo{x}", r"\frac{1}", "x^", "x^a^b", "{", "}", "a & b & c }", r"\left( x", r"\begin{pmatrix} 1", "\\",
    r"\begin{foo} x \end{foo}", r"\begin{matrix} x \end{cases}", r"\sqrt[3", r"\text{x", r"\newcommand{\a}{b}", "_", "%",
    "{" * 300 + "}" * 300, r"\frac{" * 3000, r"\hat" * 1000 + "x", "x" * 20_000, "^" * 50, r"\\" * 3000,
]  # fmt: skip
NO_FORMULAS = [
    "It costs $5 and $10.", "$5-$10", "$5 (about 4) or 10$", "US$5 to 10$", r"\$5 and \$6", "$1,000 and $2", "**$5** and **$6**",
    "$HOME and $PATH", "$HOME/$USER:$PATH", 'echo "$a" "$b"', "${HOME}/bin:${PATH}", "$(pwd)/$(ls)", "$$ and $$", "$", "$$$",
    r"C:\Users\me\(temp)", r"C:\[a]\b", r"\d+ and \w*", r"grep \(a\|b\)", r"see \(.*\) there", r"\[note\] and \[1\]",
    r"- \[ \] task", r"\(optional\) words", r"\\(a\\)", "$ x $", "a $b", r"\(a", "100$ and 200$", r"\(\) \[\]",
]  # fmt: skip


@pytest.mark.parametrize("tex", ON_ONE_LINE)
def test_a_formula_in_a_line(tex):
    assert shown(tex) == (ON_ONE_LINE[tex],)


@pytest.mark.parametrize("tex", SET_APART)
def test_a_formula_set_apart(tex):
    assert "\n".join(shown(tex, True)) == SET_APART[tex]


@pytest.mark.parametrize("tex", UNSHOWN)
def test_what_cannot_be_shown_in_full_is_not_shown(tex):
    start = time.perf_counter()
    assert shown(tex) == shown(tex, True) == ()
    assert time.perf_counter() - start < 2


def test_a_formula_that_would_fill_the_memory_with_spaces_is_not_shown():
    assert shown("a" * 2000 + r" \\ a" * 400, True) == ()


def texts(markdown):
    """The tokens of a text's lines, and the blocks set apart."""
    found = []
    for token in parser().parse(markdown):
        if token.type == "inline":
            found += [t.content if t.type in ("text", "code_inline") else f"<{t.type}>" for t in token.children]
        elif token.type in ("math_block", "fence", "code_block"):
            found.append((token.type, token.content))
    return found


@pytest.mark.parametrize("text", NO_FORMULAS)
def test_what_is_no_formula_stays_as_it_is(text):
    plain = [[t.content for t in line.children or ()] for line in MarkdownIt("gfm-like").parse(text)]
    assert [[t.content for t in line.children or ()] for line in parser().parse(text)] == plain
    assert with_formulas(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Math: $x^2$ and \(y^2\).", ["Math: ", "x²", " and ", "y²", "."]),
        (r"so \[ x = 1 \], and", ["so", "<hardbreak>", "x = 1,", "<hardbreak>", "and"]),
        ("so $$x = 1$$ and", ["so", "<hardbreak>", "x = 1", "<hardbreak>", "and"]),
        (r"`$x^2$` `\(y\)`", ["$x^2$", " ", r"\(y\)"]),
        ("```\n$x^2$\n\\[ y \\]\n```", [("fence", "$x^2$\n\\[ y \\]\n")]),
        ("    \\[ y \\]\n", [("code_block", "\\[ y \\]\n")]),
        (r"bad $\foo{x}$", ["bad ", r"$\foo{x}$"]),
        (r"**\boxed{42}**", ["", "<strong_open>", "[42]", "<strong_close>", ""]),
        ("the $n$th", ["the ", "n", "th"]),
        ("text\n\\[\na\n- b\n\\]\nmore", ["text", ("math_block", "\na\n- b"), "more"]),
        ("- a\n  $$\n  x^2\n  $$\n- b", ["a", ("math_block", "\nx^2"), "b"]),
        ("> \\[\n> x^2\n> \\].", [("math_block", "\nx^2.")]),
        ("\\begin{align}\na &= b\n\\end{align}", [("math_block", "\\begin{align}\na &= b\n\\end{align}")]),
        ("\\boxed{1}", [("math_block", "\\boxed{1}")]),
        ("# About $x^2$", ["About ", "x²"]),
        ("| $x^2$ |\n|--|\n| \\(a_1\\) |", ["x²", "a₁"]),
        ("\\[\nx\n\n- a", ["[", "<softbreak>", "x", "a"]),
        ("\\[\nx", [("math_block", "")]),
    ],
)
def test_formulas_in_markdown(text, expected):
    assert texts(text) == expected


UNCLOSED = [
    "\\(", "\\[", "\\[\n", "$ ", "$a ", "\\boxed{", "\\begin{align}\n", "$$", "$$\n", "> \\[\n", "- \\[\n", "\\\\(", "\\(a",
    "\\boxed{{{{", "\\[ a", "`$", "\\[\\begin{gather}\n$$x\n", "\\begin{align}\n\\[\n", "$\\", "{", "\\frac", "x^{",
]  # fmt: skip


@pytest.mark.parametrize("opener", UNCLOSED)
@pytest.mark.parametrize("end", ["", "\n\nend", "\\)", "$"])
def test_openers_without_closers_take_no_longer_than_other_text(opener, end):
    text = opener * (10_000 // len(opener)) + end
    start = time.process_time()
    parser().parse(text)
    with_formulas(text)
    assert time.process_time() - start < 4, (
        "10 KB; what looks at all of it again for each opener takes a quarter of a minute"
    )


PARTS = st.sampled_from(
    [
        r"a",
        r"1",
        r"x^2",
        r"_",
        r"^",
        r"{",
        r"}",
        r"\frac",
        r"\sqrt",
        r"\left(",
        r"\right)",
        r"\begin{cases}",
        r"\end{cases}",
        r"\begin{pmatrix}",
        r"\end{pmatrix}",
        r"&",
        r"\\",
        r"\text{",
        r"\hat",
        r"\sum",
        r"\boxed{",
        r"[",
        r"]",
        r"(",
        r")",
        r"|",
        r"'",
        r"\,",
        r"%",
        r"\not",
        r"\mathbb",
        r"\overset",
        r"\xrightarrow",
        r"\middle|",
        r"\binom",
        r"\substack",
        r"\limits",
        r"=",
        r"+",
        r"\alpha",
        r"\tag{",
        r"$",
        r"~",
        r"你",
        r"\foo",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PARTS, max_size=30).map(" ".join))
def test_no_mix_of_commands_fails(tex):
    for is_display in (False, True):
        lines = shown(tex, is_display)
        assert len(lines) <= 1 or is_display
        assert sum(map(cell_len, lines)) <= 60_000
