"""A package that is not installed is missed in one sentence that names its extra."""

import sys

import pytest

from kleash.errors import ModelError
from kleash.models.lora import require_peft
from kleash.models.quantization import require_library


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, require, extra in (
        ("peft", require_peft, "lora"),
        ("bitsandbytes", require_library, "qlora"),
    ):
        assert require().__name__ == package
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModelError, match=rf"{package} .*pip install 'kleash\[{extra}\]'"):
            require()
