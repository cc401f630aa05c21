"""Inspect Tokens: numbers are torch's, shares sum to one, pieces are literal, pictures hold."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from mimir_core.config import FUSER_PRESETS, FuserConfig
from mimir_core.fuser import TokenFuser
from mimir_core.inspect import draw_tokens
from mimir_core.inspect.dissect import Fusion, dissect, histogram, llm_shares, range_ratio
from mimir_core.inspect.pieces import t5_pieces
from mimir_core.inspect.report import Settings, summary, token_report
from mimir_core.llm import encode_prompt
from mimir_core.pipeline import Models
from mimir_core.provenance import recorded_pieces, text_record
from mimir_core.text import literal
from mimir_core.text import t5_pieces as spell
from mimir_core.tiny.parts import load_parts
from mimir_core.tokens import LlmTokens

N, DT, DL = 12, 8, 16
PROMPT = "a red circle moves left above a blue square"
HOSTILE = '"$x^2$" \\$5 <script>alert(1)</script> \U0001f642 \u0645\u0631\u062d\u0628\u0627 \u202e\n\tred'
TRAINED = Settings("fuser.safetensors", "as trained", 1.0, True)


@pytest.fixture(scope="module")
def models() -> Models:
    return load_parts()


def fuser(preset: str = "mimir", **changes: Any) -> TokenFuser:
    config = replace(FUSER_PRESETS[preset], text_dim=DT, llm_dim=DL, **changes)
    torch.manual_seed(1)
    module = TokenFuser(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def tokens(query: int = 5, answer: int = 3, **changes: Any) -> LlmTokens:
    torch.manual_seed(2)
    made: dict[str, Any] = {
        "query": torch.randn(1, query, DL) * 9,
        "answer": torch.randn(1, answer, DL) * 9,
        "instruction": torch.randn(1, 4, DL),
        "pieces": [f" q{i}" for i in range(query)] + [f" a{i}" for i in range(answer)],
        "prompt": "p",
        "answer_text": "a0 a1 a2",
        "instructions": ("count", "colour", "place", "move"),
        "layer": -1,
        "template": (("<|user|>\n",), ("<|end|>\n", "<|assistant|>\n")),
    }
    return LlmTokens(**{**made, **changes})


def text() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(1, N, DT)


def record(cut: int = 0) -> dict[str, Any]:
    pieces = [("a", "text"), (" red", "text"), ("\u2603", "unk"), ("", "end"), *[(" x", "cut")] * cut]
    return text_record("a red \u2603", None, N, cut, "x " * cut, pieces)


def report_of(models: Models, prompt: str, temperature: float = 0.0, **settings: Any) -> dict[str, Any]:
    """The report of the built-in model."""
    assert models.phi is not None and models.phi_tokenizer is not None
    llm = encode_prompt(
        models.phi, models.phi_tokenizer, prompt, max_answer_tokens=16, temperature=temperature
    )
    hidden, (cut,) = models.t5.encode(prompt)
    length = hidden.shape[1]
    pieces = spell(models.t5.tokenizer, models.t5.tokenizer(prompt)["input_ids"], prompt, length)
    made = text_record(prompt, None, length, *(cut or (0, "")), pieces)
    fusion = dissect(models.fuser, hidden, llm)
    return token_report(fusion, llm, made, replace(TRAINED, **settings))


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", FUSER_PRESETS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_two_branches_sum_to_what_the_fuser_gives(preset: str, strength: float) -> None:
    module, llm = fuser(preset), tokens()
    found = dissect(module, text(), llm, strength=strength)
    expected = module(text(), llm.sequence(), llm.instruction, strength=strength)[0]
    assert torch.equal(found.fused, expected)
    assert torch.equal(found.encoder + found.decoder, expected[:N])
    if module.config.stabilizer:
        torch.testing.assert_close(found.content + found.learned, expected[N:])


@pytest.mark.parametrize("preset", FUSER_PRESETS)
def test_numbers_are_those_of_the_tensors(preset: str) -> None:
    module, llm = fuser(preset), tokens()
    found = dissect(module, text(), llm)
    report = token_report(found, llm, record(), TRAINED)
    for index, entry in enumerate(report["positions"]):
        assert entry["share_t5"] + entry["share_llm"] == pytest.approx(1, abs=1e-9)
        assert entry["t5_before"] == pytest.approx(text()[0, index].norm().item(), rel=1e-5)
        assert entry["t5"] == pytest.approx(found.encoder[index].norm().item(), rel=1e-5)
        assert entry["llm"] == pytest.approx(found.decoder[index].norm().item(), rel=1e-5)
        assert entry["fused"] == pytest.approx(found.fused[index].norm().item(), rel=1e-5)
        assert entry["share_llm"] == pytest.approx(entry["llm"] / (entry["llm"] + entry["t5"]), abs=2e-6)
    own = [piece for piece in report["llm"]["pieces"] if piece["kind"] != "template"]
    for index, piece in enumerate(own):
        state = llm.sequence()[0, index]
        assert piece["norm_before"] == pytest.approx(state.norm().item(), rel=1e-5)
        assert piece["norm_after"] == pytest.approx(module.normed(state).norm().item(), rel=1e-5)
        assert piece["used"] == module.config.use_llm == (piece["position"] is not None)
        if piece["used"]:
            assert piece["share"] == report["positions"][index]["share_llm"] > 0
    for piece in report["t5"]["pieces"]:
        placed = report["positions"][piece["position"]]
        assert piece["share"] == placed["share_t5"] and piece["norm"] == placed["t5"]
        assert piece["norm_before"] == placed["t5_before"]
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("preset", FUSER_PRESETS)
def test_instruction_tokens_are_what_is_appended(preset: str) -> None:
    module, llm = fuser(preset), tokens()
    found = dissect(module, text(), llm)
    report = token_report(found, llm, record(), TRAINED)
    for index, entry in enumerate(report["instructions"]):
        assert entry["text"] == llm.instructions[index]
        assert entry["appended"] == module.config.stabilizer
        if module.config.stabilizer:
            assert entry["norm"] == pytest.approx(found.fused[N + index].norm().item(), rel=1e-5)
            learned = module.stabilizer.weight[index].norm().item()
            assert entry["norm_stabilizer"] == pytest.approx(learned, rel=1e-5)
        else:
            assert entry["norm"] == 0


def test_histograms_are_torchs() -> None:
    torch.manual_seed(0)
    values = torch.randn(40, 30) * 3 + 1
    found = histogram(values)
    assert found["mean"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert found["std"] == pytest.approx(values.std(unbiased=False).item(), rel=1e-4)
    assert found["min"] == pytest.approx(values.min().item(), rel=1e-5)
    assert found["max"] == pytest.approx(values.max().item(), rel=1e-5)
    assert sum(found["counts"]) == found["values"] == 1200
    assert found["counts"] == torch.histc(values, 48).int().tolist()
    assert len(found["edges"]) == 49 and found["edges"][0] == found["min"]
    assert sum(histogram(torch.zeros(4))["counts"]) == 4
    assert histogram(torch.zeros(0, 3))["values"] == 0


def test_zero_vectors_have_a_share() -> None:
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert llm_shares(zero, zero) == [0.0] and llm_shares(zero, one) == [1.0]
    assert llm_shares(one, one) == [0.5] and llm_shares(one, zero) == [0.0]


def test_what_is_beyond_the_limit_or_unread_is_not_in_the_sum() -> None:
    llm = tokens(query=N - 1, answer=4)
    report = token_report(dissect(fuser(), text(), llm), llm, record(), TRAINED)
    answers = [piece for piece in report["llm"]["pieces"] if piece["kind"] == "answer"]
    assert [piece["used"] for piece in answers] == [True, False, False, False]
    assert answers[0]["position"] == N - 1 and answers[1]["share"] is None
    llm = tokens()
    report = token_report(dissect(fuser(llm_tokens="answer"), text(), llm), llm, record(), TRAINED)
    places = {piece["text"]: piece["position"] for piece in report["llm"]["pieces"]}
    assert places[" q0"] is None and places[" a0"] == 0 and places[" a2"] == 2


@pytest.mark.parametrize("settings", [replace(TRAINED, trained=False), replace(TRAINED, strength=0.0)])
def test_a_fuser_that_passes_leaves_t5_alone(settings: Settings) -> None:
    llm = tokens()
    found = dissect(None, text(), llm)
    report = token_report(found, llm, record(), settings)
    assert torch.equal(found.fused, text()[0])
    assert {entry["share_t5"] for entry in report["positions"]} == {1.0}
    assert report["fuser"]["passes"] and "passes unchanged" in " ".join(report["notes"])
    assert not any(entry["appended"] for entry in report["instructions"])
    fresh = 0.1 * torch.nn.functional.rms_norm(llm.sequence(), (DL,), eps=FuserConfig().norm_eps)
    own = [piece for piece in report["llm"]["pieces"] if piece["kind"] == "query"]
    assert own[0]["norm_after"] == pytest.approx(fresh[0, 0].norm().item(), rel=1e-5)
    assert "nothing of the language model is added" in summary(report)


def test_before_normalisation_the_built_in_llm_is_wider_than_t5_and_after_it_is_not(models: Models) -> None:
    """Figure 7 c and d."""
    assert models.phi is not None and models.phi_tokenizer is not None
    for layer in (-1, -2):
        llm = encode_prompt(models.phi, models.phi_tokenizer, PROMPT, max_answer_tokens=16, layer=layer)
        hidden = models.t5.encode(PROMPT).hidden
        found = dissect(models.fuser, hidden, llm)
        t5, raw, normed = (histogram(part) for part in (found.text, found.raw, found.normed))
        before, after = range_ratio(raw, t5), range_ratio(normed, t5)
        print(f"layer {layer}: LLM range {before:.2f} times T5's before Norm and scale, {after:.2f} after")
        assert before is not None and before > 1.2 and after is not None and after < 1
        for part, kept in ((found.raw, raw), (found.normed, normed), (hidden, t5)):
            assert kept["max"] - kept["min"] == pytest.approx((part.max() - part.min()).item(), rel=1e-4)


# --- pieces -------------------------------------------------------------------------------------------------


def test_pieces_spell_the_prompt(models: Models) -> None:
    assert models.phi_tokenizer is not None
    for prompt in (PROMPT, HOSTILE, "\u4e2d\u6587"):
        report = report_of(models, prompt)
        t5 = [piece["text"] for piece in report["t5"]["pieces"] if piece["kind"] in ("text", "unk", "cut")]
        assert "".join(t5) == prompt
        query = [piece["text"] for piece in report["llm"]["pieces"] if piece["kind"] == "query"]
        assert "".join(query) == models.phi_tokenizer.defuse(prompt)
        kinds = [piece["kind"] for piece in report["llm"]["pieces"]]
        assert kinds[0] == "template" and kinds.count("template") >= 3
        assert (
            report["llm"]["answer"]
            == "".join(
                piece["text"] for piece in report["llm"]["pieces"] if piece["kind"] == "answer"
            ).strip()
        )


def test_tokens_of_single_bytes_share_one_character() -> None:
    assert literal("a\u00e9b", [(0, 1), (1, 2), (1, 2), (2, 3), (3, 3)]) == ["a", "\u00e9", "", "b", ""]


def test_what_was_cut_and_padded_is_said(models: Models) -> None:
    short, long = report_of(models, PROMPT), report_of(models, "a red circle moves left " * 2500)
    limit = short["t5"]["limit"]
    kinds = [piece["kind"] for piece in short["t5"]["pieces"]]
    assert kinds == ["text"] * 9 + ["end"] + ["pad"] * (limit - 10) and short["t5"]["read"] == 10
    cut = [piece for piece in long["t5"]["pieces"] if piece["kind"] in ("cut", "more")]
    assert long["t5"]["read"] == limit and long["t5"]["cut"] > 10_000
    assert len(cut) - 1 + cut[-1]["count"] == long["t5"]["cut"]
    more = [piece for piece in long["llm"]["pieces"] if piece["kind"] == "more"]
    assert len(more) == 1 and len(json.dumps(long)) < 200_000
    assert len(long["t5"]["cut_text"]) <= 300


def test_pieces_of_a_record_and_of_none() -> None:
    kinds = [piece["kind"] for piece in t5_pieces(record(cut=2), N)]
    assert kinds == ["text", "text", "unk", "end", *["pad"] * (N - 4), "cut", "cut"]
    assert {piece["kind"] for piece in t5_pieces(None, N)} == {"unknown"}
    joined = t5_pieces(record(), N + 3)  # another node has put more behind
    assert [piece["kind"] for piece in joined[N:]] == ["unknown"] * 3
    for damaged in ("[", "[1]", '{"a": 1}', "null", 5):
        assert recorded_pieces({"pieces": damaged}) == []


def test_a_condition_of_another_node_has_positions_only() -> None:
    llm = tokens()
    report = token_report(dissect(fuser(), text(), llm), llm, None, TRAINED)
    assert not report["prompt_known"] and report["t5"]["read"] is None
    assert "not made by T5 Encode" in report["notes"][0]
    assert [piece["position"] for piece in report["t5"]["pieces"]] == list(range(N))


# --- what is said -------------------------------------------------------------------------------------------


def test_instruction_tokens_count_as_something_added() -> None:
    llm = tokens(answer=0)
    module = fuser(llm_tokens="answer")
    said = summary(token_report(dissect(module, text(), llm), llm, record(), TRAINED))
    assert "no token of the language model is in the sum; behind it: 4 instruction tokens" in said
    said = summary(token_report(dissect(fuser(), text(), tokens()), tokens(), record(), TRAINED))
    assert "in the sum: 8 tokens of the language model" in said and "behind it: 4 instruction tokens" in said
    alone = fuser("baseline")
    said = summary(token_report(dissect(alone, text(), llm), llm, record(), TRAINED))
    assert "nothing of the language model is added" in said


def test_where_there_is_no_range_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tokens(answer=0)
    report = token_report(dissect(fuser(llm_tokens="answer"), text(), llm), llm, record(), TRAINED)
    assert report["range_ratio"] == {"before": None, "after": None}
    words = [text.get_text() for text in texts_of(report, monkeypatch)[1]]
    assert "before Norm and scale: no ratio of the ranges" in words
    zero = dissect(fuser(), torch.zeros(1, N, DT), tokens())
    assert token_report(zero, tokens(), record(), TRAINED)["range_ratio"]["before"] is None


def test_zeroed_t5_has_the_norm_zero_and_its_branch_is_said_to_be_the_fusers() -> None:
    zero = token_report(dissect(fuser(), torch.zeros(1, N, DT), tokens()), tokens(), record(), TRAINED)
    assert {entry["t5_before"] for entry in zero["positions"]} == {0.0}
    assert all(entry["t5"] > 0 for entry in zero["positions"])
    assert "T5's tokens are all zero" in " ".join(zero["notes"])
    plain = token_report(dissect(fuser(), text(), tokens()), tokens(), record(), TRAINED)
    assert "all zero" not in " ".join(plain["notes"])


def test_two_prompts_and_another_layer_are_said() -> None:
    def notes(settings: Settings = TRAINED, **changes: Any) -> str:
        llm = tokens(**{"prompt": "a  red \u2603", **changes})
        module = None if settings.passes else fuser()
        return " ".join(token_report(dissect(module, text(), llm), llm, record(), settings)["notes"])

    assert notes() == ""
    assert "Phi-3.5 read another prompt than T5: 'a blue'" in notes(prompt="a blue")
    assert (
        "another prompt" in notes(prompt="a red") and notes(prompt="a red", made={"prompt_cut": True}) == ""
    )
    assert "was trained on layer -1, these tokens are layer -2" in notes(layer=-2)
    assert "layer" not in notes(replace(TRAINED, strength=0.0), layer=-2)


# --- pictures -----------------------------------------------------------------------------------------------


def texts_of(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, list[Any]]:
    """The picture, and the text objects in it."""
    from mimir_core.inspect import canvas

    figures: list[Any] = []
    real = canvas.new_figure
    monkeypatch.setattr(canvas, "new_figure", lambda *size: figures.append(real(*size)) or figures[-1])
    image = draw_tokens.draw(report)
    return image, [text for axes in figures[0].axes for text in axes.texts]


@pytest.mark.parametrize(
    "prompt", [PROMPT, HOSTILE, "", "a red circle moves left " * 200, "\u4e2d\u6587 $_{$"]
)
def test_pictures_show_prompts_literally(
    models: Models, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of(models, prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, texts = texts_of(report, monkeypatch)
    assert image.shape[0] == 1 and image.shape[2:] == (1000, 3) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1 and image.shape[1] < 2400
    assert not any(text.get_parse_math() for text in texts)
    words = [text.get_text() for text in texts]
    for piece in report["t5"]["pieces"][:5]:
        if piece["kind"] == "text" and piece["text"].strip().isascii() and piece["text"].strip():
            assert piece["text"].strip() in words
    assert torch.equal(image, draw_tokens.draw(report)), "the same report is the same picture"


def test_nothing_is_drawn_outside_the_picture(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    image, texts = texts_of(report_of(models, HOSTILE), monkeypatch)
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= image.shape[2] and box.y0 >= 0, text.get_text()


def test_full_size_is_drawn() -> None:
    """226 tokens, a prompt that fills them, a condition whose pieces nobody knows."""
    torch.manual_seed(0)
    wide, empty = torch.randn(226, 32), torch.zeros(4, 32)
    llm = tokens(query=200, answer=64)
    fusion = Fusion(
        FuserConfig(),
        wide,
        llm.sequence()[0],
        llm.sequence()[0] / 9,
        wide,
        wide / 2,
        wide * 1.5,
        empty,
        empty,
        226,
    )
    words = [(" spectacular", "text")] * 225 + [("", "end")] + [(" more", "cut")] * 64
    for made in (text_record("spectacular", None, 226, 900, "more", words), None):
        image = draw_tokens.draw(token_report(fusion, llm, made, TRAINED))
        assert image.shape[1] < 3400


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mimir_core.inspect import canvas

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"), canvas.plain_style():
        pass
