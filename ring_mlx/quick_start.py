"""A quicker import of transformers, which reads all of its 3,000 files for their names, and then does so again.

Its memory of what it has read holds 128 folders, and it has over 500. The second reading comes with its first tokenizer
class; it is given what the first one found. That spares a quarter of the time that a command takes to start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

MODELS = "transformers.models"


class _BeforeModels(MetaPathFinder):
    """Finds nothing, but sees when the models' package is looked for: between the two readings."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == MODELS:
            sys.meta_path.remove(self)
            # Another version of transformers may do it in another way, which is then its own affair.
            with suppress(ImportError, AttributeError):
                _keep_what_was_read()
        return None


def install() -> None:
    """Let the second reading be spared, unless it is past."""
    if MODELS not in sys.modules and not any(isinstance(f, _BeforeModels) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeModels())


def _keep_what_was_read() -> None:
    from transformers.utils import import_utils

    read = import_utils.create_import_structure_from_path
    memory, package = read.cache_info(), Path(import_utils.__file__).parents[1] / "models"
    if memory.maxsize is None or memory.misses <= memory.maxsize:
        return  # nothing was forgotten
    found = read(package)  # under this name it is the last one that was read, and so still there
    names = {str(package), str(package / "__init__.py")}
    import_utils.create_import_structure_from_path = lambda path: found if str(path) in names else read(path)
