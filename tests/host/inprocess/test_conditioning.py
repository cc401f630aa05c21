"""Conditions that know how they were made: among core's nodes and samplers, and in files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.hooks
import folder_paths
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_hooks, nodes_train
from mimir_pack import mimir_core, nodes
from mimir_pack.mimir_core.conditioning import load_conditions
from mimir_pack.mimir_core.headers import fingerprint
from mimir_pack.mimir_core.provenance import RECORD, checksum, current
from mimir_pack.nodes.host import conditioning as host_conditioning
from mimir_pack.nodes.host import fuser as host_fuser
from mimir_pack.nodes.host import tiny

import nodes as host_nodes

PROMPT = "a red circle moves left"
INSTRUCTIONS = "Name it.\nName its colour.\nSay where it is.\nSay what moves."
READ = {"instructions": INSTRUCTIONS, "answer_length": 4, "temperature": 0.5, "seed": 3, "layer": -1}
Node = Callable[..., tuple[Any, ...]]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, ...]:
    return tiny.load_tiny("mimir")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    yield tmp_path


def fuse(run_node: Node, parts: tuple[Any, ...], text: str = PROMPT, **options: Any) -> list[Any]:
    _, t5, phi, fuser, _ = parts
    read = {**READ, **{name: options.pop(name) for name in list(options) if name in READ}}
    (condition,) = run_node(nodes.MimirT5Encode, clip=options.pop("clip", t5), text=text)
    tokens, _ = run_node(nodes.MimirPhiEncode, clip=phi, text=text, **read)
    options = {"fuser": fuser, "preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0, **options}
    return run_node(nodes.MimirTokenFuser, conditioning=condition, tokens=tokens, **options)[0]


def without(condition: list[Any]) -> list[Any]:
    """The same condition as if nothing were known about it."""
    return [[tokens, {k: v for k, v in options.items() if k != RECORD}] for tokens, options in condition]


# -- what is recorded ---------------------------------------------------------------------------------------


def test_the_record_says_how_it_was_made(parts, run_node):
    ((tokens, options),) = fuse(run_node, parts, strength=0.75)
    record = options[RECORD]
    assert record["checksum"] == checksum(tokens) and record["pack"] == mimir_core.__version__
    assert (record["prompt"], record["text_length"], record["dtype"]) == (
        PROMPT,
        tokens.shape[1] - 4,
        "float32",
    )
    weights = {"t5": "t5/model.safetensors", "llm": "phi/model.safetensors", "fuser": "fuser.safetensors"}
    for part, file in weights.items():
        assert record[part]["fingerprint"] == fingerprint(tiny.FOLDER / file), part
    assert (record["t5"]["file"], record["llm"]["file"]) == ("t5", "phi")
    assert "changed" not in record["t5"] and record["llm"]["computed"] == "float32"
    assert {name: record["llm"][name] for name in READ} == READ and record["llm"]["prompt"] == PROMPT
    assert isinstance(record["llm"]["answer"], str)
    settings = {"preset": "as trained", "strength": 0.75, "start": 0.0, "end": 1.0}
    assert record["fuser"] == {**record["fuser"], **settings}
    assert json.loads(json.dumps(record)) == record


def test_t5_alone_says_what_it_cut(parts, run_node):
    (condition,) = run_node(nodes.MimirT5Encode, clip=parts[1], text="red " * 200)
    record = condition[0][1][RECORD]
    assert record["cut_tokens"] > 100 and record["cut_text"].startswith("red")
    assert "llm" not in record and "fuser" not in record


def test_a_window_keeps_t5s_record_outside(parts, run_node):
    fused, before, after = fuse(run_node, parts, start=0.2, end=0.8)
    assert fused[1][RECORD]["fuser"]["end"] == 0.8
    for entry in (before, after):
        assert "fuser" not in entry[1][RECORD]
    for tokens, options in (fused, before, after):
        assert options[RECORD]["checksum"] == checksum(tokens)


@pytest.mark.parametrize("how", ["strength 0", "untrained"])
def test_a_fusion_that_changes_nothing_is_recorded_too(how, parts, run_node):
    options = {"strength": 0.0} if how == "strength 0" else {"fuser": host_fuser.untrained_fuser()}
    ((tokens, found),) = fuse(run_node, parts, **options)
    (text,) = run_node(nodes.MimirT5Encode, clip=parts[1], text=PROMPT)
    assert torch.equal(tokens, text[0][0])
    record = found[RECORD]["fuser"]
    expected = ("fuser.safetensors", 0.0) if how == "strength 0" else (host_fuser.UNTRAINED, 1.0)
    assert (record["file"], record["strength"]) == expected


def test_changed_and_unknown_weights_are_called_so(parts, run_node, monkeypatch):
    clip = parts[1].clone()
    key = "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    width = clip.patcher.model.state_dict()[key].shape
    assert clip.patcher.add_patches({key: ("diff", (torch.ones(width) * 0.1,))}, 0.5) == [key]
    clip.clip_layer(-2)
    record = run_node(nodes.MimirT5Encode, clip=clip, text=PROMPT)[0][0][1][RECORD]
    assert record["t5"]["changed"] == "a LoRA on 1 tensors (strength 0.5) and clip layer -2"
    monkeypatch.setattr(parts[1].cond_stage_model, "origin", None)  # as another loader's
    record = run_node(nodes.MimirT5Encode, clip=parts[1], text=PROMPT)[0][0][1][RECORD]
    assert record["t5"]["file"] == record["t5"]["fingerprint"] == "unknown"


def test_a_condition_of_other_nodes_is_fused_as_unknown(parts, run_node):
    with torch.inference_mode():
        (condition,) = host_nodes.CLIPTextEncode().encode(parts[1], PROMPT)
    tokens, _ = run_node(nodes.MimirPhiEncode, clip=parts[2], text=PROMPT, **READ)
    options = {"fuser": parts[3], "preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0}
    (fused,) = run_node(nodes.MimirTokenFuser, conditioning=condition, tokens=tokens, **options)
    record = fused[0][1][RECORD]
    assert record["prompt"] == "unknown" and record["llm"]["prompt"] == PROMPT


# -- harmless to core, and never a lie ----------------------------------------------------------------------


SUPPLIES = {
    "MASK": lambda: torch.ones(1, 8, 8),
    "LATENT": lambda: {"samples": torch.zeros(1, 16, 3, 8, 8)},
    "HOOKS": lambda: comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0),
    "TIMESTEPS_RANGE": lambda: (0.1, 0.9),
}
VALUES = {"INT": 64, "FLOAT": 0.5, "BOOLEAN": True, "STRING": "x"}


def core_nodes() -> dict[str, tuple[Any, dict[str, Any]]]:
    """{name: (class, inputs)} of core's nodes from CONDITIONING to CONDITIONING that need no model."""
    found = {}
    for name, node in {**host_nodes.NODE_CLASS_MAPPINGS, **nodes_hooks.NODE_CLASS_MAPPINGS}.items():
        if "CONDITIONING" not in getattr(node, "RETURN_TYPES", ()) or name.startswith("Mimir"):
            continue
        inputs = {key: value_for(value) for key, value in node.INPUT_TYPES()["required"].items()}
        if "CONDITIONING" in inputs.values() and None not in inputs.values():
            found[name] = (node, inputs)
    return found


def value_for(declared: Any) -> Any:
    kind = declared[0]
    if isinstance(kind, list):
        return kind[0] if kind else None
    if kind == "CONDITIONING":
        return kind
    return SUPPLIES[kind]() if kind in SUPPLIES else VALUES.get(kind)


CORE_NODES = core_nodes()


def apply(name: str, condition: list[Any], other: list[Any]) -> list[Any]:
    """A core node's first output; its second condition, if it takes one, is `other`."""
    node, inputs = CORE_NODES[name]
    sources = iter([condition, other, condition, other])
    taken = {key: next(sources) if value == "CONDITIONING" else value for key, value in inputs.items()}
    with torch.inference_mode():
        return getattr(node(), node.FUNCTION)(**taken)[0]


def test_the_core_nodes_that_matter_are_among_them():
    names = {
        "Average",
        "Combine",
        "Concat",
        "SetArea",
        "SetMask",
        "SetTimestepRange",
        "ZeroOut",
        "SetProperties",
    }
    assert {f"Conditioning{name}" for name in names} <= set(CORE_NODES)


@pytest.mark.parametrize("name", CORE_NODES)
def test_core_nodes_do_the_same_with_a_record(name, parts, run_node):
    condition, other = fuse(run_node, parts), fuse(run_node, parts, "a blue square")
    found = apply(name, condition, other)
    plain = apply(name, without(condition), without(other))
    assert len(found) == len(plain) > 0
    for (tokens, options), (expected, expected_options) in zip(without(found), plain, strict=True):
        assert torch.equal(tokens, expected) and options.keys() == expected_options.keys()
    known = [checksum(condition[0][0]), checksum(other[0][0])]
    for tokens, options in found:
        record = current(options, tokens)
        assert record and ("changed" in record) == (checksum(tokens) not in known), name


def sample(model: Any, positive: list[Any], negative: list[Any]) -> torch.Tensor:
    empty = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    with torch.inference_mode():
        options = (model, 7, 2, 2.0, "euler", "simple", positive, negative, empty)
        return host_nodes.common_ksampler(*options)[0]["samples"]


def test_samplers_do_the_same_with_a_record(parts, run_node):
    model, positive, negative = parts[0], fuse(run_node, parts), fuse(run_node, parts, "")
    expected = sample(model, without(positive), without(negative))
    assert torch.equal(sample(model, positive, negative), expected)

    def call(node: Any, **inputs: Any) -> Any:
        if hasattr(node, "EXECUTE_NORMALIZED"):
            return run_node(node, **inputs)[0]
        return getattr(node(), node.FUNCTION)(**inputs)[0]

    (advanced,) = run_node(
        custom.SamplerCustomAdvanced,
        noise=call(custom.RandomNoise, noise_seed=7),
        guider=call(custom.CFGGuider, model=model, positive=positive, negative=negative, cfg=2.0),
        sampler=call(custom.KSamplerSelect, sampler_name="euler"),
        sigmas=call(custom.BasicScheduler, model=model, scheduler="simple", steps=2, denoise=1.0),
        latent_image={"samples": torch.zeros(1, 16, 3, 8, 8)},
    )[:1]
    assert torch.equal(advanced["samples"], expected)
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, SUPPLIES["HOOKS"]())
    assert torch.equal(sample(model, hooked, negative), sample(model, without(hooked), negative))


def test_cores_training_walks_through_a_record(parts, run_node):
    condition = fuse(run_node, parts)
    options = {**condition[0][1]}
    nodes_train.process_cond_list({"positive": [{"cross_attn": condition[0][0], **options}]})
    assert options[RECORD] == condition[0][1][RECORD]


# -- files ---------------------------------------------------------------------------------------------------


def save(run_node: Node, positive: Any, **options: Any) -> Path:
    options = {"filename_prefix": "conditioning", "dtype": "exact", **options}
    return Path(run_node(nodes.MimirSaveConditioning, positive=positive, **options)[0])


def test_saved_and_loaded_is_the_same_condition(parts, run_node, folders):
    positive, negative = fuse(run_node, parts, start=0.2), fuse(run_node, parts, "")
    path = save(run_node, positive, negative=negative)
    assert path == folders / "output/mimir/conditioning_00001_.safetensors"
    assert save(run_node, positive).name == "conditioning_00002_.safetensors"
    name = "mimir/conditioning_00001_.safetensors [output]"
    assert name in host_conditioning.choices()
    found = run_node(nodes.MimirLoadConditioning, file=name, compare=positive, compare_negative=negative)
    for loaded, made in zip(found[:2], (positive, negative), strict=True):
        assert len(loaded) == len(made)
        for (tokens, options), (expected, wanted) in zip(loaded, made, strict=True):
            assert torch.equal(tokens, expected) and options.keys() == wanted.keys()
            assert torch.equal(options.pop("attention_mask"), wanted["attention_mask"])
            assert options == {key: value for key, value in wanted.items() if key != "attention_mask"}
    assert found[2].startswith("Nothing differs from what the graph holds.")
    assert f"prompt: {PROMPT}" in found[2] and "(from 0.2 to 1 of the sampling)" in found[2]


def test_the_node_shows_where_the_file_is(parts, run_node, folders):
    with torch.inference_mode():
        result = nodes.MimirSaveConditioning.EXECUTE_NORMALIZED(
            positive=fuse(run_node, parts), filename_prefix="a/b", dtype="bfloat16"
        )
    place = {"filename": "b_00001_.safetensors", "subfolder": "mimir/a", "type": "output"}
    assert result.ui["conditioning"] == [place]
    (text,) = result.ui["text"]
    assert text.startswith("Saved bfloat16 (0.0 MB) as output/mimir/a/b_00001_.safetensors.\nTo share it")
    assert len(text.splitlines()) == 2 and PROMPT not in text
    assert nodes.MimirSaveConditioning.GET_SCHEMA().is_output_node


def test_without_a_negative_there_are_zeros(parts, run_node, folders):
    positive = fuse(run_node, parts)
    save(run_node, positive)
    file = host_conditioning.choices()[0]
    _, negative, text = run_node(nodes.MimirLoadConditioning, file=file)
    assert negative[0][0].shape == positive[0][0].shape and not negative[0][0].any()
    assert text.startswith("The file has no negative: zeros stand for it") and text.endswith("negative: none")
    assert torch.isfinite(sample(parts[0], positive, negative)).all()


def test_zero_out_is_called_so_in_the_file(parts, run_node, folders):
    positive = fuse(run_node, parts)
    path = save(run_node, positive, negative=apply("ConditioningZeroOut", positive, []))
    text = load_conditions(path).text()
    assert text.count("careful: the tokens were set to zero by another node") == 1
    mixed = apply("ConditioningAverage", positive, fuse(run_node, parts, "a blue square"))
    _, _, text = run_node(
        nodes.MimirLoadConditioning, file="mimir/conditioning_00001_.safetensors [output]", compare=mixed
    )
    assert "the file has none, the graph has 'changed by another node'" in text


def test_what_differs_is_said_in_words(parts, run_node, folders):
    save(run_node, fuse(run_node, parts))
    file = host_conditioning.choices()[0]

    def report(**inputs: Any) -> str:
        return run_node(nodes.MimirLoadConditioning, file=file, **inputs)[2]

    other = fuse(run_node, parts, "a blue circle", seed=4, strength=0.5)
    text = report(compare=other)
    assert " differences from what the graph holds:" in text.splitlines()[1]
    for words in (
        f"prompt: the file has '{PROMPT}', the graph has 'a blue circle'",
        "seed: the file has 3, the graph has 4",
        "strength: the file has 1, the graph has 0.5",
        "tokens: they differ by ",
    ):
        assert words in text
    changed = INSTRUCTIONS.replace("Name it.", "Count it.")
    text = report(prompt=f" {PROMPT}\n", instructions=changed)
    assert "1 difference from what the graph holds:" in text
    assert "instruction 1: the file has 'Name it.', the graph has 'Count it.'" in text
    assert "Nothing differs" in report(prompt=PROMPT, instructions=INSTRUCTIONS)
    assert "differ" not in report()


def test_hooks_are_refused_by_name(parts, run_node, folders):
    hooked = comfy.hooks.set_hooks_for_conditioning(fuse(run_node, parts), SUPPLIES["HOOKS"]())
    with pytest.raises(
        ValueError, match=r"positive condition, part 1, holds 'hooks' \(hooks \(such as a sch"
    ):
        save(run_node, hooked)
    assert list((folders / "output/mimir").iterdir()) == []


@pytest.mark.parametrize("prefix", ["../x", "..", "a/../../x", "."])
def test_files_stay_below_their_folder(prefix, parts, run_node, folders):
    with pytest.raises(ValueError, match="expected a name below output/mimir"):
        save(run_node, [[torch.zeros(1, 1, 1), {}]], filename_prefix=prefix)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("x" * 300, "is 300 bytes long, expected at most 200"),
        ("a/" * 2000, "bytes long"),
        ("a\nb", r"has '\\n', which not every system"),
        ("a\0b", r"has '\\x00'"),
        ("\ud800", "which not every system"),
        *((f"a{char}b", "which not every system can store") for char in '<>:"|?*\x7f'),
        ("CON", "has the part 'CON', which Windows cannot store"),
        ("a/nul.b/c", "has the part 'nul.b'"),
        ("a./b", "has the part 'a.'"),
        ("%date:hh:mm%", "has ':'"),
    ],
)
def test_names_that_no_other_system_takes_are_refused(prefix, words, run_node, folders):
    with pytest.raises(ValueError, match=words) as refused:
        save(run_node, [[torch.zeros(1, 1, 1), {}]], filename_prefix=prefix)
    message = str(refused.value)
    assert message.startswith("filename_prefix ") and "\n" not in message and len(message) < 300
    assert not any((folders / "output").iterdir())


def test_placeholders_and_other_languages_work_in_names(run_node, folders):
    entry = [[torch.zeros(1, 1, 1), {}]]
    for prefix, pattern in (
        ("%year%/%month%_x", r"\d{4}/\d\d_x_00001_"),
        ("%date:yyyy-MM-dd%", r"\d{4}-\d\d-\d\d_00001_"),
        ("%Sampler.seed%", "%Sampler.seed%_00001_"),
        ("赤い円 1.5", "赤い円 1.5_00001_"),
    ):
        path = save(run_node, entry, filename_prefix=prefix).relative_to(folders / "output/mimir")
        assert re.fullmatch(f"{pattern}.safetensors", path.as_posix()), path


def test_input_and_output_are_listed_newest_first(run_node, folders):
    condition = [[torch.ones(1, 2, 3), {}]]
    first = save(run_node, condition, filename_prefix=" ")
    (folders / "input/mimir").mkdir()
    for index, name in enumerate(["shared.safetensors", "mimir/other.sft", "picture.png"]):
        (folders / "input" / name).write_bytes(first.read_bytes())
        os.utime(folders / "input" / name, (2e9 + index, 2e9 + index))
    own = "mimir/conditioning_00001_.safetensors [output]"
    example = host_conditioning.EXAMPLE
    assert host_conditioning.choices() == ["mimir/other.sft", "shared.safetensors", own, example]
    node = nodes.MimirLoadConditioning
    assert torch.equal(run_node(node, file="shared.safetensors")[0][0][0], condition[0][0])
    before = node.fingerprint_inputs(file="shared.safetensors", compare=None)
    os.utime(folders / "input/shared.safetensors", (1e9, 1e9))
    assert node.fingerprint_inputs(file="shared.safetensors") != before
    assert node.validate_inputs(file=own) is True and node.validate_inputs(file=None) is True
    assert node.validate_inputs(file=example) is True and node.fingerprint_inputs(file=example) != "missing"
    for name in ("nothing.safetensors", "../output/mimir/conditioning_00001_.safetensors", "../x [output]"):
        assert node.fingerprint_inputs(file=name) == "missing"
        with pytest.raises(ValueError, match=r"was not found. Put the file into .*input, press R"):
            node.validate_inputs(file=name)


def test_what_training_has_made_is_not_offered(folders):
    """Shards, checkpoints and fusers lie below output/mimir too, and would push conditions out of sight."""
    output = folders / "output"
    for name in ("training/run_001/checkpoints/1/model", "features/set/0000", "datasets/x"):
        file = output / "mimir" / f"{name}.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    (output / "mimir" / "mine").mkdir()
    (output / "mimir" / "mine" / "dog.safetensors").write_bytes(b"x")
    offered = host_conditioning.choices()
    assert [name for name in offered if name.startswith("mimir/")] == ["mimir/mine/dog.safetensors [output]"]
