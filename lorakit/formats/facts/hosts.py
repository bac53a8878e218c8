"""Programs that use adapters, and their folders, as data. No torch.

From the code of each: ComfyUI 0.3.64, AUTOMATIC1111 1.10.1, Forge 2025-06, InvokeAI 6.14, SwarmUI and Fooocus as of
2026-10.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One program.

    Attributes:
        title: its usual name.
        loras, embeddings: its folders of adapters and embeddings, relative to its own folder.
        mark: a file or folder that its own folder always contains.
        reader: the key in `compatibility.CONSUMERS` whose rules apply.
        then: what the user does next in the program.
        has_json, has_preview: whether it shows trigger words from `<name>.json` and the picture `<name>.png`.
        families: the families that it supports; empty: all.
        methods: words of methods that it misreads although the reader's rules allow them.
    """

    title: str
    loras: str
    embeddings: str
    mark: str
    reader: str
    then: str
    has_json: bool = True
    has_preview: bool = True
    families: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


HOSTS = {
    "a1111": Host("AUTOMATIC1111", "models/Lora", "embeddings", "webui.py", "a1111", "press Refresh in its Lora tab"),
    "forge": Host("Forge", "models/Lora", "embeddings", "modules_forge", "forge", "press Refresh in its Lora tab"),
    "comfyui": Host(
        "ComfyUI",
        "models/loras",
        "models/embeddings",
        "comfy/model_management.py",
        "comfyui",
        "press R, and choose it in Load LoRA",
        has_json=False,
    ),
    "swarmui": Host(
        "SwarmUI", "Models/Lora", "Models/Embeddings", "src/SwarmUI.csproj", "comfyui", "press Refresh in its LoRAs tab"
    ),
    "fooocus": Host(
        "Fooocus",
        "models/loras",
        "models/embeddings",
        "fooocus_version.py",
        "forge",  # the loader of both comes from an older ComfyUI
        "press Refresh All Files in its Models tab",
        has_json=False,
        has_preview=False,
        families=("sdxl",),
        methods=("dora", "glora", "oft", "ia3"),
    ),
    "invokeai": Host(
        "InvokeAI",
        "lora-import",
        "lora-import",
        "invokeai.yaml",
        "invokeai",
        "open Models, Scan Folder, and give it {folder}",
    ),
}
