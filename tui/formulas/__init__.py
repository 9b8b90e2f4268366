"""Formulas in LaTeX as Unicode text: `parser` finds them in Markdown, `reader` draws one."""
