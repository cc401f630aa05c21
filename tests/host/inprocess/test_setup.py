"""The process that the other tests here rely on."""

import importlib
import sys

import pytest


def test_comfyui_is_on_the_cpu_and_nodes_is_its_own():
    import comfy.model_management as management

    import nodes

    assert management.get_torch_device().type == "cpu"
    assert hasattr(nodes, "common_ksampler")


def test_core_has_one_name_only():
    assert importlib.import_module("mimir_pack.mimir_core")
    with pytest.raises(ImportError):
        importlib.import_module("mimir_core")
    assert "mimir_core" not in sys.modules


def test_run_node_runs_a_node_of_the_hosts(run_node):
    from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo

    (latent,) = run_node(EmptyHunyuanLatentVideo, width=64, height=64, length=9, batch_size=1)
    assert latent["samples"].shape == (1, 16, 3, 8, 8)
