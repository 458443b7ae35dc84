"""Around the cycle text -> image -> text -> ...: who reads, who draws, and what is kept of every half-step.

Step 0 is the data's caption or its image. Each half-step turns a text into an image (``generate``) or an image into a text
(``understand``); two of them are one cycle, so steps 0, 2, 4, ... are of one kind and steps 1, 3, 5, ... of the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from umm_kit.data.oracle import Oracle
from umm_kit.data.shapes import Shapes
from umm_kit.evaluation.facts import KEPT, Content, FactTable, said, seen
from umm_kit.evaluation.understanding import items_of
from umm_kit.models.base import Decoding, as_layers, check_images, evaluating
from umm_kit.models.masked import MaskedUMM
from umm_kit.models.teachers import Teacher

STARTS = ("text", "image")


@dataclass
class Trace:
    """What happened to n items over steps 0 to S in one run; arrays are indexed [step, item].

    Attributes:
        kinds: "text" or "image", for each step.
        texts: step -> the words of every item (text steps alone).
        contents: for each step what every item says or shows, None where it is lost.
        latents: layer -> [steps, n, d], means over the image tokens.
        teacher: [steps, n, dim], or None without a teacher.
        images: step -> pictures of the first few items [keep, 3, H, W] (image steps alone).
    """

    kinds: list[str]
    texts: dict[int, list[str]] = field(default_factory=dict)
    contents: list[list[Content | None]] = field(default_factory=list)
    latents: dict[int, np.ndarray] = field(default_factory=dict)
    teacher: np.ndarray | None = None
    images: dict[int, Tensor] = field(default_factory=dict)

    @property
    def lost(self) -> np.ndarray:
        """[steps, n] bool: the text does not parse, or the oracle reads nothing in the picture."""
        return np.array([[content is None for content in step] for step in self.contents])

    def status(self, step: int) -> list[str]:
        """ "ok" or "lost", for every item."""
        return ["lost" if content is None else "ok" for content in self.contents[step]]


@dataclass
class Cycles:
    """How to go around: who reads and who draws, what to look at on the way. See :func:`umm_kit.evaluation.drift.drift`.

    ``oracle`` reads pictures of scenes; without one, only an empty text counts as lost and contents are empty.
    """

    model: Any  # whose latents are kept
    reader: Any
    writer: Any
    oracle: Any = None
    teacher: Teacher | None = None
    layers: Sequence[int] = ()
    decoding: Decoding = field(default_factory=Decoding)

    def content(self, shown: list[str] | Tensor) -> list[Content | None]:
        """What texts say or pictures show."""
        if isinstance(shown, list):
            return [said(text) if self.oracle else (Content(()) if text.strip() else None) for text in shown]
        return [seen(r.objects) for r in self.oracle.read(shown)] if self.oracle else [Content(())] * len(shown)

    def latents(self, shown: list[str] | Tensor, origin: dict[str, Any]) -> dict[int, np.ndarray]:
        """Layer -> [n, d], the mean over image tokens of the flow that has this content as its input.

        For an image that is understanding. For a text it is the masked family's generation with every image token hidden. Other
        families would show the image there, or noise: of them it is the mean over the text's tokens. ``origin`` is not seen.
        """
        if not self.layers:
            return {}
        if isinstance(shown, list) and hasattr(self.model, "text_states") and not isinstance(self.model, MaskedUMM):
            return {k: _finite(h.float(), f"states of layer {k}") for k, h in self.model.text_states(shown, self.layers).items()}
        if isinstance(shown, list):
            rows, columns = self.model.grid
            mask = torch.ones(len(shown), rows * columns, dtype=torch.bool)
            out = self.model.generation_flow({**origin, "texts": shown}, layers=self.layers, mask=mask)
        else:
            out = self.model.understanding_flow({**origin, "images": shown}, layers=self.layers)
        return {layer: _finite(states.float().mean(1), f"states of layer {layer}") for layer, states in out.hidden_states.items()}

    def embedding(self, shown: list[str] | Tensor) -> np.ndarray | None:
        if self.teacher is None:
            return None
        out = self.teacher.embed_text(shown) if isinstance(shown, list) else self.teacher.embed_image(shown)
        if tuple(out.shape) != (len(shown), self.teacher.dim):
            raise ValueError(f"the teacher gave {tuple(out.shape)}; expected {(len(shown), self.teacher.dim)}, one row each")
        return _finite(out, "the teacher's embeddings")

    def next(self, shown: list[str] | Tensor, key: str) -> list[str] | Tensor:
        """One half-step: texts are drawn, images are read."""
        options = {"decoding": self.decoding, "generator": torch.Generator().manual_seed(zlib.crc32(key.encode()))}
        n = len(shown)
        if not isinstance(shown, list):
            words = [str(text) for text in self.reader.understand(shown, **options)]
            if len(words) != n:
                raise ValueError(f"the reader gave {len(words)} texts for {n} images; expected one each")
            return words
        drawn = self.writer.generate(shown, **options).detach().to("cpu", torch.float32)
        if len(drawn) != n:
            raise ValueError(f"the writer gave {len(drawn)} images for {n} texts; expected one each")
        return check_images(drawn)

    def run(
        self, data: Any, cycles: int, start: str, seed: int, batch_size: int, keep: int = 0, tick: Callable = lambda n: None
    ) -> Trace:
        """Take all items through the cycles, one batch in memory at a time. ``tick`` is told how many half-steps are done.

        Noise is drawn per batch, from (seed, first id of the batch, step): results depend on the seed and on ``batch_size``.
        """
        kinds = [STARTS[(STARTS.index(start) + step) % 2] for step in range(2 * cycles + 1)]
        trace, latents, embedded = Trace(kinds, contents=[[] for _ in kinds]), {}, []  # type: ignore[var-annotated]
        for origin in batches(data, batch_size, start):
            shown: list[str] | Tensor = origin["texts"] if start == "text" else origin["images"]
            of_layer, of_teacher = [], []
            for step in range(2 * cycles + 1):
                if step:
                    shown = self.next(shown, f"{seed} {origin['ids'][0]} {step}")
                trace.contents[step] += self.content(shown)
                of_layer.append(self.latents(shown, origin))
                of_teacher.append(self.embedding(shown))
                if isinstance(shown, list):
                    trace.texts.setdefault(step, []).extend(shown)
                elif (room := keep - len(trace.contents[step]) + len(shown)) > 0:
                    pictures = shown[:room].clone()
                    trace.images[step] = torch.cat([trace.images[step], pictures]) if step in trace.images else pictures
                tick(len(shown))
            for layer in of_layer[0]:
                latents.setdefault(layer, []).append(np.stack([states[layer] for states in of_layer]))
            embedded += [np.stack(of_teacher)] if self.teacher is not None else []  # type: ignore[arg-type]
        trace.latents = {layer: np.concatenate(parts, 1) for layer, parts in latents.items()}
        trace.teacher = np.concatenate(embedded, 1) if embedded else None
        return trace


def around(
    model: Any, first: str | Tensor, cycles: int = 4, seed: int = 0, decoding: Decoding = Decoding()
) -> list[str | Tensor]:
    """One text, or one picture [3, H, W], on its way around: steps 0 to 2 * cycles, texts and pictures [3, H, W] in turn.

    Raises:
        ValueError: an empty text, a picture that does not fit, cycles below 1.

    Example:
        >>> around(model, "a small red circle", cycles=2)[2]  # doctest: +SKIP
        'a small red circle'
    """
    if cycles < 1 or (isinstance(first, str) and not first.strip()):
        raise ValueError(f"{cycles=}, the text is {first!r}; expected at least one cycle, and words to start from")
    steps: list[str | Tensor] = [first]
    shown: list[str] | Tensor = [first] if isinstance(first, str) else check_images(first[None])
    go = Cycles(model, model, model, decoding=decoding)
    with evaluating(model), torch.no_grad():
        for step in range(1, 2 * cycles + 1):
            shown = go.next(shown, f"{seed} {step}")
            steps.append(shown[0])
    return steps


def batches(data: Any, batch_size: int, start: str) -> Iterator[dict[str, Any]]:
    """Checked batches (ids, texts, images) of a data set; captions may be missing unless they are where cycles start."""
    seen_ids: set[str] = set()
    for first in range(0, len(data), batch_size):
        items = items_of(data, range(first, min(first + batch_size, len(data))))
        ids = [str(item["id"]) for item in items]
        if repeated := sorted({i for i in ids if i in seen_ids or ids.count(i) > 1}):
            raise ValueError(f"ids repeat in the data set: {repeated[:3]}; items are told apart by id: make them unique")
        seen_ids |= set(ids)
        texts = [str(item.get("texts") or "") for item in items]
        if start == "text" and (bare := [i for i, text in zip(ids, texts, strict=True) if not text.strip()]):
            raise ValueError(f"{len(bare)} items have no caption, such as {bare[0]!r}; start='text' needs one each (or 'image')")
        yield {"ids": ids, "texts": texts, "images": check_images(torch.stack([item["images"] for item in items]))}


def origins(data: Shapes, start: str) -> list[Content]:
    """What each caption says, or what each scene shows (without its places)."""
    rows = range(len(data))
    if start == "text":
        told = [content for item in data if (content := said(item["texts"]))]
        assert len(told) == len(data), "captions of scenes always parse"
        return told
    scenes = data.scenes(rows)
    return [content for i in rows if (content := seen(scenes.objects(i), placed=False))]


def ceilings_of(model: Any, data: Shapes, oracle: Oracle, table: FactTable, batch_size: int, start: str) -> dict[str, np.ndarray]:
    """Which facts the oracle reads in the true images, and in their round trips through the model's image tokenizer."""
    tokenizer = getattr(model, "image_tokenizer", None)
    names = ["true images", "round trips"] if tokenizer is not None else ["true images"]
    shown: dict[str, list[Content | None]] = {name: [] for name in names}
    for batch in batches(data, batch_size, start):
        shown["true images"] += [seen(r.objects) for r in oracle.read(batch["images"])]
        if tokenizer is not None:
            again = tokenizer.reconstruct(batch["images"].to(getattr(model, "device", "cpu"))).float().cpu()
            shown["round trips"] += [seen(r.objects) for r in oracle.read(again)]
    return {name: (table.status(states) == KEPT).astype(float) for name, states in shown.items()}


def choose_layers(model: Any, layers: Sequence[int] | None) -> list[int]:
    """The layers whose latents are kept: by default the middle one and the last; none for a model without flows."""
    if not hasattr(model, "understanding_flow") or not hasattr(model, "num_layers"):
        if layers:
            raise ValueError(f"layers={list(layers)}, but {type(model).__name__} has no flows to take states from; use layers=()")
        return []
    return as_layers([model.num_layers // 2, model.num_layers] if layers is None else layers, model.num_layers)


def bar(total: int, label: str, progress: bool) -> tqdm:
    """A progress bar of half-steps, once it has taken two seconds."""
    return tqdm(total=total, desc=label, unit="step", delay=2, leave=False, disable=not progress)


def _finite(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    array = torch.as_tensor(values).detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold {int((~np.isfinite(array)).sum())} NaN or infinite numbers; expected finite ones")
    return array
