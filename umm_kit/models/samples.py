"""Small random models of the *real* classes of transformers, to walk a path on before the weights of a real checkpoint are there.

They have half a million parameters, a word-level tokenizer over the language of scenes, and know nothing: what they say and draw
is noise. Everything else is as in a checkpoint of the class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from umm_kit.data.language import vocabulary_corpus
from umm_kit.models.pretrained import Emu3UMM, JanusUMM, LiquidUMM, PretrainedUMM

CODES = 64
_NAMES: dict[str, dict[str, str]] = {
    "janus": {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_placeholder>"},
    "emu3": {
        "boi_token": "<|image start|>", "eoi_token": "<|image end|>", "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>", "image_token": "<image>",
    },
    "liquid": {},
}  # fmt: skip
_MORE = {
    "emu3": ["<|extra_200|>", *(f"<|visual token {k:06d}|>" for k in range(CODES))],
    "liquid": ["<boi>", "<eoi>", "<unconditional>", "<start_of_turn>", "<end_of_turn>"],
}
_FRAME = "Generate an image based on this description user model You are a helpful assistant . USER : ASSISTANT User Assistant"
_FRAME += " Describe this image in detail < | > : 4 * 8"
_SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def random_model(kind: str, seed: int = 0) -> PretrainedUMM:
    """An untrained model of the real class, for 32 x 32 pixels.

    Args:
        kind: "janus", "emu3" or "liquid".
    Raises:
        ValueError: another kind.

    Example:
        >>> model = random_model("janus")
        >>> type(model.model).__name__, model.num_layers, model.grid
        ('JanusForConditionalGeneration', 4, (4, 4))
    """
    makers = {"janus": _janus, "emu3": _emu3, "liquid": _liquid}
    if kind not in makers:
        raise ValueError(f"no sample of {kind!r}; there are {list(makers)}")
    tokenizer = word_tokenizer(kind)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return makers[kind](tokenizer, ids).eval()


def word_tokenizer(kind: str) -> Any:
    """A word-level tokenizer with the special tokens that the family places images by."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<bos>", "<eos>", *_NAMES[kind].values(), *_MORE.get(kind, [])]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([*vocabulary_corpus(), _FRAME], trainers.WordLevelTrainer(special_tokens=special))
    named = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=_NAMES[kind], **named)


def _janus(tokenizer: Any, ids: dict[str, int]) -> JanusUMM:
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=64,
        num_image_tokens=16, mlp_ratio=2.0,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=CODES, latent_channels=16, base_channels=32, channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1, projection_dim=64, image_token_embed_dim=64,
    )  # fmt: skip
    parts: dict[str, Any] = dict(text_config=LlamaConfig(**_SIZES, **ids), vision_config=vision, vq_config=vq)
    placeholder = tokenizer.convert_tokens_to_ids("<image_placeholder>")
    config = JanusConfig(**{name: part.to_dict() for name, part in parts.items()}, image_token_id=placeholder)
    model = JanusForConditionalGeneration(config)
    with torch.no_grad():  # codes of many lengths, as the release has them
        model.model.vqmodel.quantize.embedding.weight.mul_(torch.linspace(0.2, 3, CODES)[:, None])
    return JanusUMM(model, tokenizer)


def _emu3(tokenizer: Any, ids: dict[str, int]) -> Emu3UMM:
    from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3TextConfig, Emu3VQVAEConfig

    vq = Emu3VQVAEConfig(
        codebook_size=CODES, base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1, attn_resolutions=[], hidden_size=32
    )
    mapping = {name: k for name, k in tokenizer.get_vocab().items() if name.startswith("<")}
    text = Emu3TextConfig(**_SIZES, **ids)
    model = Emu3ForConditionalGeneration(Emu3Config(vq_config=vq.to_dict(), text_config=text.to_dict(), vocabulary_map=mapping))
    nn.init.normal_(model.model.vqmodel.quantize.embedding.weight)
    return Emu3UMM(model, tokenizer, {"image_size": 32})


def _liquid(tokenizer: Any, ids: dict[str, int]) -> LiquidUMM:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, GemmaConfig, GemmaForCausalLM

    vq = ChameleonVQVAEConfig(
        embed_dim=8, num_embeddings=CODES, latent_channels=16, resolution=32, base_channels=32, channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
    )  # fmt: skip
    model = GemmaForCausalLM(GemmaConfig(**_SIZES, **{**ids, "vocab_size": len(tokenizer) + CODES}, head_dim=16))
    tower = ChameleonVQVAE(vq)
    with torch.no_grad():  # codes that latents of noise have, so that images differ in them
        z = tower.quant_conv(tower.encoder(torch.rand(1, 3, 32, 32) * 2 - 1)).flatten(2)[0].T
        tower.quantize.embedding.weight.copy_(z)
    return LiquidUMM(model, tokenizer, vq=tower)
