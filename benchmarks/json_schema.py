"""``python -m benchmarks.json_schema FOLDER``: how much of JSON Schema answers can be held to.

FOLDER is a checkout of JSON Schema's test suite, of which draft 2020-12 is read. A schema is accepted if a grammar can be made of
it, and honoured if that allows every valid instance of the suite and no other one. An instance is written as answers are: on one
line, its keys in any order, numbers as they stand. Refusals are listed by keyword, wrong instances by file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.errors import GrammarError
from ring_mlx.generation.forms import Form, TextForm
from ring_mlx.generation.grammars import Grammars

ROWS, MOST_ORDERS = 1024, 200


def orders(value: Any) -> Iterator[Any]:
    """A value with its keys, and those of the values within, in every order."""
    if isinstance(value, dict):
        for keys in itertools.permutations(value):
            for values in itertools.product(*(list(itertools.islice(orders(value[k]), MOST_ORDERS)) for k in keys)):
                yield dict(zip(keys, values, strict=True))
    elif isinstance(value, list):
        yield from map(list, itertools.product(*(list(itertools.islice(orders(v), MOST_ORDERS)) for v in value)))
    else:
        yield value


def allows(grammars: Grammars, form: Form, instance: Any) -> bool:
    """Whether an answer may be an instance."""
    for ordered in itertools.islice(orders(instance), MOST_ORDERS):
        matcher = grammars.compiled(form, False).matcher.deep_copy()
        tokens = grammars.tokens.tokenize_str(json.dumps(ordered, ensure_ascii=False))
        if matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting():
            return True
    return False


def kind_of(e: GrammarError) -> str:
    """What a schema is refused for, in a word or two."""
    text = str(e).rpartition(": ")[2] if "keys:" in str(e) else str(e)
    if names := re.findall(r'"([$\w]+)"', text.partition(";")[0]):
        return "/".join(names)
    if "oneOf" in text:
        return "oneOf whose parts may overlap"
    if "registry" in text:
        return "$ref to elsewhere"
    return "a schema that nothing meets" if "satisf" in text or "nothing" in text or "empty" in text else "other"


def measure(grammars: Grammars, name: str, files: list[Path]) -> int:
    """Print the shares of some files; returns how many instances are allowed against their schema."""
    total = accepted = honoured = 0
    refused, wrong, missed = Counter[str](), Counter[str](), Counter[str]()
    for file in files:
        for group in json.loads(file.read_text(encoding="utf-8")):
            total += 1
            schema = group["schema"] if isinstance(group["schema"], dict) else {"allOf": [group["schema"]]}
            form = Form(TextForm("schema", json.dumps(schema), "schema"))
            try:
                grammars.compiled(form, False)
            except GrammarError as e:
                refused[kind_of(e)] += 1
                continue
            accepted += 1
            cases = [(allows(grammars, form, case["data"]), case["valid"]) for case in group["tests"]]
            wrong[file.stem] += cases.count((True, False))
            missed[file.stem] += cases.count((False, True))
            honoured += all(is_allowed == is_valid for is_allowed, is_valid in cases)
    print(f"{name}: {total} schemas, {accepted} accepted, {honoured} of them honoured")
    told = {"refused": refused, "instances refused": missed, "instances allowed against the schema": wrong}
    for what, counts in told.items():
        print(f"  {what}:", ", ".join(f"{kind} {n}" for kind, n in counts.most_common() if n) or "none")
    return wrong.total()


def main() -> int:
    """Print the shares; returns 1 if a grammar allows what a schema of the required part does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of JSON Schema's test suite")
    folder = parser.parse_args().folder / "tests" / "draft2020-12"
    grammars = Grammars(load_tokenizer(demo_model_path()), ROWS)
    wrong = measure(grammars, "required", sorted(folder.glob("*.json")))
    measure(grammars, "optional", sorted(folder.glob("optional/**/*.json")))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
