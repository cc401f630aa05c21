"""Plug-ins around a transformers model of the user's choice: local folder, safetensors, never a download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .clips import Clip, Frames
from .config import Captions, Scoring
from .plugins import model_folder

LOCAL = {"local_files_only": True, "trust_remote_code": False}
SCORED_FRAMES = 4


class ImageScorer:
    """The probability of one class, mean over a few frames. ValueError when the folder or the class is not
    there."""

    def __init__(self, section: Scoring, name: str) -> None:
        folder = model_folder(section.model, name)
        self.device = section.device
        self.processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
        model: Any = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, **LOCAL)
        self.model = model.to(self.device).eval()
        labels = {str(label): int(index) for index, label in model.config.id2label.items()}
        if section.label not in labels:
            raise ValueError(f"{name}.label is {section.label!r}; this model knows {', '.join(labels)}")
        self.index = labels[section.label]

    @torch.inference_mode()
    def __call__(self, clip: Clip, frames: Frames) -> float:
        inputs = self.processor(images=pictures(frames, SCORED_FRAMES), return_tensors="pt")
        logits = self.model(**inputs.to(self.device)).logits  # (N, classes)
        return float(logits.float().softmax(dim=-1)[:, self.index].mean())


class VideoCaptioner:
    """A vision-language model with a chat template sees several frames and the prompt; a plain captioner
    (BLIP, GIT ...) sees the middle frame and no prompt. Greedy: the same clip gets the same caption."""

    def __init__(self, section: Captions) -> None:
        folder = model_folder(section.model, "captions")
        self.section = section
        self.processor = AutoProcessor.from_pretrained(folder, **LOCAL)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **LOCAL)
        self.model = model.to(section.device).eval()

    @torch.inference_mode()
    def __call__(self, clip: Clip, frames: Frames) -> str:
        inputs = self._inputs(frames).to(self.section.device)
        made = self.model.generate(**inputs, max_new_tokens=self.section.max_new_tokens, do_sample=False)
        given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        start = (
            given
            if made.shape[1] > given and torch.equal(made[:, :given], inputs.get("input_ids", made))
            else 0
        )
        return self.processor.batch_decode(made[:, start:], skip_special_tokens=True)[0].strip()

    def _inputs(self, frames: Frames) -> Any:
        if not getattr(self.processor, "chat_template", None):
            return self.processor(images=pictures(frames, 1), return_tensors="pt")
        images = pictures(frames, self.section.frames)
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": self.section.prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return self.processor(images=images, text=text, return_tensors="pt")


def pictures(frames: Frames, count: int) -> list[Image.Image]:
    """`count` frames from the middles of equal parts."""
    total = len(frames.images)
    chosen = np.unique([(2 * index + 1) * total // (2 * count) for index in range(count)])
    return [Image.fromarray(frames.images[index]) for index in chosen]
