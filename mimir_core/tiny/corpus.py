"""What the two text models of Mimir Tiny read: captions for T5, chats for the language model.

T5 reads captions in the styles that videos have (simple, seen, long) and nothing else. The language model
also reads the held words, and a wide list of further words that people may type; it answers every caption
of a scene with the scene's one simple caption, and each of the four default instructions with a few
words. Nobody reads the unread words. No scene of the tenth that is kept for tests is ever used here.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from ..config import DEFAULT_INSTRUCTIONS
from .captions import (
    COLOUR_WORDS,
    COUNT_WORDS,
    LIGHT_WORDS,
    MOTION_WORDS,
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


class Chat(NamedTuple):
    """One turn of the language model's training text."""

    prompt: str
    instruction: str | None
    answer: str


def scene_of(rng: random.Random) -> Scene:
    """A training scene, every kind equally likely enough for text (videos draw other shares)."""
    return random_scene(rng, rng.choice(("one", "light", "count", "pair", "relation", "relation")))


def t5_pair(rng: random.Random) -> tuple[str, str]:
    """(a caption of a training style, varied; the scene's simple caption)."""
    scene = scene_of(rng)
    text = caption(scene, rng.choice(TRAINING_STYLES), rng)
    return vary(text, rng), canonical(scene)


def chat(rng: random.Random) -> Chat:
    """A caption in any style but unread; answered with the simple caption (2 of 3), or to one instruction."""
    scene = scene_of(rng)
    style = rng.choices(("simple", "seen", "held", "long", "wide"), weights=(2, 3, 5, 3, 3))[0]
    text = wide_caption(scene, rng) if style == "wide" else caption(scene, style, rng)
    prompt = vary(text, rng)
    if rng.random() < 0.65:
        return Chat(prompt, None, canonical(scene))
    index = rng.randrange(len(DEFAULT_INSTRUCTIONS))
    return Chat(prompt, DEFAULT_INSTRUCTIONS[index], instruction_answers(scene)[index])


def wide_caption(scene: Scene, rng: random.Random) -> str:
    """Like a simple caption, but each word from any list that the language model may read."""
    first = scene.things[0]
    text = _wide_noun(first, scene.count, rng)
    if first.motion != "still":
        text += " " + conjugate(_wide(MOTION_WORDS, first.motion, rng), scene.count)
    if len(scene.things) == 2:
        link = (
            _wide(RELATION_WORDS, scene.relation, rng)
            if scene.relation
            else rng.choice(("and", "next to", "with"))
        )
        text += f" {link} {_wide_noun(scene.things[1], 1, rng)}"
    if scene.light != "steady":
        light = _wide(LIGHT_WORDS, scene.light, rng)
        text = (
            f"{light}, {text}"
            if rng.random() < 0.3
            else f"{text}{rng.choice((', ', ' while ', ' as '))}{light}"
        )
    return text


def _wide_noun(thing: Thing, count: int, rng: random.Random) -> str:
    phrase = f"{_wide(COLOUR_WORDS, thing.colour, rng)} {plural(_wide(SHAPE_WORDS, thing.shape, rng), count)}"
    return article(phrase) if count == 1 else f"{_wide(COUNT_WORDS, str(count), rng)} {phrase}"


def _wide(words: Words, key: str, rng: random.Random) -> str:
    simple, seen, held, _ = words[key]
    return rng.choice((simple, *seen, *held, *WIDE_WORDS[key]))


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
        return [part for _ in range(lines) for part in t5_pair(rng)] + generic
    chats = [chat(rng) for _ in range(lines)]
    return [part for turn in chats for part in turn if part] + generic
