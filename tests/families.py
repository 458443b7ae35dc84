"""Small untrained models of every family, as the tests of one contract want them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    GemmaConfig,
    GemmaForCausalLM,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from umm_kit.data.language import vocabulary_corpus
from umm_kit.models.autoregressive import AutoregressiveUMM
from umm_kit.models.flowmatching import FlowUMM
from umm_kit.models.masked import MaskedUMM
from umm_kit.models.pretrained import Emu3UMM, JanusUMM, LiquidUMM

PRETRAINED = ("janus", "emu3", "liquid")
OWN = {"masked": MaskedUMM, "autoregressive": AutoregressiveUMM, "flow": FlowUMM}
FAMILIES = (*OWN, *PRETRAINED)

NAMES = {
    "janus": {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_placeholder>"},
    "emu3": {
        "boi_token": "<|image start|>", "eoi_token": "<|image end|>", "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>", "image_token": "<image>",
    },
    "liquid": {},
}  # fmt: skip
FRAME = "Generate an image based on this description user model You are a helpful assistant . USER : ASSISTANT User Assistant"
FRAME += " Describe this image in detail < | > : 4 * 8"


def words(kind):
    """A word-level tokenizer with the special tokens that the family places images by."""
    codes = [f"<|visual token {k:06d}|>" for k in range(64)]
    more = {
        "emu3": ["<|extra_200|>", *codes],
        "liquid": ["<boi>", "<eoi>", "<unconditional>", "<start_of_turn>", "<end_of_turn>"],
    }
    special = ["<pad>", "<unk>", "<bos>", "<eos>", *NAMES[kind].values(), *more.get(kind, [])]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([*vocabulary_corpus(), FRAME], trainers.WordLevelTrainer(special_tokens=special))
    named = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=NAMES[kind], **named)


def small(kind):
    """An untrained model; of the pretrained families one of the real class, of half a million parameters."""
    torch.manual_seed(0)
    if kind in OWN:
        return OWN[kind].tiny(list(vocabulary_corpus()))
    tokenizer = words(kind)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    if kind == "emu3":
        vq = Emu3VQVAEConfig(
            codebook_size=64,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            hidden_size=32,
        )
        mapping = {name: k for name, k in tokenizer.get_vocab().items() if name.startswith("<")}
        text = Emu3TextConfig(**sizes, **ids)
        config = Emu3Config(vq_config=vq.to_dict(), text_config=text.to_dict(), vocabulary_map=mapping)
        model = Emu3ForConditionalGeneration(config)
        nn.init.normal_(model.model.vqmodel.quantize.embedding.weight)
        return Emu3UMM(model, tokenizer, {"image_size": 32}).eval()
    if kind == "liquid":
        vq = ChameleonVQVAEConfig(
            embed_dim=8, num_embeddings=64, latent_channels=16, resolution=32, base_channels=32, channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
        )  # fmt: skip
        model = GemmaForCausalLM(GemmaConfig(**sizes, **{**ids, "vocab_size": len(tokenizer) + 64}, head_dim=16))
        tower = ChameleonVQVAE(vq)
        with torch.no_grad():  # codes that latents of noise have, so that images differ in them
            z = tower.quant_conv(tower.encoder(torch.rand(1, 3, 32, 32) * 2 - 1)).flatten(2)[0].T
            tower.quantize.embedding.weight.copy_(z)
        return LiquidUMM(model, tokenizer, vq=tower).eval()
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=64,
        num_image_tokens=16, mlp_ratio=2.0,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=64, latent_channels=16, base_channels=32, channel_multiplier=[1, 1, 1, 1], num_res_blocks=1,
        projection_dim=64, image_token_embed_dim=64,
    )  # fmt: skip
    parts = dict(text_config=LlamaConfig(**sizes, **ids), vision_config=vision, vq_config=vq)
    placeholder = tokenizer.convert_tokens_to_ids("<image_placeholder>")
    config = JanusConfig(**{name: part.to_dict() for name, part in parts.items()}, image_token_id=placeholder)
    model = JanusForConditionalGeneration(config)
    with torch.no_grad():  # codes of many lengths, as the release has them
        model.model.vqmodel.quantize.embedding.weight.mul_(torch.linspace(0.2, 3, 64)[:, None])
    return JanusUMM(model, tokenizer).eval()
