"""The shipped weights of Mimir Tiny: complete, small, self-describing, and visibly following prompts.

The figures in the README come from `python -m mimir_core.tiny.evaluate`; here a part of the same prompts
must stay above floors that noise, a swapped file or a broken sampler would fall through.
"""

from dataclasses import replace

import pytest
import torch

from mimir_core.config import DIT_PRESETS
from mimir_core.llm import encode_known, encode_prompt
from mimir_core.pipeline import Models, condition
from mimir_core.tiny import dit_train
from mimir_core.tiny.captions import canonical
from mimir_core.tiny.detector import judge
from mimir_core.tiny.evaluate import ANSWER, generate, load_prompts
from mimir_core.tiny.features import make_features
from mimir_core.tiny.parts import WEIGHTS, load_parts
from mimir_core.train.cache import Encoders
from mimir_core.train.features import FeatureSet
from mimir_core.train.loop import train


@pytest.fixture(scope="module")
def parts() -> Models:
    return load_parts()


def test_parts_are_complete_and_small(parts):
    assert parts.transformer.config == DIT_PRESETS["tiny"]
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 16e6
    assert parts.fuser is not None and parts.fuser.llm_conv.weight.any()


def test_language_model_answers_held_words_with_plain_ones(parts):
    prompts = load_prompts()[::10]
    answers = [
        encode_prompt(parts.phi, parts.phi_tokenizer, p.captions["held"], max_answer_tokens=32).answer_text
        for p in prompts
    ]
    right = [canonical(p.scene) in answer for answer, p in zip(answers, prompts, strict=True)]
    assert sum(right) / len(right) >= 0.9


def test_training_features_are_what_the_encoder_gives(parts):
    prompt = load_prompts()[150]
    text = prompt.captions["seen"]
    found = encode_prompt(parts.phi, parts.phi_tokenizer, text, max_answer_tokens=32)
    assert canonical(prompt.scene) in found.answer_text
    (known,) = encode_known(parts.phi, parts.phi_tokenizer, [text], [found.answer_text])
    torch.testing.assert_close(known.sequence(), found.sequence(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(known.instruction, found.instruction, atol=1e-4, rtol=1e-4)


def test_fusion_reads_words_that_t5_never_saw(parts):
    """Colour and motion of one object, from held words only: fused far above T5 alone."""
    prompts = [p for p in load_prompts() if p.scene.kind == "one"][::3]
    texts, seeds = [p.captions["held"] for p in prompts], [p.seed for p in prompts]
    right = {}
    for fused in (True, False):
        videos = generate(parts, texts, seeds, fused=fused)
        verdicts = [judge(v, p.scene) for v, p in zip(videos, prompts, strict=True)]
        right[fused] = sum(v["colour"] and v["motion"] for v in verdicts) / len(verdicts)
    assert right[True] >= 0.5
    assert right[True] >= right[False] + 0.3


def test_same_seed_same_video_other_seed_other_video(parts):
    text = "a red circle moves left"
    a, b, c = (generate(parts, [text], [seed], fused=True, steps=5) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_fused_condition_has_four_more_tokens(parts):
    plain, fused = (condition(parts, "a red circle", strength, ANSWER) for strength in (0.0, 1.0))
    assert fused.shape[1] == plain.shape[1] + 4
    assert fused.isfinite().all()


def test_the_recipe_trains_on_the_features_it_writes(parts, tmp_path):
    """Two clips on disk, read back, take each run a step; mimir and control start from the baseline's end."""
    encoders = Encoders(parts.t5, parts.phi, parts.phi_tokenizer, parts.vae)
    make_features(tmp_path / dit_train.FEATURES, encoders, shards=1, clips=2)
    features = FeatureSet(tmp_path / dit_train.FEATURES)
    assert (len(features), features.captions, features.answers) == (2, 2, 2)
    dit_train.start_dit(tmp_path, parts.diffusion, seed=0)
    for run in (dit_train.baseline, dit_train.mimir, dit_train.polish, dit_train.treated, dit_train.control):
        config = replace(run(tmp_path, 0), steps=1, batch=2, micro_batch=2)
        train(config, cpu=True)
    assert (tmp_path / "polish" / "fuser.safetensors").is_file()
    assert not (tmp_path / "control" / "fuser.safetensors").exists()


def test_a_caption_has_answers_of_the_same_facts_in_other_words(parts, tmp_path):
    encoders = Encoders(parts.t5, parts.phi, parts.phi_tokenizer, parts.vae)
    make_features(tmp_path, encoders, shards=1, clips=4)
    features = FeatureSet(tmp_path)
    first, second = (
        [features.text(clip, caption, answer).answer for clip in features.clips for caption in (0, 1)]
        for answer in (0, 1)
    )
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    query = [features.text(features.clips[0], 0, answer).query for answer in (0, 1)]
    assert torch.equal(*query)
