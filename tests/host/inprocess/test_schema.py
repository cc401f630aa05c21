"""What ComfyUI shows of every node: ids, tooltips, sizes; and that nodes stay thin."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest
import torch
from mimir_pack import nodes
from mimir_pack.nodes.host import files
from mimir_pack.nodes.latent import MimirEmptyLatent

CONTRACT = [
    "MimirLoadTiny", "MimirLoadModel", "MimirLoadT5", "MimirLoadPhi", "MimirLoadFuser", "MimirLoadVAE",
    "MimirLoadLora", "MimirInspectFile", "MimirPlan",
    "MimirT5Encode", "MimirPhiEncode", "MimirTokenFuser", "MimirEmptyLatent", "MimirSampler",
    "MimirVAEDecode", "MimirVAEEncode", "MimirSaveConditioning", "MimirLoadConditioning",
    "MimirCompare", "MimirCompareFusions",
    "MimirPrepareDataset", "MimirCacheFeatures", "MimirWorldFeatures", "MimirTrainFuser", "MimirSaveFuser",
    "MimirInspectTokens", "MimirTokenMap", "MimirT5Gain", "MimirPhiGain",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def entered():
    extension = asyncio.run(nodes.comfy_entrypoint())
    assert asyncio.run(extension.get_node_list()) == nodes.NODES


@pytest.mark.parametrize("node", nodes.NODES, ids=lambda node: node.__name__)
def test_schema_is_complete(node):
    schema = node.GET_SCHEMA()
    schema.validate()
    assert schema.node_id == node.__name__ and schema.node_id.startswith("Mimir")
    assert schema.display_name and len(schema.description) > 40 and schema.category.startswith("Mimir")
    for socket in [*schema.inputs, *schema.outputs]:
        assert socket.tooltip and len(socket.tooltip) > 10, socket.id
    assert not {socket.id for socket in schema.inputs} & {socket.id for socket in schema.outputs}
    assert node.GET_NODE_INFO_V1()["name"] == schema.node_id


def test_ids_are_the_contract():
    assert [node.GET_SCHEMA().node_id for node in nodes.NODES] == CONTRACT


def test_execute_is_thin():
    for path in Path(nodes.__file__).parent.glob("*.py"):
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(item, ast.FunctionDef) and item.name == "execute":
                assert item.end_lineno - item.lineno < 30, path  # signature included
                assert len(item.body) <= 6, path


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"width": 500}, "width is 500: use 496 or 512"),
        ({"height": 8}, "height is 8: use 32"),
        ({"width": 4096}, "width is 4096: use 2048"),
        ({"frames": 50}, "frames is 50: use 49 or 57"),
        ({"frames": 0}, "frames is 0: use 1 "),
        ({"width": 65, "frames": 12}, "width is 65.*frames is 12: use 9 or 17"),
    ],
)
def test_sizes_are_refused_with_the_nearest(size, words, run_node):
    whole = {"width": 64, "height": 64, "frames": 9, **size}
    with pytest.raises(ValueError, match=words):
        run_node(MimirEmptyLatent, batch=1, **whole)
    with pytest.raises(ValueError, match=words):
        MimirEmptyLatent.validate_inputs(**whole)


def test_a_wrong_size_is_reported_once(monkeypatch):
    import execution

    import nodes as host_nodes

    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "MimirEmptyLatent", MimirEmptyLatent)
    size = {"width": 65, "height": 64, "frames": 9, "batch": 1}
    prompt = {
        "1": {"class_type": "MimirEmptyLatent", "inputs": size},
        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "x"}},
    }
    valid, _, _, errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert not valid and list(errors) == ["1"]
    (problem,) = errors["1"]["errors"]
    assert problem["details"].startswith("width is 65: use 64 or 80 ")


def test_empty_latent(run_node):
    assert MimirEmptyLatent.validate_inputs(width=None, height=480, frames=None) is True
    (latent,) = run_node(MimirEmptyLatent, width=720, height=480, frames=49, batch=2)
    assert latent["samples"].shape == (2, 16, 13, 60, 90) and not torch.any(latent["samples"])


def test_files_and_model_folders_are_listed(tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "a.safetensors").write_bytes(b"x")
    (tmp_path / "b.ckpt").write_bytes(b"x")
    for name in ("org/phi", "plain"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "org/phi/config.json").write_text("{}")
    (tmp_path / "org/phi/model-00001-of-00002.safetensors").write_bytes(b"x")
    (tmp_path / "plain/c.safetensors").write_bytes(b"x")
    folder = ([str(tmp_path)], {".safetensors", ".ckpt"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "mimir", folder)
    folder_paths.filename_list_cache.pop("mimir", None)
    assert files.choices("mimir") == [str(Path("org/phi")), "a.safetensors", str(Path("plain/c.safetensors"))]
    before = files.fingerprint("mimir", "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"longer")
    assert files.fingerprint("mimir", "a.safetensors") != before
    assert files.fingerprint("mimir", "nothing") == "missing"
    with pytest.raises(ValueError, match="'../x' was not found"):
        files.resolve("mimir", "../x")


def test_registering_creates_no_folder():
    import folder_paths

    files.register()
    paths, extensions = folder_paths.folder_names_and_paths["mimir"]
    assert extensions == set(files.SUFFIXES) and not Path(paths[0]).exists()
