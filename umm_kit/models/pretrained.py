"""Real checkpoints through transformers: Janus and Janus-Pro, Emu3, Liquid; each says how the rows of a :class:`CausalUMM` look.

**Not yet run on the real weights by us**: what is tested are small random models of the same classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from umm_kit.models.base import check_loaded
from umm_kit.models.causal import SLOT, CausalUMM

INSTRUCTION = "Describe this image in detail."


class PretrainedUMM(CausalUMM):
    """A model of transformers with its tokenizer, kept in one folder as transformers keeps them.

    Args:
        model: of ``transformers_class``. words: its tokenizer, with the special tokens that the family needs.
        mean, std: how pixels are normalised, per channel.
    """

    transformers_class: str
    body_path: str  # of the language model within it
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __init__(self, model: Any, words: Any, pixels: dict[str, Any] | None = None):
        super().__init__()
        if type(model).__name__ != self.transformers_class:
            raise ValueError(f"{type(self).__name__} takes a {self.transformers_class}; a {type(model).__name__} came")
        self.model, self.words = model, words
        self.mean = tuple((pixels or {}).get("image_mean", self.mean))
        self.std = tuple((pixels or {}).get("image_std", self.std))
        self.pad = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id

    @property
    def body(self) -> Any:  # type: ignore[override]
        return self.model.get_submodule(self.body_path)

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        return self.body.embed_tokens

    @property
    def text_head(self) -> Any:  # type: ignore[override]
        return self.model.lm_head

    def special(self, name: str) -> int:
        """Id of a token by what the tokenizer calls it ("boi_token"), or as it is written ("<boi>").

        Raises:
            ValueError: the tokenizer has none.
        """
        token = getattr(self.words, name, None) or name
        found = self.words.convert_tokens_to_ids(token)
        if found is None or found == self.words.unk_token_id:
            raise ValueError(f"the tokenizer has no {name}; {type(self).__name__} needs it to place images by")
        return int(found)

    def codes_of(self, values: Tensor) -> Int[Tensor, "B N"]:
        """Codes of normalised images."""
        raise NotImplementedError

    def values_of(self, codes: Tensor) -> Float[Tensor, "B 3 H W"]:
        """Normalised images of codes."""
        raise NotImplementedError

    @property
    def beginning(self) -> list[int]:
        return [] if self.words.bos_token_id is None else [self.words.bos_token_id]

    def normalised(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Pixels in [0, 1] as the checkpoint takes them, by default in the precision of the backbone."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return ((images - mean) / std).to(dtype or self.dtype)

    def pixels(self, values: Tensor) -> Tensor:
        """Back from the checkpoint's values to [0, 1]."""
        mean, std = (torch.tensor(v, device=values.device)[:, None, None] for v in (self.mean, self.std))
        return (values.float() * std + mean).clamp(0, 1)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Weights (safetensors), configuration, tokenizer, and how pixels are normalised."""
        self.model.save_pretrained(folder, **kwargs)
        if kwargs.get("is_main_process", True):
            self.words.save_pretrained(folder)
            values = {"image_mean": list(self.mean), "image_std": list(self.std), "image_size": self.image_size}
            Path(folder, "preprocessor_config.json").write_text(json.dumps(values) + "\n")

    @classmethod
    def from_pretrained(cls, name: str | Path, download: bool = False, **options: Any) -> PretrainedUMM:
        """A folder, or a hub id that is in the local cache, or is fetched if ``download``; ``options`` (dtype, ...) go to
        transformers. Weights are read from safetensors alone, and no code that comes with a model is run."""
        import transformers
        from transformers.utils import cached_file

        safe: dict[str, Any] = {"local_files_only": not download, "trust_remote_code": False}
        kind = getattr(transformers, cls.transformers_class)
        asked = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = kind.from_pretrained(name, use_safetensors=True, **safe, **options, **asked)
        check_loaded(info, name)
        words = transformers.AutoTokenizer.from_pretrained(name, **safe)
        about = cached_file(
            str(name), "preprocessor_config.json", local_files_only=not download, _raise_exceptions_for_missing_entries=False
        )
        return cls(model, words, json.loads(Path(about).read_text()) if about else None, **cls._more(name))

    @classmethod
    def _more(cls, name: str | Path) -> dict[str, Any]:
        """What else a family has in its folder."""
        return {}


class Codes:
    """The image tokenizer of a checkpoint behind the interface of ours. Its weights are the model's own, so it is no module.

    Args:
        owner: the model. vq: the part of it that makes and reads codes.
    """

    def __init__(self, owner: PretrainedUMM, vq: nn.Module):
        self.owner, self.vq = owner, vq.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B N"]:
        return self.owner.codes_of(self.owner.normalised(images, next(self.vq.parameters()).dtype))

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B N"]) -> Float[Tensor, "B 3 H W"]:
        """In [0, 1]."""
        return self.owner.pixels(self.owner.values_of(codes))

    def reconstruct(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """decode(encode(images))."""
        return self.decode(self.encode(images))

    def requires_grad_(self, _: bool = True) -> Codes:
        """Frozen, whatever is asked."""
        self.vq.requires_grad_(False)
        return self

    def eval(self) -> Codes:
        self.vq.eval()
        return self


class JanusUMM(PretrainedUMM):
    """Janus and Janus-Pro: it sees by a vision tower of its own and draws by codes ("decoupled", as DIVA's introduction has it).

        <|User|>: Describe this image in detail.\\n [image] \\n\\n<|Assistant|>: caption        a question stands after the image
        <|User|>: caption\\n\\n<|Assistant|>: <begin_of_image> codes

    A hidden token is the padding word, which Janus itself puts in the place of a prompt that it shall not see.
    """

    transformers_class = "JanusForConditionalGeneration"
    body_path = "model.language_model"

    def __init__(self, model: Any, words: Any, pixels: dict[str, Any] | None = None):
        super().__init__(model, words, pixels)
        vision, side = model.config.vision_config, model.config.vq_config.num_patches
        self.image_size, self.grid = vision.image_size, (side, side)
        self.seen_grid = (vision.image_size // vision.patch_size,) * 2
        self.boi, self.eoi = self.special("boi_token"), self.special("eoi_token")
        self.image_tokenizer = Codes(self, model.model.vqmodel)

    def asked(self, prompt: str | None) -> list[int]:
        before = "<|User|>: " if prompt is not None else f"<|User|>: {INSTRUCTION}\n"
        after = "\n\n<|Assistant|>:" if prompt is None else f"\n{prompt}\n\n<|Assistant|>:"
        image = [self.boi, *[SLOT] * (self.seen_grid[0] * self.seen_grid[1]), self.eoi]
        return [*self.beginning, *self.spoken(before), *image, *self.spoken(after)]

    def told(self, text: str) -> list[int]:
        return [*self.beginning, *self.spoken(f"<|User|>: {text}\n\n<|Assistant|>:"), self.boi, *[SLOT] * self.num_image_tokens]

    def untold(self, text: str) -> list[int]:
        kept = (SLOT, self.boi, *self.beginning)
        return [word if word in kept else self.pad for word in self.told(text)]

    def see(self, images: Tensor, codes: Tensor | None) -> Tensor:
        return self.model.model.get_image_features(self.normalised(images)).pooler_output

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.model.prepare_embeddings_for_image_generation(codes)

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.model.model.generation_head(hidden)

    def codes_of(self, values: Tensor) -> Tensor:
        """transformers encodes with the codebook as it is and decodes with its vectors at unit length. This tokenizer was trained
        with unit vectors both ways, so its code is the one of largest cosine, and both directions agree."""
        vq = self.model.model.vqmodel
        z = vq.quant_conv(vq.encoder(values)).flatten(2).transpose(1, 2)
        return (z @ nn.functional.normalize(vq.quantize.embedding.weight, dim=1).T).argmax(-1)

    def values_of(self, codes: Tensor) -> Tensor:
        return self.model.model.vqmodel.decode(codes)


class OneVocabulary(PretrainedUMM):
    """Words and image codes in one vocabulary: it sees by the codes that it draws. ``code_words`` [K]: the word of each code."""

    code_words: Tensor

    def see(self, images: Tensor, codes: Tensor | None) -> Tensor:
        return self.embed_codes(self.image_tokenizer.encode(images) if codes is None else codes)

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.embedding(self.code_words[codes])

    def code_logits(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.text_head.weight[self.code_words])


class Emu3UMM(OneVocabulary):
    """Emu3.

        You are a helpful assistant. USER: Describe this image in detail. [image] ASSISTANT: caption     a question: after it
        caption [image]

    where [image] opens with its size in tokens, and every row of codes is closed by a word. A hidden token is the padding word.
    Images have one size (``image_size`` of preprocessor_config.json, or 512), where the checkpoint itself takes any.
    """

    transformers_class = "Emu3ForConditionalGeneration"
    body_path = "model.text_model"

    def __init__(self, model: Any, words: Any, pixels: dict[str, Any] | None = None):
        super().__init__(model, words, pixels)
        self.image_size = int((pixels or {}).get("image_size", 512))
        side = self.image_size // model.model.vqmodel.vision_spatial_factor
        self.grid = self.seen_grid = (side, side)
        mapping = model.vocabulary_mapping
        self.register_buffer("code_words", mapping.img2bpe_mapping_tensor.long(), persistent=False)
        opening = [self.special("boi_token"), *self.spoken(f"{side}*{side}"), self.special("image_wrapper_token")]
        self._image = opening + ([SLOT] * side + [int(mapping.eol_token_id)]) * side
        self._closing = [self.special("eof_token"), self.special("eoi_token")]
        self.image_tokenizer = Codes(self, model.model.vqmodel)

    def asked(self, prompt: str | None) -> list[int]:
        before = "You are a helpful assistant. USER: " + (f"{INSTRUCTION} " if prompt is None else "")
        after = " ASSISTANT:" if prompt is None else f"{prompt} ASSISTANT:"
        return [*self.beginning, *self.spoken(before), *self._image, *self._closing, *self.spoken(after)]

    def told(self, text: str) -> list[int]:
        return [*self.beginning, *self.spoken(text), *self._image]

    def untold(self, text: str) -> list[int]:
        return self.told("")

    def codes_of(self, values: Tensor) -> Tensor:
        sizes = [tuple(values.shape[-2:])] * len(values)
        return torch.stack(self.model.model.vqmodel.encode(values, sizes).image_tokens).flatten(1)

    def values_of(self, codes: Tensor) -> Tensor:
        return self.model.model.vqmodel.decode(codes.unflatten(1, self.grid))


class LiquidUMM(OneVocabulary):
    """Liquid: Gemma whose vocabulary goes on, after its words, with the codes of Chameleon's image tokenizer.

        <start_of_turn>user\n Describe this image in detail.\n [image] <end_of_turn>\n<start_of_turn>model\n caption
        caption Generate an image based on this description. <boi> codes

    A question stands after the image; a hidden token is the padding word. The checkpoint comes without its image tokenizer: save
    Chameleon's (``model.vqmodel`` of its ``ChameleonForConditionalGeneration``) to the folder ``image_tokenizer`` beside the
    weights. transformers has only its encoder, so that codes can be drawn and scored, and not be turned into pixels.
    """

    transformers_class = "GemmaForCausalLM"
    body_path = "model"

    def __init__(self, model: Any, words: Any, pixels: dict[str, Any] | None = None, vq: Any = None):
        super().__init__(model, words, pixels)
        if vq is None:
            raise ValueError("Liquid needs Chameleon's image tokenizer: save it to the folder image_tokenizer beside the weights")
        self.vq, self.image_size = vq, vq.config.resolution
        side = self.image_size // 2 ** (len(vq.config.channel_multiplier) - 1)
        self.grid = self.seen_grid = (side, side)
        codes = torch.arange(vq.config.num_embeddings) + len(words)
        if int(codes[-1]) >= model.config.vocab_size:
            raise ValueError(f"{len(words)} words and {len(codes)} codes do not fit a vocabulary of {model.config.vocab_size}")
        self.register_buffer("code_words", codes, persistent=False)
        self.boi, self.eoi, self.nothing = (self.special(token) for token in ("<boi>", "<eoi>", "<unconditional>"))
        self.image_tokenizer = Codes(self, vq)

    def asked(self, prompt: str | None) -> list[int]:
        before = "<start_of_turn>user\n" + (f"{INSTRUCTION}\n" if prompt is None else "")
        after = ("" if prompt is None else f"\n{prompt}") + "<end_of_turn>\n<start_of_turn>model\n"
        image = [self.boi, *[SLOT] * self.num_image_tokens, self.eoi]
        return [*self.beginning, *self.spoken(before), *image, *self.spoken(after)]

    def told(self, text: str) -> list[int]:
        said = self.spoken(f"{text} Generate an image based on this description.")
        return [*self.beginning, *said, self.boi, *[SLOT] * self.num_image_tokens]

    def untold(self, text: str) -> list[int]:
        return [*self.beginning, self.nothing, self.boi, *[SLOT] * self.num_image_tokens]

    def codes_of(self, values: Tensor) -> Tensor:
        return self.vq.encode(values).image_tokens.view(len(values), -1)

    def values_of(self, codes: Tensor) -> Tensor:
        raise NotImplementedError("LiquidUMM makes no pixels: transformers has no decoder for Chameleon's image tokenizer")

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)
        self.vq.save_pretrained(Path(folder, "image_tokenizer"), **kwargs)

    @classmethod
    def _more(cls, name: str | Path) -> dict[str, Any]:
        from transformers import ChameleonVQVAE

        beside = Path(name, "image_tokenizer")
        safe: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        return {"vq": ChameleonVQVAE.from_pretrained(beside, **safe) if beside.is_dir() else None}


def spread(model: Any, devices: Sequence[torch.device]) -> Any:
    """Move a model to a device; to several, its layers in equal runs, and all else to the first.

    A layer takes its inputs to its device, and gives its output back on theirs: whatever is computed around the layers, and every
    state that is read, is on the first device. Cached keys and values stay where they were made.
    """
    if len(devices) == 1:
        return model.to(devices[0])
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layers, model.body.layers = model.body.layers, nn.ModuleList()  # the whole may be too large for the first device
    for k, layer in enumerate(layers):
        hook = AlignDevicesHook(devices[k * len(devices) // len(layers)], io_same_device=True, skip_keys=["past_key_values"])
        add_hook_to_module(layer.to(hook.execution_device), hook)
    model.to(devices[0]).body.layers = layers
    return model


#: model_type of a checkpoint -> its class here
PRETRAINED: dict[str, type[PretrainedUMM]] = {"janus": JanusUMM, "emu3": Emu3UMM, "gemma": LiquidUMM}
