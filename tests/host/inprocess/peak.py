"""Measures what stages take in a real ComfyUI on the CPU: the peak of this process over what it held before.

    COMFYUI_PATH=... python tests/host/inprocess/peak.py [t5 phi dit vae] [--large]

Prints one JSON line per measurement: bytes measured and planned. Networks are written to a temporary folder
first, with zeros for weights, large enough (0.3 to 0.6 GB; --large: 1.2 to 2) that nothing else matters. On
Linux every measurement starts afresh; elsewhere a process should measure one stage, since a peak never falls.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # freed tensors go back to the system at once, as large ones always do
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1048576")
    if sys.platform == "linux" and "MALLOC_SEEN" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_SEEN": "1"})
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    import tests.host.inprocess.conftest  # noqa: F401  sets ComfyUI up for the CPU

import torch

ANSWER = 4  # tokens
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held() -> int:
    """Bytes of main memory that this process holds now (its peak where the system does not tell)."""
    return _status("VmRSS") if STATUS.exists() else peak()


def peak() -> int:
    """The most that it has held."""
    if STATUS.exists():
        return _status("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured(function: Callable[[], Any]) -> tuple[int, Any]:
    """(bytes at the peak beyond what was held before, what the function returns)."""
    gc.collect()
    if RESET.exists():
        RESET.write_text("5")
    before = held()
    result = function()
    return peak() - before, result


def write(network: Any, path: Path, **header: Any) -> None:
    from mimir_pack.mimir_core.weights import save

    state = {
        name: torch.zeros(t.shape, dtype=torch.bfloat16, device="cpu")
        for name, t in network.state_dict().items()
    }
    save(path, state, **header)


def sources(folder: Path, large: bool) -> dict[str, Path]:
    """A DiT, a VAE, a T5 and a Phi-3 of real proportions, written to `folder`."""
    from mimir_pack.mimir_core import vae
    from mimir_pack.mimir_core.config import DiTConfig, PhiConfig, to_dict
    from mimir_pack.mimir_core.dit import CogVideoXTransformer
    from mimir_pack.mimir_core.phi import Phi3ForCausalLM
    from mimir_pack.tests.host.inprocess import references

    scale = 2 if large else 1
    dit = DiTConfig(num_layers=4 * scale, num_attention_heads=16, text_embed_dim=1024)
    phi = PhiConfig(
        vocab_size=len(references.WORDS), hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=4 * scale,
        num_attention_heads=8, num_key_value_heads=8, bos_token_id=2, eos_token_id=(1,), pad_token_id=0,
    )  # fmt: skip
    coder = {"block_out_channels": (64, 128, 128, 256), "layers_per_block": 1, "norm_num_groups": 8,
             "sample_height": 480, "sample_width": 720}  # fmt: skip
    paths = {name: folder / name / "model.safetensors" for name in ("dit", "vae", "t5", "phi")}
    for path in paths.values():
        path.parent.mkdir()
    with torch.device("meta"):
        write(CogVideoXTransformer(dit), paths["dit"], config=to_dict(dit))
        write(Phi3ForCausalLM(phi), paths["phi"])
        write(_t5(4 * scale), paths["t5"])
    write(vae.build_vae(coder, device="meta"), paths["vae"], config=coder)
    (paths["phi"].parent / "config.json").write_text(json.dumps(phi.to_dict()), encoding="utf-8")
    references.tokenizer(append_eos=False).save_pretrained(paths["phi"].parent)
    references.tokenizer(append_eos=True).save_pretrained(paths["t5"].parent)
    return {name: path.parent if name in ("t5", "phi") else path for name, path in paths.items()}


def _t5(layers: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=layers, num_heads=16,
                                   vocab_size=2048, feed_forward_proj="gated-gelu"))  # fmt: skip


def stage(kind: str, path: Path, large: bool) -> Iterator[dict[str, Any]]:
    """Measurements of loading one part and of using it, each with what the plan says."""
    from mimir_pack.mimir_core import vae
    from mimir_pack.nodes.host import plan

    height, width = (256, 384) if large else (192, 256) if kind == "dit" else (96, 128)
    frames = 17 if large else 9
    settings = plan.Settings(width, height, frames, 1, True, ANSWER, "off", "default", "default")
    place = plan.place_of("none")
    vae._autoencoder_class()  # what libraries take is no stage's
    made = plan.stages({kind: plan.KINDS[kind].read(path)}, settings, place)[0]
    start = time.time()
    loaded, part = measured(lambda: LOAD[kind](path))
    yield {"stage": f"load {kind}", "measured": loaded, "planned": made.weights + made.cached,
           "seconds": time.time() - start}  # fmt: skip
    latent = torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    with torch.inference_mode():
        used, _ = measured(lambda: RUN[kind](part, latent))
    yield {"stage": kind, "measured": used + _resident(part), "planned": made.peak,
           "seconds": time.time() - start}  # fmt: skip


def _resident(part: Any) -> int:
    """Bytes of the weights, which were there before the stage began."""
    return part.patcher.model_size() if hasattr(part, "patcher") else part.model_size()


def load_dit(path: Path) -> Any:
    from mimir_pack.nodes.host.model import load_dit

    return load_dit(path)


def load_vae(path: Path) -> Any:
    from mimir_pack.nodes.host.vae import load_vae

    return load_vae(path)


def load_t5(path: Path) -> Any:
    from mimir_pack.nodes.host.t5 import load_t5

    return load_t5(path, 226)


def load_phi(path: Path) -> Any:
    from mimir_pack.nodes.host.phi import load_phi

    return load_phi(path)


def sample(model: Any, latent: torch.Tensor) -> Any:
    import nodes

    text = [[torch.zeros(1, 230, 1024), {}]]
    return nodes.common_ksampler(  # pyright: ignore[reportAttributeAccessIssue]  it takes ours for "nodes"
        model, 1, 1, 6.0, "euler", "simple", text, text, {"samples": latent}
    )


def encode_phi(clip: Any, _: torch.Tensor) -> Any:
    from mimir_pack.nodes.host.phi import encode

    return encode(clip, "red circle moves " * 80, ("say it is red",) * 4, ANSWER, 0.0, 0, -1)


LOAD = {"dit": load_dit, "vae": load_vae, "t5": load_t5, "phi": load_phi}
RUN = {
    "dit": sample,
    "vae": lambda vae, latent: vae.decode(latent),
    "t5": lambda clip, _: clip.encode_from_tokens(clip.tokenize("red circle")),
    "phi": encode_phi,
}


def main(wanted: list[str], large: bool) -> None:
    import comfy.model_management as management

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        paths = sources(Path(folder), large)
        for kind in wanted:
            for found in stage(kind, paths[kind], large):
                print(json.dumps(found), flush=True)
            management.unload_all_models()


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    main(names or ["t5", "phi", "dit", "vae"], "--large" in sys.argv)
