"""Text in: T5 for use outside ComfyUI, tokenizers from a model's own files, and chats with the prompt marked.

A user's prompt is data and never becomes a template token: wherever it spells one (`<|end|>`), a space is put
behind the first character before the text is tokenised, and what comes out is checked once more.

Letters: B texts, n text length of the DiT, D width of T5.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .headers import has_tokenizer

log = logging.getLogger(__name__)

PHI_STOPS = ("<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
PHI_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
INSTRUCTION_JOIN = "\n"  # between a prompt and the instruction that follows it, in the same user turn
LISTED_CUT = 64  # pieces that are still named of what T5 has to cut
_MARK = "\ue000mimir\ue001"  # stands for the user's words while the template is rendered


# --- tokenizers ---------------------------------------------------------------------------------------------


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model's own files: its Hugging Face folder, or a plain tokenizer.json.

    Nothing is downloaded and no code of the model is run. ValueError when the files are not there or not
    readable.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(folder)
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        if (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        if not has_tokenizer(path):
            raise ValueError("there is no tokenizer.json, tokenizer.model or spiece.model in it")
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  tokenizers raises bare Exception on files it cannot read
        reason = " ".join(str(error).split())  # one line
        raise ValueError(
            f"{path} does not hold a tokenizer that can be read ({reason}); "
            "put the model's own tokenizer files there."
        ) from error


def require_whole(name: str, text: str) -> None:
    """ValueError where a text has half of a character that takes two, which no tokenizer can read."""
    half = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
    if half is not None:
        raise ValueError(
            f"The {name} has half of a character at place {half + 1} ('{text[:half][-20:]}...'), perhaps an "
            "emoji that was cut in two: delete it and write it again."
        )


# --- T5 -----------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """What did not fit: how many tokens, and the words they stand for."""

    tokens: int
    text: str


class T5Text(NamedTuple):
    """`hidden` (B, n, D), and for each text what was cut off (None when all of it fitted)."""

    hidden: Tensor
    cut: tuple[Cut | None, ...]


class T5Encoder:
    """T5's encoder as CogVideoX uses it: each text padded to n tokens, no mask, so padding is attended."""

    def __init__(self, model: Any, tokenizer: Any, length: int) -> None:
        self.model, self.tokenizer, self.length = model, tokenizer, length

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        length: int,
        tokenizer_folder: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> T5Encoder:
        """From a folder in transformers' format; in diffusers' layout the tokenizer has its own folder."""
        from transformers import T5EncoderModel, __version__

        as_dtype: dict[str, Any] = {"dtype" if int(__version__.split(".")[0]) >= 5 else "torch_dtype": dtype}
        try:
            model = T5EncoderModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, **as_dtype
            )
        except OSError as error:
            raise ValueError(
                f"{folder} does not hold a T5 encoder (expected config.json and safetensors): {error}"
            ) from error
        model.eval().to(torch.device(device))  # type: ignore[arg-type]
        return cls(model, load_tokenizer(tokenizer_folder or folder), length)

    @torch.no_grad()
    def encode(self, texts: str | list[str]) -> T5Text:
        """Hidden states of one text or several."""
        texts = [texts] if isinstance(texts, str) else texts
        ids, cut = t5_tokens(self.tokenizer, texts, self.length)
        return T5Text(self.model(input_ids=ids.to(self.model.device)).last_hidden_state, cut)  # (B, n, D)


def t5_tokens(tokenizer: Any, texts: list[str], length: int) -> tuple[Tensor, tuple[Cut | None, ...]]:
    """Token ids (B, `length`), padded and ended as T5 expects, and what was cut off each text."""
    rows = [tokenizer(text, truncation=False, verbose=False)["input_ids"] for text in texts]
    cut = tuple(_cut(tokenizer, row, length) for row in rows)
    rows = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]), cut


def _cut(tokenizer: Any, row: list[int], length: int) -> Cut | None:
    if len(row) <= length:
        return None
    dropped = row[length - 1 : -1]  # the end token stays
    return Cut(len(dropped), tokenizer.decode(dropped, skip_special_tokens=True).strip())


class Piece(NamedTuple):
    """One token in words. kind: "text", "unk" (T5 has no token for this text), "end", "cut" (not read)."""

    text: str
    kind: str


def t5_pieces(tokenizer: Any, ids: list[int], text: str, length: int) -> list[Piece]:
    """What each of the tokens `ids` of `text` stands for: those that are read, then the first that are cut.

    Literal characters of `text` where `tokenizer` reads it as `ids`; else its own names for them.
    """
    names = _literal_names(tokenizer, ids, text)
    kinds = {tokenizer.unk_token_id: "unk", tokenizer.eos_token_id: "end"}
    pieces = [Piece(name, kinds.get(token, "text")) for name, token in zip(names, ids, strict=True)]
    if len(pieces) <= length:
        return pieces
    cut = [Piece(piece.text, "cut") for piece in pieces[length - 1 : -1][:LISTED_CUT]]
    return [*pieces[: length - 1], pieces[-1], *cut]


def _literal_names(tokenizer: Any, ids: list[int], text: str) -> list[str]:
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        if encoded["input_ids"] == ids:
            return literal(text, encoded["offset_mapping"])
    return [str(name).replace("▁", " ") for name in tokenizer.convert_ids_to_tokens(ids)]


def literal(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """The characters of each span that no span before it has: tokens of single bytes share one character."""
    found, seen = [], 0
    for first, last in spans:
        found.append(text[max(first, seen) : last])
        seen = max(seen, last)
    return found


# --- chat ---------------------------------------------------------------------------------------------------


class ChatTurn(NamedTuple):
    """A user's turn and the header of the answer, as tokens."""

    ids: list[int]
    query: list[int]  # positions of the tokens whose characters lie in the prompt
    pieces: list[str]  # the characters of each of those tokens; "" where it continues a character
    template: tuple[tuple[str, ...], tuple[str, ...]]  # the other tokens, before and after them


class PhiTokenizer:
    """A chat model's tokenizer: renders turns, knows which tokens are the user's and which end an answer."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], template: str | None = None) -> None:
        """`template` replaces the tokenizer's own. ValueError when there is none, or no offsets."""
        if not tokenizer.is_fast:
            raise ValueError(
                "this tokenizer cannot tell where in the prompt a token stands; it needs a tokenizer.json"
            )
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.template = template or tokenizer.chat_template or _phi_template(tokenizer)
        added = tokenizer.added_tokens_decoder
        reserved = {id_: t.content for id_, t in added.items() if t.special or t.content.startswith("<")}
        self._reserved = frozenset(reserved) - {tokenizer.unk_token_id}
        self._spelling = re.compile(
            "|".join(re.escape(t) for t in sorted(reserved.values(), key=len, reverse=True)) or "(?!)"
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> PhiTokenizer:
        """From the model's own folder; `generation_config.json`, when there, may name further stop tokens."""
        tokenizer = load_tokenizer(folder)
        vocabulary = tokenizer.get_vocab()
        stops = {vocabulary[name] for name in PHI_STOPS if name in vocabulary}
        stops |= {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        return cls(tokenizer, frozenset(stops | _generation_stops(Path(folder))))

    def turn(self, prompt: str, instruction: str | None = None, system: str | None = None) -> ChatTurn:
        """The chat `system` (if any), then the user saying prompt and instruction, then the answer's header.

        ValueError when the template does not show the user's words exactly once.
        """
        prompt = self.defuse(prompt)
        words = INSTRUCTION_JOIN.join(part for part in (prompt, self.defuse(instruction or "")) if part)
        before, after = self._frame(None if system is None else self.defuse(system))
        text = before + words + after
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        self._check_words(text, ids, spans, len(before), len(before) + len(words))
        query = positions_within(spans, len(before), len(before) + len(prompt))
        pieces = literal(text, spans)
        first = query[0] if query else len(positions_within(spans, 0, len(before)))
        start, end = pieces[:first], pieces[query[-1] + 1 if query else first :]
        return ChatTurn(ids, query, [pieces[position] for position in query], (tuple(start), tuple(end)))

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer, as they stand after the answer's header."""
        before, after = self._frame(None)
        header = self._ids(before + "x" + after)
        return self._ids(before + "x" + after + self.defuse(answer))[len(header) :]

    def defuse(self, text: str) -> str:
        """`text` stripped, and with nothing in it that spells a template token: '<|end|>' -> '< |end|>'."""
        return self._spelling.sub(lambda match: match[0][0] + " " + match[0][1:], text.strip())

    def shorten(self, prompt: str, tokens: int) -> str:
        """The beginning of `prompt` that is written with at most `tokens` tokens."""
        prompt = self.defuse(prompt)
        spans = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in spans["offset_mapping"]]
        return prompt if len(ends) <= tokens else prompt[: ends[tokens - 1] if tokens > 0 else 0].strip()

    def decode(self, ids: list[int]) -> str:
        """The text of answer tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def piece(self, token: int) -> str:
        """The text of one token."""
        return self.tokenizer.decode([token])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _frame(self, system: str | None) -> tuple[str, str]:
        """What the template writes before and after the user's words."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": _MARK})
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        parts = rendered.split(_MARK)
        if len(parts) != 2:
            raise ValueError(
                f"the chat template shows the user's words {len(parts) - 1} times, expected once"
            )
        return parts[0], parts[1]

    def _check_words(
        self, text: str, ids: list[int], spans: list[tuple[int, int]], start: int, end: int
    ) -> None:
        for position in positions_within(spans, start, end):
            if ids[position] in self._reserved:
                found = text[slice(*spans[position])]
                raise ValueError(
                    f"the prompt contains {found!r}, which this model reads as a control token; rephrase it"
                )


def positions_within(spans: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """Indices of the character spans that share a character with [start, end)."""
    return [index for index, (first, last) in enumerate(spans) if max(first, start) < min(last, end)]


def _phi_template(tokenizer: Any) -> str:
    """Phi-3's template, for a plain tokenizer.json that has Phi-3's tokens but no template."""
    missing = {"<|user|>", "<|assistant|>", "<|end|>"} - set(tokenizer.get_vocab())
    if missing:
        raise ValueError(
            f"this tokenizer has no chat template and lacks Phi-3's tokens {', '.join(sorted(missing))}; "
            "use the tokenizer files of Phi-3.5-mini-instruct"
        )
    return PHI_TEMPLATE


def _generation_stops(folder: Path) -> set[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return set()
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return set(found) if isinstance(found, list) else set() if found is None else {found}
