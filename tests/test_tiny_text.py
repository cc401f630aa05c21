"""The text stage of Mimir Tiny: what its models may read, that training resumes, and what the shipped ones
know.
"""

import json
import random
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

import mimir_core.tiny
from mimir_core.config import DEFAULT_INSTRUCTIONS, PhiConfig
from mimir_core.llm import encode_known, encode_prompt
from mimir_core.phi import Phi3ForCausalLM
from mimir_core.text import PhiTokenizer, T5Encoder
from mimir_core.tiny import captions
from mimir_core.tiny.bpe import train_tokenizers
from mimir_core.tiny.corpus import ANSWERS, Chat, chat, gerund, scene_of, t5_pair, t5_text, vary
from mimir_core.tiny.text_train import (
    corrupt,
    llm_batch,
    llm_exact,
    render,
    t5_batch,
    train_llm,
    train_t5,
)
from mimir_core.tiny.world import random_scene

WEIGHTS = Path(mimir_core.tiny.__file__).parent / "weights"
KINDS_OF_WORDS = "COLOUR SHAPE MOTION RELATION LIGHT COUNT ORDER".split()
TABLES = [getattr(captions, f"{name}_WORDS") for name in KINDS_OF_WORDS]


def words_only_in(style: int) -> set[str]:
    """Words that occur in the phrases of one style (2 held, 3 unread) and in no simple or seen phrase."""
    phrases = [entry[style] for table in TABLES for entry in table.values()]
    known = [p for table in TABLES for entry in table.values() for p in (entry[0], *entry[1])]
    words = {word for group in phrases for phrase in group for word in phrase.strip(", ").split()}
    common = {"the", "a", "of", "comes", "on", "by"}
    return words - {word for phrase in known for word in phrase.strip(", ").split()} - common


# --- what is read -------------------------------------------------------------------------------------------


def test_both_read_held_words_but_only_the_language_model_is_told_what_they_mean():
    rng = random.Random(0)
    told, gaps, chats = (
        set(re.findall(r"[a-z0-9]+", " ".join(texts).lower()))
        for texts in (
            [part for _ in range(5000) for part in t5_pair(rng)],
            [t5_text(rng) for _ in range(8000)],
            [chat(rng).prompt for _ in range(8000)],
        )
    )
    held, unread = words_only_in(2), words_only_in(3)
    assert len(held) > 25 and len(unread) > 15
    assert not told & held  # T5's pairs of a caption and its simple form
    assert not (told | gaps | chats) & unread
    assert held <= gaps and held <= chats


def test_held_out_scenes_are_never_read():
    rng = random.Random(0)
    assert not any(scene_of(rng).held_out for _ in range(2000))


def test_chats_teach_every_instruction_and_the_simple_caption():
    rng = random.Random(0)
    chats = [chat(rng) for _ in range(500)]
    assert {c.instruction for c in chats} == {None, *DEFAULT_INSTRUCTIONS}
    plain = [c for c in chats if c.instruction is None]
    assert 0.55 < len(plain) / 500 < 0.75
    facts = re.compile(r"\b(an?|two|three) (red|yellow|green|cyan|blue|purple) (circle|square|triangle)")
    words = [c for c in plain if not facts.search(c.answer)]
    assert words and all(any(c.prompt.endswith(end) for end in "?") or ": " in c.prompt for c in words)
    frames = {facts.split(c.answer)[0] for c in plain if c not in words}
    assert len(frames) == len(ANSWERS) - 1  # with and without a full stop begin alike


def test_variations_keep_the_meaning():
    rng = random.Random(1)
    varied = {vary("a red circle moves left, day turns to night", rng) for _ in range(300)}
    assert len(varied) > 10
    assert any("moving left" in text for text in varied) and any(
        text.startswith("the red") for text in varied
    )
    assert all("red circle" in text and "left" in text and "day" in text for text in varied)
    assert [gerund(v) for v in ("moves", "goes", "flies", "drops", "vanishes", "rises")] == [
        "moving", "going", "flying", "dropping", "vanishing", "rising",
    ]  # fmt: skip


def test_span_corruption_can_be_undone():
    rng = random.Random(0)
    for _ in range(200):
        ids = [*(rng.randrange(100, 900) for _ in range(rng.randrange(1, 40))), 1]
        source, target = corrupt(ids, rng)
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if 3 <= token < 11:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        filled = [t for token in source for t in spans.get(token, [token])]
        assert filled == ids and target[-1] == 1


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizers(folder)
    return folder


def fresh(tokenizers: Path, folder: Path) -> Path:
    """A new output folder with trained tokenizers."""
    for file in tokenizers.rglob("*.json"):
        target = folder / file.relative_to(tokenizers)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return folder


def test_any_text_survives_the_tokenizers(tokenizers):
    text = "naïve 🙂 日本 <|not a token|> spaceship\n\ttwo"
    for name in ("t5", "phi"):
        tokenizer = Tokenizer.from_file(str(tokenizers / name / "tokenizer.json"))
        assert tokenizer.get_vocab_size() == 1024
        assert tokenizer.encode("Red").ids[0] == tokenizer.encode("a red circle").ids[1]  # first word as any
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
    assert Tokenizer.from_file(str(tokenizers / "t5" / "tokenizer.json")).encode("a").ids[-1] == 1


def test_training_text_is_what_the_tokenizer_renders(tokenizers):
    chat_tokenizer = PhiTokenizer.from_folder(tokenizers / "phi")
    raw = Tokenizer.from_file(str(tokenizers / "phi" / "tokenizer.json"))
    rng = random.Random(0)
    for turn in [chat(rng) for _ in range(100)] + [
        Chat("a red circle", DEFAULT_INSTRUCTIONS[0], "one circle")
    ]:
        asked = chat_tokenizer.turn(turn.prompt, turn.instruction).ids
        assert raw.encode(render(turn)).ids == [*asked, *chat_tokenizer.answer_ids(turn.answer), 2]


def test_batches(tokenizers):
    t5_raw, phi_raw = (Tokenizer.from_file(str(tokenizers / n / "tokenizer.json")) for n in ("t5", "phi"))
    source, target = t5_batch(t5_raw, random.Random(0), 9)
    assert source.shape == (9, 64) and target.shape[0] == 9
    ids, weights = llm_batch(phi_raw, random.Random(0), 9)
    assert ids.shape == weights.shape
    for row, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        answer = row.index(5) + 1
        length = answer + row[answer:].index(2) + 1  # the end token is learnt too
        expected = [0.05] * answer + [1.0] * (length - answer) + [0.0] * (len(row) - length)
        assert weight == pytest.approx(expected)


@pytest.mark.parametrize("name", ["t5", "phi"])
def test_stopped_and_resumed_training_equals_training_in_one_go(tokenizers, tmp_path, name, monkeypatch):
    train = {"t5": train_t5, "phi": train_llm}[name]
    whole, parts = fresh(tokenizers, tmp_path / "whole"), fresh(tokenizers, tmp_path / "parts")
    train(whole, seed=5, steps=4, batch=4)
    module = "mimir_core.tiny.text_train.t5_batch" if name == "t5" else "mimir_core.tiny.text_train.llm_batch"
    batch, calls = {"t5": t5_batch, "phi": llm_batch}[name], []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(parts, seed=5, steps=4, batch=4, every=2)
    train(parts, seed=5, steps=4, batch=4)
    a, b = (load_file(folder / name / "model.safetensors") for folder in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    other = fresh(tokenizers, tmp_path / "other")
    train(other, seed=6, steps=4, batch=4)
    c = load_file(other / name / "model.safetensors")
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_written_folders_load_in_transformers_and_here(tokenizers, tmp_path):
    folder = fresh(tokenizers, tmp_path)
    train_t5(folder, steps=1, batch=2)
    train_llm(folder, steps=1, batch=2)
    t5_class, phi_class = cast(Any, transformers.T5EncoderModel), cast(Any, transformers.Phi3ForCausalLM)
    encoder, info = t5_class.from_pretrained(folder / "t5", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and encoder.config.num_layers == 2
    assert T5Encoder.from_folder(folder / "t5", 64).encode("a red circle").hidden.shape == (1, 64, 96)
    theirs, info = phi_class.from_pretrained(folder / "phi", output_loading_info=True)
    theirs = theirs.float()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = load_phi(folder / "phi")
    ids = torch.tensor([[4, 262, 300, 2, 5]])
    with torch.no_grad():
        hidden = ours(ids)[0]
        expected = theirs(ids, output_hidden_states=True)
    assert torch.allclose(hidden, expected.hidden_states[-1], atol=1e-5)
    assert torch.allclose(ours.logits(hidden), expected.logits, atol=1e-5)


def load_phi(folder: Path) -> Phi3ForCausalLM:
    model = Phi3ForCausalLM(PhiConfig.from_dict(json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.float().eval()


# --- shipped weights ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phi() -> tuple[Phi3ForCausalLM, PhiTokenizer]:
    return load_phi(WEIGHTS / "phi"), PhiTokenizer.from_folder(WEIGHTS / "phi")


def test_shipped_text_models_are_small():
    files = [f for name in ("t5", "phi") for f in (WEIGHTS / name).iterdir()]
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    assert sum(f.stat().st_size for f in files) < 3_000_000


def test_shipped_language_model_answers_what_it_has_read_about(phi):
    rates = llm_exact(phi[0], Tokenizer.from_file(str(WEIGHTS / "phi" / "tokenizer.json")), count=100)
    assert min(rates[style] for style in ("simple", "seen", "held", "long")) >= 0.95, rates
    assert min(rates[f"instruction {i}"] for i in (1, 2, 3, 4)) >= 0.95, rates
    # words that nobody knows must stay unknown, or the class is no class
    assert rates["unread"] <= 0.2, rates


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("A ruby orb heading leftward.", "a red circle moves left"),
        ("a red circle moves left above a blue square", "a red circle moves left above a blue square"),
        ("a blue square moves left above a red circle", "a blue square moves left above a red circle"),
        ("a jade orb materialises, succeeded by a plum orb", "a green circle appears, then a purple circle"),
        ("three emerald balls", "three green circles"),
        ("a cobalt tile, the sun comes up", "a blue square, night turns to day"),
    ],
)
def test_shipped_language_model_generates(phi, prompt, answer):
    model, tokenizer = phi
    found = encode_prompt(model, tokenizer, prompt, max_answer_tokens=40)
    assert answer in found.answer_text
    known = encode_known(model, tokenizer, [prompt], [found.answer_text])[0]
    assert found.pieces == known.pieces
    for name in ("query", "answer", "instruction"):
        assert torch.allclose(getattr(found, name), getattr(known, name), atol=1e-4)


@torch.no_grad()
def test_shipped_t5_tells_order():
    """Same words, other order: a set of tokens without positions must differ (the DiT gives text no
    positions).
    """
    t5 = T5Encoder.from_folder(WEIGHTS / "t5", 64)
    a, b = t5.encode(["a red circle above a blue square", "a blue square above a red circle"]).hidden
    assert t5.tokenizer("red")["input_ids"][0] == t5.tokenizer("a red circle")["input_ids"][1]
    red_first, red_second = a[1], b[5]  # the token " red" in both
    assert torch.nn.functional.cosine_similarity(red_first, red_second, dim=0) < 0.9


@torch.no_grad()
def test_a_linear_reader_finds_word_and_order_in_shipped_t5():
    """Which colour stands first is linearly readable from the unordered tokens of unseen scenes."""
    t5, rng = T5Encoder.from_folder(WEIGHTS / "t5", 64), random.Random(0)
    colours = list(captions.COLOUR_WORDS)

    def features(held_out: bool, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = [random_scene(rng, "relation", held_out) for _ in range(count)]
        hidden = t5.encode([captions.caption(s, "seen", rng) for s in scenes]).hidden
        pooled = torch.cat((hidden.amax(1), hidden.amin(1), hidden.mean(1), torch.ones(count, 1)), dim=1)
        return pooled, torch.tensor([colours.index(s.things[0].colour) for s in scenes])

    x, y = features(False, 1500)
    solution = torch.linalg.lstsq(x, torch.nn.functional.one_hot(y, 6).float()).solution
    x, y = features(True, 200)
    assert ((x @ solution).argmax(1) == y).float().mean() > 0.8
