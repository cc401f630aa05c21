"""The nodes of Mimir/inspect on a real host: what they show is what Token Fuser gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from mimir_pack import nodes
from mimir_pack.mimir_core.config import FUSER_PRESETS
from mimir_pack.mimir_core.inspect.pieces import t5_pieces
from mimir_pack.mimir_core.provenance import current, recorded_pieces
from mimir_pack.nodes.host import fuser as host_fuser
from mimir_pack.nodes.host import t5 as host_t5
from mimir_pack.nodes.host import tiny

import nodes as host_nodes

PROMPT = "a red circle moves left above a blue square"
HOSTILE = '"$x^2$" <script>alert(1)</script> \U0001f642 \u0645\u0631\u062d\u0628\u0627'
READ = {"instructions": "count\ncolour\nplace\nmove", "answer_length": 8, "seed": 0, "layer": -1}
FUSE = {"preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0}


@pytest.fixture(scope="module")
def parts() -> tuple[Any, ...]:
    return tiny.load_tiny("mimir")


def read(parts: Any, run_node: Any, prompt: str) -> tuple[Any, Any]:
    (condition,) = run_node(nodes.MimirT5Encode, clip=parts[1], text=prompt)
    tokens, _ = run_node(nodes.MimirPhiEncode, clip=parts[2], text=prompt, temperature=0.0, **READ)
    return condition, tokens


def inspect(
    condition: Any, tokens: Any, fuser: Any, preset: str = "as trained", strength: float = 1.0
) -> Any:
    with torch.inference_mode():
        return nodes.MimirInspectTokens.EXECUTE_NORMALIZED(
            conditioning=condition, tokens=tokens, fuser=fuser, preset=preset, strength=strength
        )


@pytest.mark.parametrize("preset", ["as trained", *FUSER_PRESETS])
@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_the_report_is_what_token_fuser_gives(parts, run_node, preset, strength):
    condition, tokens = read(parts, run_node, PROMPT)
    output = inspect(condition, tokens, parts[3], preset, strength)
    image, text = output.result
    report = json.loads(text)
    settings = {**FUSE, "preset": preset, "strength": strength}
    (fused,) = run_node(
        nodes.MimirTokenFuser, conditioning=condition, tokens=tokens, fuser=parts[3], **settings
    )
    limit = report["t5"]["limit"]
    for entry, norm in zip(report["positions"], fused[0][0][0].norm(dim=-1).tolist()):
        assert entry["fused"] == pytest.approx(norm, rel=1e-4)
        assert entry["share_t5"] + entry["share_llm"] == pytest.approx(1, abs=1e-9)
    appended = [entry["norm"] for entry in report["instructions"] if entry["appended"]]
    assert len(appended) == fused[0][0].shape[1] - limit
    assert image.shape[0] == 1 and image.shape[3] == 3 and torch.isfinite(image).all()
    assert output.ui["mimir_inspect"] == [report] and output.ui["text"][0].startswith("T5 read 10 of")


@pytest.mark.parametrize("prompt", [HOSTILE, "", "a red circle moves left " * 500])
@pytest.mark.parametrize("trained", [True, False])
def test_any_prompt_and_any_fuser(parts, run_node, prompt, trained):
    condition, tokens = read(parts, run_node, prompt)
    fuser = parts[3] if trained else host_fuser.untrained_fuser()
    report = inspect(condition, tokens, fuser).ui["mimir_inspect"][0]
    read_pieces = [p["text"] for p in report["t5"]["pieces"] if p["kind"] in ("text", "unk")]
    assert prompt.startswith("".join(read_pieces)) and report["fuser"]["passes"] == (not trained)
    if len(prompt) > 1000:
        assert report["t5"]["cut"] > 1000 and report["t5"]["read"] == report["t5"]["limit"]


def test_a_core_condition_has_positions_only(parts, run_node):
    _, tokens = read(parts, run_node, PROMPT)
    with torch.inference_mode():
        (condition,) = host_nodes.CLIPTextEncode().encode(parts[1], PROMPT)
    report = inspect(condition, tokens, parts[3]).ui["mimir_inspect"][0]
    assert {piece["kind"] for piece in report["t5"]["pieces"]} == {"unknown"} and not report["prompt_known"]


def test_a_fused_condition_is_refused(parts, run_node):
    condition, tokens = read(parts, run_node, PROMPT)
    (fused,) = run_node(nodes.MimirTokenFuser, conditioning=condition, tokens=tokens, fuser=parts[3], **FUSE)
    with pytest.raises(ValueError, match="been through Token Fuser already. Connect that of T5 Encode"):
        inspect(fused, tokens, parts[3])
    choice = {"piece": "red", "occurrence": 1, "gain": 2.0}
    for node, inputs in (
        (nodes.MimirT5Gain, choice),
        (nodes.MimirTokenFuser, {**FUSE, "tokens": tokens, "fuser": parts[3]}),
        (nodes.MimirTokenFuser, {**FUSE, "tokens": tokens, "fuser": parts[3], "strength": 0.0}),
    ):
        for conditioning in (fused, [*condition, *fused]):
            with pytest.raises(ValueError, match="been through Token Fuser already. Connect that of T5 En"):
                run_node(node, conditioning=conditioning, **inputs)
    with pytest.raises(ValueError, match="The condition is empty"):
        inspect([], tokens, parts[3])
    with pytest.raises(ValueError, match="NaN or infinite"):
        inspect([[condition[0][0] * float("nan"), {}]], tokens, parts[3])


def test_parts_and_batches_show_the_first_and_say_so(parts, run_node):
    condition, tokens = read(parts, run_node, PROMPT)
    twice = [[condition[0][0].repeat(2, 1, 1), condition[0][1]]] * 2
    notes = " ".join(inspect(twice, tokens, parts[3]).ui["mimir_inspect"][0]["notes"])
    assert "has 2 parts" in notes and "2 prompts in the batch" in notes


def test_pieces_survive_the_fuser_and_a_file(parts, run_node, tmp_path):
    from mimir_pack.mimir_core.conditioning import load_conditions, save_conditions

    condition, tokens = read(parts, run_node, PROMPT)
    (fused,) = run_node(nodes.MimirTokenFuser, conditioning=condition, tokens=tokens, fuser=parts[3], **FUSE)
    save_conditions(tmp_path / "a.safetensors", fused)
    for entry in (fused[0], load_conditions(tmp_path / "a.safetensors").positive[0]):
        pieces = t5_pieces(current(entry[1], entry[0]), 64)
        assert "".join(piece["text"] for piece in pieces[:9]) == PROMPT
        assert [piece["kind"] for piece in pieces[9:11]] == ["end", "pad"]


def test_pieces_of_another_loaders_t5_are_the_same_words(run_node):
    """The sections of core's tokenizers: ids of T5-XXL's vocabulary, with weights, ended and padded."""
    own = host_t5._host_tokenizer()
    for prompt in ("A red circle, moving left.", "na\u00efve \U0001f642"):
        ids = own(prompt)["input_ids"]
        section = [(token, 1.0) for token in [*ids, *[0] * 40]]
        pieces = host_t5._pieces(None, [section], prompt)
        assert [kind for _, kind in pieces][-1] == "end" and len(pieces) == len(ids)
        assert "".join("".join(text.split()) for text, _ in pieces) == "".join(prompt.split())
    pieces = host_t5._pieces(None, [[(ids[0], 1.0), (torch.zeros(4), 1.0)]], "something else")
    assert [kind for _, kind in pieces] == ["text", "unk", "end"]


def sampled(parts: Any, run_node: Any, condition: Any, tokens: Any) -> torch.Tensor:
    (fused,) = run_node(nodes.MimirTokenFuser, conditioning=condition, tokens=tokens, fuser=parts[3], **FUSE)
    (empty,) = run_node(nodes.MimirEmptyLatent, width=64, height=64, frames=9, batch=1)
    settings = {"seed": 1, "steps": 2, "cfg": 1.0, "dynamic_cfg": "off", "sampler_name": "euler"}
    (latent,) = run_node(
        nodes.MimirSampler, model=parts[0], positive=fused, negative=fused, latent=empty,
        scheduler="simple", denoise=1.0, **settings,
    )  # fmt: skip
    return latent["samples"]


def test_gain_is_seen_in_the_video_and_gain_one_is_the_same_bits(parts, run_node):
    condition, tokens = read(parts, run_node, PROMPT)
    plain = sampled(parts, run_node, condition, tokens)
    choice = {"piece": "red", "occurrence": 1}
    for gain in (1.0, 3.0):
        (louder,) = run_node(nodes.MimirT5Gain, conditioning=condition, **choice, gain=gain)
        (added,) = run_node(nodes.MimirPhiGain, tokens=tokens, part="answer", **choice, gain=gain)
        for pair in ((louder, tokens), (condition, added)):
            assert torch.equal(sampled(parts, run_node, *pair), plain) == (gain == 1)
    report = inspect(louder, added, parts[3]).ui["mimir_inspect"][0]
    before = inspect(condition, tokens, parts[3]).ui["mimir_inspect"][0]
    assert "Gain on T5's tokens: 'red' (token 2) times 3." in report["notes"]
    gained = [index for index, piece in enumerate(report["llm"]["pieces"]) if piece["gain"] == 3]
    assert [report["llm"]["pieces"][index]["text"].strip() for index in gained] == ["red"]
    assert report["llm"]["pieces"][gained[0]]["share"] > before["llm"]["pieces"][gained[0]]["share"]
    (fused,) = run_node(nodes.MimirTokenFuser, conditioning=louder, tokens=added, fuser=parts[3], **FUSE)
    made = current(fused[0][1], fused[0][0])
    assert made["gains"] and made["llm"]["gains"] and "changed" not in made and recorded_pieces(made)


def said(node: Any, **inputs: Any) -> str:
    with torch.inference_mode():
        return node.EXECUTE_NORMALIZED(**inputs).ui.value


def test_a_gain_that_changes_nothing_says_so(parts, run_node):
    """The built-in fuser adds only the answer: with the node's defaults, 'red' is found in the prompt."""
    condition, tokens = read(parts, run_node, PROMPT)
    default = {"tokens": tokens, "part": "query or answer", "piece": "red", "occurrence": 1, "gain": 3.0}
    (asked,) = run_node(nodes.MimirPhiGain, **default)
    assert "a fuser that adds only the answer, as the built-in one does" in said(
        nodes.MimirPhiGain, **default
    )
    assert "only the answer" not in said(nodes.MimirPhiGain, **{**default, "part": "answer"})
    inputs = {"conditioning": condition, "fuser": parts[3], **FUSE}
    (plain,) = run_node(nodes.MimirTokenFuser, tokens=tokens, **inputs)
    (same,) = run_node(nodes.MimirTokenFuser, tokens=asked, **inputs)
    assert torch.equal(plain[0][0], same[0][0])
    assert "The gain on Phi-3.5's 'red' (token 2) changes nothing" in said(
        nodes.MimirTokenFuser, tokens=asked, **inputs
    )
    assert "gain" not in said(nodes.MimirTokenFuser, tokens=tokens, **inputs)
    notes = " ".join(inspect(condition, asked, parts[3]).ui["mimir_inspect"][0]["notes"])
    assert "Gain on Phi-3.5's tokens: 'red' (token 2) times 3." in notes and "changes nothing" in notes


def test_two_prompts_are_said_and_a_long_one_that_phi_cut_is_no_other(parts, run_node):
    long = "a red circle moves left " * 4000
    for text, other in ((PROMPT, "two green triangles"), (long, long), (HOSTILE, HOSTILE)):
        (condition,) = run_node(nodes.MimirT5Encode, clip=parts[1], text=text)
        tokens, _ = run_node(nodes.MimirPhiEncode, clip=parts[2], text=other, temperature=0.0, **READ)
        notes = " ".join(inspect(condition, tokens, parts[3]).ui["mimir_inspect"][0]["notes"])
        assert ("Phi-3.5 read another prompt than T5" in notes) == (text != other)
        assert (tokens.made or {}).get("prompt_cut", False) == (text == long)


def test_half_a_character_is_refused_in_a_sentence(parts, run_node):
    words = "has half of a character at place 3 .'a ...'., perhaps an emoji that was cut in two"
    for node, inputs in (
        (nodes.MimirT5Encode, {"clip": parts[1], "text": "a \ud83d circle"}),
        (nodes.MimirPhiEncode, {"clip": parts[2], "temperature": 0.0, **READ, "text": "a \ud83d circle"}),
        (nodes.MimirPhiEncode, {"clip": parts[2], "temperature": 0.0, **READ, "text": "a",
                                "instructions": "a \ud83d\nb\nc\nd"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run_node(node, **inputs)


def compared(monkeypatch: pytest.MonkeyPatch, labels: str, *videos: torch.Tensor) -> list[str]:
    """The labels that Compare Prompts writes."""
    from mimir_pack.nodes.host import compare

    written: list[str] = []
    monkeypatch.setattr(compare, "compare", lambda videos, names, columns: written.extend(names) or videos[0])
    compare.compare_images([*videos, *[None] * (8 - len(videos))], labels, 0)
    return written


def test_empty_labels_and_repeated_videos(monkeypatch):
    a, b, c = torch.rand(3, 2, 8, 8, 3)
    for labels, expected in (
        ("", ["a", "b", "c"]),
        ("one\ntwo\nthree\n\n", ["one", "two", "three"]),
        ("\ntwo\nthree", ["", "two", "three"]),
        ("one\r\n\r\n", ["one", "", ""]),
        ("\n\none\ntwo\nthree", ["one", "two", "three"]),
    ):
        assert compared(monkeypatch, labels, a, b, c) == expected
    assert compared(monkeypatch, "T5 only\nnorm", a, a.clone()) == ["T5 only", "norm\n= T5 only, bit for bit"]
    assert compared(monkeypatch, "\nnorm", a, a.clone()) == ["", "norm\n= video 1, bit for bit"]


def test_a_piece_that_is_not_there_lists_those_that_are(parts, run_node):
    condition, tokens = read(parts, run_node, PROMPT)
    with pytest.raises(ValueError, match="'green' is no piece.*Its pieces are 'a', 'red', 'circle'"):
        run_node(nodes.MimirT5Gain, conditioning=condition, piece="green", occurrence=1, gain=2.0)
    with pytest.raises(ValueError, match="'green' is no piece of Phi-3.5's prompt"):
        run_node(nodes.MimirPhiGain, tokens=tokens, part="query", piece="green", occurrence=1, gain=2.0)


@pytest.mark.parametrize("trained", [True, False])
def test_token_map(parts, run_node, trained):
    settings = {"prompts": f"{PROMPT}\n\na blue square\n", "method": "PCA", "runs": 3, "answer_length": 8}
    clips = {"t5": parts[1], "phi": parts[2], "fuser": parts[3] if trained else host_fuser.untrained_fuser()}
    results = []
    for _ in range(2):
        image, text = run_node(nodes.MimirTokenMap, **clips, **settings, temperature=1.0, seed=2**64 - 1)
        results.append((image, json.loads(text)))
    (image, numbers), (again, same) = results
    assert torch.equal(image, again) and numbers == same
    assert numbers["prompts"] == [PROMPT, "a blue square"] and numbers["scatter"]["query"]["identical"]
    assert numbers["space"] == ("text" if trained else "raw")
    with pytest.raises(ValueError, match="write at least one prompt"):
        run_node(nodes.MimirTokenMap, **clips, **{**settings, "prompts": " \n"}, temperature=1.0, seed=0)
