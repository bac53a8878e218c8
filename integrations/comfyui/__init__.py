"""lorakit's nodes for ComfyUI. Copy or link this folder into `custom_nodes`; see docs/hosts.md of lorakit."""

from .nodes import Check, Compare, Inspect, Merge, Photos, Train

NODE_CLASS_MAPPINGS = {
    "LorakitPhotos": Photos,
    "LorakitCheck": Check,
    "LorakitTrain": Train,
    "LorakitCompare": Compare,
    "LorakitInspect": Inspect,
    "LorakitMerge": Merge,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LorakitPhotos": "Photos (lorakit)",
    "LorakitCheck": "Check and plan (lorakit)",
    "LorakitTrain": "Train LoRA (lorakit)",
    "LorakitCompare": "Compare strengths (lorakit)",
    "LorakitInspect": "Inspect LoRA (lorakit)",
    "LorakitMerge": "Merge LoRA (lorakit)",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
