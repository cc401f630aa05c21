"""T5 and Phi-3.5 as the host's CLIP, against transformers; wrong wiring and long prompts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mimir_pack.mimir_core.text import PhiTokenizer
from mimir_pack.mimir_core.tokens import LlmTokens
from mimir_pack.nodes.encode import MimirPhiEncode, MimirT5Encode
from mimir_pack.nodes.host import phi as host_phi
from mimir_pack.nodes.host import t5 as host_t5
from mimir_pack.tests.host.inprocess import references

import nodes as host_nodes

PROMPT = "a red circle moves left above the blue square"
PHI = {
    "instructions": "name the square\nsay it",
    "answer_length": 6,
    "temperature": 0.0,
    "seed": 1,
    "layer": -1,
}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("models") / "t5"
    return references.save_t5(folder), host_t5.load_t5(folder, references.TEXT_LENGTH)


@pytest.fixture(scope="module")
def phi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "phi"


@pytest.fixture(scope="module")
def phi(phi_folder: Path) -> tuple[Any, Any]:
    return references.save_phi(phi_folder), host_phi.load_phi(phi_folder)


def t5_reference(model: Any, text: str) -> torch.Tensor:
    ids = references.tokenizer(append_eos=True)(
        text, padding="max_length", max_length=references.TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("text", [PROMPT, "", "red " * 40])
def test_t5_encode_is_transformers(t5, run_node, text):
    reference, clip = t5
    (found,) = run_node(MimirT5Encode, clip=clip, text=text)
    expected = t5_reference(reference, text)
    assert found[0][0].shape == (1, references.TEXT_LENGTH, references.TEXT_WIDTH)
    assert (found[0][0] - expected).abs().max() < 1e-4


def test_core_clip_text_encode_reads_our_t5(t5, run_node):
    _, clip = t5
    with torch.inference_mode():
        found = host_nodes.CLIPTextEncode().encode(clip, PROMPT)[0]
    (ours,) = run_node(MimirT5Encode, clip=clip, text=PROMPT)
    assert torch.equal(found[0][0], ours[0][0])


def test_brackets_have_no_meaning(t5, run_node):
    _, clip = t5
    weights = {weight for _, weight in clip.tokenize("a (red:1.5) circle")["t5xxl"][0]}
    assert weights == {1.0}


def test_long_prompt_works_and_says_what_was_cut(t5):
    _, clip = t5
    with torch.inference_mode():
        result = MimirT5Encode.EXECUTE_NORMALIZED(
            clip=clip, text=" ".join(["red"] * 14 + ["moves left"] * 2500)
        )
    note = result.ui.value
    assert "the last 4999 tokens are cut off, beginning with 'left moves left" in note


def host_clip() -> tuple[Any, Any]:
    """(transformers' T5, a CLIP with the host's own T5 tokenizer and network, as Load CLIP makes it)."""
    import comfy.text_encoders.sd3_clip as sd3
    from comfy import sd1_clip
    from comfy.supported_models_base import ClipTarget
    from mimir_pack.mimir_core.config import T5Config
    from mimir_pack.nodes.host.patcher import build_clip

    reference = references.t5(vocab_size=32128)
    config = T5Config.from_dict(reference.config.to_dict())
    tokens = partial(sd1_clip.SD1Tokenizer, clip_name="t5xxl", tokenizer=sd3.T5XXLTokenizer, name="t5xxl")
    target = ClipTarget(tokens, partial(host_t5.T5Model, config, {}))
    return reference, build_clip(target, reference.state_dict(), dtype=torch.float32)


@pytest.mark.parametrize("text", ["A red circle moves left.", "word " * 300])
def test_a_clip_of_the_hosts_gives_the_same_as_ours(run_node, text):
    from transformers import AutoTokenizer

    reference, clip = host_clip()
    (found,) = run_node(MimirT5Encode, clip=clip, text=text)
    tokenizer = AutoTokenizer.from_pretrained(host_t5.HOST_TOKENIZER)
    ids = tokenizer(
        text, padding="max_length", max_length=226, truncation=True, return_tensors="pt"
    ).input_ids
    assert (found[0][0] - reference(input_ids=ids).last_hidden_state).abs().max() < 1e-4


def test_scaled_fp8_is_read_with_its_scales(t5, run_node, tmp_path):
    """The layout of t5xxl_fp8_e4m3fn_scaled.safetensors."""
    from safetensors.torch import save_file

    reference, _ = t5
    references.save_t5(tmp_path)
    state, plain = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in reference.state_dict().items():
        if "DenseReluDense" not in name and ".SelfAttention." not in name or "bias" in name:
            state[name] = tensor.clone()
            continue
        scale = tensor.abs().max() / 300
        state[name] = (tensor / scale).to(torch.float8_e4m3fn)
        state[name.replace(".weight", ".scale_weight")] = scale
        plain[name] = state[name].float() * scale
    state = {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    save_file(state, tmp_path / "model.safetensors")
    quantised = references.t5()
    quantised.load_state_dict({**reference.state_dict(), **plain})
    clip = host_t5.load_t5(tmp_path, references.TEXT_LENGTH)
    (found,) = run_node(MimirT5Encode, clip=clip, text=PROMPT)
    assert (found[0][0] - t5_reference(quantised, PROMPT)).abs().max() < 1e-4
    assert (found[0][0] - t5_reference(reference, PROMPT)).abs().max() > 1e-4


def test_another_t5_clip_is_cut_and_padded_to_226():
    tokens = [[(7, 1.0)] * 400 + [(1, 1.0)], [(8, 1.2), (1, 1.0), (0, 1.0)]]
    (section,), cut = host_t5._fit(tokens)
    assert len(section) == 226 and section[225] == (1, 1.0) and cut.tokens == 401 - 225
    (section,), cut = host_t5._fit([[(8, 1.2), (1, 1.0), (0, 1.0)]])
    assert section[:3] == [(8, 1.2), (1, 1.0), (0, 1.0)] and len(section) == 226 and cut is None


def test_wrong_wires_name_the_right_loader(t5, phi, run_node):
    with pytest.raises(ValueError, match="T5 Encode got Phi-3.5. Connect Load T5 here"):
        run_node(MimirT5Encode, clip=phi[1], text=PROMPT)
    with pytest.raises(ValueError, match="needs Phi-3.5.*Connect Load Phi-3.5 here"):
        run_node(MimirPhiEncode, clip=t5[1], text=PROMPT, **PHI)
    with pytest.raises(ValueError, match="Connect it to Phi-3.5 Encode"), torch.inference_mode():
        host_nodes.CLIPTextEncode().encode(phi[1], PROMPT)


def test_phi_encode_is_transformers(phi, phi_folder, run_node):
    reference, clip = phi
    tokens, answer = run_node(MimirPhiEncode, clip=clip, text=PROMPT, **PHI)
    turn = PhiTokenizer.from_folder(phi_folder).turn(PROMPT)
    ids = torch.tensor([turn.ids])
    generated = reference.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    stop = {1, 4, 5, 6, 7}
    expected_answer = [int(token) for token in generated]
    expected_answer = expected_answer[: next((i for i, t in enumerate(expected_answer) if t in stop), 6)]
    whole = torch.tensor([turn.ids + expected_answer])
    states = reference(whole, output_hidden_states=True).hidden_states[-1]
    assert (tokens.query - states[:, turn.query]).abs().max() < 1e-4
    assert tokens.answer.shape[1] == len(expected_answer)
    assert torch.allclose(tokens.answer, states[:, ids.shape[1] :], atol=1e-4)
    assert tokens.instruction.shape == (1, 2, references.PHI_WIDTH)
    assert answer == tokens.answer_text


def test_seeds_scatter_answers_but_not_prompt_tokens(phi, run_node):
    _, clip = phi
    options = {**PHI, "temperature": 1.5, "answer_length": 12}
    runs = [
        run_node(MimirPhiEncode, clip=clip, text=PROMPT, **{**options, "seed": seed})[0] for seed in (1, 1, 2)
    ]
    assert runs[0].pieces == runs[1].pieces and runs[0].pieces != runs[2].pieces
    assert torch.allclose(runs[0].query, runs[2].query)
    assert torch.allclose(runs[0].instruction, runs[2].instruction)


def test_phi_partially_loaded_gives_the_same_tokens(phi, phi_folder, run_node):
    whole, _ = run_node(MimirPhiEncode, clip=phi[1], text=PROMPT, **PHI)
    clip = host_phi.load_phi(phi_folder)
    patcher = clip.patcher
    patcher.detach()
    patcher.partially_load(patcher.load_device, extra_memory=patcher.model_size() // 3)
    loaded = patcher.model.model_loaded_weight_memory
    assert patcher.model.model_lowvram and 0 < loaded < patcher.model_size() // 2
    with torch.inference_mode():
        part = host_phi.encode_prompt(
            clip.cond_stage_model.phi, clip.tokenizer.tokenizer, PROMPT, ("name the square", "say it"), 6,
            device=patcher.load_device, dtype=torch.float32,
        )  # fmt: skip
    assert torch.allclose(part.query, whole.query, atol=1e-5) and part.answer_text == whole.answer_text


def test_interrupt_stops_between_tokens(phi, monkeypatch):
    import comfy.model_management as management

    count = []

    def raising() -> None:
        count.append(1)
        if len(count) == 3:
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", raising)
    clip = phi[1]
    monkeypatch.setattr(clip.tokenizer.tokenizer, "stop_ids", frozenset())
    with pytest.raises(management.InterruptProcessingException), torch.inference_mode():
        host_phi.encode(clip, PROMPT, (), 20, 0.0, 0, -1)
    assert len(count) == 3


def test_core_text_generation_works_where_the_host_has_it(phi, run_node):
    """0.33's Generate Text on our CLIP gives the answer that Phi-3.5 Encode gives."""
    textgen = pytest.importorskip("comfy_extras.nodes_textgen")
    _, clip = phi
    (text,) = run_node(
        textgen.TextGenerate, clip=clip, prompt=PROMPT, max_length=6, sampling_mode={"sampling_mode": "off"}
    )
    assert text == run_node(MimirPhiEncode, clip=clip, text=PROMPT, **PHI)[1]


def test_the_note_on_a_cut_prompt_is_two_sentences():
    state = torch.zeros(1, 0, 4)
    for answer, end in (("a red square", "square."), ("A red square.", "square.")):
        read = LlmTokens(state, state, state, [], "a red", answer, (), -1)
        assert f"{end} The prompt was too long" in host_phi.report(read, "a red square that turns")
