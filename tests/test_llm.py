"""`encode_prompt` against transformers, which reads every sequence separately and from its beginning."""

import logging
import math

import pytest
import torch
import transformers

from mimir_core.config import DEFAULT_INSTRUCTIONS, PhiConfig
from mimir_core.llm import Sampling, common_prefix, encode_known, encode_prompt, sample
from mimir_core.phi import Phi3ForCausalLM
from mimir_core.text import PhiTokenizer
from mimir_core.tiny.bpe import train_tokenizers

PROMPT = "a red circle moves left above a blue square"


def config(border: int) -> PhiConfig:
    """A random model whose rotary factors change after `border` tokens."""
    return PhiConfig(
        vocab_size=1024, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, original_max_position_embeddings=border,
        short_factor=(1.0, 1.1, 1.2, 1.5, 2.0, 3.0), long_factor=(1.5, 2.0, 4.0, 8.0, 16.0, 31.0),
        bos_token_id=1, eos_token_id=(2,), pad_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> PhiTokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    train_tokenizers(folder)
    return PhiTokenizer.from_folder(folder / "phi")


def models(border: int = 2048) -> tuple[Phi3ForCausalLM, transformers.Phi3ForCausalLM]:
    torch.manual_seed(1)
    theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**config(border).to_dict())).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
        theirs.lm_head.weight[:6] = 0  # template tokens are never the likeliest, so that the answer goes on
    ours = Phi3ForCausalLM(config(border)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@torch.no_grad()
def separately(theirs, chat: PhiTokenizer, prompt: str, count: int, layer: int):
    """(query, answer, instruction, answer ids) with no cache and nothing shared."""

    def states(ids: list[int]) -> torch.Tensor:
        return theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]

    turn = chat.turn(prompt)
    ids = turn.ids
    if count:
        start = torch.tensor([ids])
        ids = theirs.generate(start, max_new_tokens=count, do_sample=False, eos_token_id=None)[0].tolist()
    answer = [states(ids[: end + 1])[:, -1:] for end in range(len(turn.ids), len(ids))]
    ends = [states(chat.turn(prompt, instruction).ids)[:, -1:] for instruction in DEFAULT_INSTRUCTIONS]
    query = states(turn.ids)[:, turn.query]
    return query, torch.cat([query[:, :0], *answer], 1), torch.cat(ends, 1), ids[len(turn.ids) :]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


# Where the rotary factors change. 10 tokens are shared; the plain turn has 12, one with an instruction 20-28.
BORDERS = {
    "nowhere": 2048,
    "within the instructions": 23,
    "within the answer": 14,
    "after the prompt's turn": 12,
    "within its header": 11,
    "after the shared beginning": 10,
    "within the shared beginning": 6,
    "before everything": 3,
}


@pytest.mark.parametrize("border", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_equals_separate_sequences_of_transformers(chat, border, layer):
    ours, theirs = models(border)
    query, answer, instruction, ids = separately(theirs, chat, PROMPT, 8, layer)
    found = encode_prompt(ours, chat, PROMPT, max_answer_tokens=8, layer=layer)
    assert relative(found.query, query) < 1e-5
    assert relative(found.answer, answer) < 1e-5
    assert relative(found.instruction, instruction) < 1e-5
    assert found.answer_text == chat.decode(ids) and len(set(ids)) > 3
    assert "".join(found.pieces[:9]) == PROMPT and found.pieces[9:] == [chat.piece(token) for token in ids]
    assert (found.prompt, found.layer, found.instructions) == (PROMPT, layer, DEFAULT_INSTRUCTIONS)


def test_borders_are_where_their_names_say(chat):
    turns = [chat.turn(PROMPT, instruction).ids for instruction in (None, *DEFAULT_INSTRUCTIONS)]
    assert (common_prefix(turns), len(turns[0])) == (10, 12)
    assert min(map(len, turns[1:])) == 20 and max(map(len, turns)) == 28


def test_the_shared_beginning_is_read_once(chat, monkeypatch):
    ours, _ = models()
    read = []
    forward = ours.forward
    monkeypatch.setattr(ours, "forward", lambda ids, *rest: read.append(ids.shape[1]) or forward(ids, *rest))
    encode_prompt(ours, chat, PROMPT, max_answer_tokens=3)
    turns = [chat.turn(PROMPT, instruction).ids for instruction in (None, *DEFAULT_INSTRUCTIONS)]
    shared = common_prefix(turns)
    assert shared >= len(chat.turn(PROMPT).query)
    assert sum(read) == shared + sum(len(ids) - shared for ids in turns) + 3


def test_no_answer_no_instructions_no_prompt(chat):
    ours, theirs = models()
    found = encode_prompt(ours, chat, PROMPT, instructions=(), max_answer_tokens=0)
    assert found.answer.shape == (1, 0, 48) and found.instruction.shape == (1, 0, 48)
    assert found.answer_text == "" and found.query.shape == (1, 9, 48)
    assert relative(found.query, separately(theirs, chat, PROMPT, 0, -1)[0]) < 1e-5
    nothing = encode_prompt(ours, chat, "", max_answer_tokens=2)
    assert nothing.query.shape == (1, 0, 48) and nothing.answer.shape == (1, 2, 48)
    assert nothing.instruction.shape == (1, 4, 48) and len(nothing.pieces) == 2


def test_answer_ends_at_a_stop_token_which_is_not_part_of_it(chat):
    ours, theirs = models()
    *_, ids = separately(theirs, chat, PROMPT, 6, -1)
    assert ids[2] not in ids[:2]
    whole = encode_prompt(ours, chat, PROMPT, max_answer_tokens=6)
    stopped = encode_prompt(
        ours, PhiTokenizer(chat.tokenizer, frozenset({ids[2]})), PROMPT, max_answer_tokens=6
    )
    assert (whole.answer.shape[1], stopped.answer.shape[1]) == (6, 2)
    assert torch.equal(stopped.answer, whole.answer[:, :2])


def test_seed_decides_the_answer_and_nothing_else_does(chat):
    ours, _ = models()

    def answer(seed: int, temperature: float = 2.0) -> str:
        torch.manual_seed(seed + len(answers))
        return encode_prompt(ours, chat, PROMPT, (), 8, temperature, 0.99, seed).answer_text

    answers: list[str] = []
    for seed in (1, 1, 2, 3):
        answers.append(answer(seed))
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3
    assert answer(1, 0.0) == answer(2, 0.0) == encode_prompt(ours, chat, PROMPT, (), 8).answer_text
    before = torch.get_rng_state()
    encode_prompt(ours, chat, PROMPT, (), 4, 1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_query_tokens_coincide_and_answers_scatter(chat):
    """Figure 7b of the paper, which holds for any weights."""
    ours, _ = models()
    runs = [encode_prompt(ours, chat, PROMPT, (), 4, 2.0, seed=seed) for seed in range(6)]
    assert all(torch.equal(run.query, runs[0].query) for run in runs)
    assert len({run.answer_text for run in runs}) > 3


def test_sampling_follows_temperature_and_top_p():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def shares(temperature: float, top_p: float) -> list[float]:
        drawn = [sample(scores, Sampling(temperature, top_p), generator) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(1.0, 0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(1.0, 0.81) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert shares(1.0, 1e-6) == [1, 0, 0, 0]
    cold = [p**2 / (0.25 + 0.09 + 0.0225 + 0.0025) for p in (0.5, 0.3, 0.15, 0.05)]
    assert shares(0.5, 1.0) == pytest.approx(cold, abs=0.03)
    assert shares(0.0, 1.0) == [1, 0, 0, 0]
    assert sample(torch.tensor([-math.inf, 0.0, -math.inf]), Sampling(1.0), generator) == 1


def test_progress_is_reported_per_token(chat):
    ours, _ = models()
    calls = []
    encode_prompt(ours, chat, PROMPT, (), 3, on_token=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_known_answers_give_the_same_tokens(chat):
    ours, _ = models()
    prompts = [PROMPT, "two green triangles", ""]
    one_by_one = [encode_prompt(ours, chat, p, max_answer_tokens=0, layer=-2) for p in prompts]
    together = encode_known(ours, chat, prompts, ["a red circle", "two", ""], layer=-2)
    for prompt, a, b in zip(prompts, one_by_one, together, strict=True):
        assert a.query.shape == b.query.shape and torch.allclose(a.query, b.query, atol=1e-4)
        assert relative(b.instruction, a.instruction) < 1e-5
        assert b.prompt == prompt
    assert [t.answer_text for t in together] == ["a red circle", "two", ""]
    ids = [*chat.turn(PROMPT).ids, *chat.answer_ids("a red circle")]
    with torch.no_grad():
        (states,) = ours(torch.tensor([ids]), layers=(-2,))
    assert relative(together[0].answer, states[:, -together[0].answer.shape[1] :]) < 1e-5
    assert together[2].query.shape[1] == 0


def test_five_thousand_words_are_shortened_to_the_models_positions(chat, caplog):
    _, theirs = models()
    small = config(2048)
    ours = Phi3ForCausalLM(PhiConfig(**{**vars(small), "max_position_embeddings": 128})).eval()
    ours.load_state_dict(theirs.state_dict())
    with caplog.at_level(logging.WARNING, logger="mimir_core.llm"):
        found = encode_prompt(ours, chat, "red circle " * 2500, max_answer_tokens=10)
    assert 60 < found.query.shape[1] < 128 - 10
    assert found.prompt == ("red circle " * 60)[: len(found.prompt)]
    assert "cut" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_answer_tokens": -1}, "max_answer_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"layer": 9}, "layer is 9.*use -1, the last one"),
    ],
)
def test_settings_out_of_range_are_refused(chat, settings, message):
    ours, _ = models()
    with pytest.raises(ValueError, match=message):
        encode_prompt(ours, chat, PROMPT, **settings)
