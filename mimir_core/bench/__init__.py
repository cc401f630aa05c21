"""How fast this is, against what: contestants take turns in one process, on the same weights and inputs.

    python -m mimir_core.bench --help

measure   taking turns, medians, spreads, ratios, peak memory
flops     the arithmetic of a step
shapes    what is measured: small shapes for a CPU, real ones for a GPU
rivals    one step: ours and diffusers', each attention, compiled or not
video     a whole video: our pipeline and diffusers'
prefill   the language model: one shared prefill against separate ones
limits    where the time of a step goes
report    the machine, JSON and Markdown
suite     runs what was asked for, until the time is over

A host's own model is a contestant from outside: `suite.run` takes functions that build such models
(`rivals.Builder`). This package knows no host.
"""
