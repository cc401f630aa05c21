"""Tokenizers of Mimir Tiny: byte-level BPE of about a thousand pieces, which can write any text.

T5's ends every text with `</s>` (id 1) and pads with id 0. The language model's has Phi-3's template
tokens, which swallow the whitespace that follows them as Phi-3.5's do, and Phi-3.5's chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from .corpus import tokenizer_text

VOCABULARY = 1024
SENTINELS = 8  # <extra_id_0> ... for span corruption
T5_SPECIALS = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
PHI_SPECIALS = ["<|endoftext|>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train_tokenizers(out_dir: str | Path) -> None:
    """Writes `t5/` and `phi/` tokenizer.json and tokenizer_config.json under `out_dir`, unless they are
    there.
    """
    out_dir = Path(out_dir)
    for name, build in (("t5", build_t5_tokenizer), ("phi", build_phi_tokenizer)):
        folder = out_dir / name
        if (folder / "tokenizer_config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer, config = build()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        print(f"tokenizer {name}: {tokenizer.get_vocab_size()} pieces", flush=True)


def build_t5_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """Trains T5's tokenizer; returns it with its tokenizer_config."""
    tokenizer = _train(T5_SPECIALS, tokenizer_text(for_llm=False))
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", T5_SPECIALS.index("</s>"))]
    )
    return tokenizer, _config(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_phi_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """Trains the language model's tokenizer; returns it with its tokenizer_config."""
    tokenizer = _train(PHI_SPECIALS, tokenizer_text(for_llm=True))
    names = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<|endoftext|>"}
    return tokenizer, _config(chat_template=CHAT_TEMPLATE, **names)


def _train(specials: list[str], lines: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokens = [
        AddedToken(name, rstrip=name.startswith("<|"), normalized=False, special=True) for name in specials
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _config(**names: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        **names,
    }
