"""A quicker import of transformers, which reads all of its 3,000 files for the names in them, and then does so again.

Its memory of what it has read holds 128 folders, and it has over 500. The second reading comes with its first tokenizer
class; it is given what the first one found. The first one looks at every line for the last ``__all__``; here it is
given the text from there on. Both together spare two fifths of the time that a command takes to start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

UTILS, MODELS, NAMES = "transformers.utils.import_utils", "transformers.models", "__all__"


class _Beside(MetaPathFinder):
    """Finds nothing, but sees what of transformers is looked for, and so how far its import is."""

    _is_quick = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Another version of transformers may do it in another way, which is then its own affair.
        with suppress(AttributeError):
            if fullname == MODELS:
                sys.meta_path.remove(self)
                _keep_what_was_read(sys.modules[UTILS])
            elif not self._is_quick and hasattr(sys.modules.get(UTILS), "define_import_structure"):
                self._is_quick = True
                _look_for_names_quickly(sys.modules[UTILS])
        return None


def install() -> None:
    """Let both be spared, unless they are past."""
    if MODELS not in sys.modules and not any(isinstance(f, _Beside) for f in sys.meta_path):
        sys.meta_path.insert(0, _Beside())


def _look_for_names_quickly(utils: Any) -> None:
    found = utils.fetch__all__
    utils.fetch__all__ = lambda text: found(text[max(0, text.rfind("\n" + NAMES)) :])


def _keep_what_was_read(utils: Any) -> None:
    """Between the two readings."""
    read = utils.create_import_structure_from_path
    memory, package = read.cache_info(), Path(utils.__file__).parents[1] / "models"
    if memory.maxsize is None or memory.misses <= memory.maxsize:
        return  # nothing was forgotten
    found = read(package)  # under this name it is the last one that was read, and so still there
    names = {str(package), str(package / "__init__.py")}
    utils.create_import_structure_from_path = lambda path: found if str(path) in names else read(path)
