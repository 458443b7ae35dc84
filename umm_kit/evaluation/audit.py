"""Is what the encoders call shared really in both flows, and what they call unique in one only? An audit against known truth.

Three steps: *truth*: which factors of the scenes can be read from the raw input of which flow; *score*: which of them can be
read from the shared and from the unique half of each flow; *rivals*: linear and random splits that encoders must beat. All
amounts are held-out bits of one fixed probe (:func:`read`), so all are lower bounds: "not read" is not "not there".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from umm_kit.diagnostics.bits import Reading, parts_of, read
from umm_kit.evaluation.known import RIVALS, Planted, Split, axes, collect
from umm_kit.features import FLOWS, evaluating

HIGH, LOW = 0.8, 0.2  # a half should hold at least, or at most, this share of what h holds
PRESENT, ABSENT = 0.2, 0.05  # shares of a factor's entropy: in an input from the first on, not in it up to the second
HELD = 0.1  # share of a factor's entropy that h must hold, or there is nothing to divide
LEAK = 0.05  # by which leakage may exceed its permutation null (:func:`recovery`)
OWN = {"understanding": "U-only", "generation": "G-only"}
_RESAMPLES = 1000


# --- truth: what each flow's input holds -------------------------------------------------------------------------------


def truth_table(inputs: Mapping[str, Mapping[str, Tensor]], factors: Mapping[str, Any], seed: int = 0) -> pd.DataFrame:
    """Which input holds which factor: share of its entropy that :func:`read` finds in a flow's input, less the control.

    An input comes in several parts (``{flow: {part: [n, k]}}``); the part with the least validation loss speaks for it.
    A factor is *in* an input from a share of .2 on and *absent* up to .05. In both: shared. In one, absent from the other:
    U-only or G-only. Absent from both: neither. Anything between: undecided, and not judged.

    Returns:
        Columns factor, entropy (bits), and for each flow its share and the part it was read from; kind.
    """
    shares = {flow: _shares(parts, factors, seed) for flow, parts in inputs.items()}
    rows = []
    for k, name in enumerate(factors):
        (u, _, _), (g, _, _) = (shares[flow][k] for flow in FLOWS)
        present, absent = (u >= PRESENT, g >= PRESENT), (u <= ABSENT, g <= ABSENT)
        kinds = {"shared": all(present), "U-only": present[0] and absent[1], "G-only": present[1] and absent[0]}
        kind = next((kind for kind, holds in (kinds | {"neither": all(absent)}).items() if holds), "undecided")
        found = {f"{flow}{end}": v for flow in FLOWS for end, v in zip(("", " part"), shares[flow][k][:2], strict=True)}
        rows.append({"factor": name, "entropy": shares[FLOWS[0]][k][2], **found, "kind": kind})
    return pd.DataFrame(rows)


def _shares(parts: Mapping[str, Tensor], factors: Mapping[str, Any], seed: int) -> list[tuple[float, str, float]]:
    """For each factor: share of its entropy, the part it was read from, its entropy."""
    readings = {part: read(x, factors, seed=seed) for part, x in parts.items()}
    out = []
    for k in range(len(factors)):
        part, best = min(readings.items(), key=lambda item: item[1].loss[k])
        share = (best.items[k].mean() - best.control[k]) / best.entropy[k]
        out.append((float(share), part, float(best.entropy[k])))
    return out


# --- score: what each half holds ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Audit:
    """Verdicts on the two halves of each flow.

    Attributes:
        frame: method, flow, factor, kind, z (h, shared, unique, or gain: the pair's bits beyond those of shared, if it is read
            better), bits (less the control), r = bits / bits of h with its 95 % interval over held-out items, wanted, verdict
            (pass, fail, or empty where nothing is asked), n. r is NaN where h holds less than .1 of the factor's entropy:
            nothing is asked there.
        rivals: for each method the separation, mean of r(right half) - r(wrong half) over all that is judged; by how much the
            encoders are ahead of it, with intervals.
        truth: :func:`truth_table`. relevance: share of a factor's entropy in what each task must predict.
    """

    frame: pd.DataFrame
    rivals: pd.DataFrame
    truth: pd.DataFrame | None = None
    relevance: pd.DataFrame | None = None

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    @property
    def judged(self) -> pd.DataFrame:
        """The rows of the encoders with a verdict."""
        return self.frame[(self.frame["method"] == "encoders") & (self.frame["verdict"] != "")]

    @property
    def unjudged(self) -> list[str]:
        """Kinds of factors, of shared, U-only and G-only, of which h holds too little to ask anything."""
        return [kind for kind in ("shared", *OWN.values()) if kind not in set(self.judged["kind"])]

    @property
    def passed(self) -> bool:
        """Every judged row passes, every kind of factor is judged, and the interval of the lead over every rival is above 0."""
        good, ahead = self.judged["verdict"] == "pass", self.rivals["low"].dropna() > 0
        return bool(good.all() and ahead.all()) and not self.unjudged

    def summary(self) -> str:
        """The verdict in sentences: what failed, what could not be asked, and how the encoders stand to their rivals."""
        failed = self.judged[self.judged["verdict"] == "fail"]
        good, verdict = len(self.judged) - len(failed), "passed" if self.passed else "not passed"
        lines = [f"The audit is {verdict}: {good} of {len(self.judged)} verdicts are good."]
        for row in failed.to_dict("records"):
            what = "leaks into" if row["wanted"] == f"<= {LOW}" else "is lost from"
            found = f"{row['r']:.2f} [{row['low']:.2f}, {row['high']:.2f}] of what h holds, expected {row['wanted']}"
            lines.append(f"{row['factor']!r} ({row['kind']}) {what} the {row['z']} half of {row['flow']}: {found}.")
        lines += [f"No {kind} factor could be judged: the states hold less than {HELD} of its entropy." for kind in self.unjudged]
        for row in self.rivals.dropna().to_dict("records"):
            side = "ahead of" if row["low"] > 0 else "not ahead of"
            found = f"{row['ahead']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
            lines.append(f"The encoders are {side} the {row['method']} split: {found} in separation.")
        return "\n".join(lines)


def score(
    encoders: Callable,
    flows: Mapping[str, Tensor],
    factors: Mapping[str, Any],
    kinds: Mapping[str, str],
    rivals: Mapping[str, Callable] = RIVALS,
    seed: int = 0,
) -> Audit:
    """Share of what h holds of each factor that each half keeps: r(f, z) = bits from z / bits from h, both less the control.

    h is read twice, and for each factor the reading with the least validation loss counts: cut to the leading principal
    components of the width of z (fitted on training rows), so that both probes get as many numbers; and whole, so that h does not
    look empty beside a narrow z. Asked: r >= .8 of the right half, r <= .2 of the wrong one: shared factors in both flows,
    U-only and G-only ones in their own. The encoders are called once and see no label.

    Args:
        encoders: called with {"understanding": [n, d], "generation": [n, d]}, returns .shared[flow] and .unique[flow], [n, f].
        factors: name -> [n] integer classes. kinds: name -> shared, U-only, G-only or another word (not judged).
        rivals: name -> (training flows, f) -> encoders, such as ``lambda flows, size: trained_on_shuffled_pairs``.
    Raises:
        ValueError: as :func:`read`; flows or halves with other rows, or NaN.
    """
    n = {len(h) for h in flows.values()}
    if set(flows) != set(FLOWS) or len(n) > 1 or not all(torch.isfinite(h).all() for h in flows.values()):
        came = {flow: tuple(h.shape) for flow, h in flows.items()}
        raise ValueError(f"flows are {came} or hold NaN; expected finite [n, d] of the same n items for {FLOWS}")
    flows = {flow: h.detach().cpu().float() for flow, h in flows.items()}
    train, _, test = parts_of(n.pop(), seed)
    seen = {flow: h[train] for flow, h in flows.items()}
    halves = {"encoders": _encode(encoders, flows)}
    size = halves["encoders"].shared[FLOWS[0]].shape[1]
    halves |= {name: _encode(make(seen, size), flows) for name, make in rivals.items()}
    weights = np.random.default_rng(seed).multinomial(len(test), np.full(len(test), 1 / len(test)), _RESAMPLES) / len(test)
    weights = np.concatenate([np.full((1, len(test)), 1 / len(test)), weights])  # the sample itself, then resamples of it
    rows: list[dict[str, Any]] = []
    separation: dict[str, list[np.ndarray]] = {}
    for flow in FLOWS:
        directions = axes(seen[flow] - seen[flow].mean(0))[:, :size]
        cut, whole = (read(x, factors, seed=seed) for x in (flows[flow] @ directions, flows[flow]))
        items, control = _better(cut, whole)
        h = items @ weights.T - control  # [factors, 1 + resamples]
        held = (h[:, 0] >= HELD * whole.entropy) & (np.quantile(h, 0.025, axis=1) > 0)
        for method, half in halves.items():
            bits = {"shared": half.shared[flow], "unique": half.unique[flow]}
            if method == "encoders":
                bits["gain"] = torch.cat(list(bits.values()), 1)
            readings = {z: read(x, factors, seed=seed) for z, x in bits.items()}
            found = {z: r.items @ weights.T - r.control[:, None] for z, r in readings.items()}
            if method == "encoders":
                items, control = _better(readings["shared"], readings["gain"])
                found = {"h": h, **found, "gain": items @ weights.T - control - found["shared"]}
            for k, name in enumerate(factors):
                right = {"shared": "shared", OWN[flow]: "unique"}.get(kinds[name]) if held[k] else None
                divisor = np.where(held[k] & (h[k] > 0), h[k], np.nan)
                ratios = {z: b[k] / divisor for z, b in found.items()}
                for z, r in ratios.items():
                    low, high = np.nanquantile(r[1:], [0.025, 0.975]) if held[k] else (np.nan, np.nan)
                    wanted = "" if right is None or z in ("h", "gain") else f">= {HIGH}" if z == right else f"<= {LOW}"
                    good = r[0] >= HIGH if z == right else r[0] <= LOW
                    rows.append({
                        "method": method, "flow": flow, "factor": name, "kind": kinds[name], "z": z, "bits": found[z][k, 0],
                        "r": r[0], "low": low, "high": high, "wanted": wanted,
                        "verdict": ("pass" if good else "fail") if wanted else "", "n": len(test),
                    })  # fmt: skip
                if right:
                    wrong = "unique" if right == "shared" else "shared"
                    separation.setdefault(method, []).append(ratios[right] - ratios[wrong])
    mean = {method: np.mean(parts, 0) for method, parts in separation.items()}
    table = [{"method": "encoders", "separation": mean["encoders"][0]}] if mean else []
    for method in list(mean)[1:]:
        ahead = mean["encoders"] - mean[method]
        low, high = np.nanquantile(ahead[1:], [0.025, 0.975])
        table.append({"method": method, "separation": mean[method][0], "ahead": ahead[0], "low": low, "high": high})
    return Audit(pd.DataFrame(rows), pd.DataFrame(table, columns=["method", "separation", "ahead", "low", "high"]))


def _better(a: Reading, b: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Items and controls of the reading with the lower validation loss, factor by factor: more numbers can be harder to read."""
    second = (b.loss < a.loss)[:, None]
    return np.where(second, b.items, a.items), np.where(second, b.control[:, None], a.control[:, None])


def _encode(encoders: Callable, flows: Mapping[str, Tensor]) -> Split:
    """Both halves, on the CPU, checked; a module is put to evaluation mode and fed on its own device."""
    if isinstance(encoders, nn.Module):
        where = next((p.device for p in encoders.parameters()), torch.device("cpu"))
        with evaluating(encoders), torch.no_grad():
            out = encoders({flow: h.to(where) for flow, h in flows.items()})
    else:
        out = encoders(flows)
    halves = [{flow: torch.as_tensor(half[flow]).detach().cpu().float() for flow in FLOWS} for half in (out.shared, out.unique)]
    for name, half in zip(("shared", "unique"), halves, strict=True):
        for flow, z in half.items():
            if z.ndim != 2 or len(z) != len(flows[flow]) or not torch.isfinite(z).all():
                came = f"the {name} half of {flow} is {tuple(z.shape)} or holds NaN"
                raise ValueError(f"{came}; expected finite [{len(flows[flow])}, f]")
    return Split(*halves)


def audit(
    encoders: Callable,
    model: Any,
    data: Any,
    layer: int | None = None,
    rivals: Mapping[str, Callable] = RIVALS,
    batch_size: int = 64,
    seed: int = 0,
) -> Audit:
    """Check encoders of one layer of a model on scenes of ``Shapes``: :func:`truth_table`, then :func:`score`.

    States are pooled over image tokens, which encoders of kind "transformer" cannot read. Masks hide about 31 to 59 % of the
    tokens, as in training, the same 30 % in every scene: else nothing of fixed place would be seen by understanding alone.
    Inputs are pixels (of visible patches, in G), words and mask; codes hold no more than the pixels of their patch where the
    tokenizer sees each patch by itself, as ours does.

    Args:
        encoders: see :func:`score`. layer: by default the middle one.
        data: at least 100 scenes, better 4,000, that the encoders were not trained on.
    Raises:
        ValueError: other data than scenes, a token grid that does not divide the texture's, a factor that is constant, encoders
            that read tokens.
    """
    if (kind := getattr(getattr(encoders, "config", None), "kind", None)) == "transformer":
        raise ValueError(f"encoders of kind {kind!r} read tokens, an audit pools states; expected 'gated', 'shallow' or 'linear'")
    scenes = collect(model, data, layer, batch_size, seed)
    truth = truth_table(scenes.inputs, scenes.factors, seed)
    targets = {flow: _shares(parts, scenes.factors, seed) for flow, parts in scenes.targets.items()}
    relevance = pd.DataFrame({"factor": list(scenes.factors), **{flow: [s for s, *_ in t] for flow, t in targets.items()}})
    done = score(encoders, scenes.flows, scenes.factors, dict(zip(truth["factor"], truth["kind"], strict=True)), rivals, seed)
    return Audit(done.frame, done.rivals, truth, relevance)


# --- planted truth -----------------------------------------------------------------------------------------------------


def recovery(encode: Callable, planted: Planted, permutations: int = 20, seed: int = 0) -> pd.DataFrame:
    """What encoders recover of planted factors, and what leaks into the wrong half, against shuffled labels.

    Both are r = bits from z / bits from h (all of it). Recovery should be at least .8; leakage at most the 95th percentile of the
    same ratio with shuffled labels + .05.

    Returns:
        Columns flow, factor, kind, z, quantity (recovery, leakage), r, null (95th percentile), limit, ok.
    """
    halves, rows = _encode(encode, planted.flows), []
    for flow in FLOWS:
        asked = {name: y for name, y in planted.factors.items() if planted.kinds[name] in ("shared", OWN[flow])}
        h = read(planted.flows[flow], asked, seed=seed)
        for z, half in (("shared", halves.shared), ("unique", halves.unique)):
            found = read(half[flow], asked, permutations, seed)
            for k, name in enumerate(asked):
                held = h.items[k].mean() - h.control[k]
                if held < HELD * h.entropy[k]:
                    raise ValueError(f"{flow} holds {held:.2f} bits of {name!r}; too few to recover: more rows, or a wider flow")
                right = z == ("shared" if planted.kinds[name] == "shared" else "unique")
                r, null = found.items[k].mean() / held, float(np.quantile(found.controls[k], 0.95)) / held
                limit = HIGH if right else null + LEAK
                rows.append({
                    "flow": flow, "factor": name, "kind": planted.kinds[name], "z": z,
                    "quantity": "recovery" if right else "leakage", "r": r, "null": null, "limit": limit,
                    "ok": bool(r >= limit if right else r <= limit),
                })  # fmt: skip
    return pd.DataFrame(rows)
