"""Stronger embedding models: what LatentUMM aligns to, and what drift can be measured by from outside.

A teacher puts texts and images into one space. Three kinds: any CLIP-like checkpoint of transformers; a small one that was
trained here (``load_teacher("tiny-teacher")``), or one of your own by ``umm-kit train teacher``; and vectors that were computed
elsewhere, kept by stable id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from umm_kit.models import CHECKPOINTS
from umm_kit.models.base import check_images, resolve_device

#: Mean and standard deviation of the pixels CLIP was trained on, for checkpoints that do not say theirs.
CLIP_PIXELS = ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))


@runtime_checkable
class Teacher(Protocol):
    """Texts and images in one space of ``dim`` numbers, as unit vectors [n, dim], float32 on the CPU."""

    dim: int

    def embed_text(self, texts: Sequence[str]) -> Tensor: ...

    def embed_image(self, images: Tensor) -> Tensor: ...


class CLIPTeacher:
    """A CLIP-like model of transformers: one that has ``get_text_features`` and ``get_image_features`` (CLIP, SigLIP, ...).

    A vision transformer alone (DINO, DINOv2, ViT) embeds images, by the last state of its class token, and refuses texts: enough
    to compare images by, not to train with. Images are resized to the model's size, without cropping: at the edge of a scene
    there may be an object.

    Args:
        model: the transformers model. tokenizer: its own. pixels: (mean, standard deviation) per channel it was trained with.
        batch_size: how many texts or images are embedded at once. size: of images, in pixels, if not that of the configuration.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pixels: tuple[Sequence[float], Sequence[float]] = CLIP_PIXELS,
        batch_size: int = 256,
        size: int | None = None,
    ):
        config: Any = getattr(model, "config", None)
        self.reads, vision = hasattr(model, "get_text_features"), getattr(config, "vision_config", config)
        if not hasattr(vision, "image_size") or self.reads != hasattr(model, "get_image_features"):
            raise ValueError(f"{type(model).__name__} is neither CLIP-like (get_text_features, get_image_features) nor a "
                             "vision transformer; expected one of them")  # fmt: skip
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.mean, self.spread = (torch.tensor(values).view(1, 3, 1, 1) for values in pixels)
        size = size or vision.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        text = config.text_config if self.reads else config
        self.max_text = text.max_position_embeddings if self.reads else 0
        self.dim = int(getattr(config, "projection_dim", None) or text.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """Unit vectors of texts; longer ones than the model takes are cut at its end."""
        if not self.reads:
            raise ValueError(f"{type(self.model).__name__} embeds images alone; expected a CLIP-like model to embed texts by")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts hold {sorted({type(text).__name__ for text in texts})}; expected strings")
        takes = [name for name in ("input_ids", "attention_mask") if name in self.tokenizer.model_input_names]
        padding = "attention_mask" in takes or "max_length"  # SigLIP has no mask: it was trained on texts of full length
        out = []
        for start in range(0, len(texts), self.batch_size):
            some = list(texts[start : start + self.batch_size])
            ids = self.tokenizer(some, padding=padding, truncation=True, max_length=self.max_text, return_tensors="pt")
            out.append(self._vectors(self.model.get_text_features(**{name: ids[name].to(self.device) for name in takes})))
        return torch.cat(out) if out else torch.zeros(0, self.dim)

    @torch.no_grad()
    def embed_image(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Unit vectors of images in [0, 1]."""
        check_images(images)
        parts = (images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size))
        see = (
            self.model.get_image_features if self.reads else lambda pixel_values: self.model(pixel_values).last_hidden_state[:, 0]
        )
        out = [self._vectors(see(pixel_values=self.pixels(part))) for part in parts]
        return torch.cat(out) if out else torch.zeros(0, self.dim)

    def pixels(self, images: Tensor) -> Tensor:
        """Images as the model takes them: its size and its normalisation, on its device."""
        if tuple(images.shape[-2:]) != self.image_size:
            images = nn.functional.interpolate(images.float(), self.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        return ((images - self.mean.to(images)) / self.spread.to(images)).to(self.device)

    @staticmethod
    def _vectors(found: Any) -> Tensor:
        found = getattr(found, "pooler_output", found)  # transformers 5 returns a whole output, earlier versions the vectors
        return nn.functional.normalize(found.float(), dim=1).cpu()

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights, tokenizer and how pixels are normalised, in one folder."""
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        values: dict[str, Any] = {"image_mean": self.mean.flatten().tolist(), "image_std": self.spread.flatten().tolist()}
        values |= {"crop_size": self.image_size[0]} if len(set(self.image_size)) == 1 else {}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(values) + "\n")

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "auto", download: bool = False, **options: Any) -> CLIPTeacher:
        """A folder, or the id of a model on the Hugging Face hub that is in the local cache, or is fetched if ``download``.

        Weights are read from safetensors alone, and no code that comes with a model is run.
        """
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import cached_file

        safe: dict[str, Any] = {"local_files_only": not download, "trust_remote_code": False}
        try:
            model = AutoModel.from_pretrained(name, use_safetensors=True, **safe)
            tokenizer = AutoTokenizer.from_pretrained(name, **safe) if hasattr(model, "get_text_features") else None
            about = cached_file(
                str(name), "preprocessor_config.json", local_files_only=not download, _raise_exceptions_for_missing_entries=False
            )
        except (OSError, SafetensorError) as error:
            why = "" if download or Path(name).is_dir() else "; to fetch it from the hub, pass download=True"
            raise ValueError(f"no teacher could be read from {str(name)!r}{why} ({str(error).splitlines()[0]})") from error
        values = json.loads(Path(about).read_text()) if about else {}
        pixels = tuple(values.get(key, default) for key, default in zip(("image_mean", "image_std"), CLIP_PIXELS, strict=True))
        size = values.get("crop_size")  # DINOv2 is used at 224, whatever its configuration says
        size = size.get("height") if isinstance(size, dict) else size
        return cls(model.to(resolve_device(device)), tokenizer, pixels, size=size, **options)  # type: ignore[arg-type]


def load_teacher(name: str | Path = "tiny-teacher", device: str = "auto", download: bool = False) -> CLIPTeacher:
    """The shipped teacher by its name, or the folder or hub id of a CLIP-like model (see ``CLIPTeacher.from_pretrained``).

    Example:
        >>> load_teacher("tiny-teacher", device="cpu").embed_text(["a red circle"]).shape
        torch.Size([1, 64])
    """
    shipped = CHECKPOINTS / str(name)
    return CLIPTeacher.from_pretrained(shipped if (shipped / "config.json").exists() else name, device, download)


class EmbeddingTable:
    """Vectors that were computed elsewhere (by a model behind an interface, say), looked up by the stable ids of the data.

    It is no :class:`Teacher`: it knows no other text or image than those it was made of. Trainers take either.

    Args:
        ids: [n] unique strings. text, image: [n, dim] each, finite; kept as unit vectors.
    Raises:
        ValueError: ids repeat, numbers of rows differ, widths differ, NaN, a vector of zeros.

    Example:
        >>> table = EmbeddingTable(["a", "b"], torch.eye(2), torch.eye(2))
        >>> table.of(["b"])[0]
        tensor([[0., 1.]])
    """

    def __init__(self, ids: Sequence[str], text: Float[Tensor, "n dim"], image: Float[Tensor, "n dim"]):
        ids = [str(i) for i in ids]
        if len(set(ids)) != len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})[:3]
            raise ValueError(f"{len(ids) - len(set(ids))} ids occur more than once, such as {twice}; expected each once")
        for name, vectors in (("text", text), ("image", image)):
            if vectors.ndim != 2 or len(vectors) != len(ids) or vectors.shape != text.shape:
                raise ValueError(f"{name} vectors are {tuple(vectors.shape)}; expected [{len(ids)}, {text.shape[-1]}]")
            if not bool(torch.isfinite(vectors).all()) or bool((vectors.norm(dim=1) == 0).any()):
                raise ValueError(f"{name} vectors hold NaN, infinity or rows of zeros; expected finite, with a direction")
        self.dim = text.shape[1]
        self._row = {k: row for row, k in enumerate(ids)}
        self.text, self.image = (nn.functional.normalize(v.float().cpu(), dim=1) for v in (text, image))

    def __len__(self) -> int:
        return len(self._row)

    def of(self, ids: Sequence[str]) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
        """Text and image vectors of these ids.

        Raises:
            ValueError: an id has no vector.
        """
        ids = [str(i) for i in ids]
        if missing := [i for i in ids if i not in self._row]:
            raise ValueError(f"{len(missing)} of {len(ids)} ids have no vector in this table, such as {missing[:3]}")
        rows = torch.tensor([self._row[i] for i in ids], dtype=torch.long)
        return self.text[rows], self.image[rows]

    def save(self, file: str | Path) -> None:
        """One safetensors file; the ids are in its header."""
        save_file({"text": self.text, "image": self.image}, file, {"ids": json.dumps(list(self._row))})

    @classmethod
    def load(cls, file: str | Path) -> EmbeddingTable:
        """What :meth:`save` wrote; or an Arrow, Feather or Parquet file with columns id, text and image (lists of numbers)."""
        file = Path(file)
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as content:
                    ids = json.loads((content.metadata() or {})["ids"])
                    text, image = content.get_tensor("text"), content.get_tensor("image")
            else:
                from pyarrow import OSFile, ipc, parquet

                with OSFile(str(file)) as source:
                    arrow = ipc.open_file if source.read(6) == b"ARROW1" else ipc.open_stream
                    source.seek(0)
                    found = parquet.read_table(source) if file.suffix == ".parquet" else arrow(source).read_all()
                rows = found.to_pydict()
                ids, text, image = rows["id"], torch.tensor(rows["text"]), torch.tensor(rows["image"])
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{file} holds no table of embeddings ({error}); expected ids, text and image vectors") from error
        return cls(ids, text, image)


def embeddings(teacher: Teacher | EmbeddingTable, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Text and image vectors [B, dim] of a batch, from a teacher or by its ids from a table."""
    if isinstance(teacher, EmbeddingTable):
        return teacher.of(batch["ids"])
    return teacher.embed_text(batch["texts"]), teacher.embed_image(batch["images"])


def retrieval(text: Float[Tensor, "n dim"], image: Float[Tensor, "n dim"], facts: Sequence[Any] | None = None) -> float:
    """R@1 both ways: share of texts whose nearest image, and of images whose nearest text, is their own, averaged.

    Args:
        facts: what each pair says; nearest ones that say the same are right too.
    Returns:
        In [0, 1], higher = better; chance is about 1 / n.
    """
    return float(retrieved(text, image, facts).mean())


def retrieved(text: Float[Tensor, "n dim"], image: Float[Tensor, "n dim"], facts: Sequence[Any] | None = None) -> Tensor:
    """[n], what each pair adds to :func:`retrieval`: 0, .5 (one way only) or 1."""
    names = {fact: k for k, fact in enumerate(dict.fromkeys(facts))} if facts is not None else {}
    own = torch.arange(len(text)) if facts is None else torch.tensor([names[fact] for fact in facts])
    scores = nn.functional.normalize(text, dim=1) @ nn.functional.normalize(image, dim=1).T
    return torch.stack([(own[s.argmax(1)] == own).float() for s in (scores, scores.T)]).mean(0)
