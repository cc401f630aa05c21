"""Mimir: text to video with a decoder-only language model beside T5 (arXiv 2412.03085), in plain PyTorch.

The library knows nothing of ComfyUI. Its modules import one another in one direction only, down this list:
config, attention, positions, diffusion, tokens, phi, dit, fuser, vae, sampling, headers, recognise, scaled,
weights, lora_names, lora, describe, memory, plan, text, llm, provenance, conditioning, pipeline, data, train,
bench, tiny (tests/test_layers.py holds it to that).
"""

__version__ = "0.1.0"
