"""Plug-ins of the data pipeline around transformers models: tiny random ones, written by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from mimir_core.data.clips import Clip, Frames
from mimir_core.data.config import Captions, DataConfig, Scoring
from mimir_core.data.models import ImageScorer, VideoCaptioner, pictures
from mimir_core.data.plugins import check_plugins, load_plugins, signature

CLIP = Clip("a.mp4", 0.0, 3.0, 64, 48, 25.0)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "camera",
    "moves",
    "over",
    "colours",
    "<image>",
    "USER",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of WORDS."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **special)


@pytest.fixture
def frames() -> Frames:
    images = np.random.default_rng(0).integers(0, 256, (7, 48, 64, 3), dtype=np.uint8)
    return Frames(images, tuple(range(7)))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    names = {"id2label": {0: "clean", 1: "watermark"}, "label2id": {"clean": 0, "watermark": 1}}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **SMALL, **names)).save_pretrained(
        folder
    )
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    sizes = {"encoder_hidden_size": 16, "max_position_embeddings": 32, "projection_dim": 16}
    text = {**SMALL, **special, **sizes, "vocab_size": len(WORDS)}
    vision = {**SMALL, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():  # so that it says a word, and not nothing
        model.text_decoder.cls.predictions.bias[WORDS.index("camera")] = 5.0
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    template = (
        "{% for message in messages %}USER {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        "<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    torch.manual_seed(0)
    text = {**SMALL, "model_type": "llama", "vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3}
    vision = {
        **SMALL,
        "model_type": "clip_vision_model",
        "image_size": 32,
        "patch_size": 16,
        "num_hidden_layers": 2,
    }
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=WORDS.index("<image>"))
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer(), patch_size=16, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_score_is_the_probability_of_the_class(classifier: Path, frames: Frames) -> None:
    watermark = ImageScorer(Scoring(0.5, "transformers", str(classifier), "watermark"), "watermark")(
        CLIP, frames
    )
    clean = ImageScorer(Scoring(0.5, "transformers", str(classifier), "clean"), "watermark")(CLIP, frames)
    assert 0 < watermark < 1 and watermark + clean == pytest.approx(1)
    model = ViTForImageClassification.from_pretrained(classifier).eval()
    inputs = ViTImageProcessor.from_pretrained(classifier)(images=pictures(frames, 4), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1)[:, 1].mean()
    assert watermark == pytest.approx(float(expected), abs=1e-6)


def test_a_class_that_the_model_does_not_know_is_refused(classifier: Path) -> None:
    with pytest.raises(ValueError, match="watermark.label is 'logo'; this model knows clean, watermark"):
        ImageScorer(Scoring(0.5, "transformers", str(classifier), "logo"), "watermark")


@pytest.mark.parametrize("kind", ["blip", "llava"])
def test_captions_by_a_model(kind: str, frames: Frames, request: pytest.FixtureRequest) -> None:
    section = Captions(
        "transformers", model=str(request.getfixturevalue(kind)), prompt="a camera", max_new_tokens=6
    )
    caption = VideoCaptioner(section)
    first = caption(CLIP, frames)
    assert first and set(first.split()) <= set(WORDS[4:])
    assert caption(CLIP, frames) == first == VideoCaptioner(section)(CLIP, frames)


def test_the_caption_is_only_what_was_generated(
    llava: Path, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model returns prompt and answer; here the answer is made to be two known words."""
    caption = VideoCaptioner(Captions("transformers", model=str(llava), prompt="a camera moves", frames=3))
    seen: dict[str, Any] = {}

    def generate(**inputs: Any) -> torch.Tensor:
        seen.update(inputs)
        answer = torch.tensor([[WORDS.index("over"), WORDS.index("colours"), WORDS.index("[SEP]")]])
        return torch.cat([inputs["input_ids"], answer], dim=1)

    monkeypatch.setattr(caption.model, "generate", generate)
    assert caption(CLIP, frames) == "over colours"
    assert len(seen["pixel_values"]) == 3 and seen["do_sample"] is False
    given = caption.processor.batch_decode(seen["input_ids"], skip_special_tokens=True)[0]
    assert given.endswith("a camera moves")


def test_pictures_are_spread_evenly(frames: Frames) -> None:
    def which(count: int) -> list[int]:
        found = [np.asarray(picture) for picture in pictures(frames, count)]
        return [
            next(i for i, image in enumerate(frames.images) if np.array_equal(image, one)) for one in found
        ]

    assert which(1) == [3] and which(3) == [1, 3, 5] and which(99) == list(range(7))
    assert isinstance(pictures(frames, 1)[0], Image.Image)


def test_models_are_found_by_the_configuration(classifier: Path, blip: Path, frames: Frames) -> None:
    config = DataConfig(
        aesthetic=Scoring(0.5, "transformers", str(classifier), "clean"),
        watermark=Scoring(0.5, "none"),
        captions=Captions("transformers", model=str(blip), max_new_tokens=4),
    )
    check_plugins(config)
    plugins = load_plugins(config)
    assert plugins.watermark is None and plugins.aesthetic and plugins.captions
    assert 0 < plugins.aesthetic(CLIP, frames) < 1 and plugins.captions(CLIP, frames)
    before = signature(config.aesthetic)
    (classifier / "model.safetensors").touch()
    assert signature(config.aesthetic) != before, "another file is another model"
    with pytest.raises(ValueError, match="captions.model is 'nowhere'; expected a local folder"):
        check_plugins(replace(config, captions=Captions("transformers", model="nowhere")))


def test_weights_that_are_no_safetensors_are_not_read(classifier: Path, tmp_path: Path) -> None:
    for path in classifier.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(
        ViTForImageClassification.from_pretrained(classifier).state_dict(), tmp_path / "pytorch_model.bin"
    )
    with pytest.raises((OSError, ValueError)):
        ImageScorer(Scoring(0.5, "transformers", str(tmp_path), "clean"), "aesthetic")
