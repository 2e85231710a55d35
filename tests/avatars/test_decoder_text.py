import pytest
import torch
from diffusers import HunyuanVideoPipeline, QwenImagePipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from reference.avatars.attributes import vocabulary
from reference.avatars.decoder_text import DISTANCES, build_llama, build_qwen

CAPTION = "a red jacket on a blue background"


def qwen():
    tokenizer, reader = build_qwen(vocabulary())
    return QwenImagePipeline(scheduler=None, vae=None, text_encoder=reader, tokenizer=tokenizer, transformer=None)


def hunyuan():
    tokenizer, reader = build_llama(vocabulary())
    parts = dict.fromkeys(("transformer", "vae", "scheduler", "text_encoder_2", "tokenizer_2"))
    return HunyuanVideoPipeline(text_encoder=reader, tokenizer=tokenizer, **parts)


def states_of(pipeline, captions):
    if isinstance(pipeline, QwenImagePipeline):
        return pipeline.encode_prompt(captions)
    return pipeline._get_llama_prompt_embeds(captions, DEFAULT_PROMPT_TEMPLATE, max_sequence_length=12)


@pytest.mark.parametrize("make", [qwen, hunyuan])
def test_the_pipeline_drops_its_instruction_and_keeps_the_caption(make):
    states, mask = states_of(make(), [CAPTION, "a red jacket"])
    assert mask.sum(1).tolist() == [8, 4]  # the words and one for what follows
    torch.testing.assert_close(states[0, :3], states[1, :3])  # nothing later is seen


@pytest.mark.parametrize("make", [qwen, hunyuan])
def test_a_word_knows_the_words_before_it(make):
    (red, blue), _ = states_of(make(), ["a red jacket on a blue background", "a blue jacket on a blue background"])
    same, jacket = (red[0] - blue[0]).norm(), (red[2] - blue[2]).norm()
    assert same == 0
    assert jacket > 0.2 * red[2].norm()


def test_each_head_looks_its_distance_back():
    _, model = build_llama(vocabulary())
    model.set_attn_implementation("eager")
    ids = torch.randint(8, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    seen = model(ids, output_attentions=True).attentions[0][0]
    for head, distance in enumerate(DISTANCES):
        assert seen[head].diagonal(-distance).min() > 0.95
