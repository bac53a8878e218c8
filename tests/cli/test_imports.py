"""Faster imports of libraries: their only lasting effect is that garbage collection skips imported objects."""

import gc
import subprocess
import sys

import pytest
import torch

import lorakit
from lorakit.cli import imports


def test_the_collector_rests_while_imports_last_and_looks_at_none_of_them_later(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    compile, before = torch.compile, gc.get_freeze_count()
    try:
        with pytest.raises(KeyError), imports.model_imports():
            assert not gc.isenabled()
            new = [[] for _ in range(100_000)]
            raise KeyError
        assert gc.isenabled() and gc.get_freeze_count() >= before + len(new)
    finally:
        gc.unfreeze()
    assert torch.compile is compile


def test_what_is_imported_already_is_left_to_the_collector():
    import transformers  # noqa: F401

    before = gc.get_freeze_count()
    with imports.model_imports():
        assert "transformers" in sys.modules and gc.isenabled()
    assert gc.get_freeze_count() == before


@pytest.mark.slow
def test_bitsandbytes_comes_without_torchs_compiler():
    code = (
        "import sys, torch; from lorakit.cli import imports; compile = torch.compile; imports.import_bitsandbytes(); "
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules, compile is torch.compile)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True False True\n"


def test_a_public_name_leaves_the_collector_as_it_was():
    assert lorakit.Event and gc.isenabled()
    gc.disable()
    try:
        assert lorakit.Event and not gc.isenabled()
    finally:
        gc.enable()
