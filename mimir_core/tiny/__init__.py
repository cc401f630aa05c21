"""Mimir Tiny: a complete Mimir at toy size, its synthetic world, its exact detector, and the recipe.

`python -m mimir_core.tiny.train` makes the weights, `python -m mimir_core.tiny.evaluate` measures them.
"""
