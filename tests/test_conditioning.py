"""Conditions in files: what goes in comes out, what cannot go in is named, and damage is noticed."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mimir_core import provenance, weights
from mimir_core.conditioning import MARK, load_conditions, save_conditions, zeros_like
from mimir_core.provenance import NO_ORIGIN, RECORD, checksum, current, differences, fused_record, sealed

T5 = {"file": "t5xxl_fp16.safetensors", "fingerprint": "a" * 64, "dtype": "float16"}
LLM = {
    "file": "Phi-3.5-mini-instruct",
    "fingerprint": "b" * 64,
    "dtype": "fp8_e4m3fn",
    "computed": "bfloat16",
    "prompt": "a red circle",
    "instructions": "Name the objects.\nName the colours.",
    "answer": "One circle.",
    "answer_length": 64,
    "temperature": 0.7,
    "seed": 5,
    "layer": -1,
}
FUSER = {
    "file": "fuser.safetensors",
    "fingerprint": "c" * 64,
    "preset": "as trained",
    "strength": 1.0,
    "start": 0.0,
    "end": 1.0,
}


def tokens(seed: int = 0, length: int = 6) -> torch.Tensor:
    return torch.randn(1, length, 4, generator=torch.Generator().manual_seed(seed))


def entry(values: torch.Tensor | None = None, **changes: Any) -> list[Any]:
    """A fused entry with its record; `changes` {"llm.seed": 6} to the record."""
    values = tokens() if values is None else values
    text = provenance.text_record("a red circle", T5, 6)
    record = fused_record(text, LLM, FUSER)
    for path, value in changes.items():
        part, _, name = path.partition(".")
        if name:
            record[part] = {**record[part], name: value}
        else:
            record[part] = value
    return [values, {"pooled_output": None, RECORD: sealed(record, values, "0.1.0")}]


# -- what goes in comes out ---------------------------------------------------------------------------------


def random_tensor(chance: random.Random) -> torch.Tensor:
    shape = [chance.randrange(0, 4) for _ in range(chance.randrange(0, 4))]
    made = torch.randn(shape, generator=torch.Generator().manual_seed(chance.randrange(1000))) * 50
    kinds = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.uint8,
    ]
    made = made.to(chance.choice([*kinds, torch.float8_e4m3fn]))
    return made.transpose(0, -1) if len(shape) > 1 else made


def random_value(chance: random.Random, depth: int = 0) -> Any:
    leaves = [
        lambda: None,
        lambda: chance.random() < 0.5,
        lambda: chance.randrange(-(2**70), 2**70),
        lambda: chance.uniform(-1, 1) * 10.0 ** chance.randrange(-300, 300),
        lambda: "".join(chance.choice('az ."\\\n\0äß漢🙂\ud800') for _ in range(chance.randrange(6))),
        lambda: random_tensor(chance),
    ]
    nests = [
        lambda: [random_value(chance, depth + 1) for _ in range(chance.randrange(4))],
        lambda: tuple(random_value(chance, depth + 1) for _ in range(chance.randrange(4))),
        lambda: {random_name(chance): random_value(chance, depth + 1) for _ in range(chance.randrange(4))},
    ]
    return chance.choice(leaves + nests * (depth < 3))()


def random_name(chance: random.Random) -> str:
    return chance.choice(["tensor", "tuple", "dict", "tokens", "0", "a.0", "a", "dtype", "é", ""])


def random_tokens(chance: random.Random) -> torch.Tensor:
    made = torch.randn(
        *(chance.randrange(1, 4) for _ in range(3)), generator=torch.Generator().manual_seed(1)
    )
    return made.to(chance.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16]))


def random_condition(seed: int) -> list[Any]:
    chance = random.Random(seed)
    return [
        [
            random_tokens(chance),
            {random_name(chance): random_value(chance) for _ in range(chance.randrange(6))},
        ]
        for _ in range(chance.randrange(1, 4))
    ]


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure, dtype, shape and bits."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return alike and checksum(a) == checksum(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_data_comes_back(seed: int, tmp_path: Path) -> None:
    positive, negative = random_condition(seed), random_condition(seed + 1000)
    file = tmp_path / "a.safetensors"
    save_conditions(file, positive, negative)
    found = load_conditions(file)
    assert same(found.positive, positive) and found.negative is not None and same(found.negative, negative)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    save_conditions(file, found.positive)  # over the file that was just read
    assert same(load_conditions(file).positive, positive) and load_conditions(file).negative is None


def test_an_entry_without_tokens_comes_back(tmp_path: Path) -> None:
    positive = [[None, {"strength": 0.5}]]
    save_conditions(tmp_path / "a.safetensors", positive)
    assert load_conditions(tmp_path / "a.safetensors").positive == positive
    assert zeros_like(positive) == [[None, {}]]
    assert (
        "no tokens: a sampler for CogVideoX cannot use it"
        in load_conditions(tmp_path / "a.safetensors").text()
    )


def test_bfloat16_halves_the_tokens_and_nothing_else(tmp_path: Path) -> None:
    values, pooled = tokens(length=4000), tokens(1)
    condition = [[values, {"pooled_output": pooled, RECORD: entry(values)[1][RECORD]}]]
    sizes = {}
    for precision in ("exact", "bfloat16"):
        file = tmp_path / f"{precision}.safetensors"
        save_conditions(file, condition, precision=precision)
        sizes[precision] = file.stat().st_size
    assert sizes["bfloat16"] < 0.6 * sizes["exact"]
    saved = load_conditions(tmp_path / "bfloat16.safetensors")
    ((found, options),) = saved.positive
    assert found.dtype == torch.float32 and torch.equal(found, values.bfloat16().float())
    assert torch.equal(options["pooled_output"], pooled)
    assert "float32 rounded to bfloat16" in saved.text() and "changed" not in saved.text()
    assert differences(saved.positive, condition)[-1].endswith("and the file is rounded to bfloat16")


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    condition = [[tokens(), {"strength": numpy.float32(0.5), "start": numpy.int64(3)}]]
    save_conditions(tmp_path / "a.safetensors", condition)
    assert load_conditions(tmp_path / "a.safetensors").positive[0][1] == {"strength": 0.5, "start": 3}


def test_the_header_is_readable(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_conditions(file, [entry(prompt="赤い円")], [[tokens(3), {}]], pack="9.9.9")
    with safe_open(str(file), "pt") as opened:
        header = json.loads(opened.metadata()[MARK])
        assert "赤い円" in opened.metadata()[MARK]
    assert header["positive"][0]["made"]["llm"]["answer"] == "One circle."
    text = load_conditions(file).text()
    for words in (
        "a.safetensors, saved by version 9.9.9, exact",
        "prompt: 赤い円",
        "T5: t5xxl_fp16.safetensors (aaaaaaaaaaaa), float16, 6 tokens",
        "prompt for Phi-3.5: a red circle",
        "Phi-3.5: Phi-3.5-mini-instruct (bbbbbbbbbbbb), fp8_e4m3fn computed in bfloat16, layer -1, answer ",
        "    Name the colours.",
        "answer: One circle.",
        "fuser: fuser.safetensors (cccccccccccc), preset as trained, strength 1.0",
        "made by version 0.1.0",
        "negative\n  made by other nodes: nothing is known about it",
    ):
        assert words in text, text


# -- what cannot go in, and what is no such file ------------------------------------------------------------


class ControlNet:
    pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"control": ControlNet()}, "negative condition, part 2, holds 'control' .a ControlNet, ControlNet"),
        ({"hooks": object()}, "holds 'hooks' .hooks "),
        ({"gligen": ("position", ControlNet(), [])}, "holds 'gligen.1' .GLIGEN"),
        ({"mine": [{"deep": ControlNet()}]}, "holds 'mine.0.deep' .an object, ControlNet"),
        ({"strength": math.nan}, "holds 'strength' .nan, float"),
        ({"table": {1: 2}}, "holds 'table' .an object, dict"),
        ({"pooled_output": torch.tensor([math.nan])}, "has NaN in 'pooled_output'"),
        ({"start_percent": 1.5}, "part 2, has 1.5 as 'start_percent', so it is not saved"),
    ],
)
def test_what_no_file_can_hold_is_named(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        save_conditions(tmp_path / "a.safetensors", [[tokens(), {}]], [[tokens(), {}], [tokens(), options]])
    assert list(tmp_path.iterdir()) == []


def test_broken_tokens_are_refused_and_infinite_masks_are_not(tmp_path: Path) -> None:
    broken = tokens()
    broken[0, 0, 0] = math.inf
    with pytest.raises(
        ValueError, match="positive condition, part 1, has NaN or infinity in 4% of its tokens"
    ):
        save_conditions(tmp_path / "a.safetensors", [[broken, {}]])
    mask = torch.tensor([0.0, -math.inf])
    save_conditions(tmp_path / "a.safetensors", [[tokens(), {"attention_mask": mask}]], precision="bfloat16")
    assert torch.equal(load_conditions(tmp_path / "a.safetensors").positive[0][1]["attention_mask"], mask)
    with pytest.raises(ValueError, match="positive condition is empty"):
        save_conditions(tmp_path / "b.safetensors", [])
    with pytest.raises(ValueError, match="dtype is 'fp4', expected one of exact, bfloat16"):
        save_conditions(tmp_path / "b.safetensors", [entry()], precision="fp4")


def test_every_way_of_cutting_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    save_conditions(whole, [[tokens(), {"strength": 0.5}]])
    data = whole.read_bytes()
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        assert_one_sentence(file)
    at = data.index(tokens().numpy().tobytes())
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match="^broken.safetensors is a saved condition, but a damaged one: copy"):
        load_conditions(file)
    chance = random.Random(0)
    for _ in range(300):  # anything may stand in a header: it is read or refused, never another error
        changed = bytearray(data)
        changed[chance.randrange(8, at)] = chance.randrange(256)
        file.write_bytes(changed)
        try:
            load_conditions(file)
        except ValueError as error:
            assert "broken.safetensors" in str(error)


def assert_one_sentence(file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_conditions(file)
    text = str(caught.value)
    assert text.startswith(file.name) and text.endswith(".") and "\n" not in text, text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"llm_conv.weight": torch.zeros(2, 2)}, "is a Mimir Token Fuser, but a saved condition is needed"),
        ({"a.lora_A.weight": torch.zeros(2, 2)}, "is a LoRA, but a saved condition is needed here: choose"),
        ({"latent_tensor": torch.zeros(2)}, "is no model that this pack knows, but a saved condition"),
        ({MARK: torch.zeros(1)}, "is a saved condition, but a damaged one"),
    ],
)
def test_foreign_files_are_named(state: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    save_file(state, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match=f"^x.safetensors {words}"):
        load_conditions(tmp_path / "x.safetensors")


def test_a_newer_file_asks_for_an_update(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({MARK: torch.tensor([2])}, str(file), {MARK: json.dumps({"format": 2})})
    with pytest.raises(
        ValueError, match="newer version of this pack .file format 2, this one reads up to 1.: update"
    ):
        load_conditions(file)
    with pytest.raises(ValueError, match="nowhere.safetensors does not exist"):
        load_conditions(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    "read", [weights.read_transformer, weights.read_t5, weights.read_vae, weights.read_fuser]
)
def test_model_loaders_refuse_a_condition_by_its_name(read: Any, tmp_path: Path) -> None:
    save_conditions(tmp_path / "a.safetensors", [entry()])
    with pytest.raises(ValueError, match=r"a.safetensors is a saved condition \(which Load Conditioning"):
        read(tmp_path / "a.safetensors")


# -- how it was made, and what differs ----------------------------------------------------------------------


def test_nothing_differs_from_itself(tmp_path: Path) -> None:
    save_conditions(tmp_path / "a.safetensors", [entry()])
    assert differences(load_conditions(tmp_path / "a.safetensors").positive, [entry()]) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("prompt", "a blue circle", "prompt: the file has 'a red circle', the graph has 'a blue circle'"),
        ("text_length", 226, "text length: the file has 6, the graph has 226"),
        (
            "t5.fingerprint",
            "d" * 64,
            r"T5: the file has .*\(aaaaaaaaaaaa\).*, the graph has .*\(dddddddddddd\)",
        ),
        ("t5.changed", "a LoRA", "T5, changed: the file has none, the graph has 'a LoRA'"),
        ("t5", dict(NO_ORIGIN), "T5: the graph does not know which weights it used"),
        ("llm.fingerprint", "d" * 64, "Phi-3.5: the file has "),
        ("llm.dtype", "float32", "Phi-3.5, dtype: the file has 'fp8_e4m3fn', the graph has 'float32'"),
        (
            "llm.instructions",
            "Name the objects.\nName it.",
            "instruction 2: the file has 'Name the colours.'",
        ),
        ("llm.instructions", "Name the objects.", "instruction 2: .*, the graph has none"),
        ("llm.answer", "Two.", "answer: the file has 'One circle.', the graph has 'Two.'"),
        ("llm.answer_length", 8, "answer length: "),
        ("llm.temperature", 0.0, "temperature: the file has 0.7, the graph has 0"),
        ("llm.seed", 6, "seed: the file has 5, the graph has 6"),
        ("llm.layer", -2, "layer: "),
        ("fuser.fingerprint", "d" * 64, "fuser: the file has fuser.safetensors"),
        ("fuser.preset", "norm", "preset: the file has 'as trained', the graph has 'norm'"),
        ("fuser.strength", 0.5, "strength: the file has 1, the graph has 0.5"),
        ("fuser.end", 0.5, "end: the file has 1, the graph has 0.5"),
        ("fuser", None, "fuser: the file has .*, the graph has none"),
        ("changed", "changed by another node", "changed by other nodes: the file has none"),
    ],
)
def test_one_changed_field_is_one_difference(path: str, value: Any, words: str) -> None:
    live = entry(**{path: value})
    if value is None:
        live[1][RECORD].pop(path)
    (line,) = differences([entry()], [live])
    assert re.match(words, line), line


def test_tokens_parts_and_unknown_makers_are_compared() -> None:
    assert differences([entry()], [entry(tokens() * 1.01)]) == [
        "tokens: they differ by 9.9e-03 of their size"
    ]
    assert differences([entry()], [entry(tokens(length=8))])[-1] == (
        "tokens: the file has (1, 6, 4), the graph has (1, 8, 4)"
    )
    assert differences([entry()] * 2, [entry()]) == ["parts: the file has 2, the graph has 1"]
    assert differences([entry()] * 2, [entry(), entry(prompt="x")])[0].startswith("part 2: prompt: ")
    plain = [tokens(), {}]
    assert differences([entry()], [plain]) == [
        "the graph does not know how its condition was made: only tokens are compared"
    ]
    assert differences([plain], [plain]) == []


def test_changed_tokens_are_noticed_and_the_file_says_so(tmp_path: Path) -> None:
    """As core's nodes do it: new tokens, the old options."""
    _, options = entry()
    for values, how in ((tokens() * 0.5, "changed"), (torch.zeros(1, 6, 4), "set to zero")):
        record = current(options, values)
        assert record is not None and record["changed"] == f"{how} by another node"
        save_conditions(tmp_path / "a.safetensors", [[values, options]])
        saved = load_conditions(tmp_path / "a.safetensors")
        assert f"careful: the tokens were {how} by another node; this is what they were made" in saved.text()
        assert current(saved.positive[0][1], values) == record  # loading and saving again loses nothing
    assert "changed" not in (current(options, tokens()) or {})


def test_a_checksum_sees_bits_shape_and_dtype() -> None:
    values = tokens()
    assert checksum(values) == checksum(values.clone()) == checksum(values.transpose(1, 2).transpose(1, 2))
    others = [values.double(), values.reshape(1, 4, 6), -values, values.bfloat16()]
    assert len({checksum(values), *map(checksum, others)}) == 5


def test_records_hold_no_list() -> None:
    """Core's training node would walk through a list of strings without end."""

    def leaves(value: Any) -> list[Any]:
        return (
            [leaf for item in value.values() for leaf in leaves(item)] if isinstance(value, dict) else [value]
        )

    record = entry()[1][RECORD]
    assert all(isinstance(leaf, (str, int, float)) for leaf in leaves(record))
    assert json.loads(json.dumps(record)) == record
