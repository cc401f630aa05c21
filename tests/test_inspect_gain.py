"""Token Gain: a piece is found by its text, weighs what it should, and what changes nothing says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mimir_core.config import FuserConfig
from mimir_core.inspect.dissect import dissect
from mimir_core.inspect.gain import gain_llm, gain_t5, idle_gain, prompt_gain
from mimir_core.inspect.pieces import find
from mimir_core.inspect.report import token_report
from mimir_core.provenance import RECORD, current, describe, fused_record, sealed, text_record

from .test_inspect import TRAINED, N, fuser, record, text, tokens


def test_a_piece_is_found_by_its_text() -> None:
    names = ["a", " red", " cir", "cle", " red", " \U0001f642", "", "", " re", "d"]
    assert (
        find(names, "red") == [1] and find(names, " red ", 2) == [4] and find(names, "red", 0) == [1, 4, 8, 9]
    )
    assert find(names, "circle") == [2, 3] and find(names, "red circle") == [1, 2, 3]
    assert find(names, "\U0001f642") == [5, 6, 7]
    with pytest.raises(ValueError, match="'Red' is no piece.*Its pieces are 'a', 'red', 'cir', 'cle'"):
        find(names, "Red")
    with pytest.raises(ValueError, match="occurrence is 4, but 'red' is there 3 times"):
        find(names, "red", 4)
    with pytest.raises(ValueError, match="piece is empty"):
        find(names, " ")
    with pytest.raises(ValueError, match="There are no pieces in this prompt: it is empty"):
        find([], "red")
    with pytest.raises(ValueError, match="'sun' was cut: the prompt is too long, and T5 never read"):
        find(names, "sun", cut=["the", " sun"])


def condition() -> list[Any]:
    return [[text(), {"pooled_output": None, RECORD: sealed(record(), text(), "0")}]]


def test_gain_on_t5_scales_one_token_and_is_recorded() -> None:
    before = condition()
    after, words = gain_t5(before, "red", 1, 2.0, "0")
    assert torch.equal(after[0][0][:, 1], before[0][0][:, 1] * 2)
    others = [place for place in range(N) if place != 1]
    assert torch.equal(after[0][0][:, others], before[0][0][:, others])
    made = current(after[0][1], after[0][0])
    assert made is not None and made["gains"] == words == "'red' (token 2) times 2" and "changed" not in made
    assert f"gain: {words}" in describe(made)
    again, _ = gain_t5(after, "a", 1, 0.0, "0")
    assert again[0][1][RECORD]["gains"] == f"{words}; 'a' (token 1) times 0"
    assert torch.equal(before[0][0], text())


def test_gain_one_is_the_same_bits() -> None:
    before, llm = condition(), tokens()
    assert gain_t5(before, "red", 1, 1.0, "0")[0] is before
    assert gain_llm(llm, "query or answer", "q1", 1, 1.0)[0] is llm
    with pytest.raises(ValueError, match="is no piece"):
        gain_t5(before, "green", 1, 1.0, "0")


def test_gain_on_the_llm_weighs_what_is_added() -> None:
    """Scaling the hidden state would do nothing: Norm takes it away."""
    module, llm = fuser(), tokens()
    louder, words = gain_llm(llm, "answer", "a1", 1, 3.0)
    assert words == "'a1' (token 7) times 3" and louder.made is not None and louder.made["gains"] == words
    plain, found = (dissect(module, text(), entry) for entry in (llm, louder))
    torch.testing.assert_close(found.decoder[6], plain.decoder[6] * 3)
    others = [place for place in range(N) if place != 6]
    assert torch.equal(found.decoder[others], plain.decoder[others])
    report = token_report(found, louder, record(), TRAINED)
    gained = [piece for piece in report["llm"]["pieces"] if piece["gain"] != 1]
    assert [(piece["text"], piece["gain"]) for piece in gained] == [(" a1", 3.0)]
    assert gained[0]["share"] > token_report(plain, llm, record(), TRAINED)["positions"][6]["share_llm"]
    answers = dissect(fuser(llm_tokens="answer"), text(), louder)
    alone = dissect(fuser(llm_tokens="answer"), text(), llm)
    torch.testing.assert_close(answers.decoder[1], alone.decoder[1] * 3)


def test_gain_on_what_knows_no_pieces_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="does not know its pieces.*Use T5 Encode"):
        gain_t5([[text(), {}]], "red", 1, 2.0, "0")
    with pytest.raises(ValueError, match="'q0' is no piece of Phi-3.5's answer.*'a0', 'a1', 'a2'"):
        gain_llm(tokens(), "answer", "q0", 1, 2.0)
    with pytest.raises(ValueError, match="There are no pieces in Phi-3.5's answer: it is empty"):
        gain_llm(tokens(answer=0), "answer", "q0", 1, 2.0)
    with pytest.raises(ValueError, match="'x' was cut"):
        gain_t5([[text(), {RECORD: sealed(record(cut=2), text(), "0")}]], "x", 1, 2.0, "0")
    with pytest.raises(ValueError, match="gain has shape"):
        replace(tokens(), gain=torch.ones(1, 3))


def test_gain_on_a_combined_condition_changes_the_parts_that_have_the_piece() -> None:
    other = text_record("blue", None, N, pieces=[("blue", "text"), ("", "end")])
    both = [*condition(), [text(), {RECORD: sealed(other, text(), "0")}]]
    for piece, words in (
        ("red", "part 1: 'red' (token 2) times 2; part 2: unchanged"),
        ("blue", "part 2: 'b"),
    ):
        changed, said = gain_t5(both, piece, 1, 2.0, "0")
        assert words in said
        assert [torch.equal(entry[0], text()) for entry in changed] == [piece == "blue", piece == "red"]
    with pytest.raises(ValueError, match="part 1: 'green' is no piece.*'red'.*part 2: 'green'.*'blue'"):
        gain_t5(both, "green", 1, 2.0, "0")


def test_gain_on_a_fused_condition_is_refused() -> None:
    fused = fused_record(record(), {}, {"file": "f"})
    with pytest.raises(ValueError, match="been through Token Fuser already. Connect that of T5 Encode"):
        gain_t5([*condition(), [text(), {RECORD: sealed(fused, text(), "0")}]], "red", 1, 2.0, "0")


def test_a_gain_that_does_not_reach_the_sum_is_said() -> None:
    asked, _ = gain_llm(tokens(), "query or answer", "q1", 1, 3.0)
    assert "'q1' (token 2) is in the prompt" in prompt_gain(asked)
    both, answer = FuserConfig(), FuserConfig(llm_tokens="answer")
    assert idle_gain(asked, both, N) == "" and idle_gain(tokens(), answer, N) == ""
    assert "Phi-3.5's 'q1' (token 2) changes nothing" in idle_gain(asked, answer, N)
    assert "takes the first 1 tokens" in idle_gain(asked, both, 1)
    assert "takes no token" in idle_gain(asked, FuserConfig(use_llm=False), N)
    louder, _ = gain_llm(tokens(), "answer", "a1", 1, 3.0)
    assert prompt_gain(louder) == "" and idle_gain(louder, answer, N) == ""
    for llm, idle in ((asked, True), (louder, False)):
        module = fuser(llm_tokens="answer")
        report = token_report(dissect(module, text(), llm), llm, record(), TRAINED)
        notes = " ".join(report["notes"])
        assert ("changes nothing" in notes) == idle and "Gain on Phi-3.5's tokens: '" in notes
        plain = dissect(module, text(), tokens())
        assert torch.equal(dissect(module, text(), llm).fused, plain.fused) == idle
