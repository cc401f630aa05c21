"""Our DiT against diffusers' CogVideoXTransformer3DModel: same random weights, same inputs, float32, CPU."""

import dataclasses
from typing import Any

import pytest
import torch

from mimir_core.config import DIT_PRESETS, DiTConfig
from mimir_core.dit import CogVideoXTransformer
from mimir_core.positions import crop_region, rotary_table, rotate, sincos_table

diffusers = pytest.importorskip("diffusers")
pipeline = pytest.importorskip("diffusers.pipelines.cogvideo.pipeline_cogvideox")

COMMON: dict[str, Any] = {
    "num_layers": 2,
    "text_embed_dim": 24,
    "time_embed_dim": 20,
    "sample_height": 12,
    "sample_width": 16,
}
VARIANTS = {
    "2b": DiTConfig(
        num_attention_heads=2,
        attention_head_dim=32,
        use_rotary_positional_embeddings=False,
        sample_frames=9,
        **COMMON,
    ),
    "5b": DiTConfig(num_attention_heads=3, attention_head_dim=32, sample_frames=9, **COMMON),
    "1.5": DiTConfig(
        num_attention_heads=3,
        attention_head_dim=16,
        sample_frames=13,
        patch_size_t=2,
        patch_bias=False,
        **COMMON,
    ),
}
NATIVE, LARGER, PORTRAIT = (12, 16), (16, 24), (20, 8)  # latent height and width


def reference(config: DiTConfig):
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(**dataclasses.asdict(config)).eval()
    for (
        name,
        parameter,
    ) in model.named_parameters():  # norms too: weights of exactly 1 would hide a swapped norm
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model


def ours(config: DiTConfig, theirs, **arguments) -> CogVideoXTransformer:
    model = CogVideoXTransformer(config, **arguments).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def rotary_of_the_pipeline(config: DiTConfig, theirs, height: int, width: int, frames: int):
    """What diffusers' pipeline would pass: its method needs three attributes of the pipeline only."""
    fake = type("Pipe", (), {"vae_scale_factor_spatial": 8, "transformer": theirs})()
    prepare = pipeline.CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(fake, height * 8, width * 8, frames, torch.device("cpu"))


def inputs(config: DiTConfig, size: tuple[int, int], text_length: int, frames: int):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.in_channels, frames, *size, generator=generator)
    text = torch.randn(2, text_length, config.text_embed_dim, generator=generator)
    return latents, torch.tensor([999, 123]), text


def relative_error(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def compare(config: DiTConfig, size: tuple[int, int], text_length: int, frames: int, theirs=None) -> float:
    theirs = theirs or reference(config)
    latents, timestep, text = inputs(config, size, text_length, frames)
    rotary = None
    if config.use_rotary_positional_embeddings:
        rotary = rotary_of_the_pipeline(config, theirs, *size, frames)
    expected = theirs(latents.transpose(1, 2), text, timestep, image_rotary_emb=rotary).sample.transpose(1, 2)
    found = ours(config, theirs)(latents, timestep, text)
    assert found.shape == expected.shape == latents.shape
    return relative_error(found, expected)


@pytest.mark.parametrize("size", [NATIVE, LARGER, PORTRAIT])
@pytest.mark.parametrize("text_length", [226, 230])
@pytest.mark.parametrize("variant, frames", [("5b", 3), ("5b", 2), ("1.5", 4), ("1.5", 2)])
def test_rotary_models(variant, frames, size, text_length):
    config = VARIANTS[variant]
    if variant == "1.5":  # diffusers cuts its table out of the native size, so give it room
        config = dataclasses.replace(config, sample_height=40, sample_width=40)
    assert compare(config, size, text_length, frames) < 1e-5


@pytest.mark.parametrize("size", [NATIVE, LARGER, PORTRAIT])
@pytest.mark.parametrize("text_length", [226, 230])
@pytest.mark.parametrize("frames", [3, 4])
def test_sincos_model(size, text_length, frames):
    """diffusers' table is zero for `max_text_seq_length` text tokens, so 230 of them are the table for 226
    extended by zeros. Our model gets the unchanged config."""
    config = VARIANTS["2b"]
    theirs = reference(dataclasses.replace(config, max_text_seq_length=text_length))
    assert compare(config, size, text_length, frames, theirs) < 1e-5


def test_parameter_names_of_the_published_sizes():
    for name in ("2b", "5b", "1.5-5b"):
        config = dataclasses.replace(DIT_PRESETS[name], num_layers=1)
        with torch.device("meta"):
            theirs = diffusers.CogVideoXTransformer3DModel(**dataclasses.asdict(config)).state_dict()
            model = CogVideoXTransformer(config).state_dict()
        assert {key: value.shape for key, value in model.items()} == {k: v.shape for k, v in theirs.items()}


def test_crop_region_is_the_pipelines():
    for height in range(1, 60, 7):
        for width in range(1, 100, 9):
            expected = pipeline.get_resize_crop_region_for_grid((height, width), 45, 30)
            assert crop_region(height, width, 30, 45) == expected


@pytest.mark.parametrize("height, width", [(60, 90), (90, 60)], ids=["480x720", "720x480"])
@pytest.mark.parametrize("variant, frames", [("5b", 13), ("1.5-5b", 14)])
def test_rotary_table_of_the_published_sizes(variant, frames, height, width):
    """49 frames at 480 x 720 and portrait, every token of the real grid."""
    config = DIT_PRESETS[variant]
    layer = dataclasses.replace(config, num_layers=1)
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel(**dataclasses.asdict(layer))
    cos, sin = rotary_of_the_pipeline(config, theirs, height, width, frames)
    found = rotary_table(config, (frames // (config.patch_size_t or 1), height // 2, width // 2), 226)
    torch.testing.assert_close(found.cos[226:, 0], cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sin[226:, 0, 1::2], sin[:, 1::2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(13, 30, 45), (13, 45, 30)], ids=["480x720", "720x480"])
def test_sincos_table_of_the_published_sizes(grid):
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    config = DIT_PRESETS["2b"]
    frames, height, width = grid
    expected = get_3d_sincos_pos_embed(config.width, (width, height), frames, 1.875, 1.0, output_type="pt")
    torch.testing.assert_close(sincos_table(config, grid), expected.flatten(0, 1).float(), rtol=0, atol=1e-6)


def test_rotation_keeps_length_and_leaves_text_alone():
    config = VARIANTS["5b"]
    x = torch.randn(2, 5 + 2 * 3 * 4, 3, config.attention_head_dim)
    turned = rotate(x, rotary_table(config, (2, 3, 4), 5))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :5], x[:, :5])
    assert not torch.allclose(turned[:, 6:], x[:, 6:])
    assert rotate(x.bfloat16(), rotary_table(config, (2, 3, 4), 5)).dtype == torch.bfloat16


def test_sincos_table_tells_every_token_apart():
    table = sincos_table(VARIANTS["2b"], (3, 4, 5))
    assert table.shape == (60, 64)
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.05


def test_tables_are_computed_once_per_size():
    config = DIT_PRESETS["tiny"]
    model = CogVideoXTransformer(config)
    with torch.inference_mode():
        model(torch.randn(1, 16, 3, 8, 8), torch.tensor([5]), torch.randn(1, 64, 96))
    first = model._cached
    output = model(torch.randn(1, 16, 3, 8, 8), torch.tensor([7]), torch.randn(1, 64, 96))
    assert model._cached is first
    output.mean().backward()  # a table made under inference mode must not break training
    model(torch.randn(1, 16, 2, 8, 8), torch.tensor([7]), torch.randn(1, 64, 96))
    assert model._cached is not first


def test_injected_ops_and_attention_are_the_ones_used():
    calls = []

    def attention(q, k, v, *, mask=None, options=None):
        calls.append((options, q.shape))
        return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v

    class Ops:
        Linear = type("Linear", (torch.nn.Linear,), {})
        Conv2d = type("Conv2d", (torch.nn.Conv2d,), {})
        LayerNorm = type("LayerNorm", (torch.nn.LayerNorm,), {})

    config = VARIANTS["5b"]
    theirs = reference(config)
    plain, injected = ours(config, theirs), ours(config, theirs, ops=Ops, attention=attention)
    latents, timestep, text = inputs(config, NATIVE, 7, 3)
    found = injected(latents, timestep, text, {"x": 1})
    assert relative_error(found, plain(latents, timestep, text)) < 1e-5
    assert calls == [({"x": 1}, (2, 3, 7 + 3 * 6 * 8, 32))] * config.num_layers
    leaves = [m for m in injected.modules() if not list(m.children()) and list(m.parameters(recurse=False))]
    assert leaves and all(type(leaf) in (Ops.Linear, Ops.Conv2d, Ops.LayerNorm) for leaf in leaves)


def test_init_weights_predicts_zero_and_can_learn():
    model = CogVideoXTransformer(DIT_PRESETS["tiny"])
    model.init_weights()
    latents, timestep, text = torch.randn(2, 16, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 64, 96)
    assert model(latents, timestep, text).abs().max() == 0
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = (model(latents, timestep, text) - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "latents, text, message",
    [((1, 8, 3, 8, 8), (1, 5, 96), "expected .B, 16"), ((1, 16, 3, 9, 8), (1, 5, 96), "multiples"),
     ((1, 16, 3, 8, 8), (1, 5, 128), "another text encoder")],
)  # fmt: skip
def test_wrong_shapes_are_refused(latents, text, message):
    model = CogVideoXTransformer(DIT_PRESETS["tiny"])
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(latents), torch.tensor([1]), torch.zeros(text))


def test_odd_frames_are_refused_by_1_5():
    model = CogVideoXTransformer(VARIANTS["1.5"])
    with pytest.raises(ValueError, match="multiples of .2, 2, 2"):
        model(torch.zeros(1, 16, 3, 12, 16), torch.tensor([1]), torch.zeros(1, 5, 24))
