"""Numbers that the papers print or draw, each with where it stands and how it was read, and where they contradict each other.

From DIVA (arXiv:2605.25328v1) and, for some disagreements, its authors' release (commits 2234dba and 1f2854c). No number of
LatentUMM (arXiv:2605.17766) is here: only its abstract and its release were read.
"""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

NAMES = ("diva_fig2", "diva_settings", "diva_tables")


def load(name: str) -> pd.DataFrame:
    """One published table, a row per value.

    ``diva_fig2``: panel, series, layer (as on the axis; Show-o has 24), value, uncertainty (plus or minus, in the value's unit),
    source, how ("read by eye" off the curves). Panel ``effective_rank_increment_pct`` is in percent, the others are shares;
    ``gradient_conflict`` has no formula in the paper, so no number of ours belongs on its axis.

    ``diva_tables``: table, model, config, metric, value, source, how ("printed"); ``diva_settings``: stage, model, setting ...

    Raises:
        ValueError: unknown name.

    Example:
        >>> load("diva_fig2").how.unique().tolist()
        ['read by eye']
    """
    if name not in NAMES:
        raise ValueError(f"nothing published under {name!r}; there are {', '.join(NAMES)}")
    return _read(name)


def disagreements() -> pd.DataFrame:
    """Where paper, tables and release contradict each other: what, value_a, where_a, value_b, where_b (values as text).

    Example:
        >>> disagreements().loc[0, ["what", "value_a", "value_b"]].tolist()
        ['GenEval of Show-o, base', '0.57', '0.69']
    """
    return _read("disagreements", dtype=str)


def _read(name: str, **options: type) -> pd.DataFrame:
    with (files(__name__) / f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, **options)  # type: ignore[call-overload]
