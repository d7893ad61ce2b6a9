"""Read the section "Example:" of docstrings as "Examples:", the name that griffe knows, so that it is shown as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Rename the section of every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rename the section of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
