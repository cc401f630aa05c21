"""Configurations: presets are consistent, config.json files of the reference libraries are read as is."""

import dataclasses
import json

import pytest

from mimir_core import config as C


@pytest.mark.parametrize("preset", list(C.DIT_PRESETS.values()) + list(C.T5_PRESETS.values()))
def test_round_trip_through_json(preset):
    again = type(preset).from_dict(json.loads(json.dumps(C.to_dict(preset))))
    assert again == preset


@pytest.mark.parametrize("preset", list(C.FUSER_PRESETS.values()))
def test_fuser_round_trip(preset):
    assert C.FuserConfig.from_dict(json.loads(json.dumps(C.to_dict(preset)))) == preset


def test_the_eight_ablation_rows_are_eight_different_fusers():
    rows = "baseline decoder_only norm norm_ss zero_conv zero_conv_ss norm_zero_conv mimir".split()
    assert sorted(C.FUSER_PRESETS) == sorted(rows)
    assert len(set(C.FUSER_PRESETS.values())) == len(rows)


def test_published_widths():
    assert C.DIT_PRESETS["2b"].width == 1920
    assert C.DIT_PRESETS["5b"].width == C.DIT_PRESETS["1.5-5b"].width == 3072
    assert C.default_diffusion(C.DIT_PRESETS["2b"]).snr_shift_scale == 3.0
    assert C.default_diffusion(C.DIT_PRESETS["5b"]).latent_scale == 0.7


def test_dit_reads_diffusers_config():
    diffusers = pytest.importorskip("diffusers")
    values = dict(diffusers.CogVideoXTransformer3DModel(num_layers=1).config)  # by default a 2B model
    ours = C.DiTConfig.from_dict(values)
    assert ours == dataclasses.replace(C.DIT_PRESETS["2b"], num_layers=1)


@pytest.mark.parametrize("key, value", [("use_learned_positional_embeddings", True), ("ofs_embed_dim", 512)])
def test_image_to_video_configs_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match="image-to-video"):
        C.DiTConfig.from_dict({**C.to_dict(C.DIT_PRESETS["tiny"]), key: value})


def test_missing_field_is_named():
    with pytest.raises(ValueError, match="num_layers"):
        C.DiTConfig.from_dict({"num_attention_heads": 4})


def test_head_width_is_checked():
    with pytest.raises(ValueError, match="multiple of 16"):
        dataclasses.replace(C.DIT_PRESETS["tiny"], attention_head_dim=24)


def test_phi_reads_transformers_config_old_and_new():
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    base = {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 131072, "eos_token_id": 32000}  # fmt: skip
    old_rope = {"type": "longrope", **factors}
    old = C.PhiConfig.from_dict({**base, "rope_scaling": old_rope, "rope_theta": 10000.0})
    new_rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
    new = C.PhiConfig.from_dict({**base, "rope_parameters": {**new_rope, **factors}})
    assert old == new
    assert old.num_key_value_heads == 32 and old.eos_token_id == (32000,) and old.long_factor == (2.0,) * 48


@pytest.mark.parametrize("scaled", [False, True])
def test_phi_dict_is_read_by_transformers_and_by_us(scaled):
    transformers = pytest.importorskip("transformers")
    factors = {"short_factor": (1.0,) * 16, "long_factor": (1.5,) * 16} if scaled else {}
    config = dataclasses.replace(C.PHI_PRESETS["tiny"], **factors)
    values = json.loads(json.dumps(config.to_dict()))
    assert C.PhiConfig.from_dict(values) == config
    theirs = transformers.Phi3Config(**values)
    assert theirs.hidden_size == 128
    assert C.PhiConfig.from_dict(theirs.to_dict()) == config


@pytest.mark.parametrize("change", [{"partial_rotary_factor": 0.75}, {"rope_scaling": {"type": "yarn"}}])
def test_other_language_models_are_refused(change):
    with pytest.raises(ValueError, match="Phi-3.5"):
        C.PhiConfig.from_dict({**C.PHI_PRESETS["tiny"].to_dict(), **change})


def test_schedule_of_another_model_is_refused():
    with pytest.raises(ValueError, match="v_prediction"):
        C.DiffusionConfig.from_dict({"prediction_type": "epsilon"})
    assert C.DiffusionConfig.from_dict({"snr_shift_scale": 3.0, "clip_sample": True}).snr_shift_scale == 3.0


def test_zero_scale_is_refused():
    with pytest.raises(ValueError, match="scale_init"):
        C.FuserConfig(scale_init=0.0)
