"""Written-out computations that a tiny model can follow one digit at a time; knows no phrasing and no split.

Numbers are padded to one width and worked off from the right. Every column shows its two digits, the carry that comes
in, then ``carry out:result so far``, so that each step needs only digits near by and the last line holds the result.
"""

from __future__ import annotations


def padded(*numbers: int) -> list[str]:
    """Return the numbers with leading zeros, all as wide as the widest."""
    width = max(len(str(n)) for n in numbers)
    return [str(n).zfill(width) for n in numbers]


def add_steps(a: int, b: int) -> str:
    """Return the columns of a + b, such as ``7+8+0=1:5``; the result is the last carry, if 1, then the digits."""
    x, y = padded(a, b)
    lines, carry, done = [f"{x}+{y}"], 0, ""
    for p, q in zip(reversed(x), reversed(y), strict=True):
        carry_out, digit = divmod(int(p) + int(q) + carry, 10)
        done = f"{digit}{done}"
        lines.append(f"{p}+{q}+{carry}={carry_out}:{done}")
        carry = carry_out
    return "\n".join(lines)


def digit_comparison(x: str, y: str) -> str:
    """Return the comparisons of two numbers of one width from the left up to the first difference: ``4=4 7>3``."""
    shown = []
    for p, q in zip(x, y, strict=True):
        shown.append(f"{p}{sign(int(p), int(q))}{q}")
        if p != q:
            break
    return " ".join(shown)


def sign(a: int, b: int) -> str:
    """Return the sign that holds between a and b."""
    return "=" if a == b else ">" if a > b else "<"


def subtract_steps(a: int, b: int) -> str:
    """Return the columns of a - b with borrows; a smaller a is swapped with b and the result called minus."""
    x, y = padded(a, b)
    first = f"{x}-{y} {digit_comparison(x, y)}"
    if a < b:
        x, y = y, x
        first += f", so minus\n{x}-{y}"
    lines, borrow, done = [first], 0, ""
    for p, q in zip(reversed(x), reversed(y), strict=True):
        left = int(p) - int(q) - borrow
        done = f"{left % 10}{done}"
        lines.append(f"{p}-{q}-{borrow}={int(left < 0)}:{done}")
        borrow = int(left < 0)
    return "\n".join(lines)


def digit_product_steps(a: int, digit: int) -> str:
    """Return the columns of a times one digit: product, plus the carry that comes in, then as in `add_steps`."""
    lines, carry, done = [f"{a}*{digit}"], 0, ""
    for p in reversed(str(a)):
        product = int(p) * digit
        carry_out, unit = divmod(product + carry, 10)
        done = f"{unit}{done}"
        lines.append(f"{p}*{digit}={product:02d}+{carry}={carry_out}:{done}")
        carry = carry_out
    return "\n".join(lines)


def product_factors(a: int, b: int) -> tuple[int, int]:
    """Return the factors in the order in which they are worked: the smaller one, at most 19, second."""
    return max(a, b), min(a, b)


def product_pairs(a: int, b: int) -> tuple[tuple[int, int], ...]:
    """Return the operand pairs that the steps of a * b show besides a and b."""
    a, b = product_factors(a, b)
    return () if b <= 10 else ((a, b - 10), (a, 10), (10 * a, a * (b - 10)))


def multiply_steps(a: int, b: int) -> str:
    """Return a * b: by columns for one digit, by the partial products of 10 and the rest up to 19."""
    a, b = product_factors(a, b)
    if b < 10:
        return digit_product_steps(a, b)
    if b == 10:
        return f"{a}*10={a}0"
    rest = b - 10
    parts = (digit_product_steps(a, rest), f"{a}*10={a}0", add_steps(10 * a, a * rest))
    return f"{a}*{b}={a}*10+{a}*{rest}\n" + "\n".join(parts)


def compare_steps(a: int, b: int) -> str:
    """Return the comparison of a and b, digit by digit after padding, with what follows from it."""
    x, y = padded(a, b)
    return f"{x} {y}\n{digit_comparison(x, y)}, so {a}{sign(a, b)}{b}"


def sort_steps(numbers: list[int], descending: bool) -> str:
    """Return an insertion sort: on each line the next number, then all so far in order."""
    texts = padded(*numbers)
    lines = [("largest" if descending else "smallest") + " first: " + " ".join(texts)]
    done: list[str] = []
    for text in texts:
        done = sorted([*done, text], reverse=descending)
        lines.append(f"{text}: {' '.join(done)}")
    return "\n".join(lines)


def numbered_letters(word: str) -> str:
    """Return the letters with their positions: `` c1 a2 t3`` without the first space."""
    return " ".join(f"{letter}{i}" for i, letter in enumerate(word, 1))


def reversal_steps(word: str) -> str:
    """Return the numbered letters, then the same from the last to the first."""
    letters = numbered_letters(word)
    return f"letters: {letters}\nback: {' '.join(reversed(letters.split()))}"


def count_steps(word: str, letter: str) -> str:
    """Return each letter of the word followed by how often `letter` has been seen."""
    shown = [f"{c}{word[: i + 1].count(letter)}" for i, c in enumerate(word)]
    return f"count {letter}: {' '.join(shown)}"
