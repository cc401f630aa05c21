"""What the two text models of Mimir Tiny read: captions for T5, chats for the language model.

Both read captions of every style: simple, seen and long ones as videos have them, held words, and a wide list
of further words that people may type. T5 learns from them as T5 does, by filling gaps, and learns order and
meaning from turning the captions that videos have into simple ones. The language model learns as a chat model
does: it answers every caption of a scene with the scene's simple caption in changing wording, each of the
four default instructions with a few words, and questions about single words. So both know every word from
text, and only the language model has ever been asked what the held ones mean. Nobody reads the unread words.
No scene of the tenth that is kept for tests is ever used here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from ..config import DEFAULT_INSTRUCTIONS
from .captions import (
    COLOUR_WORDS,
    COUNT_WORDS,
    LIGHT_WORDS,
    MOTION_WORDS,
    ORDER_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    TRAINING_STYLES,
    Words,
    article,
    canonical,
    caption,
    conjugate,
    instruction_answers,
    plural,
)
from .world import Scene, Thing, random_scene

# Further words for the language model, so that free text is not lost on it. None of them is an unread word.
WIDE_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("cherry", "maroon", "rose", "bright red", "dark red"),
    "yellow": ("gold", "canary", "mustard", "sunny"),
    "green": ("mint", "grass green", "moss", "dark green"),
    "cyan": ("sky blue", "light blue", "aquamarine"),
    "blue": ("azure", "dark blue", "ultramarine", "royal blue"),
    "purple": ("pink", "lilac", "mauve", "fuchsia"),
    "circle": ("dot", "bubble", "marble", "round shape", "planet"),
    "square": ("rectangle", "crate", "brick", "dice"),
    "triangle": ("arrowhead", "tent", "roof", "mountain"),
    "left": ("travels left", "flies left", "goes left", "moves to the left", "rolls to the left"),
    "right": ("travels right", "flies right", "goes right", "moves to the right", "rolls to the right"),
    "up": ("floats up", "flies up", "goes up", "lifts off", "moves upward", "jumps"),
    "down": ("drops", "goes down", "comes down", "tumbles", "moves downward"),
    "appears": ("pops up", "comes into view", "arrives", "becomes visible"),
    "disappears": ("leaves", "fades away", "goes out of sight", "becomes invisible"),
    "left of": ("to the left side of", "at the left of"),
    "right of": ("to the right side of", "at the right of"),
    "above": ("on", "up above", "hovering over"),
    "below": ("down below", "at the bottom of", "hanging under"),
    "day to night": ("night falls", "evening comes", "it becomes dark", "the light fades", "at sunset"),
    "night to day": (
        "morning comes",
        "the sun rises",
        "it becomes bright",
        "the light returns",
        "at sunrise",
    ),
    "2": ("a couple", "2 identical", "double"),
    "3": ("three identical", "3 of the same"),
    "then": (" and then", ", after that", ", subsequently", ", next"),
}

# Ordinary words, so that the tokenizers have pieces for more than captions.
GENERIC_TEXT = """
the of and to in is it that was for on are with as his they be at one have this from or had by hot but
some what there we can out other were all your when up use word how said an each she which do their time
if will way about many then them would write like so these her long make thing see him two has look more
day could go come did my sound no most number who over know water than call first people may down side
been now find any new work part take get place made live where after back little only round man year
came show every good me give our under name very through just form much great think say help low line
before turn cause same mean differ move right boy old too does tell sentence set three want air well
also play small end put home read hand port large spell add even land here must big high such follow act
why ask men change went light kind off need house picture try us again animal point mother world near
build self earth father head stand own page should country found answer school grow study still learn
plant cover food sun four thought let keep eye never last door between city tree cross since hard start
might story saw far sea draw left late run while press close night real life few stop open seem together
next white children begin got walk example ease paper often always music those both mark book letter
until mile river car feet care second group carry took rain eat room friend began idea fish mountain
north once base hear horse cut sure watch colour face wood main video clip film camera cinematic shot
scene slowly quickly fast slow bright dark beautiful background foreground style realistic dog cat woman
girl street forest ocean sky cloud snow fire smoke hair red dress wearing walking running flying dancing
holding looking smiling moving
"""


READ_STYLES = {"simple": 2, "seen": 3, "held": 5, "long": 3, "wide": 3}  # and how often
ANSWERS = ("{}", "{}.", "the video: {}.", "you see: {}", "in short: {}", "it shows this: {}")
_ASKED = (
    (COLOUR_WORDS, "colour"), (SHAPE_WORDS, "shape"), (MOTION_WORDS, "motion"), (RELATION_WORDS, "place"),
    (LIGHT_WORDS, "light"), (COUNT_WORDS, "number"), (ORDER_WORDS, "order"),
)  # fmt: skip


class Chat(NamedTuple):
    """One turn of the language model's training text."""

    prompt: str
    instruction: str | None
    answer: str


def scene_of(rng: random.Random) -> Scene:
    """A training scene, every kind equally likely enough for text (videos draw other shares)."""
    return random_scene(rng, rng.choice(("one", "light", "count", "pair", "relation", "relation", "order")))


def any_caption(rng: random.Random, styles: dict[str, int]) -> tuple[str, Scene]:
    """A caption as people write it, in one of the weighted styles, and its scene."""
    scene = scene_of(rng)
    style = rng.choices(list(styles), weights=list(styles.values()))[0]
    text = wide_caption(scene, rng) if style == "wide" else caption(scene, style, rng)
    return vary(text, rng), scene


def t5_pair(rng: random.Random) -> tuple[str, str]:
    """(a caption as videos have it, the scene's simple caption)."""
    text, scene = any_caption(rng, dict.fromkeys(TRAINING_STYLES, 1))
    return text, canonical(scene)


def t5_text(rng: random.Random) -> str:
    """A caption of any style but unread, to fill gaps in."""
    return any_caption(rng, READ_STYLES)[0]


def chat(rng: random.Random) -> Chat:
    """A caption of any style but unread with the model's answer to it, or to an instruction; or a question
    about a word.
    """
    chance = rng.random()
    if chance < 0.08:
        return word_question(rng)
    prompt, scene = any_caption(rng, READ_STYLES)
    if chance < 0.65:
        return Chat(prompt, None, answer(scene, rng))
    index = rng.randrange(len(DEFAULT_INSTRUCTIONS))
    return Chat(prompt, DEFAULT_INSTRUCTIONS[index], instruction_answers(scene)[index])


def answer(scene: Scene, rng: random.Random) -> str:
    """What the language model says about a scene: always the same facts, not always the same words."""
    return rng.choice(ANSWERS).format(canonical(scene))


def word_question(rng: random.Random) -> Chat:
    """What a word means, the way a dictionary or a child would ask."""
    words, kind = rng.choice(_ASKED)
    key = rng.choice(list(words))
    simple, seen, held, _ = words[key]
    word = rng.choice((*seen, *held, *WIDE_WORDS[key])).strip(", ")
    question = rng.choice(("what {} is {}?", "which {} does {} mean?", "{}: {}?")).format(kind, word)
    return Chat(question, None, simple.strip(", "))


def wide_caption(scene: Scene, rng: random.Random, plain: bool = True) -> str:
    """Like a simple caption, but each word from any list that both text models read; with `plain` False from
    WIDE_WORDS alone, which no video is captioned with.
    """

    def pick(words: Words, key: str) -> str:
        simple, seen, held, _ = words[key]
        return rng.choice((simple, *seen, *held, *WIDE_WORDS[key]) if plain else WIDE_WORDS[key])

    first = scene.things[0]
    text = _wide_noun(first, scene.count, pick)
    if first.motion != "still":
        text += " " + conjugate(pick(MOTION_WORDS, first.motion), scene.count)
    if len(scene.things) == 2:
        text += f"{_wide_link(scene, rng, pick)} {_wide_noun(scene.things[1], 1, pick)}"
    if scene.light != "steady":
        light = pick(LIGHT_WORDS, scene.light)
        text = (
            f"{light}, {text}"
            if rng.random() < 0.3
            else f"{text}{rng.choice((', ', ' while ', ' as '))}{light}"
        )
    return text


def _wide_noun(thing: Thing, count: int, pick: Callable[[Words, str], str]) -> str:
    phrase = f"{pick(COLOUR_WORDS, thing.colour)} {plural(pick(SHAPE_WORDS, thing.shape), count)}"
    return article(phrase) if count == 1 else f"{pick(COUNT_WORDS, str(count))} {phrase}"


def _wide_link(scene: Scene, rng: random.Random, pick: Callable[[Words, str], str]) -> str:
    if scene.kind == "order":
        return pick(ORDER_WORDS, "then")
    if scene.relation:
        return " " + pick(RELATION_WORDS, scene.relation)
    return rng.choice((" and", " next to", " with"))


# --- how people write the same thing ------------------------------------------------------------------------

_IRREGULAR = {"flies": "flying", "gets": "getting", "drops": "dropping", "pops": "popping", "runs": "running"}
_VERBS = {words[0].split()[0] for entry in MOTION_WORDS.values() for words in (entry[:1], entry[1], entry[2])}
_VERBS |= {phrase.split()[0] for entry in MOTION_WORDS.values() for part in entry[1:3] for phrase in part}
_VERBS |= {phrase.split()[0] for key in MOTION_WORDS for phrase in WIDE_WORDS[key]}


def gerund(verb: str) -> str:
    """'moves' -> 'moving'."""
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    stem = verb.removesuffix("es") if verb in ("goes", "vanishes") else verb.removesuffix("s")
    return stem.removesuffix("e") + "ing"


def vary(text: str, rng: random.Random) -> str:
    """Half the captions as they are, half written as people write them: 'the', no article, gerunds, a full
    stop.
    """
    if rng.random() < 0.5:
        return text
    if rng.random() < 0.4:
        text = re.sub(r"[a-z]+", lambda m: gerund(m[0]) if m[0] in _VERBS else m[0], text)
    if rng.random() < 0.3:
        word = rng.choice(("the ", "", "one "))
        text = re.sub(r"\b[Aa]n? (?!pair|trio|couple|triad)", word, text)
    if rng.random() < 0.15:
        text = rng.choice(("a video of ", "video: ", "show me ", "a clip of ", "please draw ")) + text
    if rng.random() < 0.15:
        text = text.replace(",", "")
    if rng.random() < 0.3:
        text = text.rstrip(".") + rng.choice((".", "!", " "))
    return text.strip()


# --- text for the tokenizers --------------------------------------------------------------------------------


def tokenizer_text(for_llm: bool, seed: int = 0, lines: int = 6000) -> list[str]:
    """Lines that a tokenizer is trained on: the model's own reading, and ordinary words."""
    rng = random.Random(f"tokenizer:{seed}")
    generic = [" " + word for word in GENERIC_TEXT.split() for _ in range(4)]
    if not for_llm:
        return [part for _ in range(lines) for part in (*t5_pair(rng), t5_text(rng))] + generic
    chats = [chat(rng) for _ in range(lines)]
    return [part for turn in chats for part in turn if part] + generic
