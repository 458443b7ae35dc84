"""umm_kit: small unified multimodal models, their two information flows, and an exact oracle to score them.

Public names are imported on first use, so that ``import umm_kit`` costs nothing (torch comes with the first of them).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name -> the module that defines it
_NAMES = {
    "Shapes": "umm_kit.data.shapes",
    "Nuisance": "umm_kit.data.shapes",
    "Oracle": "umm_kit.data.oracle",
    "ImageText": "umm_kit.data.imagetext",
    "Digits": "umm_kit.data.digits",
    "load": "umm_kit.models",
    "collate": "umm_kit.models.base",
    "draw_mask": "umm_kit.models.base",
    "check_model": "umm_kit.models.contract",
    "HookedUMM": "umm_kit.models.hooked",
    "Pass": "umm_kit.models.hooked",
    "Decoding": "umm_kit.models.base",
    "extract": "umm_kit.features",
    "diagnose": "umm_kit.diagnostics.report",
    "evaluate": "umm_kit.evaluation",
    "compare": "umm_kit.evaluation",
    "audit": "umm_kit.evaluation.audit",
    "drift": "umm_kit.evaluation.drift",
    "Drift": "umm_kit.evaluation.drift",
    "PretrainTrainer": "umm_kit.trainers.pretrain",
    "PretrainConfig": "umm_kit.trainers.pretrain",
    "DIVATrainer": "umm_kit.trainers.diva",
    "DIVAConfig": "umm_kit.trainers.diva",
    "PreferenceTrainer": "umm_kit.trainers.preference",
    "PreferenceConfig": "umm_kit.trainers.preference",
    "LatentUMMTrainer": "umm_kit.trainers.latentumm",
    "LatentUMMConfig": "umm_kit.trainers.latentumm",
    "load_teacher": "umm_kit.models.teachers",
    "weight_changes": "umm_kit.diagnostics.changes",
    "expect": "umm_kit.reproduce",
}

if TYPE_CHECKING:
    from umm_kit.data.digits import Digits
    from umm_kit.data.imagetext import ImageText
    from umm_kit.data.oracle import Oracle
    from umm_kit.data.shapes import Nuisance, Shapes
    from umm_kit.diagnostics.changes import weight_changes
    from umm_kit.diagnostics.report import diagnose
    from umm_kit.evaluation import compare, evaluate
    from umm_kit.evaluation.audit import audit
    from umm_kit.evaluation.drift import Drift, drift
    from umm_kit.features import extract
    from umm_kit.models import load
    from umm_kit.models.base import Decoding, collate, draw_mask
    from umm_kit.models.contract import check_model
    from umm_kit.models.hooked import HookedUMM, Pass
    from umm_kit.models.teachers import load_teacher
    from umm_kit.reproduce import expect
    from umm_kit.trainers.diva import DIVAConfig, DIVATrainer
    from umm_kit.trainers.latentumm import LatentUMMConfig, LatentUMMTrainer
    from umm_kit.trainers.preference import PreferenceConfig, PreferenceTrainer
    from umm_kit.trainers.pretrain import PretrainConfig, PretrainTrainer

__all__ = [
    "DIVAConfig", "DIVATrainer", "Decoding", "Digits", "Drift", "HookedUMM", "ImageText", "LatentUMMConfig",
    "LatentUMMTrainer", "Nuisance", "Oracle", "Pass", "PreferenceConfig", "PreferenceTrainer", "PretrainConfig",
    "PretrainTrainer", "Shapes", "__version__", "audit", "check_model", "collate", "compare", "diagnose", "draw_mask",
    "drift", "evaluate", "expect", "extract", "load", "load_teacher", "weight_changes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'umm_kit' has no attribute {name!r}; it has {', '.join(sorted(_NAMES))}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
