"""Phi-3: a decoder-only language model whose every hidden state can be read.

Source: the architecture of `transformers.Phi3ForCausalLM` (Apache-2.0), written anew; parameter names are
equal, so published checkpoints load without renaming. Differences:
- `ops` and `attention` are injected, so that a host can cast, offload and choose the attention of every
  layer;
- one `forward` returns the hidden states of the layers that are asked for, counted as transformers counts
  `hidden_states`: 0 is the embedding, -1 follows the final norm, -2 enters the last layer un-normed;
- no dropout, no sliding window.

LongRoPE has two sets of factors: the short ones up to `original_max_position_embeddings` positions, the
long ones for every position of a longer sequence. A cache that was filled with one set cannot be
continued with the other, so a cache that crosses the border is computed again from its tokens (once);
cached therefore always equals uncached.

Letters: B batch, L new tokens, P tokens in the cache, D width, H heads, d head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import Attention, sdpa
from .config import PhiConfig

ROWS = 2048  # a prompt longer than this attends in pieces of so many tokens


class Rope(NamedTuple):
    """Rotary tables of the new positions, each (L, d)."""

    cos: Tensor
    sin: Tensor


class KeyValueCache:
    """What the model keeps of the tokens it has read: ids (B, P); keys, values (B, H, P, d) of each layer.

    Appending never writes into a tensor that is there, so a `fork` shares what both have read.
    """

    def __init__(self, layers: int) -> None:
        self.ids: Tensor | None = None
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    @property
    def length(self) -> int:
        """Number of tokens read so far."""
        return 0 if self.ids is None else self.ids.shape[1]

    def fork(self) -> KeyValueCache:
        """A cache that continues from the same tokens without touching this one."""
        copy = KeyValueCache(len(self.layers))
        copy.ids, copy.layers = self.ids, list(self.layers)
        return copy

    def clear(self) -> None:
        """Forgets everything."""
        self.ids, self.layers = None, [None] * len(self.layers)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new keys and values (B, H, L, d) of one layer and returns all of them (B, H, P + L, d)."""
        old = self.layers[layer]
        if old is None:
            values = values.contiguous()  # a view would keep queries and keys alive with it
        else:
            keys, values = torch.cat((old[0], keys), dim=2), torch.cat((old[1], values), dim=2)
        self.layers[layer] = (keys, values)
        return keys, values


class Phi3ForCausalLM(nn.Module):
    """The language model. `ops` supplies Linear, Embedding and RMSNorm."""

    def __init__(
        self,
        config: PhiConfig,
        ops: Any = torch.nn,
        attention: Attention = sdpa,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.model = Phi3Model(config, ops, attention, device, dtype)
        self.lm_head = ops.Linear(
            config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype
        )
        if config.tie_word_embeddings:
            self.register_load_state_dict_pre_hook(_share_embedding)

    def forward(
        self,
        ids: Tensor,
        cache: KeyValueCache | None = None,
        layers: Sequence[int] = (-1,),
        dtype: torch.dtype | None = None,
        options: Any = None,
    ) -> tuple[Tensor, ...]:
        """Reads tokens `ids` (B, L) after those in `cache`; returns hidden states (B, L, D) of `layers`.

        `cache` is extended in place. `dtype` is what to compute in, the parameters' own when None; `options`
        goes to the attention untouched. ValueError for a layer that does not exist, or for no tokens.
        """
        wanted = [self._layer_index(layer) for layer in layers]
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(
                f"token ids have shape {tuple(ids.shape)}, expected (batch, length), a length of 1 or more"
            )
        new = ids.shape[1]
        if cache is not None and self._crosses(cache.length, new):
            ids = torch.cat((_ids(cache), ids), dim=1)
            cache.clear()
        states = self.model(ids, cache, dtype, options, wanted)
        return tuple(states[index][:, -new:] for index in wanted)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token (B, L, V) from hidden states (B, L, D) of layer -1."""
        return self.lm_head(hidden)

    def new_cache(self) -> KeyValueCache:
        """An empty cache for this model."""
        return KeyValueCache(self.config.num_hidden_layers)

    def same_regime(self, length: int, longer: int) -> bool:
        """True when sequences of both lengths use the same rotary factors: one may continue the other."""
        return self.model.is_long(length) == self.model.is_long(longer)

    def tie_weights(self) -> None:
        """Makes the output layer use the embedding's own parameter, to train tied embeddings."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Norms one, matrices normal with `std`; smaller by sqrt(2 layers) where they write the residual."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, 0.0, std / math.sqrt(2 * self.config.num_hidden_layers), generator)
            else:
                nn.init.normal_(parameter, 0.0, std, generator)

    def _layer_index(self, layer: int) -> int:
        count = self.config.num_hidden_layers + 1
        if not -count <= layer < count:
            raise ValueError(
                f"layer is {layer}, but this language model has hidden states {-count} to {count - 1}: "
                "use -1, the last one, unless the fuser was trained with another."
            )
        return layer % count

    def _crosses(self, read: int, new: int) -> bool:
        return read > 0 and not self.same_regime(read, read + new)


class Phi3Model(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(
        self,
        config: PhiConfig,
        ops: Any,
        attention: Attention,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self.config = config
        self.embed_tokens = ops.Embedding(config.vocab_size, config.hidden_size, **kwargs)
        self.layers = nn.ModuleList(
            [
                Phi3DecoderLayer(config, index, ops, attention, kwargs)
                for index in range(config.num_hidden_layers)
            ]
        )
        self.norm = ops.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)

    def forward(
        self,
        ids: Tensor,
        cache: KeyValueCache | None,
        dtype: torch.dtype | None,
        options: Any,
        wanted: Sequence[int],
    ) -> dict[int, Tensor]:
        """The `wanted` hidden states (B, L, D): 0 the embedding, then each layer's output, the last normed.

        The others are not kept: 33 of a long prompt are gigabytes.
        """
        read = 0 if cache is None else cache.length
        x = self.embed_tokens(ids)  # (B, L, D)
        x = x if dtype is None else x.to(dtype)
        rope = self._rope(read, read + ids.shape[1], x)
        mask = causal_mask(ids.shape[1], read, x) if ids.shape[1] <= ROWS else None
        states = {0: x} if 0 in wanted else {}
        for index, layer in enumerate(self.layers, start=1):
            x = layer(x, rope, mask, cache, options)  # (B, L, D)
            if index in wanted:
                states[index] = x
        if len(self.layers) in wanted:
            states[len(self.layers)] = self.norm(x)  # (B, L, D)
        if cache is not None:
            cache.ids = ids if cache.ids is None else torch.cat((cache.ids, ids), dim=1)
        return states

    def is_long(self, length: int) -> bool:
        """True when a sequence of `length` tokens uses LongRoPE's long factors."""
        return bool(self.config.long_factor) and length > self.config.original_max_position_embeddings

    def _rope(self, start: int, end: int, like: Tensor) -> Rope:
        """Tables of positions start to end, computed in float32, with dtype and device of `like`."""
        frequencies, scale = rope_frequencies(self.config, self.is_long(end))
        angles = torch.arange(start, end, dtype=torch.float32)[:, None] * frequencies  # (L, d / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (L, d)
        return Rope((angles.cos() * scale).to(like), (angles.sin() * scale).to(like))


class Phi3DecoderLayer(nn.Module):
    """Attention and feed-forward network, each normed before and added after."""

    def __init__(
        self, config: PhiConfig, index: int, ops: Any, attention: Attention, kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.self_attn = Phi3Attention(config, index, ops, attention, kwargs)
        self.mlp = Phi3MLP(config, ops, kwargs)
        self.input_layernorm = ops.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)
        self.post_attention_layernorm = ops.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KeyValueCache | None, options: Any
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, options)  # (B, L, D)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, L, D)


class Phi3Attention(nn.Module):
    """Causal attention with rotary positions; query, key and value come from one projection."""

    def __init__(
        self, config: PhiConfig, index: int, ops: Any, attention: Attention, kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.attention = attention
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = ops.Linear(config.hidden_size, width, bias=False, **kwargs)
        self.o_proj = ops.Linear(self.heads * self.head_dim, config.hidden_size, bias=False, **kwargs)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KeyValueCache | None, options: Any
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 Hkv, L, d)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)  # (B, H or Hkv, L, d)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, Hkv, P + L, d)
        if self.kv_heads != self.heads:
            share = self.heads // self.kv_heads
            k, v = (t.repeat_interleave(share, dim=1) for t in (k, v))  # (B, H, P + L, d)
        if mask is None and q.shape[2] > 1:
            out = self._in_rows(q, k, v, options)  # (B, H, L, d)
        else:
            out = self.attention(q, k, v, mask=mask, options=options)  # (B, H, L, d)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, L, D)

    def _in_rows(self, q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
        """The same, some queries at a time: their masks together would be as large as L squared."""
        parts: list[Tensor] = []
        read = k.shape[2] - q.shape[2]
        for rows in q.split(ROWS, dim=2):
            seen = read + rows.shape[2]
            mask = causal_mask(rows.shape[2], read, rows)
            parts.append(self.attention(rows, k[:, :, :seen], v[:, :, :seen], mask=mask, options=options))
            read = seen
        return torch.cat(parts, dim=2)


class Phi3MLP(nn.Module):
    """SwiGLU with gate and up in one projection."""

    def __init__(self, config: PhiConfig, ops: Any, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.gate_up_proj = ops.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False, **kwargs)
        self.down_proj = ops.Linear(config.intermediate_size, config.hidden_size, bias=False, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, L, intermediate) each
        return self.down_proj(up * nn.functional.silu(gate))  # (B, L, D)


def rope_frequencies(config: PhiConfig, long: bool) -> tuple[Tensor, float]:
    """Inverse frequencies (d / 2,) and the factor on cos and sin (LongRoPE, arXiv 2402.13753).

    The factor is `sqrt(1 + ln s / ln original)`, s = max / original positions; 1.19024 for Phi-3.5-mini.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    factors = config.long_factor if long else config.short_factor
    if not factors:
        return 1.0 / config.rope_theta**exponents, 1.0
    stretch = config.max_position_embeddings / config.original_max_position_embeddings
    scale = math.sqrt(1 + math.log(max(stretch, 1.0)) / math.log(config.original_max_position_embeddings))
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * config.rope_theta**exponents), scale


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding of x (B, H, L, d): channel i pairs with channel i + d / 2."""
    first, second = x.chunk(2, dim=-1)  # (B, H, L, d / 2) each
    return x * rope.cos + torch.cat((-second, first), dim=-1) * rope.sin  # (B, H, L, d)


def causal_mask(new: int, read: int, like: Tensor) -> Tensor | None:
    """Additive mask (1, 1, L, P + L): new token i sees what was read and new tokens 0 to i. None for L = 1.

    Half the lowest finite number, not minus infinity: a host's attention that works in chunks of keys
    would get NaN from a chunk that is hidden entirely.
    """
    if new == 1:
        return None
    hidden = torch.ones(new, read + new, dtype=torch.bool, device=like.device).triu(read + 1)
    mask = torch.zeros(1, 1, new, read + new, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(like.dtype).min / 2)


def _ids(cache: KeyValueCache) -> Tensor:
    if cache.ids is None:
        raise RuntimeError("An empty cache has no tokens to read again.")
    return cache.ids


def _check(config: PhiConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads is {config.num_attention_heads}, expected a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )


def _share_embedding(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Files of models with tied embeddings hold the matrix once."""
    state.setdefault(prefix + "lm_head.weight", state[prefix + "model.embed_tokens.weight"])
