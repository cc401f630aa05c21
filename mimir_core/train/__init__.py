"""Training of Mimir: from cached features to a fuser, a LoRA or a whole DiT.

    cache.py      captioned clips to features, with the encoders: `python -m mimir_core.train.cache`
    features.py   what is on disk: latents and tokens, computed once, read without encoders
    config.py     one dataclass for a run
    trainee.py    the networks, what of them moves, and the loss
    optimiser.py  AdamW or Muon, the learning rate, the moving average
    folder.py     the run folder: configuration, metrics, checkpoints, exports
    loop.py       the loop, as phases

Command: `python -m mimir_core.train --config run.json`.
"""
