"""A make-believe CUDA card for tests with a torch without CUDA. It needs a C++ compiler.

    python tests/card/card.py LIBRARY PYTEST-ARGUMENTS...

runs pytest in a process whose torch has the card. `build` compiles LIBRARY; device.cpp says what the card shows. This
module and graphs.py replace torch's Python code for CUDA: streams, events and graphs. There is no Triton, so
`torch.compile` does not work.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")


def build(folder: Path, compiler: str) -> Path:
    """Compile the card's library into `folder`, unless it exists for this source, torch, Python and compiler."""
    import torch
    from torch.utils import cpp_extension

    includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    options = ["-O0", "-std=c++20", "-fPIC", "-shared", "-w"]
    command = [compiler, *options, *includes, str(SOURCE)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    facts = (SOURCE.read_text(encoding="utf-8"), torch.__version__, sys.version, version, options)
    library = folder / f"device-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(exist_ok=True)
        (temporary := library.with_suffix(f".{os.getpid()}")).unlink(missing_ok=True)
        subprocess.run([*command, "-o", str(temporary)], check=True)
        temporary.replace(library)
    return library


class Card:
    """Functions of the library. Each takes a number, by default 0, and returns a number, except `pools`."""

    def __init__(self, functions: ctypes.PyDLL):
        self._functions = functions
        self.pools = functions.card_pools
        self.pools.restype = ctypes.py_object

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._functions, f"card_{name}")
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
        setattr(self, name, lambda number=0: function(number))
        return getattr(self, name)


def present(library: Path) -> Any:
    """Import torch with the card. Return `torch.cuda.card`, which counts memory, copies and waits.

    Call it before torch is imported, because torch looks for a card only at its import.
    """
    assert "torch" not in sys.modules, "torch looks for a card when it is imported"
    module_spec = importlib.util.find_spec("torch")
    assert module_spec is not None and module_spec.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(Path(module_spec.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    functions = ctypes.PyDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    # Import these before the card is visible: with a card, they would look for parts of CUDA that it does not have.
    import bitsandbytes  # noqa: F401
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401

    card = Card(functions)
    card.present()
    _play_cuda(torch, card)
    # The plan reads torch's version to see whether torch can use CUDA. This torch can.
    from lorakit.runs import plan

    plan._no_cuda = lambda: False
    return card


def _play_cuda(torch: Any, card: Any) -> None:
    cuda = torch.cuda
    cuda.card = card
    import graphs

    def clone(storage: Any) -> Any:
        new, old = (torch.empty(size, dtype=torch.uint8, device=storage.device) for size in (storage.nbytes(), 0))
        return new.copy_(old.set_(storage, 0, (storage.nbytes(),), (1,))).untyped_storage()

    # `with torch.device(...)` caches torch's factory functions. Fill this cache before `torch.empty` is replaced.
    torch.utils._device._device_constructors()
    empty, pinned = torch.empty, set[int]()

    def empty_or_pinned(*size: Any, pin_memory: bool = False, **named: Any) -> Any:
        array = empty(*size, **named)
        if pin_memory:
            pinned.add(array.untyped_storage().data_ptr())
        elif pinned and type(array) is torch.Tensor and array.device.type == "cpu":
            pinned.discard(array.untyped_storage().data_ptr())  # reused address of freed pinned memory
        return array

    cuda._lazy_init = cuda.synchronize = lambda *_: None
    cuda.empty_cache, cuda.memory_snapshot = card.empty_cache, graphs.snapshot

    def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
        cuda._utils._get_device_index(0 if device is None else device)  # raises for a device without an index
        card.set_room(int(fraction * 2**34))

    cuda.set_per_process_memory_fraction = set_per_process_memory_fraction
    cuda.set_sync_debug_mode, cuda.get_sync_debug_mode = graphs.set_sync_debug_mode, lambda: graphs.sync_debug_mode[0]
    torch._C._cuda_endAllocateToPool = lambda device, pool: card.end_allocation(pool)
    torch._C._cuda_releasePool = lambda device, pool: card.release_pool(pool)
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.device_count = lambda: 1
    cuda.get_device_name = lambda *_: "make-believe card"
    cuda.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)
    cuda.set_rng_state = cuda.manual_seed_all = lambda *_: None
    cuda.memory_allocated, cuda.max_memory_allocated = lambda *_: card.live(), lambda *_: card.peak()
    cuda.memory_reserved, cuda.max_memory_reserved = lambda *_: card.reserved(), lambda *_: card.reserved_peak()
    cuda.reset_peak_memory_stats = lambda *_: card.reset_peak()
    cuda.mem_get_info = lambda *_: (card.room() - card.reserved(), 2**34)
    cuda.Stream, cuda.stream, cuda.set_stream = graphs.Stream, graphs.On, graphs.set_stream
    cuda.current_stream = lambda *_: graphs.current[0]
    cuda.is_current_stream_capturing = lambda: bool(card.capturing())
    cuda.CUDAGraph, cuda.graph = graphs.Graph, graphs.Capture
    cuda.graph_pool_handle = lambda: next(graphs.numbers)
    torch.empty = empty_or_pinned
    torch.Tensor.is_pinned = lambda tensor, *_: tensor.untyped_storage().data_ptr() in pinned
    torch.UntypedStorage.clone = clone


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    present(Path(sys.argv[1]))
    import pytest

    sys.exit(pytest.main(sys.argv[2:]))
