"""Small pipelines of every family that cachec is to compile: real classes of diffusers, random weights, made in under a second.

``FAMILIES`` lists them. Every parameter is random, also those that a fresh model has at zero or one, so that nothing is right
by accident. Widths are tiny; there are at least two blocks of each kind. Schedulers are of the published models' classes, sizes
as small as the pipelines take them. One tokenizer serves all: a byte-level BPE that has seen the prompt templates, so that they
take about as many tokens as in the published models (the pipelines cut them off by number).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.flux2 import system_messages
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

if not hasattr(pipeline_wan_i2v, "ftfy"):  # it mends prompts, and only this pipeline does not do without
    pipeline_wan_i2v.ftfy = SimpleNamespace(fix_text=str)

STEPS = 3
WIDTH = 32  # of every text encoder, and of every transformer's stream: two heads of sixteen
HEADS, HEAD = 2, 16
AXES = (4, 6, 6)  # of rotary positions; they add up to the head
PROMPT, NEGATIVE = 'a large blue ring that says "left of it" above a small red cross', "blurred"
CLIP_TOKENS = 77
IMAGE = {"height": 32, "width": 48}
VIDEO = {"height": 32, "width": 48, "num_frames": 5}
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SPECIAL += ("<|video_pad|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A small pipeline.

    ``call``: keywords of a run. ``stand_ins``: what loading a saved directory is handed besides. ``missing``: what is not as in
    the published model, beyond size, and why.
    """

    name: str
    pipeline: str
    make: Callable[[], diffusers.DiffusionPipeline]
    call: Mapping[str, Any]
    output: str = "images"
    transformers: tuple[str, ...] = ("transformer",)
    stand_ins: Callable[[Path], dict[str, Any]] = field(default=lambda directory: {})
    missing: str = ""

    def load(self, directory: Path) -> diffusers.DiffusionPipeline:
        """The pipeline as its users load it."""
        kind = getattr(diffusers, self.pipeline)
        pipeline = kind.from_pretrained(directory, local_files_only=True, **self.stand_ins(directory))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(self, pipeline: diffusers.DiffusionPipeline, **changes: Any) -> torch.Tensor:
        """Latents of a run; DiT's pipeline gives pictures only."""
        changes.setdefault("generator", torch.Generator().manual_seed(0))
        return torch.as_tensor(getattr(pipeline(**{**self.call, **changes}), self.output))


# --- weights


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values of a size at which activations neither vanish nor grow; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.7 / parameter[0].numel() ** 0.5)
            else:  # the scale of a norm is one in a fresh model, a bias is not
                parameter.copy_(0.1 * noise + (1.0 if torch.all(parameter == 1) else 0.0))
    return module.eval()


def assemble(kind: type, **parts: Any) -> diffusers.DiffusionPipeline:
    """A pipeline of its parts, each of which gets its own random weights."""
    for seed, part in enumerate(parts.values()):
        if isinstance(part, nn.Module):
            randomise(part, seed)
    return kind(**parts)


# --- tokenizers and text encoders


@cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    seen = [pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE["template"], system_messages.SYSTEM_MESSAGE, PROMPT, NEGATIVE]
    seen += [inspect.getsource(getattr(diffusers, name).__init__) for name in ("QwenImagePipeline", "QwenImageEditPipeline")]
    seen += [inspect.getsource(diffusers.HunyuanVideo15Pipeline.__init__)]
    tokenizer.train_from_iterator(seen, trainer)
    return tokenizer.to_str()


def make_tokenizer(max_length: int = 512, *, ends: bool = False) -> transformers.PreTrainedTokenizerBase:
    """``ends``: every text ends with ``</s>``, as CLIP and T5 have it."""
    tokenizer = Tokenizer.from_str(_bpe())
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=max_length
    )
    made.chat_template = CHAT
    made.padding_side = "right"
    return made


def _text(layers: int = 2) -> dict[str, Any]:
    vocabulary = make_tokenizer()
    return {
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "pad_token_id": vocabulary.pad_token_id,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
    }


def _clip(kind: type = transformers.CLIPTextModel) -> Any:
    config = transformers.CLIPTextConfig(**_text(), max_position_embeddings=CLIP_TOKENS, projection_dim=WIDTH)
    return kind(config)


def _t5(kind: str = "T5", width: int = WIDTH, tokens: int | None = None) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tokens or len(make_tokenizer()),
        d_model=width,
        d_kv=HEAD,
        d_ff=2 * width,
        num_layers=2,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _rotary(layers: int = 3) -> dict[str, Any]:
    return {**_text(layers), "num_key_value_heads": 1, "head_dim": HEAD}


def _qwen_vl_text(layers: int = 3) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    return {**_text(layers), "num_key_value_heads": 1, "rope_parameters": rope}


def _qwen_vl() -> Any:
    ids = make_tokenizer().convert_tokens_to_ids
    vision = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": HEADS, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_qwen_vl_text(),
        vision_config={**vision, "fullatt_block_indexes": [1]},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


# --- autoencoders


def _vae(latents: int = 16, kind: type = diffusers.AutoencoderKL, **other: Any) -> Any:
    levels = 4
    return kind(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latents,
        layers_per_block=1,
        norm_num_groups=2,
        **other,
    )


def _video_vae(kind: type, levels: int = 4) -> Any:
    halves_time = [False, *[True] * (levels - 2)]
    return kind(base_dim=4, z_dim=16, dim_mult=[1] * levels, num_res_blocks=0, temperal_downsample=halves_time)


def _flow(**other: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**other)


# --- families


def _flux(kind: type = diffusers.FluxPipeline, *, guidance: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=AXES,
    )
    return assemble(
        kind,
        transformer=transformer,
        scheduler=_flow(use_dynamic_shifting=True, shift=3.0) if guidance else _flow(),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
        text_encoder=_clip(),
        tokenizer=make_tokenizer(CLIP_TOKENS, ends=True),
        text_encoder_2=_t5(),
        tokenizer_2=make_tokenizer(ends=True),
    )


def _qwen_image(*, edit: bool = False) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS, joint_attention_dim=WIDTH, axes_dims_rope=AXES
    )
    return assemble(
        diffusers.QwenImageEditPipeline if edit else diffusers.QwenImagePipeline,
        transformer=transformer,
        scheduler=_flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        vae=_video_vae(diffusers.AutoencoderKLQwenImage, 6 if edit else 4),
        text_encoder=_qwen_vl(),
        tokenizer=make_tokenizer(1024),
        **({"processor": None} if edit else {}),
    )


class QwenProcessor:
    """Stands in for ``Qwen2VLProcessor``, which needs torchvision: the image processor in its PIL form, and the tokenizer."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> transformers.BatchFeature:
        seen = self.images(images, return_tensors=return_tensors)
        patches = int(seen["image_grid_thw"][0].prod()) // self.images.merge_size**2
        full = [prompt.replace("<|image_pad|>", "<|image_pad|>" * patches) for prompt in text]
        read = self.tokenizer(full, padding=padding, return_tensors=return_tensors)
        return transformers.BatchFeature({**seen, **read})


def _qwen_stand_in(directory: Path) -> dict[str, Any]:
    return {"processor": QwenProcessor(transformers.AutoTokenizer.from_pretrained(directory / "tokenizer"))}


def _hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        num_layers=2,
        num_single_layers=2,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=AXES,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)
    return assemble(
        diffusers.HunyuanVideoPipeline,
        transformer=transformer,
        scheduler=_flow(shift=7.0),
        vae=vae,
        text_encoder=transformers.LlamaModel(transformers.LlamaConfig(**_rotary(4))),
        tokenizer=make_tokenizer(),
        text_encoder_2=_clip(),
        tokenizer_2=make_tokenizer(CLIP_TOKENS, ends=True),
    )


def _hunyuan_video_15() -> Any:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=65,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        num_layers=2,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=AXES,
        task_type="t2v",
    )
    text_config = transformers.Qwen2_5_VLTextConfig(**_qwen_vl_text(4))
    return assemble(
        diffusers.HunyuanVideo15Pipeline,
        transformer=transformer,
        scheduler=_flow(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(32,) * 5, layers_per_block=1),
        text_encoder=transformers.models.qwen2_5_vl.Qwen2_5_VLTextModel(text_config),
        tokenizer=make_tokenizer(2048),
        text_encoder_2=_t5(tokens=384),
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def _wan_transformer(channels: int = 16, reference: int = 0, **other: Any) -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        in_channels=channels + reference,
        out_channels=channels,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=2 * WIDTH,
        num_layers=2,
        **other,
    )


def _wan_scheduler() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _wan_image() -> Any:
    """Picture to video, which CLIP sees, too."""
    seen = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return assemble(
        diffusers.WanImageToVideoPipeline,
        transformer=_wan_transformer(reference=20, image_dim=WIDTH, added_kv_proj_dim=HEADS * HEAD),
        scheduler=_wan_scheduler(),
        vae=_video_vae(diffusers.AutoencoderKLWan),
        text_encoder=_t5("UMT5"),
        tokenizer=make_tokenizer(ends=True),
        image_encoder=transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**seen, image_size=28, patch_size=14)),
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    )


def _wan_5b_vae() -> Any:
    """Sixteenfold: of patches of two by two pixels."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


def _wan(*, experts: int = 1, told_by_token: bool = False) -> Any:
    second = {"transformer_2": _wan_transformer(), "boundary_ratio": 0.875} if experts == 2 else {}
    return assemble(
        diffusers.WanPipeline,
        transformer=_wan_transformer(48 if told_by_token else 16),
        scheduler=_wan_scheduler(),
        vae=_wan_5b_vae() if told_by_token else _video_vae(diffusers.AutoencoderKLWan),
        text_encoder=_t5("UMT5"),
        tokenizer=make_tokenizer(ends=True),
        expand_timesteps=told_by_token,
        **second,
    )


def _sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        num_layers=4,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    encoders = (_clip(transformers.CLIPTextModelWithProjection) for _ in range(2))
    return assemble(
        diffusers.StableDiffusion3Pipeline,
        transformer=transformer,
        scheduler=_flow(shift=3.0),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        text_encoder=next(encoders),
        text_encoder_2=next(encoders),
        text_encoder_3=_t5(width=2 * WIDTH),
        **{f"tokenizer{part}": make_tokenizer(CLIP_TOKENS, ends=True) for part in ("", "_2", "_3")},
    )


def _pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        num_layers=2,
        cross_attention_dim=HEADS * HEAD,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return assemble(
        diffusers.PixArtSigmaPipeline,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=_vae(4),
        text_encoder=_t5(),
        tokenizer=make_tokenizer(ends=True),
    )


def _dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, out_channels=8, num_layers=2, sample_size=8
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return assemble(diffusers.DiTPipeline, transformer=transformer, scheduler=scheduler, vae=_vae(4))


def _flux2(*, klein: bool = False) -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    if klein:
        encoder = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**_rotary(28))
        )  # the pipeline takes states of layer 27
    else:
        vision = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
        config = transformers.Mistral3Config(
            text_config={"model_type": "mistral", **_rotary(31)},  # it takes states of layer 30
            vision_config={"model_type": "pixtral", **vision, "head_dim": HEAD, "image_size": 28, "patch_size": 14},
            image_token_index=make_tokenizer().convert_tokens_to_ids("<|image_pad|>"),
        )
        encoder = transformers.Mistral3ForConditionalGeneration(config)
    return assemble(
        diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline,
        transformer=transformer,
        scheduler=_flow(use_dynamic_shifting=True, shift=3.0),
        vae=_vae(32, diffusers.AutoencoderKLFlux2),
        text_encoder=encoder,
        tokenizer=make_tokenizer(),
    )


def _z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        dim=HEADS * HEAD,
        n_layers=2,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=WIDTH,
        axes_dims=list(AXES),
        axes_lens=[128, 32, 32],
    )
    return assemble(
        diffusers.ZImagePipeline,
        transformer=transformer,
        scheduler=_flow(shift=3.0),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**_rotary())),
        tokenizer=make_tokenizer(),
    )


def _auraflow() -> Any:
    sizes = {"attention_head_dim": HEAD, "num_attention_heads": HEADS, "caption_projection_dim": HEADS * HEAD}
    sizes |= {"sample_size": 16, "joint_attention_dim": WIDTH, "pos_embed_max_size": 64}
    return assemble(
        diffusers.AuraFlowPipeline,
        transformer=diffusers.AuraFlowTransformer2DModel(**sizes, num_mmdit_layers=2, num_single_dit_layers=2),
        scheduler=_flow(shift=1.73),
        vae=_vae(4),
        text_encoder=_t5("UMT5"),
        tokenizer=make_tokenizer(ends=True),
    )


def _call(**other: Any) -> Mapping[str, Any]:
    return MappingProxyType({"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent"} | other)


_PICTURE = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
_SHORT = {"max_sequence_length": 24}
_GUIDED = {"negative_prompt": NEGATIVE}

FAMILIES = (
    Family("flux", "FluxPipeline", _flux, _call(**IMAGE, **_SHORT)),
    Family("flux-schnell", "FluxPipeline", lambda: _flux(guidance=False), _call(**IMAGE, **_SHORT, guidance_scale=0.0)),
    Family(
        "flux-kontext",
        "FluxKontextPipeline",
        lambda: _flux(diffusers.FluxKontextPipeline),
        _call(**IMAGE, **_SHORT, image=_PICTURE, max_area=32 * 48, _auto_resize=False),
    ),
    Family("qwen-image", "QwenImagePipeline", _qwen_image, _call(**IMAGE, **_GUIDED)),
    Family(
        "qwen-image-edit",
        "QwenImageEditPipeline",
        lambda: _qwen_image(edit=True),
        _call(height=128, width=192, image=_PICTURE, **_GUIDED, num_inference_steps=2),
        stand_ins=_qwen_stand_in,
        missing="Qwen2VLProcessor needs torchvision: the directory has none, loading is handed a stand-in of PIL processor and "
        "tokenizer. The autoencoder shrinks 32-fold, not 8-fold: the pipeline scales every picture to a million pixels.",
    ),
    Family("hunyuan-video", "HunyuanVideoPipeline", _hunyuan_video, _call(**VIDEO, **_SHORT), output="frames"),
    Family(
        "hunyuan-video-1.5",
        "HunyuanVideo15Pipeline",
        _hunyuan_video_15,
        _call(**VIDEO, **_GUIDED, num_inference_steps=2),
        output="frames",
    ),
    Family("wan-2.1", "WanPipeline", _wan, _call(**VIDEO, **_SHORT, **_GUIDED), output="frames"),
    Family(
        "wan-2.2",
        "WanPipeline",
        lambda: _wan(experts=2),
        _call(**VIDEO, **_SHORT, **_GUIDED),
        output="frames",
        transformers=("transformer", "transformer_2"),
    ),
    Family(
        "wan-2.2-5b",
        "WanPipeline",
        lambda: _wan(told_by_token=True),
        _call(height=64, width=96, num_frames=5, **_SHORT, **_GUIDED),
        output="frames",
    ),
    Family(
        "wan-i2v",
        "WanImageToVideoPipeline",
        _wan_image,
        _call(**VIDEO, image=_PICTURE, **_GUIDED),
        output="frames",
        missing="Where ftfy is not installed, which mends prompts, a stand-in leaves them as they are.",
    ),
    Family("sd3", "StableDiffusion3Pipeline", _sd3, _call(**IMAGE, **_SHORT, **_GUIDED)),
    Family(
        "pixart-sigma",
        "PixArtSigmaPipeline",
        _pixart,
        _call(**IMAGE, **_SHORT, **_GUIDED, clean_caption=False, use_resolution_binning=False),
    ),
    Family(
        "dit",
        "DiTPipeline",
        _dit,
        MappingProxyType({"class_labels": [7], "num_inference_steps": STEPS, "output_type": "np"}),
        missing="The pipeline gives no latents, only pictures.",
    ),
    Family(
        "flux-2",
        "Flux2Pipeline",
        _flux2,
        _call(**IMAGE, max_sequence_length=96),
        missing="PixtralProcessor needs torchvision: a tokenizer with a chat template stands in, so there is no picture input.",
    ),
    Family("flux-2-klein", "Flux2KleinPipeline", lambda: _flux2(klein=True), _call(**IMAGE, max_sequence_length=48)),
    Family("auraflow", "AuraFlowPipeline", _auraflow, _call(**IMAGE, **_SHORT, **_GUIDED)),  # from outside
    Family("z-image", "ZImagePipeline", _z_image, _call(**IMAGE, max_sequence_length=48, **_GUIDED)),
)
