"""Token Fuser on the host: identities, presets, windows of the sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mimir_pack.mimir_core.config import FUSER_PRESETS, FuserConfig
from mimir_pack.mimir_core.fuser import TokenFuser, untrained_state
from mimir_pack.mimir_core.tokens import LlmTokens
from mimir_pack.nodes.fuse import MimirTokenFuser
from mimir_pack.nodes.host import fuser as host_fuser

TEXT, LLM = 24, 48
SIZES = {"text_dim": TEXT, "llm_dim": LLM, "num_instructions": 4}


def trained(preset: str = "mimir") -> tuple[host_fuser.Fuser, TokenFuser]:
    """A fuser with weights that do something, on the host and as the core builds it."""
    config = replace(FUSER_PRESETS[preset], **SIZES)
    torch.manual_seed(1)
    state = {name: torch.randn_like(tensor) * 0.1 for name, tensor in untrained_state(config).items()}
    reference = TokenFuser(config).eval()
    reference.load_state_dict(state)
    return host_fuser.build_fuser("test.safetensors", config, state), reference


def tokens(layer: int = -1, instructions: int = 4) -> LlmTokens:
    torch.manual_seed(2)
    return LlmTokens(
        query=torch.randn(1, 5, LLM),
        answer=torch.randn(1, 3, LLM),
        instruction=torch.randn(1, instructions, LLM),
        pieces=list("abcdefgh"),
        prompt="p",
        answer_text="a",
        instructions=tuple("wxyz"[:instructions]),
        layer=layer,
    )


def condition(**options: Any) -> list[Any]:
    torch.manual_seed(3)
    return [[torch.randn(1, 16, TEXT), {"pooled_output": None, **options}]]


def fuse(fuser: Any, conditioning: Any, **options: Any) -> tuple[list[Any], str]:
    options = {"preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0, **options}
    llm = options.pop("llm", tokens())
    with torch.inference_mode():
        result = MimirTokenFuser.EXECUTE_NORMALIZED(
            conditioning=conditioning, tokens=llm, fuser=fuser, **options
        )
    return result.result[0], result.ui.value


def test_fused_is_the_cores_fuser():
    fuser, reference = trained()
    text = condition()
    fused, note = fuse(fuser, text, strength=0.5)
    expected = reference(text[0][0], tokens().sequence(), tokens().instruction, strength=0.5)
    assert fused[0][0].shape == (1, 20, TEXT) and torch.allclose(fused[0][0], expected, atol=1e-6)
    assert "5 prompt and 3 answer tokens; the condition has 20" in note


@pytest.mark.parametrize("preset", ["as trained", "norm", "baseline"])
def test_untrained_passes_bit_for_bit_and_says_so(preset):
    for fuser in (host_fuser.untrained_fuser(), untrained_file()):
        text = condition()
        fused, note = fuse(fuser, text, preset=preset, start=0.2)
        ((tokens, options),) = fused
        assert torch.equal(tokens, text[0][0]) and {**options, **text[0][1]} == options
        assert options["mimir"]["fuser"]["preset"] == preset
        assert "untrained" in note


def untrained_file() -> host_fuser.Fuser:
    config = FuserConfig(**SIZES)
    return host_fuser.build_fuser("untrained.safetensors", config, untrained_state(config))


def test_strength_zero_passes_bit_for_bit():
    fuser, _ = trained()
    text = condition()
    fused, note = fuse(fuser, text, strength=0.0)
    assert fused[0][0] is text[0][0] and "Strength 0" in note


def test_window_leaves_t5_alone_outside():
    fuser, _ = trained()
    text = condition()
    fused, _ = fuse(fuser, text, start=0.25, end=0.75)
    ranges = {(options["start_percent"], options["end_percent"]): part for part, options in fused}
    assert set(ranges) == {(0.25, 0.75), (0.0, 0.25), (0.75, 1.0)}
    assert ranges[0.25, 0.75].shape[1] == 20 and torch.equal(ranges[0.0, 0.25], text[0][0])
    assert "start_percent" not in text[0][1]


def test_window_inside_an_entrys_own_range():
    fuser, _ = trained()
    fused, _ = fuse(fuser, condition(start_percent=0.5, end_percent=0.9), start=0.0, end=0.6)
    ranges = {(options["start_percent"], options["end_percent"]) for _, options in fused}
    assert ranges == {(0.5, 0.6), (0.6, 0.9)}
    fused, _ = fuse(fuser, condition(start_percent=0.5, end_percent=0.9), start=0.0, end=0.3)
    assert len(fused) == 1 and fused[0][0].shape[1] == 16


def test_presets_use_the_weights_that_are_there():
    fuser, reference = trained()
    text = condition()
    fused, _ = fuse(fuser, text, preset="norm")
    expected = reference.variant(replace(FUSER_PRESETS["norm"], **SIZES))(
        text[0][0], tokens().sequence(), tokens().instruction
    )
    assert fused[0][0].shape == (1, 16, TEXT) and torch.allclose(fused[0][0], expected, atol=1e-6)
    again, _ = fuse(fuser, text)
    assert again[0][0].shape == (1, 20, TEXT)  # the preset did not stick


def test_the_note_counts_the_tokens_that_are_used():
    fuser, _ = trained()
    text = condition()
    fused, note = fuse(fuser, text, preset="baseline", llm=tokens(layer=-2))
    assert torch.equal(fused[0][0], text[0][0])
    assert note == "Fused as 'baseline': no language model tokens are used; the condition has 16."
    short = [[text[0][0][:, :6], {}]]
    assert ": 5 prompt and 1 answer tokens; the condition has 10." in fuse(fuser, short)[1]
    config = replace(FUSER_PRESETS["mimir"], **SIZES, llm_tokens="answer")
    state = {name: tensor + 0.1 for name, tensor in untrained_state(config).items()}
    assert ": 3 answer tokens; the" in fuse(host_fuser.build_fuser("a", config, state), text)[1]


def test_presets_without_weights_are_refused():
    fuser, _ = trained("zero_conv")
    with pytest.raises(ValueError, match="The preset 'mimir' does not fit test.safetensors"):
        fuse(fuser, condition(), preset="mimir")


def test_wrong_widths_and_layers():
    fuser, _ = trained()
    with pytest.raises(ValueError, match="use the encoders it was trained with"):
        fuse(fuser, [[torch.zeros(1, 16, 4096), {}]])
    with pytest.raises(
        ValueError, match="2 instructions, this fuser expects 4: .*Phi-3.5 Encode, one per line"
    ):
        fuse(fuser, condition(), llm=tokens(instructions=2))
    _, note = fuse(fuser, condition(), llm=tokens(layer=-2))
    assert "trained on layer -1, these tokens are layer -2" in note


def test_start_after_end_is_refused():
    with pytest.raises(ValueError, match="start must come before end"):
        MimirTokenFuser.validate_inputs(start=0.6, end=0.4)
    with pytest.raises(ValueError, match="both must be from 0 to 1"):
        MimirTokenFuser.validate_inputs(start=-0.5, end=None)
    assert MimirTokenFuser.validate_inputs(start=None, end=0.4) is True
    with pytest.raises(ValueError, match="start must come before end"):
        fuse(trained()[0], condition(), start=1.0, end=1.0)


def test_a_fuser_that_was_trained_with_other_models_says_so():
    """Its header names T5, Phi-3.5 and the DiT; what differs is said, what nobody knows is not."""
    from mimir_pack.mimir_core.provenance import RECORD, text_record
    from mimir_pack.nodes.host.sampling import strange_base

    def origin(mark: str) -> dict[str, str]:
        return {"file": f"{mark}.safetensors", "fingerprint": mark * 8}

    fuser, _ = trained()
    known = replace(fuser, training={"t5": origin("a"), "phi": origin("b"), "base": origin("c")})
    same = condition(**{RECORD: text_record("p", origin("a"), 16)})
    other = condition(**{RECORD: text_record("p", origin("x"), 16)})
    llm = replace(tokens(), made=origin("b"))
    assert "Careful" not in fuse(known, same, llm=llm)[1]
    assert "Careful" not in fuse(known, condition())[1]  # another node's T5: unknown
    fused, note = fuse(known, other, llm=replace(llm, made=origin("y")))
    assert "the T5 a.safetensors (aaaaaaaa), this one is x.safetensors (xxxxxxxx)" in note
    assert "the Phi-3.5 b.safetensors" in note

    class Model:
        class model:
            origin = {"file": "dit.safetensors", "fingerprint": "zzzzzzzz"}

    assert "does not belong to this DiT: it was trained with the DiT c.safetensors" in strange_base(
        Model, fused
    )
    Model.model.origin = origin("c")
    assert strange_base(Model, fused) == "" and strange_base(Model, condition()) == ""


def test_the_same_fuser_is_saved_once_and_another_beside_it(tmp_path):
    """Whatever order safetensors gives to the entries of a header."""
    fuser, _ = trained()
    assert {host_fuser.save_fuser(fuser, tmp_path, "mine").name for _ in range(6)} == {"mine.safetensors"}
    assert host_fuser.save_fuser(trained("norm")[0], tmp_path, "mine").name == "mine_2.safetensors"
