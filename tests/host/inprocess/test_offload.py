"""Small cards: weights that stay outside give the same bits, stages leave for each other, failures pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as management
import pytest
import torch
from comfy.ldm.modules import attention
from mimir_pack.mimir_core import memory
from mimir_pack.nodes.decode import MimirVAEDecode, MimirVAEEncode
from mimir_pack.nodes.encode import MimirPhiEncode, MimirT5Encode
from mimir_pack.nodes.host import fuser as host_fuser
from mimir_pack.nodes.host import model as host_model
from mimir_pack.nodes.host import phi as host_phi
from mimir_pack.nodes.host import t5 as host_t5
from mimir_pack.nodes.host import vae as host_vae
from mimir_pack.nodes.host.tiny import FOLDER
from mimir_pack.tests.host.inprocess import references
from mimir_pack.tests.host.inprocess.card import DEVICE, Card, insert

import nodes as host_nodes

PROMPT = "a red circle moves left above the blue square"
PHI = {
    "instructions": "name the square\nsay it",
    "answer_length": 8,
    "temperature": 1.0,
    "seed": 1,
    "layer": -1,
}
DIT = {**references.DIT, "num_layers": 16}  # all three parts take some megabytes
PLENTY = 2**40
META = torch.device("meta")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    references.transformer(**DIT).save_pretrained(root / "dit")
    references.save_t5(root / "t5", d_ff=2048, num_layers=6)
    references.save_phi(root / "phi", intermediate_size=2048, num_hidden_layers=4)
    references.vae().save_pretrained(root / "vae")
    return root


@pytest.fixture(autouse=True)
def empty_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is loaded, and attention is not the CPU's default one, whose pieces depend on what is free."""
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    management.unload_all_models()
    yield
    management.unload_all_models()


@pytest.fixture
def dit(folder: Path) -> Any:
    """A MODEL whose weights are all that counts: one step of a toy needs more than the toy."""
    patcher = host_model.load_dit(folder / "dit")
    patcher.model.memory_usage_factor /= 1000
    return patcher


@pytest.fixture
def t5(folder: Path) -> Any:
    return host_t5.load_t5(folder / "t5", references.TEXT_LENGTH)


@pytest.fixture
def phi(folder: Path) -> Any:
    return host_phi.load_phi(folder / "phi")


@pytest.fixture
def vae(folder: Path) -> Any:
    return host_vae.load_vae(folder / "vae")


def tokens(seed: int = 5, length: int = references.TEXT_LENGTH) -> torch.Tensor:
    return torch.randn(1, length, references.TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def sample(model: Any, steps: int = 3, cfg: float = 1.0) -> torch.Tensor:
    latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    positive, negative = ([[tokens(seed), {}]] for seed in (5, 6))
    with torch.inference_mode():
        return host_nodes.common_ksampler(
            model, 7, steps, cfg, "euler", "simple", positive, negative, latent
        )[0]["samples"]


def predict(patcher: Any) -> torch.Tensor:
    x = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return patcher.model.diffusion_model(x, torch.tensor([500.0]), tokens(), transformer_options={})


def give_a_third(patcher: Any) -> None:
    """Loads a third of the weights, and checks by the patcher's own counters that it was a third."""
    third = patcher.model_size() // 3
    patcher.partially_load(DEVICE, extra_memory=third)
    assert patcher.model.model_lowvram
    assert 0 < patcher.model.model_loaded_weight_memory == patcher.loaded_size() <= third
    assert patcher.loaded_size() > 0.1 * patcher.model_size()


# a third of the weights


def test_dit_with_a_third_of_its_weights_is_bitwise_the_same(dit):
    dit.partially_load(DEVICE, extra_memory=PLENTY)
    assert not dit.model.model_lowvram and dit.loaded_size() == dit.model_size()
    expected = predict(dit)
    dit.detach()
    give_a_third(dit)
    assert torch.equal(predict(dit), expected)


def test_phi_with_a_third_of_its_weights_is_bitwise_the_same(phi, run_node, monkeypatch):
    expected, answer = run_node(MimirPhiEncode, clip=phi, text=PROMPT, **PHI)
    assert answer
    card = insert(monkeypatch, 1, phi.patcher)
    give_a_third(phi.patcher)
    monkeypatch.setattr(management, "load_models_gpu", lambda *_, **__: None)  # it is loaded, as it should be
    found, same = run_node(MimirPhiEncode, clip=phi, text=PROMPT, **PHI)
    assert same == answer and card.size == 1
    assert all(
        torch.equal(getattr(found, n), getattr(expected, n)) for n in ("query", "answer", "instruction")
    )


def test_t5_with_a_third_of_its_weights_is_bitwise_the_same(t5, run_node, monkeypatch):
    (expected,) = run_node(MimirT5Encode, clip=t5, text=PROMPT)
    management.unload_all_models()
    monkeypatch.setattr(t5.patcher, "load_device", DEVICE)
    give_a_third(t5.patcher)
    monkeypatch.setattr(management, "load_models_gpu", lambda *_, **__: None)
    (found,) = run_node(MimirT5Encode, clip=t5, text=PROMPT)
    assert torch.equal(found[0][0], expected[0][0])


@pytest.mark.parametrize("part", ["dit", "phi", "fuser"])
def test_nothing_stands_in_the_way_of_partial_loading(part, request):
    """The host leaves out leaf modules that fetch their weights when they run. All of ours are such."""
    if part == "fuser":
        network: Any = host_fuser.load_fuser(FOLDER / "fuser.safetensors").module
    else:
        loaded = request.getfixturevalue(part)
        network = loaded.model.diffusion_model if part == "dit" else loaded.cond_stage_model
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        assert not own or hasattr(module, "comfy_cast_weights"), f"{name} cannot fetch its weights"
        assert not own or len(own) == len(dict(module.named_parameters())), f"{name} is no leaf"
    assert not dict(network.named_buffers())


def test_dit_meets_no_tensor_of_another_device(dit):
    """The meta device refuses to compute with a tensor of the CPU: what stays there has to be fetched."""
    dit.partially_load(META, extra_memory=dit.model_size() // 3)
    devices = {parameter.device.type for parameter in dit.model.diffusion_model.parameters()}
    assert dit.model.model_lowvram and devices == {"cpu", "meta"}
    x, text = (tensor.to(META) for tensor in (torch.zeros(2, 16, 3, 8, 8), tokens().expand(2, -1, -1)))
    options = {"mimir_padding": (0, 4)}
    with torch.inference_mode():
        step = torch.zeros(2, device=META)
        assert dit.model.diffusion_model(x, step, text, transformer_options=options).is_meta


def test_phi_meets_no_tensor_of_another_device(phi):
    management.unload_all_models()  # the host loads a CLIP as it is made
    phi.patcher.partially_load(META, extra_memory=phi.patcher.model_size() // 3)
    network = phi.cond_stage_model.phi
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu", "meta"}
    cache = network.new_cache()
    with torch.inference_mode():
        for length in (7, 1):
            ids = torch.zeros(1, length, dtype=torch.long, device=META)
            (hidden,) = network(ids, cache)
        assert network.logits(hidden).is_meta


# the host's own path


@pytest.mark.parametrize("cfg", [1.0, 6.0])
def test_sampling_on_a_card_that_is_too_small_gives_the_same_bits(dit, monkeypatch, cfg):
    expected = sample(dit, cfg=cfg)
    card = insert(monkeypatch, 0.6 * dit.model_size(), dit)
    found = sample(dit, cfg=cfg)
    assert dit.model.model_lowvram and 0 < dit.loaded_size() < card.size
    assert torch.equal(found, expected)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_encoders_on_a_card_that_is_too_small_give_the_same_bits(t5, phi, run_node, monkeypatch, share):
    """By the host's own decision, and again when the next prompt comes."""
    text = run_node(MimirT5Encode, clip=t5, text=PROMPT)[0][0][0]
    llm, answer = run_node(MimirPhiEncode, clip=phi, text=PROMPT, **PHI)
    insert(monkeypatch, share * t5.patcher.model_size(), t5.patcher, phi.patcher)
    monkeypatch.setattr(memory, "phi", lambda *_, **__: 0)
    for _ in range(2):
        assert torch.equal(run_node(MimirT5Encode, clip=t5, text=PROMPT)[0][0][0], text)
        assert t5.patcher.model.model_lowvram and t5.patcher.loaded_size() < share * t5.patcher.model_size()
        found, same = run_node(MimirPhiEncode, clip=phi, text=PROMPT, **PHI)
        assert phi.patcher.model.model_lowvram and same == answer and torch.equal(found.answer, llm.answer)


def test_a_lora_is_applied_to_what_stays_outside(dit, monkeypatch):
    key = "diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    patch = {key: ("diff", (torch.full((64, 64), 0.02),))}
    patched = dit.clone()
    assert patched.add_patches(patch, 1.0) == [key]
    plain, expected = sample(dit), sample(patched)
    insert(monkeypatch, 0.3 * dit.model_size(), dit, patched)
    found = sample(patched)
    assert patched.model.model_lowvram and not torch.equal(plain, expected)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(sample(dit), plain)  # and leaves nothing behind


def test_encoders_leave_before_the_dit_comes_and_come_back(t5, phi, dit, run_node, monkeypatch):
    """A card that holds any one of the three, and no two of them; the same video both times."""
    before = run_all(t5, phi, dit, run_node)
    sizes = [patcher.model_size() for patcher in (t5.patcher, phi.patcher, dit)]
    assert min(sizes) > 0.6 * max(sizes)
    card = insert(monkeypatch, 1.2 * max(sizes), t5.patcher, phi.patcher, dit)
    monkeypatch.setattr(memory, "phi", lambda *_, **__: 0)  # a toy's work outweighs its weights
    for _ in range(2):
        after = run_all(t5, phi, dit, run_node, card)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert card.most <= card.size


def run_all(t5: Any, phi: Any, dit: Any, run_node: Any, card: Card | None = None) -> list[torch.Tensor]:
    """T5, Phi-3.5 and a few steps. With a card: each stage is all there, and the others are not."""

    def alone(patcher: Any) -> None:
        if card is not None:
            sizes = {id(p): loaded(card, p) for p in (t5.patcher, phi.patcher, dit)}
            assert sizes.pop(id(patcher)) == patcher.model_size() and not patcher.model.model_lowvram
            assert sum(sizes.values()) <= card.size - patcher.model_size()

    (text,) = run_node(MimirT5Encode, clip=t5, text=PROMPT)
    alone(t5.patcher)
    llm, _ = run_node(MimirPhiEncode, clip=phi, text=PROMPT, **PHI)
    alone(phi.patcher)
    latent = sample(dit)
    alone(dit)
    return [text[0][0], llm.query, llm.answer, llm.instruction, latent]


def loaded(card: Card, patcher: Any) -> int:
    return sum(one.model.loaded_size() for one in card.models() if one.model is patcher)


# what fails leaves the next run as it was


class Broken(Exception):
    pass


def failing(calls: int, error: BaseException) -> Callable[..., Any]:
    """A wrapper that lets some calls pass and then raises."""
    seen: list[int] = []

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            raise error
        return executor(*args, **kwargs)

    return run


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    "error",
    [Broken(), torch.OutOfMemoryError("CUDA out of memory"), management.InterruptProcessingException()],
    ids=["error", "memory", "interrupt"],
)
def test_a_sampling_that_failed_leaves_nothing_behind(dit, monkeypatch, error, small):
    expected = sample(dit)
    if small:
        insert(monkeypatch, 0.5 * dit.model_size(), dit)
    patched = dit.clone()
    patched.add_patches({"diffusion_model.proj_out.weight": ("diff", (torch.ones(64, 64),))}, 1.0)
    patched.add_wrapper_with_key("diffusion_model", "test", failing(1, error))
    with pytest.raises(type(error)):
        sample(patched)
    assert torch.equal(sample(dit), expected)
    assert not dit.backup and not dit.object_patches_backup


def test_phi_after_a_failure_in_its_answer(phi, run_node, monkeypatch):
    expected, answer = run_node(MimirPhiEncode, clip=phi, text=PROMPT, **PHI)
    for error in (Broken(), management.InterruptProcessingException()):
        with monkeypatch.context() as patch:
            step = failing(0, error)
            patch.setattr(host_phi, "progress", lambda step=step: lambda *_: step(lambda: None))
            with pytest.raises(type(error)):
                run_node(MimirPhiEncode, clip=phi, text=PROMPT, **PHI)
        found, same = run_node(MimirPhiEncode, clip=phi, text=PROMPT, **PHI)
        assert same == answer and torch.equal(found.query, expected.query)
        assert torch.equal(found.answer, expected.answer)


def test_decoding_after_a_failure_is_whole_again(vae, run_node, monkeypatch):
    latent = {"samples": torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(1))}
    (expected,) = run_node(MimirVAEDecode, vae=vae, latent=latent, tiling="off")
    with monkeypatch.context() as patch:
        patch.setattr(vae.first_stage_model.network.decoder, "forward", broken)
        with pytest.raises(Broken):
            run_node(MimirVAEDecode, vae=vae, latent=latent, tiling="on")
    (found,) = run_node(MimirVAEDecode, vae=vae, latent=latent, tiling="off")
    assert torch.equal(found, expected) and not vae.first_stage_model.network.use_tiling


def broken(*_: Any, **__: Any) -> Any:
    raise Broken


# memory that runs out in the VAE


def out_of_memory(original: Any, when: Callable[[Any], bool]) -> Any:
    def run(x: torch.Tensor, tile: Any = None) -> torch.Tensor:
        if when(tile):
            raise management.OOM_EXCEPTION("CUDA out of memory. Tried to allocate 17.00 GiB")
        return original(x, tile)

    return run


@pytest.mark.parametrize("coding", ["decode", "encode"])
def test_whole_that_runs_out_of_memory_becomes_tiles_and_says_so(vae, monkeypatch, coding):
    original = getattr(vae.first_stage_model, coding)
    expected, _ = run_vae(vae, coding, "on")
    monkeypatch.setattr(vae.first_stage_model, coding, out_of_memory(original, lambda tile: tile is None))
    found, note = run_vae(vae, coding, "auto")
    assert "in tiles" in note and "because memory ran out" in note
    assert found.shape == expected.shape and torch.isfinite(found).all()


@pytest.mark.parametrize("coding", ["decode", "encode"])
def test_tiles_become_smaller_as_long_as_memory_runs_out(vae, monkeypatch, coding):
    """0.33 sizes its tiles by what should fit, up to nearly the whole."""
    original = getattr(vae.first_stage_model, coding)
    seen: list[Any] = []

    def large(tile: Any) -> bool:
        seen.append(tile)
        return tile is None or max(tile) > 128

    monkeypatch.setattr(vae.first_stage_model, coding, out_of_memory(original, large))
    _, note = run_vae(vae, coding, "auto")
    assert seen == [None, (256, 256), (128, 128)] and "in tiles of 128 x 128 pixels, because" in note


@pytest.mark.parametrize("coding", ["decode", "encode"])
@pytest.mark.parametrize("tiling", ["auto", "on"])
def test_tiles_that_run_out_of_memory_say_what_to_do(vae, monkeypatch, coding, tiling):
    expected, _ = run_vae(vae, coding, "off")
    with monkeypatch.context() as patch:
        original = getattr(vae.first_stage_model, coding)
        patch.setattr(vae.first_stage_model, coding, out_of_memory(original, lambda tile: True))
        with pytest.raises(ValueError, match="not even in tiles.*fewer frames.*--cpu-vae"):
            run_vae(vae, coding, tiling)
    assert torch.equal(run_vae(vae, coding, "off")[0], expected)


def test_off_means_off(vae, monkeypatch):
    original = vae.first_stage_model.decode
    monkeypatch.setattr(vae.first_stage_model, "decode", out_of_memory(original, lambda tile: tile is None))
    with pytest.raises(ValueError, match="tiling is off.*auto"):
        run_vae(vae, "decode", "off")


def test_auto_goes_straight_to_tiles_on_a_card_that_is_known_to_be_too_small(vae, monkeypatch):
    monkeypatch.setattr(management, "get_total_memory", lambda *_: vae.needs((1, 16, 1, 10, 12), None) // 2)
    _, note = run_vae(vae, "decode", "auto")
    assert note.startswith("Decoded in tiles") and "ran out" not in note


def run_vae(vae: Any, coding: str, tiling: str) -> tuple[torch.Tensor, str]:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        if coding == "decode":
            latent = {"samples": torch.randn(1, 16, 1, 10, 12, generator=generator)}
            out = MimirVAEDecode.EXECUTE_NORMALIZED(vae=vae, latent=latent, tiling=tiling)
            return out.result[0], out.ui.value
        frames = torch.rand(1, 80, 96, 3, generator=generator)
        out = MimirVAEEncode.EXECUTE_NORMALIZED(vae=vae, image=frames, tiling=tiling)
        return out.result[0]["samples"], out.ui.value
