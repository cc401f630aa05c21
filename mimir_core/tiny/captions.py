"""Captions of scenes in four styles, and what a language model should answer about them.

SIMPLE uses one fixed word for each attribute. SEEN replaces words by synonyms that videos are captioned with
during training. HELD replaces them by synonyms that only the language model has ever read: a model that
follows those captions can know them from the language model alone. UNREAD words are read by nobody; they show
what none of this buys. LONG wraps SIMPLE or SEEN words into several sentences.
"""

from __future__ import annotations

import random

from .world import Scene, Thing

STYLES = ("simple", "seen", "held", "unread", "long")
TRAINING_STYLES = ("simple", "seen", "long")  # styles that videos and T5 are trained with

Words = dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]]

# attribute: (simple word, seen synonyms, held synonyms, unread synonyms)
COLOUR_WORDS: Words = {
    "red": ("red", ("crimson", "scarlet"), ("ruby", "vermilion"), ("carmine",)),
    "yellow": ("yellow", ("golden", "lemon"), ("saffron", "amber"), ("xanthic",)),
    "green": ("green", ("emerald", "lime"), ("jade", "olive"), ("viridian",)),
    "cyan": ("cyan", ("turquoise", "aqua"), ("teal", "cerulean"), ("celadon",)),
    "blue": ("blue", ("navy", "sapphire"), ("cobalt", "indigo"), ("smalt",)),
    "purple": ("purple", ("violet", "magenta"), ("plum", "lavender"), ("heliotrope",)),
}
SHAPE_WORDS: Words = {
    "circle": ("circle", ("disc", "ball"), ("orb", "sphere"), ("roundel",)),
    "square": ("square", ("box", "block"), ("cube", "tile"), ("quadrate",)),
    "triangle": ("triangle", ("wedge", "pyramid"), ("cone", "spike"), ("trigon",)),
}
# verbs in the singular; the plural drops the first word's s
MOTION_WORDS: Words = {
    "left": (
        "moves left",
        ("slides left", "goes to the left"),
        ("heads leftward", "drifts westward"),
        ("veers larboard",),
    ),
    "right": (
        "moves right",
        ("slides right", "goes to the right"),
        ("heads rightward", "drifts eastward"),
        ("veers dexter",),
    ),
    "up": ("moves up", ("rises", "goes to the top"), ("ascends", "climbs skyward"), ("levitates",)),
    "down": ("moves down", ("falls", "goes to the bottom"), ("descends", "sinks earthward"), ("plummets",)),
    "appears": ("appears", ("shows up", "fades in"), ("emerges", "materialises"), ("manifests",)),
    "disappears": ("disappears", ("goes away", "fades out"), ("vanishes", "dissolves"), ("evanesces",)),
}
RELATION_WORDS: Words = {
    "left of": (
        "left of",
        ("to the left of", "on the left side of"),
        ("leftward of", "west of"),
        ("sinister of",),
    ),
    "right of": (
        "right of",
        ("to the right of", "on the right side of"),
        ("rightward of", "east of"),
        ("dexter of",),
    ),
    "above": ("above", ("over", "on top of"), ("higher than", "atop"), ("surmounting",)),
    "below": ("below", ("under", "underneath"), ("lower than", "beneath"), ("subjacent to",)),
}
LIGHT_WORDS: Words = {
    "day to night": (
        "day turns to night",
        ("it gets dark", "the day becomes night"),
        ("dusk falls", "the sun sets"),
        ("the gloaming deepens",),
    ),
    "night to day": (
        "night turns to day",
        ("it gets light", "the night becomes day"),
        ("dawn breaks", "the sun comes up"),
        ("the aurora kindles",),
    ),
}
ORDER_WORDS: Words = {
    "then": (", then", (", followed by", ", and later"), (", succeeded by", " preceding"), (", anon",)),
}
COUNT_WORDS: Words = {
    "2": ("two", ("2", "a pair of"), ("a couple of", "twin"), ("a brace of",)),
    "3": ("three", ("3", "a trio of"), ("a triad of", "triple"), ("a ternion of",)),
}
_STYLE_INDEX = {"simple": 0, "seen": 1, "held": 2, "unread": 3}


def caption(scene: Scene, style: str, rng: random.Random) -> str:
    """One caption of `scene`. `style` is one of STYLES; `rng` chooses among synonyms."""
    if style == "long":
        return _long(scene, rng)
    return _sentence(scene, style, rng)


def canonical(scene: Scene) -> str:
    """The one SIMPLE caption of a scene: what the language model answers to any caption of it."""
    return _sentence(scene, "simple", random.Random(0))


def instruction_answers(scene: Scene) -> tuple[str, str, str, str]:
    """Short answers to the four default instructions: objects and number, colours, relation, motion and
    light.
    """
    things = scene.things
    if len(things) == 2:
        number = " and ".join(f"one {t.shape}" for t in things)
    else:
        number = {1: "one ", 2: "two ", 3: "three "}[scene.count] + plural(things[0].shape, scene.count)
    colours = " and ".join(f"{t.shape} {t.colour}" for t in things)
    relation = f"{things[0].shape} {scene.relation} {things[1].shape}" if scene.relation else "none"
    first = things[0].motion
    motion = first if first in ("still", "appears", "disappears") else f"moves {first}"
    if scene.kind == "order":
        motion = f"{things[0].shape} appears, then {things[1].shape}"
    return number, colours, relation, f"{motion}, {scene.light}"


def _pick(words: Words, key: str, style: str, rng: random.Random) -> str:
    entry = words[key][_STYLE_INDEX[style]]
    return entry if isinstance(entry, str) else rng.choice(entry)


def plural(noun: str, count: int) -> str:
    if count == 1:
        return noun
    return noun + ("es" if noun.endswith(("x", "s")) else "s")


def conjugate(verb: str, count: int) -> str:
    if count == 1:
        return verb
    head, _, rest = verb.partition(" ")
    head = {"goes": "go", "vanishes": "vanish"}.get(head, head.removesuffix("s"))
    return f"{head} {rest}".strip()


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _noun(thing: Thing, count: int, style: str, rng: random.Random) -> str:
    colour = _pick(COLOUR_WORDS, thing.colour, style, rng)
    phrase = f"{colour} {plural(_pick(SHAPE_WORDS, thing.shape, style, rng), count)}"
    if count == 1:
        return article(phrase)
    return f"{_pick(COUNT_WORDS, str(count), style, rng)} {phrase}"


def _sentence(scene: Scene, style: str, rng: random.Random) -> str:
    first = scene.things[0]
    text = _noun(first, scene.count, style, rng)
    if first.motion != "still":
        text += " " + conjugate(_pick(MOTION_WORDS, first.motion, style, rng), scene.count)
    if len(scene.things) == 2:
        text += f"{_link(scene, style, rng)} {_noun(scene.things[1], 1, style, rng)}"
    if scene.light != "steady":
        text += ", " + _pick(LIGHT_WORDS, scene.light, style, rng)
    return text


def _link(scene: Scene, style: str, rng: random.Random) -> str:
    """What stands between two things, with the space or comma before it."""
    if scene.kind == "order":
        return _pick(ORDER_WORDS, "then", style, rng)
    return " " + (_pick(RELATION_WORDS, scene.relation, style, rng) if scene.relation else "and")


_OPENINGS = ("The video shows", "We see", "In this clip there is", "On a plain grey background there is")
_STILL = ("It stays where it is.", "Nothing moves.", "The picture is calm.")
_CLOSINGS = ("The background is plain.", "The style is flat and simple.", "The camera does not move.", "")


def _long(scene: Scene, rng: random.Random) -> str:
    style = rng.choice(("simple", "seen"))
    first = scene.things[0]
    parts = [f"{rng.choice(_OPENINGS)} {_noun(first, scene.count, style, rng)}."]
    if len(scene.things) == 2:
        parts.append(_second(scene, style, rng))
    if scene.kind != "order":
        parts += _movement(scene, style, rng)
    if scene.light != "steady":
        light = _pick(LIGHT_WORDS, scene.light, style, rng)
        parts.append(f"{light[0].upper()}{light[1:]}.")
    parts.append(rng.choice(_CLOSINGS))
    return " ".join(p for p in parts if p)


def _second(scene: Scene, style: str, rng: random.Random) -> str:
    """A sentence about the second thing."""
    second = _noun(scene.things[1], 1, style, rng)
    if scene.kind == "order":
        verb = _pick(MOTION_WORDS, "appears", style, rng)
        return f"It {verb} first. {rng.choice(('After it', 'Then'))} {second} {verb}."
    if scene.relation:
        return f"It is {_pick(RELATION_WORDS, scene.relation, style, rng)} {second}."
    return f"Next to it there is {second}."


def _movement(scene: Scene, style: str, rng: random.Random) -> list[str]:
    """A sentence about how the first thing moves, or perhaps that nothing does."""
    first = scene.things[0]
    if first.motion == "still":
        return [rng.choice(_STILL)] if rng.random() < 0.5 else []
    verb = conjugate(_pick(MOTION_WORDS, first.motion, style, rng), scene.count)
    subject = "It" if scene.count == 1 else "They"
    if len(scene.things) == 2:
        colour = _pick(COLOUR_WORDS, first.colour, style, rng)
        subject = f"The {colour} {_pick(SHAPE_WORDS, first.shape, style, rng)}"
    return [f"{subject} {verb}."]
