"""Faster imports of libraries: their only lasting effect is that garbage collection skips imported objects."""

import gc
import subprocess
import sys

import pytest
import torch

import lorakit
from lorakit.cli import imports


def test_garbage_collection_is_off_during_imports_and_skips_their_objects(monkeypatch: pytest.MonkeyPatch):
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


def test_garbage_collection_stays_on_if_transformers_is_imported():
    import transformers  # noqa: F401

    before = gc.get_freeze_count()
    with imports.model_imports():
        assert "transformers" in sys.modules and gc.isenabled()
    assert gc.get_freeze_count() == before


@pytest.mark.slow
def test_bitsandbytes_is_imported_without_torchs_compiler():
    code = (
        "import sys, torch; from lorakit.cli import imports; compile = torch.compile; imports.import_bitsandbytes(); "
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules, compile is torch.compile)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True False True\n"


def test_a_public_name_does_not_switch_garbage_collection():
    assert lorakit.Event and gc.isenabled()
    gc.disable()
    try:
        assert lorakit.Event and not gc.isenabled()
    finally:
        gc.enable()
