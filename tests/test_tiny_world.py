"""The synthetic world, its captions and its detector, and the loop that trains on it."""

import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mimir_core.tiny.captions import STYLES, TRAINING_STYLES, caption
from mimir_core.tiny.corpus import WIDE_WORDS
from mimir_core.tiny.detector import blobs, judge
from mimir_core.tiny.evaluate import load_prompts, make_prompts, rendered_truth, score
from mimir_core.tiny.features import doubtful, draw, invent_words
from mimir_core.tiny.loop import LoopConfig, train
from mimir_core.tiny.world import COLOURS, FRAMES, KINDS, SIZE, Scene, Thing, random_scene, render, stage
from mimir_core.train.optimiser import orthogonalise


def one(motion: str = "still", light: str = "steady") -> Scene:
    return Scene("one", (Thing("circle", "red", motion),), light=light)


def alike(count: int) -> Scene:
    return Scene("count", (Thing("square", "cyan"),), count=count)


def pair(relation: str) -> Scene:
    return Scene("relation", (Thing("circle", "red"), Thing("square", "blue")), relation=relation)


def order(*colours: str) -> Scene:
    return Scene("order", tuple(Thing("circle", colour, "appears") for colour in colours))


def clip(scene: Scene, seed: int = 0) -> torch.Tensor:
    return render([stage(scene, random.Random(seed))])[0]


def test_renderer_is_deterministic_and_in_range():
    video = clip(one("left"))
    assert video.shape == (3, FRAMES, SIZE, SIZE)
    assert torch.equal(video, clip(one("left")))
    assert video.min() >= -1 and video.max() <= 1


def test_detector_reads_what_was_rendered():
    rng = random.Random(7)
    scenes = [random_scene(rng, kind) for kind in KINDS for _ in range(30)]
    videos = render([stage(s, rng) for s in scenes])
    right = [judge(v, s)["all"] for v, s in zip(videos, scenes, strict=True)]
    assert sum(right) / len(right) >= 0.98


@pytest.mark.parametrize(
    ("shown", "said", "wrong"),
    [
        (one("left"), one("right"), {"motion"}),
        (one(), one("appears"), {"motion"}),
        (one(), Scene("one", (Thing("circle", "blue"),)), {"colour", "motion"}),
        (one(), Scene("one", (Thing("square", "red"),)), {"shape"}),
        (one(light="day to night"), one(light="night to day"), {"light"}),
        (alike(3), alike(2), {"count", "shape"}),
        (order("red", "blue"), order("blue", "red"), {"order"}),
        (order("red", "blue"), order("red", "green"), {"colour", "binding", "order"}),
        (pair("above"), pair("below"), {"relation"}),
    ],
)  # fmt: skip
def test_detector_names_what_is_wrong(shown: Scene, said: Scene, wrong: set[str]):
    verdict = judge(clip(shown), said)
    assert {name for name, right in verdict.items() if not right} == wrong | {"all"}


def test_binding_is_which_shape_has_which_colour():
    """Both colours and both shapes are there, only swapped."""
    swapped = Scene("relation", (Thing("square", "red"), Thing("circle", "blue")), relation="above")
    verdict = judge(clip(pair("above")), swapped)
    assert verdict["colour"] and verdict["shape"] and not verdict["binding"] and not verdict["all"]


def test_detector_sees_nothing_in_grey_noise():
    noise = torch.rand(SIZE, SIZE, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 3)
    assert blobs(noise.numpy()) == []


def test_held_out_scenes_are_a_tenth_and_never_train():
    rng = random.Random(3)
    assert not any(random_scene(rng).held_out for _ in range(500))
    assert all(random_scene(rng, held_out=True).held_out for _ in range(50))
    every = {Scene("one", (Thing(s, c, m),)) for s in ("circle", "square", "triangle")
             for c in ("red", "yellow", "green", "cyan", "blue", "purple")
             for m in ("still", "left", "right", "up", "down", "appears", "disappears")}  # fmt: skip
    assert 0.04 < sum(s.held_out for s in every) / len(every) < 0.2


def test_held_and_unread_words_never_caption_a_training_video():
    rng = random.Random(5)
    words = {style: set() for style in STYLES}
    for _ in range(2000):
        scene = random_scene(rng)
        for style in STYLES:
            words[style] |= set(caption(scene, style, rng).lower().replace(",", "").replace(".", "").split())
    trained = set().union(*(words[s] for s in TRAINING_STYLES))
    shared = (words["held"] | words["unread"]) & trained
    assert shared <= {
        "a",
        "an",
        "of",
        "and",
        "the",
        "than",
        "to",
        "down",
        "falls",
        "rises",
        "turns",
        "comes",
        "up",
        "sets",
        "by",
    }


def test_features_of_a_shard_are_drawn_from_its_number_alone():
    drawn = draw(0, 3, clips=20)
    assert drawn == draw(0, 3, clips=20)
    assert drawn.captions != draw(0, 4, clips=20).captions
    assert len(drawn.captions) == len(drawn.doubtful) == len(drawn.answers) == 40
    assert not any(s.scene.held_out for s in drawn.stagings)


def test_doubtful_readings_tell_nothing_that_training_captions_could_explain():
    """Half are invented words, half other scenes in words that no video is captioned with."""
    rng = random.Random(2)
    read = [doubtful("a red circle moves left", "one", rng) for _ in range(400)]
    phrases = [phrase for colour in COLOURS for phrase in WIDE_WORDS[colour]]
    other = [text for text in read if any(phrase in text for phrase in phrases)]
    assert 0.4 < len(other) / len(read) < 0.6
    assert not any(word in text for text in other for word in ("crimson", "scarlet", "disc", "ball"))


def test_invented_words_replace_words_and_nothing_else():
    rng = random.Random(11)
    text = "A red circle moves left, it gets dark."
    doubted = [invent_words(text, rng) for _ in range(200)]
    assert all(re.sub("[A-Za-z]+", "", d) == re.sub("[A-Za-z]+", "", text) for d in doubted)
    assert all(d.startswith("A ") and ", it " in d for d in doubted)
    kept = [word in d.split() for d in doubted for word in ("red", "circle", "moves")]
    assert 0.1 < sum(kept) / len(kept) < 0.6


def test_prompts_are_fixed_and_the_detector_scores_their_truth():
    prompts = load_prompts()
    assert prompts == make_prompts()
    assert len(prompts) == 400 and all(p.scene.held_out for p in prompts)
    assert min(score(prompts, rendered_truth(prompts)).values()) >= 0.98


def test_orthogonalise_gives_singular_values_near_one():
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.6 and values.max() < 1.3


def _regression() -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def loss(step: int) -> torch.Tensor:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        return (module(x) - x.flip(1)).square().mean()

    return module, loss


def test_training_resumes_bit_for_bit_and_learns(tmp_path):
    module, loss = _regression()
    before = loss(10_000).item()
    whole = train("x", module, loss, LoopConfig(steps=60, ema=0.9, save_every=20), tmp_path / "whole")
    assert loss(10_000).item() < 0.7 * before

    class Stop(Exception):
        pass

    module, loss = _regression()

    def stopping(step: int) -> torch.Tensor:
        if step == 33:
            raise Stop
        return loss(step)

    with pytest.raises(Stop):
        train("x", module, stopping, LoopConfig(steps=60, ema=0.9, save_every=20), tmp_path / "parts")
    module, loss = _regression()
    resumed = train("x", module, loss, LoopConfig(steps=60, ema=0.9, save_every=20), tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
