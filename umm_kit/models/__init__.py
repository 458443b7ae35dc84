"""Models, and the way to load one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def load(name: str | Path, device: str = "auto", dtype: str = "float32") -> Any:
    """Load a shipped model by name ("tiny-masked"), or any folder that save_pretrained wrote.

    ``dtype`` "auto" takes bf16 only where a short matrix-product probe beats float32. Nothing is downloaded.

    Raises:
        ValueError: no such name or folder, or a family that is not known.
    """
    from umm_kit.models.base import resolve_device, resolve_dtype
    from umm_kit.models.masked import MaskedUMM

    families = {"umm_masked": MaskedUMM}
    folder = CHECKPOINTS / str(name) if (CHECKPOINTS / str(name) / "config.json").exists() else Path(name)
    if not (folder / "config.json").exists():
        shipped = sorted(p.parent.name for p in CHECKPOINTS.glob("*/config.json"))
        raise ValueError(f"no model {str(name)!r}: neither one of the shipped {shipped} nor a folder with a config.json")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in families:
        raise ValueError(f"{folder} holds a {kind!r} model; this version loads {sorted(families)}")
    where = resolve_device(device)
    model = families[kind].from_pretrained(folder, use_safetensors=True, local_files_only=True)
    model = model.to(device=where, dtype=resolve_dtype(dtype, where)).eval()
    model.image_tokenizer.float()  # codes near a rounding edge must not depend on the precision of the backbone
    return model
