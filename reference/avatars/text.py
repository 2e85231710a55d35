"""The frozen text encoders of tiny-flux, of which tiny-hunyuan has one, and their tokenizers.

FLUX takes a pooled CLIP vector and a sequence of T5 states. Here both encoders are tiny and keep their random
initialisation: with a vocabulary of a few dozen words that already tells captions apart, and the transformer
learns to read them. The tokenizers are real ``tokenizers`` word-level tokenizers over the captions' words.
"""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WIDTH = 64
SEED = 20260101
# FLUX gives text tokens no positions of their own, so word order reaches the transformer through T5 only, and an untrained
# T5 attends to all words alike: "black hair in a red tee" would be a bag of words. So each head looks at one neighbour.
NEIGHBOURS = (1, 2, 17, 18)  # T5's buckets of the words one and two before, one and two after
SHARPNESS = 6.0


def build_tokenizer(words: list[str], *, bos: str | None, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer that ends every text with ``</s>`` (and begins it with ``bos``, if given)."""
    specials = ["<pad>", "<unk>", *([bos] if bos else []), "</s>"]
    vocab = {word: i for i, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{bos} $A </s>" if bos else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocab[token]) for token in specials if token in template.split()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token=bos,
        model_max_length=max_length,
    )


def build_clip(words: list[str], tokens: int) -> tuple[PreTrainedTokenizerFast, CLIPTextModel]:
    """CLIP text model (2 layers, width 64) and its tokenizer, which pads to ``tokens``."""
    tokenizer = build_tokenizer(words, bos="<s>", max_length=tokens)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # CLIP's own initialisation is made for 512 channels and up: at width 64 it would drown the words.
        initializer_range=0.2,
        initializer_factor=4.0,
    )
    torch.manual_seed(SEED)
    return tokenizer, CLIPTextModel(config).eval().requires_grad_(False)


def build_t5(words: list[str]) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """T5 encoder (2 layers, width 64) and its tokenizer."""
    tokenizer = build_tokenizer(words, bos=None, max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=False,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(SEED + 1)
    encoder = T5EncoderModel(config).eval().requires_grad_(False)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads], all layers'
    bias.zero_()
    for head, bucket in enumerate(NEIGHBOURS):
        bias[bucket, head] = SHARPNESS
    return tokenizer, encoder


@torch.no_grad()
def encode(captions: list[str], clip: tuple, t5: tuple, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode as ``FluxPipeline`` does. Returns T5 states [B, tokens, 64] and the pooled CLIP vector [B, 64]."""
    (clip_tokenizer, clip_model), (t5_tokenizer, t5_model) = clip, t5
    clip_ids = clip_tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    t5_ids = t5_tokenizer(captions, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt").input_ids
    return t5_model(t5_ids)[0], clip_model(clip_ids).pooler_output
