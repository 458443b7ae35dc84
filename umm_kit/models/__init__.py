"""Models, and the way to load one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def load(name: str | Path, device: str = "auto", dtype: str = "float32", download: bool = False) -> Any:
    """Load a shipped model ("tiny-masked"), a folder that save_pretrained wrote, or a checkpoint of Janus or Emu3 by its hub id.

    ``dtype`` "auto" takes bf16 only where a short matrix-product probe beats float32. Several devices, "cuda:0,cuda:1", share the
    layers of a checkpoint that is too large for one. A hub id is looked up in the local cache; nothing is fetched unless
    ``download``. Weights are read from safetensors alone, and no code that comes with them is run.

    Raises:
        ValueError: no such name or folder, a family that is not known, weights in another format.
    """
    from umm_kit.models.autoregressive import AutoregressiveUMM
    from umm_kit.models.base import cast, resolve_device, resolve_dtype
    from umm_kit.models.flowmatching import FlowUMM
    from umm_kit.models.masked import MaskedUMM
    from umm_kit.models.pretrained import PRETRAINED, spread

    if (Path(name) / "adapter_config.json").exists():
        return _with_adapter(Path(name), device, dtype, download)
    own: dict[str, Any] = {"umm_masked": MaskedUMM, "umm_autoregressive": AutoregressiveUMM, "umm_flow": FlowUMM}
    families = {**own, **PRETRAINED}
    place = place_of(name)
    about = config_of(place, download)
    try:
        kind = json.loads(about.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{about} is no model's configuration ({type(error).__name__}: {error})") from error
    if kind not in families:
        raise ValueError(f"{name} holds a {kind!r} model; this version loads {sorted(families)}")
    if download and kind in PRETRAINED and not Path(place).exists():
        from umm_kit.models.sizes import sizes

        print(f"{sizes(name)}\nNot yet run on these weights by the authors of umm_kit. Fetching what is not in the cache ...")
    places = [resolve_device(one) for one in str(device).split(",")]
    if len(places) > 1 and kind in own:
        raise ValueError(f"device is {device!r}, but {name} is small; several devices share the layers of real checkpoints")
    more = {"local_files_only": True, "use_safetensors": True} if kind in own else {"download": download}
    try:
        with _quietly() if kind in own else nullcontext():
            model = families[kind].from_pretrained(place, **more)
    except Exception as error:  # whatever a file may hold that is not what it should be
        raise ValueError(f"no {kind} model could be read from {str(name)!r}: {str(error).splitlines()[0]}") from error
    return spread(cast(model, resolve_dtype(dtype, places[0])), places).eval()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar, which a model of megabytes does not need."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _with_adapter(folder: Path, device: str, dtype: str, download: bool) -> Any:
    """The base model that an adapter names, with the adapter added to its weights, if they are those that it was trained on."""
    from peft import PeftModel
    from safetensors import safe_open

    from umm_kit.models.base import cast, checksum, resolve_dtype

    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter in {folder} names no base model; put its name into adapter_config.json")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        about = file.metadata() or {}
    model = load(base, device, about.get("base_dtype", "float32"), download)  # as it was when the adapter was trained
    if "base_checksum" in about and str(checksum(model)) != about["base_checksum"]:
        raise ValueError(f"the adapter in {folder} was trained on other weights than those of {base!r}; name the right base")
    model = cast(model, resolve_dtype(dtype, next(model.parameters()).device))
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()


def place_of(name: str | Path) -> str | Path:
    """The folder of a shipped model, or the name as it is."""
    shipped = CHECKPOINTS / str(name)
    return shipped if (shipped / "config.json").exists() else name


def config_of(name: str | Path, download: bool = False) -> Path:
    """config.json of a folder, or of a hub id: from the local cache, or from the hub if ``download``."""
    if (Path(name) / "config.json").exists():
        return Path(name) / "config.json"
    found = None
    if not Path(name).exists() and str(name).count("/") == 1:
        from transformers.utils import cached_file

        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = cached_file(str(name), "config.json", local_files_only=not download, **quiet)
    if found is None:
        shipped = sorted(p.parent.name for p in CHECKPOINTS.glob("*/config.json"))
        hub = "; a model on the Hugging Face hub is fetched with download=True" if not download else ""
        raise ValueError(f"no model {str(name)!r}: neither one of the shipped {shipped} nor a folder with a config.json{hub}")
    return Path(found)
