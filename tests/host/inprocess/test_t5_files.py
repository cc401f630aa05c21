"""T5 in every form that people have it, from our loader, from core's and from the GGUF pack's: one result."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sd
import pytest
import torch
from mimir_pack.nodes.encode import MimirT5Encode
from mimir_pack.nodes.host import t5 as host_t5
from mimir_pack.tests.host.inprocess import references
from safetensors.torch import save_file

PROMPT = "A (red:1.5) circle moves left, above [the] blue square."
VOCABULARY = 32128
# Core knows T5-XXL by this tensor's shape; it has no place in a network of two layers and is left out there.
MARK = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
TYPES = ["cogvideox", "sd3", "mochi", "ltxv", "pixart", "chroma"]
TYPES = [kind for kind in TYPES if hasattr(comfy.sd.CLIPType, kind.upper())]  # 0.3.75 has no cogvideox
FORMS = ["fp32", "fp16", "bf16", "fp8", *references.SCALED]


@pytest.fixture(scope="module")
def reference() -> Any:
    model = references.t5(vocab_size=VOCABULARY)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.half().float()  # what the hosts store T5 in
    return model


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """As in a published single file: the embedding under one name."""
    return {k: v.clone() for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}


def file_in(form: str, model: Any, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A single file in `form` with its tokenizer beside it, and the numbers that it stands for."""
    shutil.copytree(host_t5.HOST_TOKENIZER, folder)
    state = state_of(model)
    simple = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    simple["fp8"] = torch.float8_e4m3fn
    if form in simple:
        stored = {name: tensor.to(simple[form]) for name, tensor in state.items()}
        save_file(stored, folder / "t5.safetensors")
        return folder / "t5.safetensors", {name: tensor.float() for name, tensor in stored.items()}
    only = ("DenseReluDense", "SelfAttention.")
    return folder / "t5.safetensors", references.save_scaled(state, folder / "t5.safetensors", form, only)


@lru_cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(host_t5.HOST_TOKENIZER)


def expected(model: Any, text: str = PROMPT) -> torch.Tensor:
    options = {"padding": "max_length", "max_length": 226, "truncation": True, "return_tensors": "pt"}
    return model(input_ids=tokenizer()(text, **options).input_ids).last_hidden_state


def holding(numbers: dict[str, torch.Tensor]) -> Any:
    model = references.t5(vocab_size=VOCABULARY)
    model.load_state_dict({**numbers, "encoder.embed_tokens.weight": numbers["shared.weight"]})
    return model


def core_clip(kind: str, state: dict[str, torch.Tensor], *others: Any, **options: Any) -> Any:
    """What core's Load CLIP gives for type `kind`, at the size of our reference."""
    state = {**state, MARK: torch.empty(10240, 4096, device="meta")}
    config = {"d_model": 24, "num_layers": 2, "num_heads": 3, "d_kv": 8, "d_ff": 48, "vocab_size": VOCABULARY}
    clip_type = getattr(comfy.sd.CLIPType, kind.upper())
    return comfy.sd.load_text_encoder_state_dicts(
        [state, *others], clip_type=clip_type, model_options={"t5xxl_model_config": config, **options}
    )


@pytest.mark.parametrize("form", FORMS)
def test_our_loader_gives_transformers_numbers(reference, run_node, tmp_path, form):
    path, numbers = file_in(form, reference, tmp_path / "t5")
    (found,) = run_node(MimirT5Encode, clip=host_t5.load_t5(path), text=PROMPT)
    assert (found[0][0] - expected(holding(numbers))).abs().max() < 1e-4


@pytest.mark.parametrize("kind", TYPES)
def test_any_type_of_core_clip_gives_ours(reference, run_node, kind):
    clip = core_clip(kind, state_of(reference))
    network, before = clip.cond_stage_model, masks(clip)
    (found,) = run_node(MimirT5Encode, clip=clip, text=PROMPT)
    assert found[0][0].shape == (1, 226, 24) and bool(found[0][1]["attention_mask"].all())
    assert (found[0][0] - expected(reference)).abs().max() < 1e-4
    assert clip.cond_stage_model is network and masks(clip) == before  # the CLIP that came in is as it was


def test_t5_is_taken_out_of_a_clip_that_joins_it_with_another(reference, run_node):
    """Flux's pair, as Load CLIP (dual) makes it; CLIP-L is random here and must not matter."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    other = {"text_model.encoder.layers.1.mlp.fc1.weight": torch.zeros(8, 8)}
    clip = core_clip("flux", state_of(reference), other, clip_l_model_config=small)
    (found,) = run_node(MimirT5Encode, clip=clip, text=PROMPT)
    assert (found[0][0] - expected(reference)).abs().max() < 1e-4


def masks(clip: Any) -> list[bool]:
    """How the CLIP's own type treats padding."""
    t5 = next(part for part in clip.cond_stage_model.modules() if type(part).__name__ == "T5XXLModel")
    return [t5.enable_attention_masks, t5.return_attention_masks, t5.zero_out_masked]


def test_a_long_prompt_through_a_core_clip(reference):
    clip = core_clip("mochi", state_of(reference))
    text = "red " * 300
    with torch.inference_mode():
        found, report = host_t5.encode(clip, text)
    assert (found[0][0] - expected(reference, text)).abs().max() < 1e-4
    assert "the last 75 tokens are cut off" in report


def test_a_clip_with_operations_of_its_own_gives_ours(reference, run_node):
    """As the GGUF pack has them: weights in a form of its own, turned into numbers at each use."""

    class Packed(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            used: list[int] = []

            def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                self.used.append(1)
                return torch.nn.functional.linear(input, self.weight.to(input))

    state = {name: tensor.half() for name, tensor in state_of(reference).items()}
    clip = core_clip("sd3", state, custom_operations=Packed)
    (found,) = run_node(MimirT5Encode, clip=clip, text=PROMPT)
    rounded = holding({name: tensor.float() for name, tensor in state.items()})
    assert (found[0][0] - expected(rounded)).abs().max() < 1e-4 and Packed.Linear.used


def test_a_umt5_clip_is_another_text_space():
    class Wan:
        def tokenize(self, text: str, **_: Any) -> dict[str, Any]:
            return {"umt5xxl": [[(1, 1.0)]]}

    with pytest.raises(ValueError, match="UMT5.*another text space.*Load T5"):
        host_t5.encode(Wan(), PROMPT)  # type: ignore[arg-type]
