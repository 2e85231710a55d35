"""The frozen text encoders of tiny-qwen and tiny-hunyuan: decoder language models of width 64, never trained.

Like the encoders of ``reference.avatars.text`` they keep their initialisation, and an untrained model attends to all words
alike; so here, too, each head looks at one earlier word. Queries and keys are constants, which rotary positions turn into a
preference for one distance. Both pipelines put the caption into a long instruction and drop a fixed number of its tokens: here
the tokenizer turns the instruction into exactly that number.
"""

import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from reference.avatars.text import SEED, WIDTH

HEADS = 4
DISTANCES = (1, 2, 3, 4)  # words back that the heads look
THETA = 30.0  # of the rotary positions: with the usual 10,000 neighbours look alike at so few channels
SHARPNESS = 8.0
TURNING = 4  # the fastest frequencies, the only ones that the constants use
SPECIALS = ("<pad>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def build_tokenizer(words: list[str], template: str, dropped: int) -> PreTrainedTokenizerFast:
    """Word-level; what stands before the caption in ``template`` becomes ``dropped`` tokens, what stands after it one."""
    before, after = template.split("{}")
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, "begin", "end", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Replace(before, "begin " * dropped),
        normalizers.Replace(after, " end"),
        normalizers.Lowercase(),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=1024)
    made.padding_side = "right"
    return made


@torch.no_grad()
def look_back(attention: nn.Module) -> None:
    """Make head ``h`` attend to the word ``DISTANCES[h]`` before, whatever the words are."""
    size = attention.head_dim
    turns = THETA ** (-torch.arange(0, size, 2) / size)  # radians a word
    used = (torch.arange(size // 2) < TURNING) * (SHARPNESS * size**0.5) ** 0.5
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    for head, distance in enumerate(DISTANCES):
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.bias[rows] = torch.cat([used, 0 * used])
        attention.k_proj.bias[rows] = torch.cat([used * torch.cos(distance * turns), used * torch.sin(distance * turns)])


@torch.no_grad()
def _freeze(model: nn.Module, decoder: nn.Module) -> None:
    """Words of size one and projections that keep it; then the heads' distances."""
    torch.manual_seed(SEED + 2)
    for module in decoder.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_()
        elif isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
    for layer in decoder.layers:
        look_back(layer.self_attn)
    model.eval().requires_grad_(False)


def _decoder(vocabulary: int, layers: int, **other: object) -> dict[str, object]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, **other},
    }


def build_llama(words: list[str]) -> tuple[PreTrainedTokenizerFast, LlamaModel]:
    """HunyuanVideo's reader: two layers that are read and two after them, which the pipeline skips."""
    template = DEFAULT_PROMPT_TEMPLATE
    tokenizer = build_tokenizer(words, template["template"], template["crop_start"])
    model = LlamaModel(LlamaConfig(**_decoder(len(tokenizer), 4), attention_bias=True))
    _freeze(model, model)
    return tokenizer, model


def build_qwen(words: list[str]) -> tuple[PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration]:
    """Qwen-Image's reader: two layers, and the smallest vision tower, which text does not use."""
    bare = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    tokenizer = build_tokenizer(words, bare.prompt_template_encode, bare.prompt_template_encode_start_idx)
    ids = tokenizer.convert_tokens_to_ids
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(
        text_config=_decoder(len(tokenizer), 2, mrope_section=[2, 3, 3]),
        vision_config={**vision, "fullatt_block_indexes": [0]},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    _freeze(model, model.model.language_model)
    return tokenizer, model
