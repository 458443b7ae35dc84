"""Whose fault drift is: the reader's, the writer's or the tokenizer's; and the one cycle that other benchmarks measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from umm_kit.data.language import Parsed, caption, parse
from umm_kit.data.oracle import Oracle, holds
from umm_kit.data.shapes import CELLS, MAX_OBJECTS, WORDS, SceneObject, Scenes, Shapes, render, sample_nuisance
from umm_kit.evaluation.cycles import STARTS, Cycles, bar, batches
from umm_kit.evaluation.drift import drift
from umm_kit.evaluation.facts import shifts
from umm_kit.evaluation.survival import cosine, mean, survival
from umm_kit.models.base import Decoding, evaluating

_TRIES = 100  # places drawn at random until the relations hold


class PerfectReader:
    """Reads pictures of scenes by the oracle and says all of it, places included. What is unclear is left out.

    Example:
        >>> data = Shapes("test", n=2)
        >>> PerfectReader(data).understand(data.images([0])) == [data.caption(0, "placed")]
        True
    """

    def __init__(self, data: Shapes):
        self.oracle = Oracle(data.image_size, data.nuisance.jitter)

    def understand(self, images: Tensor, prompts: None = None, decoding: Any = None, generator: Any = None) -> list[str]:
        """Captions; empty where nothing is clear."""
        if prompts is not None:
            raise NotImplementedError("the perfect reader describes pictures and answers no questions")
        return [caption(reading.objects, "placed") if reading.objects else "" for reading in self.oracle.read(images)]


class PerfectWriter:
    """Draws what a text says with the renderer; what it leaves unsaid, and the background, are drawn at random.

    A text that cannot be read gives an empty picture; of more than four things the first four are drawn.

    Example:
        >>> writer, text = PerfectWriter(Shapes("test", n=2)), "a small red circle at the top"
        >>> PerfectReader(Shapes("test", n=2)).understand(writer.generate([text]))
        ['a small red circle at the top']
    """

    def __init__(self, data: Shapes):
        self.image_size, self.nuisance = data.image_size, data.nuisance

    def generate(
        self, texts: Sequence[str], images: None = None, mask: None = None, decoding: Any = None, generator: Any = None
    ) -> Tensor:
        """Pictures [n, 3, H, W]; all chance comes from the generator."""
        if images is not None or mask is not None:
            raise NotImplementedError("the perfect writer draws whole pictures and fills no holes")
        seed = int(torch.randint(2**31, (1,), generator=generator))
        rng, scenes = np.random.default_rng(seed), Scenes.blank(len(texts))
        told = {row: arrange(parsed, rng) for row, text in enumerate(texts) if (parsed := parse(text)).ok}
        if told:
            for factor, values in Scenes.of(list(told.values())).factors().items():
                getattr(scenes, factor)[list(told)] = values
        nuisance = sample_nuisance(self.nuisance, seed, np.arange(len(texts)))
        return torch.from_numpy(render(scenes, nuisance, self.image_size, self.nuisance.jitter))


def arrange(parsed: Parsed, rng: np.random.Generator) -> list[SceneObject]:
    """Objects of which a text is true, the rest of them at random; where its places cannot all hold, the last draw."""
    units = [p for p in parsed.phrases for _ in range(p.number)][:MAX_OBJECTS]
    objects: list[SceneObject] = []
    for _ in range(_TRIES):
        claimed = {p.cell for p in units}
        free = [str(cell) for cell in rng.permutation([c for c in CELLS if c not in claimed])]
        objects = []
        for p in units:
            place = p.cell if p.cell and p.cell not in {o.cell for o in objects} else free.pop()
            drawn = {name: getattr(p, name) or str(rng.choice(WORDS[name])) for name in ("shape", "colour", "size")}
            objects.append(SceneObject(place, **drawn))
        if holds(parsed, objects, counted=False):
            break
    return objects


class ThroughTokenizer:
    """A writer whose every picture goes through an image tokenizer: encoded, and decoded again."""

    def __init__(self, writer: Any, model: Any):
        self.writer, self.model = writer, model

    def generate(self, texts: Sequence[str], **options: Any) -> Tensor:
        drawn = self.writer.generate(texts, **options)
        return self.model.image_tokenizer.reconstruct(drawn.to(getattr(self.model, "device", "cpu"))).float().cpu()


class WithoutPixels:
    """A model that reads the codes of the pictures it drew last, and not what its tokenizer makes of their pixels.

    Other pictures it reads as ever. For models that draw codes (``generate_codes``), such as the masked family.
    """

    def __init__(self, model: Any):
        self.model, self.codes, self.drawn = model, torch.zeros(0), torch.zeros(0)

    def generate(self, texts: Sequence[str], **options: Any) -> Tensor:
        codes = torch.zeros(len(texts), self.model.num_image_tokens, dtype=torch.long, device=self.model.device)
        self.codes = self.model.generate_codes(texts, codes, torch.ones_like(codes, dtype=torch.bool), **options)
        self.drawn = self.model.image_tokenizer.decode(self.codes).float().cpu()
        return self.drawn

    def understand(self, images: Tensor, **options: Any) -> list[str]:
        return self.model.understand(images, codes=self.codes if torch.equal(images.cpu(), self.drawn) else None, **options)


def blame(
    model: Any,
    data: Shapes,
    cycles: int = 8,
    start: str = "text",
    other: Any = None,
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    decoding: Decoding = Decoding(),
    progress: bool = True,
) -> pd.DataFrame:
    """Mean survival with the reader, the writer or both exchanged: who forgets?

    The oracle stands in as a perfect reader (it says all that it sees, places included) and the renderer as a perfect writer;
    ``other`` is a second model. "oracle, tokenized" is a perfect writer whose pictures go through the model's image tokenizer:
    what is lost there between two perfect partners is the tokenizer's part. "model, on codes" reads the codes it drew
    (:class:`WithoutPixels`): what it gains is what the way through pixels costs the model itself.

    Returns:
        Columns reader, writer, mean_survival, low, high, gain over the model with itself (paired by item), gain_low, gain_high,
        n (items). All rows have the ceiling of ``model``: one without its tokenizer can exceed 1 by what the tokenizer loses.

    Raises:
        ValueError: data without known factors, and as :func:`drift`.

    Example:
        >>> blame(model, uk.Shapes("test", n=256))  # doctest: +SKIP
    """
    if not isinstance(data, Shapes):
        raise ValueError(f"data are {type(data).__name__}; the oracle reads and draws scenes of Shapes alone")
    readers, writers = {"model": model, "oracle": PerfectReader(data)}, {"model": model, "oracle": PerfectWriter(data)}
    if other is not None:
        readers["other"] = writers["other"] = other
    pairs = [(r, w) for r in readers for w in writers]
    if hasattr(model, "image_tokenizer"):
        writers["oracle, tokenized"] = ThroughTokenizer(writers["oracle"], model)
        pairs.append(("oracle", "oracle, tokenized"))
    if hasattr(model, "generate_codes"):
        on_codes = "model, on codes"
        readers[on_codes] = writers[on_codes] = WithoutPixels(model)
        pairs.append((on_codes, on_codes))
    common = (model, data, cycles, start, repeats, seed, batch_size, None, decoding, (), 0, progress)
    curves = [drift(*common, readers[r], writers[w]).survival() for r, w in pairs]
    rows = []
    for (r, w), found in zip(pairs, curves, strict=True):
        e, gain = found.mean(), found.over(curves[0])  # the model with itself comes first
        row = {"reader": r, "writer": w, "mean_survival": e.value, "low": e.low, "high": e.high}
        rows.append(row | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "n": e.n})
    return pd.DataFrame(rows)


def unified_bench(
    model: Any,
    data: Any,
    embed: Callable[[Tensor], Any],
    seed: int = 0,
    batch_size: int = 64,
    decoding: Decoding = Decoding(),
    progress: bool = True,
) -> pd.DataFrame:
    """One cycle image -> caption -> image: how like the origin the last image is to an embedding model of your choice.

    similarity = cos(e(I), e(I')), as UnifiedBench has it; here with the floor (other items' last images), the ceiling (the round
    trip of the origin through the model's image tokenizer; 1 without one) and survival = (similarity - floor) / (ceiling -
    floor). No pair is left out: an empty caption is drawn from, too, and counted in ``lost``.

    Args:
        data: any image-text data; captions are not used.
        embed: images [n, 3, H, W] -> vectors [n, dim], such as ``teacher.embed_image``.

    Returns:
        Columns metric, value, low, high, n; higher = nearer to the origin.

    Raises:
        ValueError: fewer than two items, NaN, another number of vectors than images, batch_size below 1.

    Example:
        >>> unified_bench(model, uk.ImageText("my_folder/"), clip.embed_image)  # doctest: +SKIP
    """
    if len(data) < 2 or batch_size < 1:
        raise ValueError(f"{len(data)} item(s), {batch_size=}; the floor compares items with others: expected at least 2 (and 1)")
    around, first = Cycles(model, model, model, decoding=decoding), STARTS[1]
    tokenizer, parts = getattr(model, "image_tokenizer", None), []
    with evaluating(model), torch.no_grad(), bar(len(data), "unified bench", progress) as done:
        for origin in batches(data, batch_size, first):
            key = f"{seed} {origin['ids'][0]}"
            texts = around.next(origin["images"], f"{key} 1")
            drawn = around.next(texts, f"{key} 2")
            again = origin["images"]
            if tokenizer is not None:
                again = tokenizer.reconstruct(again.to(getattr(model, "device", "cpu"))).float().cpu()
            vectors = [_vectors(embed, torch.as_tensor(shown)) for shown in (origin["images"], drawn, again)]
            parts.append((*vectors, np.array([not text.strip() for text in texts], dtype=np.float64)))
            done.update(len(texts))
    true, last, again, lost = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    values = {"similarity": cosine(true, last), "ceiling": cosine(true, again), "lost": lost}
    values["floor"] = np.mean([cosine(true, np.roll(last, s, 0)) for s in shifts(len(true))], axis=0)
    rows = [(metric, e.value, e.low, e.high, e.n) for metric, v in values.items() if (e := mean(v[None]))]
    if values["ceiling"].mean() - values["floor"].mean() > 1e-3:
        s = survival(values["similarity"][None, None], values["floor"][None, None], values["ceiling"])
        rows.append(("survival", float(s.value[0]), float(s.low[0]), float(s.high[0]), s.n))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "n"])


def _vectors(embed: Callable[[Tensor], Any], images: Tensor) -> np.ndarray:
    out = torch.as_tensor(embed(images)).detach().to("cpu", torch.float32).numpy()
    if out.ndim != 2 or len(out) != len(images) or not np.isfinite(out).all():
        raise ValueError(f"embed gave {out.shape} for {len(images)} images; expected one finite vector each, [n, dim]")
    return out
