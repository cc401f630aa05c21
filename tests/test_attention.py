"""The attention signature, and a choice of backend that survives every broken xFormers."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mimir_core import attention as A


def plain(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


def test_sdpa_is_softmax_attention():
    q, k, v = (torch.randn(2, 3, n, 16) for n in (5, 7, 7))
    torch.testing.assert_close(A.sdpa(q, k, v), plain(q, k, v))
    mask = torch.ones(5, 7, dtype=torch.bool).tril(1)
    torch.testing.assert_close(A.sdpa(q, k, v, mask=mask, options={"any": 1}), plain(q, k, v, mask))


def fake_xformers(monkeypatch, function: Any):
    package: Any = types.ModuleType("xformers")
    ops: Any = types.ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, function
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def test_xformers_gets_its_own_layout_and_gives_ours(monkeypatch):
    seen = []

    def memory_efficient_attention(q, k, v):  # (B, L, H, D)
        seen.append(q.shape)
        return plain(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    fake_xformers(monkeypatch, memory_efficient_attention)
    q, k, v = (torch.randn(2, 3, n, 16) for n in (5, 7, 7))
    torch.testing.assert_close(A.xformers_attention(q, k, v), plain(q, k, v))
    assert seen == [(2, 5, 3, 16)]
    mask = torch.ones(5, 7, dtype=torch.bool).tril(1)
    torch.testing.assert_close(A.xformers_attention(q, k, v, mask=mask), plain(q, k, v, mask))
    assert len(seen) == 1  # a masked call does not reach xFormers


def test_cpu_uses_sdpa_and_says_why():
    chosen, reason = A.choose_attention("cpu")
    assert chosen is A.sdpa and "SDPA" in reason and "cpu" in reason


BROKEN = [OSError("bad.dll"), RuntimeError("torch 2.9"), ImportError("flash"), AttributeError("wheel")]


@pytest.mark.parametrize("error", BROKEN)
def test_broken_xformers_is_reported_with_the_remedy(monkeypatch, error):
    fail_to_import_xformers(monkeypatch, error)
    problem = A._xformers_problem(torch.device("cpu"))
    assert problem is not None and str(error) in problem
    assert A.REMEDY in problem


def test_absent_xformers_is_not_called_broken(monkeypatch):
    fail_to_import_xformers(monkeypatch, ModuleNotFoundError("No module named 'xformers'", name="xformers"))
    problem = A._xformers_problem(torch.device("cpu"))
    assert problem is not None and "not installed" in problem


def fail_to_import_xformers(monkeypatch, error):
    """The same whether this environment has xformers or not."""

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "xformers":
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


def test_useless_xformers_is_reported(monkeypatch):
    def no_kernel(q, k, v):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    fake_xformers(monkeypatch, no_kernel)
    problem = A._xformers_problem(torch.device("cpu"))
    assert problem is not None and "cannot run on this device" in problem and A.REMEDY in problem
    fake_xformers(monkeypatch, lambda q, k, v: q * 0)
    assert "wrong numbers" in (A._xformers_problem(torch.device("cpu")) or "")


def test_a_gpu_with_working_xformers_uses_it(monkeypatch):
    monkeypatch.setattr(A, "_xformers_problem", lambda device: None)
    assert A.choose_attention("cuda")[0] is A.xformers_attention
    monkeypatch.setattr(A, "_xformers_problem", lambda device: "xFormers is broken")
    chosen, reason = A.choose_attention("cuda")
    assert chosen is A.sdpa and "xFormers is broken" in reason


def test_reason_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(A, "_logged", set())
    with caplog.at_level("INFO", logger=A.__name__):
        A.choose_attention("cpu")
        A.choose_attention("cpu")
    assert len(caplog.records) == 1


def test_exactly_one_scaled_dot_product_attention_in_the_project():
    root = Path(__file__).parents[1]
    files = [*(root / "mimir_core").rglob("*.py"), *(root / "nodes").rglob("*.py")]
    calls = {
        str(path.relative_to(root)): path.read_text("utf-8").count("scaled_dot_product_attention(")
        for path in files
    }
    assert {name: count for name, count in calls.items() if count} == {
        str(Path("mimir_core/attention.py")): 1
    }
