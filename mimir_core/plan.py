"""A run's memory, stage by stage, against a card and the main memory: what fits, what happens otherwise.

ComfyUI runs one stage after the other. Before a stage it makes room on the card: what is not at work goes to
main memory, and of what is at work as much stays there as does not fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .memory import GB

PIECE = 0.3 * GB  # what crosses to the card at a time where weights stay in main memory

LARGE = "TOO LARGE "


@dataclass(frozen=True)
class Stage:
    """One stage. Sizes in bytes."""

    name: str
    what: str  # the file, or what stands in for it
    weights: int  # in the precision they are kept in
    work: int  # what it computes with, at its busiest moment
    less: int | None = None  # the same in its frugal form, where it has one
    frugal: str = ""  # that form, in words
    splits: bool = True  # weights that do not fit may stay in main memory
    on_cpu: bool = False  # runs in main memory whatever card there is
    cached: int = 0  # file cache beyond the weights while its file is loaded; the system can take it back
    result: int = 0  # main memory that the stage's result takes while it is put together
    advice: str = ""  # what makes it smaller

    @property
    def peak(self) -> int:
        return self.weights + self.work


@dataclass(frozen=True)
class Machine:
    """What there is, in bytes. Without a card everything happens in main memory."""

    card: int  # 0: none
    free: int  # of the card, for ComfyUI
    reserve: int  # what ComfyUI leaves free beside a stage
    least: int  # what it leaves free at least, whatever the stage needs
    ram: int
    ram_free: int
    base: int = GB  # the process itself: Python, PyTorch, ComfyUI


@dataclass(frozen=True)
class Verdict:
    stage: Stage
    work: int  # of the form that is taken
    peak: int  # on the card, or in main memory for what runs there
    outside: int  # bytes of weights that stay in main memory
    fits: bool
    text: str


def judge(stage: Stage, machine: Machine) -> Verdict:
    """What ComfyUI will do with this stage."""
    if not machine.card or stage.on_cpu:
        return _in_ram(stage, machine)
    ways = [(stage.work, "fits")]
    if stage.less is not None and stage.less < stage.work:
        ways.append((stage.less, _frugally("fits", stage)))
    for work, text in ways:
        if stage.weights <= _room(work, machine):
            return Verdict(stage, work, stage.weights + work, 0, True, text)
    work = ways[-1][0]
    kept = int(_room(work, machine) - PIECE)
    if kept < 0 or not stage.splits:
        missing = (stage.weights if not stage.splits else PIECE) - _room(work, machine)
        return Verdict(stage, work, stage.weights + work, 0, False, f"{LARGE}by {_gb(missing)} GB")
    outside = stage.weights - kept
    text = f"partly: {_gb(outside)} GB of its weights stay in main memory, slower"
    return Verdict(stage, work, kept + work + int(PIECE), outside, True, text)


def main_memory(stages: Sequence[Stage], machine: Machine) -> int:
    """Bytes that the process needs at its busiest: all weights, as ComfyUI keeps what it has loaded.

    With a card, weights that were moved there leave main memory; but all of them were loaded through it, and
    return to it when another stage needs the room.
    """
    work = [stage.work if stage.on_cpu or not machine.card else stage.result for stage in stages]
    return machine.base + sum(stage.weights for stage in stages) + max(work, default=0)


def report(title: str, stages: Sequence[Stage], machine: Machine, basis: str) -> str:
    """The verdict in a line, and the plan in fixed columns, gigabytes of 10^9 bytes.

    `basis`: what the figures rest on.
    """
    verdicts = [judge(stage, machine) for stage in stages]
    lines = [_verdict(verdicts, main_memory(stages, machine), machine), title, _where(machine), ""]
    lines += [f"{'GB':12}{'weights':>8}{'work':>7}{'peak':>7}"]
    lines += [line for verdict in verdicts for line in _lines(verdict)]
    needed = main_memory(stages, machine)
    enough = "" if needed <= machine.ram else f", but there are {_gb(machine.ram)} GB: TOO LITTLE"
    lines += ["", f"Main memory: {_gb(needed)} GB at the busiest moment{enough}"]
    cached = max((stage.cached for stage in stages), default=0)
    if cached > 0.1 * GB:
        lines.append(f"  and up to {_gb(cached)} GB of file cache while a file is loaded")
    return "\n".join([*lines, *_advice(verdicts, needed, machine), "", basis])


def _verdict(verdicts: Sequence[Verdict], needed: int, machine: Machine) -> str:
    """Whether a run fits, in one sentence; cards by the size that they are sold with, 2^30 bytes to a GB."""
    where = f"a card of {round(machine.card / 2**30)} GB" if machine.card else "main memory"
    large = [f"{found.stage.name} {found.text.removeprefix(LARGE)}" for found in verdicts if not found.fits]
    if large:
        return f"Too large for {where}: {', '.join(large).removesuffix(' of main memory')}."
    outside = [f"{_gb(found.outside)} GB of {found.stage.name}" for found in verdicts if found.outside]
    ways = [f"{v.stage.name} {v.stage.frugal}" for v in verdicts if v.work != v.stage.work and v.stage.frugal]
    if needed > machine.ram:
        return f"Too little main memory: {_gb(needed)} GB are needed, and there are {_gb(machine.ram)}."
    if outside:
        stays = f"{' and '.join(outside)} {'stay' if len(outside) > 1 else 'stays'} in main memory"
        return f"Too large for {where}, but runs, slower: {'; '.join([stays, *ways])}."
    return f"Fits {where}{': ' * bool(ways)}{'; '.join(ways)}."


def _where(machine: Machine) -> str:
    if not machine.card:
        return "No card: everything in main memory"
    return f"A card with {_gb(machine.card)} GB, of which ComfyUI can use {_gb(machine.free)}"


def _in_ram(stage: Stage, machine: Machine) -> Verdict:
    """In main memory nothing is offloaded; the frugal form is taken where the other would not fit."""
    room = machine.ram - machine.base
    if stage.peak <= room:
        return Verdict(stage, stage.work, stage.peak, 0, True, "fits in main memory")
    work = stage.work if stage.less is None else stage.less
    peak = stage.weights + work
    if peak <= room:
        return Verdict(stage, work, peak, 0, True, _frugally("fits in main memory", stage))
    return Verdict(stage, work, peak, 0, False, f"{LARGE}by {_gb(peak - room)} GB of main memory")


def _frugally(verb: str, stage: Stage) -> str:
    return f"{verb} {stage.frugal} ({_gb(stage.peak)} GB otherwise)"


def _room(work: int, machine: Machine) -> float:
    """Bytes of weights that ComfyUI leaves on the card beside `work`."""
    return machine.free - max(machine.least, work + machine.reserve)


def _lines(verdict: Verdict) -> list[str]:
    stage = verdict.stage
    peak = stage.weights + verdict.work
    figures = f"{stage.name:12}{_gb(stage.weights):>8}{_gb(verdict.work):>7}{_gb(peak):>7}"
    return [figures, f"  {stage.what}: {verdict.text}"]


def _advice(verdicts: Sequence[Verdict], needed: int, machine: Machine) -> list[str]:
    """What to change, for the stages that do not fit whole and for the main memory."""
    lines = [f"- {found.stage.name}: {found.stage.advice}" for found in verdicts
             if found.stage.advice and (found.outside or not found.fits)]  # fmt: skip
    if needed > machine.ram:
        lines.append("- Main memory: smaller files (fp8), or fewer of them in one workflow.")
    return ["What helps:", *lines] if lines else []


def _gb(size: float) -> str:
    return f"{size / GB:.1f}" if size >= 0.05 * GB else f"{size / GB:.2f}"
