"""For the site: doctests under `Example:` are shown as code, as Griffe does under `Examples:`."""

from typing import Any

import griffe


class DoctestExamples(griffe.Extension):
    """Give the section the name that Griffe's reader of Google docstrings knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in one docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")
