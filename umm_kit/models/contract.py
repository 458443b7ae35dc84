"""Does a model meet the contract (``umm-kit check MODEL``)? Its parts are called, and what they must not do is tried.

A part that is there may still be wrong in a way that no shape shows: a caption that stands before the image makes a copy of the
caption of understanding's states, a hidden code that stays in the input a copy of the answer of generation's. Either would be
measured as "shared information". So each rule is tried by changing what must not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from umm_kit.models.base import FlowOutput, check_images, evaluating, example_losses, token_losses

PARTS = ("embedding", "num_layers", "hidden_size", "grid", "layer_parameters", "understanding_flow", "generation_flow")
RULES = ("caption_unseen", "caption_read", "hidden_unseen", "raster_order", "losses", "gradients", "repeatable")
TIERS = {
    "diagnosable": (*PARTS, *RULES),
    "drivable": ("understand", "generate", "same_seed", "shown_kept"),
    "preference-trainable": ("image_log_prob",),
}


class NotAsked(Exception):
    """A rule that cannot be tried on this model, and why."""


@dataclass
class CheckReport:
    """What a model meets of the contract, what is missing or broken (``missing``), and what could not be tried, in words."""

    family: str
    met: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    not_asked: dict[str, str] = field(default_factory=dict)

    @property
    def tier(self) -> str:
        fine = {*self.met, *self.not_asked}
        return ", ".join(name for name, needs in TIERS.items() if fine.issuperset(needs)) or "none"

    def __str__(self) -> str:
        lines = [f"{self.family}: {self.tier}"] + [f"  ok         {name}" for name in self.met]
        lines += [f"  not asked  {name}: {why}" for name, why in self.not_asked.items()]
        return "\n".join(lines + [f"  fails      {name}: {why}" for name, why in self.missing.items()])


def check_model(model: Any, batch: Mapping[str, Any]) -> CheckReport:
    """Call every part of the contract on a small batch and try every rule; the model is left as it was.

    The rules, beside the parts of :class:`UnifiedModel`:

    - ``caption_unseen``: understanding's image states do not change with the caption; ``caption_read``: generation's do.
    - ``hidden_unseen``: a hidden code changes no state; ``raster_order``: a shown one changes the input state of its place alone.
      Of a model without an ``image_tokenizer``, the pixels of that place.
    - ``losses``: they are cross-entropies of logits and labels, the labels of generation being the hidden tokens.
    - ``gradients``: both losses reach every layer. ``repeatable``: one seed, one mask and one loss.
    - ``same_seed``: one seed, one drawing. ``shown_kept``: inpainting leaves what is shown.

    Args:
        batch: two examples or more, whose texts differ.
    Raises:
        ValueError: a batch of one, or of equal texts, by which nothing can be tried.
    """
    texts = list(batch["texts"])
    if len(set(texts)) < 2:
        raise ValueError(f"{len(texts)} examples with {len(set(texts))} different texts; expected two of each at least")
    report, trial = CheckReport(type(model).__name__), _Trial(model, batch)
    for name in dict.fromkeys(name for needs in TIERS.values() for name in needs):
        try:
            with evaluating(model), torch.set_grad_enabled(name == "gradients"):
                getattr(trial, name)() if hasattr(trial, name) else getattr(model, name)
            report.met.append(name)
        except NotAsked as why:
            report.not_asked[name] = str(why)
        except (NotImplementedError, AttributeError, ValueError, RuntimeError, TypeError, LookupError) as error:
            report.missing[name] = f"{type(error).__name__}: {error}"
    return report


class _Trial:
    """One method for each part or rule that has to be tried; it raises where the model falls short."""

    def __init__(self, model: Any, batch: Mapping[str, Any]):
        self.model, self.batch, self.n = model, batch, len(batch["ids"])
        self.other = {**batch, "texts": [*batch["texts"][1:], batch["texts"][0]]}

    def _mask(self) -> Tensor:
        rows, columns = self.model.grid
        return (torch.arange(rows * columns) % 2 == 0).expand(self.n, -1)

    def _generation(self, batch: Mapping[str, Any] | None = None, **more: Any) -> FlowOutput:
        return self.model.generation_flow(self.batch if batch is None else batch, mask=self._mask(), **more)

    def _contents(self) -> Tensor:
        """What stands at each place: codes [B, N, ...], or of a model without an image tokenizer the pixels there."""
        images = self.batch["images"].to(getattr(self.model, "device", "cpu"))
        if hasattr(self.model, "image_tokenizer"):
            return self.model.image_tokenizer.encode(images)
        return nn.functional.unfold(images, self._cell(), stride=self._cell()).mT

    def _cell(self) -> tuple[int, int]:
        """Pixels (down, across) of one image token."""
        (height, width), (rows, columns) = self.batch["images"].shape[-2:], self.model.grid
        if height % rows or width % columns:
            raise NotAsked(f"{height} x {width} pixels do not divide into {rows} x {columns} tokens, and there are no codes")
        return height // rows, width // columns

    def _with(self, contents: Tensor) -> dict[str, Any]:
        """The batch with other codes, or other pixels."""
        if hasattr(self.model, "image_tokenizer"):
            return {**self.batch, "codes": contents}
        size = tuple(self.batch["images"].shape[-2:])
        return {**self.batch, "images": nn.functional.fold(contents.mT, size, self._cell(), stride=self._cell())}

    # --- parts ---

    def layer_parameters(self) -> None:
        groups = {name: list(group) for name, group in self.model.layer_parameters().items()}
        if len(groups) != self.model.num_layers or not all(groups.values()):
            found = {name: len(group) for name, group in groups.items()}
            raise ValueError(f"parameters per layer are {found}; expected some for each of {self.model.num_layers} layers")

    def _flow(self, out: FlowOutput) -> None:
        length = out.grid[0] * out.grid[1]
        if sorted(out.hidden_states) != list(range(self.model.num_layers + 1)):
            raise ValueError(f"hidden states of layers {sorted(out.hidden_states)}; expected 0 to {self.model.num_layers}")
        expected = (self.n, length, self.model.hidden_size)
        for layer, states in out.hidden_states.items():
            if tuple(states.shape) != expected:
                raise ValueError(f"layer {layer} states are {tuple(states.shape)}; expected {expected}")
        if not torch.isfinite(out.loss):
            raise ValueError(f"the loss is {float(out.loss)}")

    def understanding_flow(self) -> None:
        self._flow(self.model.understanding_flow(self.batch))

    def generation_flow(self) -> None:
        self._flow(self.model.generation_flow(self.batch))

    def _count(self, what: str, made: int) -> None:
        if made != self.n:
            raise ValueError(f"{made} {what} for {self.n} examples; expected one each")

    def understand(self) -> None:
        self._count("texts", len(self.model.understand(self.batch["images"])))

    def generate(self) -> None:
        self._count("images", len(check_images(self.model.generate(self.batch["texts"]))))

    def image_log_prob(self) -> None:
        self._count("log-probabilities", len(self.model.image_log_prob(self.batch["texts"], self.batch["images"])))

    # --- rules of the flows ---

    def caption_unseen(self) -> None:
        a, b = (self.model.understanding_flow(batch).hidden_states for batch in (self.batch, self.other))
        for layer in a:
            if (by := _moved(a[layer], b[layer])) > 1e-3:
                raise ValueError(
                    f"with another caption the image states of understanding move by {by:.2g} of their spread in layer {layer}; "
                    "the caption must stand behind the image, and the image not attend to it"
                )

    def caption_read(self) -> None:
        a, b = (self._generation(batch).hidden_states for batch in (self.batch, self.other))
        if all(_moved(a[layer], b[layer]) < 1e-6 for layer in a):
            raise ValueError("with another caption no image state of generation moves; the caption must stand before the image")

    def hidden_unseen(self) -> None:
        contents, mask = self._contents(), self._mask()
        if contents.is_floating_point() and hasattr(self.model, "image_tokenizer"):
            raise NotAsked("a hidden token stands as noise of some level, and below level 1 its latent shows through")
        hidden = mask.to(contents.device).view(*mask.shape, *[1] * (contents.ndim - 2))
        changed = torch.where(hidden, contents.roll(1, 0).roll(1, 1), contents)
        if torch.equal(changed, contents):
            raise NotAsked("all images of the batch have the same content")
        a, b = (self._generation(self._with(c)).hidden_states for c in (contents, changed))
        for layer in a:
            if (by := _moved(a[layer], b[layer])) > 1e-3:
                raise ValueError(
                    f"with other hidden content generation's image states move by {by:.2g} of their spread in layer {layer}; "
                    "what is hidden must not be in the input (hide pixels before any layer that looks at several of them at once)"
                )

    def raster_order(self) -> None:
        contents = self._contents()
        differs = (contents != contents[:1]).flatten(2).any(2) if contents.ndim > 2 else contents != contents[:1]
        places = [j for j in range(1, contents.shape[1], 2) if bool(differs[:, j].any())]  # shown by _mask
        if not places:
            raise NotAsked("all images of the batch have the same content")
        a = self._generation(self._with(contents), layers=[0]).hidden_states[0]
        for place in places[:2]:  # one may lie on the diagonal, where rows and columns are not told apart
            changed = contents.clone()
            changed[:, place] = contents[:, place].roll(1, 0)
            b = self._generation(self._with(changed), layers=[0]).hidden_states[0]
            moved = (a - b).abs().amax((0, 2)).nonzero()[:, 0].tolist()
            if not moved:
                raise ValueError(f"with other content at place {place}, which is shown, no input state moves; is it read at all?")
            if moved != [place]:
                raise ValueError(
                    f"with another content at place {place} the input states of places {moved} move; they must be in raster order"
                )

    def losses(self) -> None:
        for name, out in (("understanding", self.model.understanding_flow(self.batch)), ("generation", self._generation())):
            if out.logits is not None and out.labels is not None:
                given, (loss, each) = "logits and labels", token_losses(out.logits, out.labels)
            elif out.prediction is not None and out.target is not None and out.mask is not None:
                given, each = "prediction and target", example_losses(out, out.prediction)
                loss = (each * out.mask.sum(1)).sum() / out.mask.sum()
            else:
                raise ValueError(f"{name} has neither logits and labels nor prediction, target and mask")
            for what, ours, theirs in (("loss", loss, out.loss), ("per_example_loss", each, out.per_example_loss)):
                if not torch.allclose(ours.to(theirs), theirs, rtol=1e-3, atol=1e-4):
                    raise ValueError(f"{what} of {name} is {theirs.tolist()}; its {given} give {ours.tolist()}")
            if name == "generation" and out.mask is not None and not torch.equal(out.mask.cpu(), self._mask()):
                raise ValueError("generation returns another mask than it was given")
            if name == "generation" and out.labels is not None:
                supervised = (out.labels != -100).cpu()
                if not torch.equal(supervised.sum(1), self._mask().sum(1)):
                    raise ValueError(f"generation supervises {supervised.sum(1).tolist()} tokens; expected the hidden ones")
                if supervised.shape == self._mask().shape and not torch.equal(supervised, self._mask()):
                    raise ValueError("generation supervises as many tokens as are hidden, but others; expected the hidden ones")

    def gradients(self) -> None:
        groups = {name: [p for p in group if p.requires_grad] for name, group in self.model.layer_parameters().items()}
        if not any(groups.values()):
            raise NotAsked("no parameter of the layers asks for a gradient")
        for flow, out in (("understanding", self.model.understanding_flow(self.batch)), ("generation", self._generation())):
            for name, group in groups.items():
                found = torch.autograd.grad(out.loss, group, retain_graph=True, allow_unused=True) if group else ()
                if group and not any(g is not None and bool(g.abs().max() > 0) for g in found):
                    raise ValueError(f"the loss of {flow} has no gradient in {name}")

    def repeatable(self) -> None:
        a, b = (self.model.generation_flow(self.batch, generator=torch.Generator().manual_seed(0)) for _ in range(2))
        if a.mask is not None and b.mask is not None and not torch.equal(a.mask, b.mask):
            raise ValueError("one seed gives two masks; draw them with the generator that is given")
        if not torch.allclose(a.loss, b.loss):
            raise ValueError(f"one seed gives two losses of generation, {float(a.loss)} and {float(b.loss)}")

    # --- rules of decoding ---

    def _drawn(self, **more: Any) -> Tensor:
        return self.model.generate(self.batch["texts"], generator=torch.Generator().manual_seed(0), **more).cpu()

    def same_seed(self) -> None:
        if not torch.equal(self._drawn(), self._drawn()):
            raise ValueError("one seed gives two drawings; draw all noise with the generator that is given")

    def shown_kept(self) -> None:
        rows, columns = self.model.grid
        mask = torch.zeros(self.n, rows, columns, dtype=torch.bool)
        mask[:, : rows // 2] = True
        images = self.batch["images"].cpu()
        try:
            drawn = self._drawn(images=self.batch["images"], mask=mask)
        except NotImplementedError as error:
            raise NotAsked(f"the family does not inpaint ({error})") from error
        below = images.shape[2] * (rows // 2) // rows
        if not torch.allclose(drawn[:, :, below:], images[:, :, below:], atol=1e-3):
            raise ValueError("inpainting changes pixels that were not hidden")


def _moved(a: Tensor, b: Tensor) -> float:
    """Largest change, in standard deviations of what it was."""
    return float((a - b).abs().max() / a.std().clamp(min=1e-12))
