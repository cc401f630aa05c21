"""Token Map: PCA is scikit-learn's, query tokens coincide, answers scatter, a seed repeats its map."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mimir_core.inspect import canvas, cloud, draw_map
from mimir_core.llm import encode_prompt
from mimir_core.pipeline import Models
from mimir_core.tiny.parts import load_parts

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def models() -> Models:
    return load_parts()


def reading(
    models: Models, prompt: str, temperature: float, seed: int, trained: bool = True
) -> cloud.Reading:
    assert models.phi is not None and models.phi_tokenizer is not None
    llm = encode_prompt(models.phi, models.phi_tokenizer, prompt, (), 16, temperature, seed=seed)
    hidden = models.t5.encode(prompt).hidden
    read = range(len(models.t5.tokenizer(prompt)["input_ids"]))
    return cloud.reading(models.fuser if trained else None, hidden, llm, read)


def runs(models: Models, temperature: float, count: int = 50) -> list[cloud.Reading]:
    return [reading(models, PROMPT, temperature, seed) for seed in range(count)]


def test_over_fifty_runs_query_tokens_coincide_and_answer_tokens_scatter(models: Models) -> None:
    """Figure 7 b."""
    found = cloud.token_map([reading(models, PROMPT, 1.0, 0)], runs(models, 1.0), cloud.PCA).numbers
    print(cloud.summary(found))
    assert found["scatter"]["query"] == {"relative": 0.0, "identical": True}
    assert found["scatter"]["answer"]["relative"] > 0.05 and not found["scatter"]["answer"]["identical"]
    assert found["scatter"]["final"]["relative"] > 0.01 and len(found["answers"]) > 1
    assert f"{len(found['answers'])} different answers" in cloud.summary(found)


def test_at_temperature_zero_nothing_scatters(models: Models) -> None:
    found = cloud.token_map([reading(models, PROMPT, 0.0, 0)], runs(models, 0.0, 8), cloud.PCA).numbers
    assert all(entry == {"relative": 0.0, "identical": True} for entry in found["scatter"].values())
    assert len(found["answers"]) == 1 and "every answer is the same" in cloud.summary(found)


def test_without_answers_nothing_is_said_of_their_scatter(models: Models) -> None:
    assert models.phi is not None and models.phi_tokenizer is not None
    llm = encode_prompt(models.phi, models.phi_tokenizer, PROMPT, (), 0)
    none = cloud.reading(models.fuser, models.t5.encode(PROMPT).hidden, llm, range(4))
    found = cloud.token_map([none], [none, none], cloud.PCA).numbers
    assert found["scatter"]["answer"] == {"relative": None, "identical": True}
    said = cloud.summary(found)
    assert "there are no answer tokens" in said and "no answer was sampled" in said and "0.0" not in said
    one = cloud.token_map([none], [none, reading(models, PROMPT, 0.0, 0)], cloud.PCA).numbers
    assert "answer tokens share no place, so there is no scatter" in cloud.summary(one)


def test_a_fuser_that_adds_nothing_leaves_t5s_points_and_no_padding(models: Models) -> None:
    found = reading(models, PROMPT, 1.0, 0, trained=False)
    assert len(found.added) > len(found.encoder) and torch.equal(found.final, found.encoder)


def test_without_the_language_model_the_fused_points_are_still_the_fusers(models: Models) -> None:
    assert models.fuser is not None and models.phi is not None and models.phi_tokenizer is not None
    module = models.fuser.variant(replace(models.fuser.config, use_llm=False))
    hidden = models.t5.encode(PROMPT).hidden
    llm = encode_prompt(models.phi, models.phi_tokenizer, PROMPT, (), 4)
    found = cloud.reading(module, hidden, llm, range(4))
    assert torch.equal(found.final, module.branches(hidden, llm.answer)[0][0, :4])
    assert not torch.equal(found.final, found.encoder) and found.space == "raw"


def test_the_picture_counts_the_prompts(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    real = canvas.new_figure
    monkeypatch.setattr(canvas, "new_figure", lambda *size: figures.append(real(*size)) or figures[-1])
    prompts = [PROMPT, "two blue squares", "a yellow square"]
    readings = [reading(models, text, 0.0, 0) for text in prompts]
    draw_map.draw(cloud.token_map(readings, readings[:1] * 2, cloud.PCA), prompts)
    (figure,) = figures
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "a  3 prompts: every token" in words and f"\u201c{PROMPT}\u201d" in words
    names = [[text.get_text() for text in axes.get_legend().texts] for axes in figure.axes[1:]]
    assert names == [["T5", "Phi-3.5", "fused"], ["query", "answer", "final"]]
    assert all("PCA 1 (1 and 2 show " in axes.get_xlabel() for axes in figure.axes[1:])


def test_scatter_is_the_distance_from_the_mean() -> None:
    torch.manual_seed(0)
    stack = torch.randn(5, 3, 4)
    mean = stack.mean(dim=0)
    expected = ((stack - mean).square().sum() / stack.square().sum()).sqrt().item()
    assert cloud.scatter(list(stack))["relative"] == pytest.approx(expected, rel=1e-4)
    ragged: Sequence[torch.Tensor] = [stack[0], stack[1, :2], stack[2, :1]]
    assert 0 < cloud.scatter(ragged)["relative"] < 2
    assert cloud.scatter([stack[0], stack[1][:0]]) == {"relative": None, "identical": False}


def test_pca_is_scikit_learns() -> None:
    from sklearn.decomposition import PCA

    torch.manual_seed(0)
    points = torch.randn(40, 7) @ torch.randn(7, 7)
    found, share = cloud.pca(points)
    reference = PCA(2, svd_solver="full").fit(points.numpy())
    expected = torch.from_numpy(reference.transform(points.numpy())).float()
    for axis in range(2):
        sign = torch.sign((found[:, axis] * expected[:, axis]).sum())
        torch.testing.assert_close(found[:, axis], sign * expected[:, axis], rtol=1e-3, atol=1e-4)
    assert share == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-4)
    assert cloud.pca(points[:1])[0].tolist() == [[0.0, 0.0]]


def test_separation() -> None:
    a, b = torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([[10.0, 1.0], [10.0, -1.0]])
    assert cloud.separation(a, b) == pytest.approx(10) and cloud.separation(a, b[:0]) == 0


@pytest.mark.parametrize("trained", [True, False])
def test_maps_repeat_and_are_drawn(models: Models, trained: bool) -> None:
    prompts = [reading(models, text, 1.0, 0, trained) for text in (PROMPT, "two blue squares", "")]
    several = [reading(models, PROMPT, 1.0, seed, trained) for seed in range(3)]
    first, again = (cloud.token_map(prompts, several, "PCA and t-SNE", seed=4) for _ in range(2))
    assert first.numbers == again.numbers
    assert first.numbers["space"] == ("text" if trained else "raw")
    for ours, theirs in zip((first.prompts, first.runs), (again.prompts, again.runs)):
        for method in ("PCA", "t-SNE"):
            assert all(
                torch.equal(ours.points[method][k], theirs.points[method][k]) for k in ours.points[method]
            )
    image = draw_map.draw(first, ["$x$ \U0001f642", "two blue squares", ""])
    assert image.shape[0] == 1 and image.shape[2:] == (1000, 3) and torch.isfinite(image).all()


def test_without_scikit_learn_pca_works_and_tsne_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    cloud.require_map(["a"], "PCA", 2)
    with pytest.raises(ValueError, match="pip install scikit-learn.*or choose PCA"):
        cloud.require_map(["a"], "t-SNE", 2)


def test_settings_that_make_no_map_are_refused() -> None:
    for prompts, method, count, words in (
        ([], "PCA", 2, "write at least one prompt"),
        (["a"], "PCA", 1, "2 or more"),
        (["a"], "UMAP", 2, "expected one of PCA, t-SNE"),
    ):
        with pytest.raises(ValueError, match=words):
            cloud.require_map(prompts, method, count)
    with pytest.raises(ValueError, match="t-SNE needs 5 different tokens, there are 1"):
        cloud.tsne(torch.zeros(9, 3), 0)


def test_equal_tokens_are_one_point_in_tsne() -> None:
    torch.manual_seed(0)
    points = torch.randn(8, 5)
    found = cloud.tsne(torch.cat((points, points[:3])), 0)
    assert torch.equal(found[8:], found[:3]) and len(found.unique(dim=0)) == 8
