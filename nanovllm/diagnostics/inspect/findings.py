"""What an inspection finds: problems, for which something has to be done, and notes, which are good to know."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a checkpoint.

    Args:
        section: The section that found it.
        kind: What sort of problem, in a word or three: "missing tensor".
        message: What it is, and where there is one, the remedy.
    """

    section: str
    kind: str
    message: str


@dataclass(slots=True)
class Findings:
    """The problems and notes of an inspection, in the order in which they were found."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)  # (section, message)

    def problem(self, section: str, kind: str, message: object) -> None:
        """Note a problem, once, whichever sections come upon it."""
        found = Problem(section, kind, " ".join(str(message).split()))
        if all((one.kind, one.message) != (found.kind, found.message) for one in self.problems):
            self.problems.append(found)

    def note(self, section: str, message: str) -> None:
        """Note something that is right, or may be, and that one might not expect."""
        self.notes.append((section, message))

    def notes_of(self, section: str) -> list[str]:
        return [message for where, message in self.notes if where == section]


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def by_layer(names: Iterable[str]) -> list[str]:
    """Names of tensors with those that differ by the layer alone drawn together: ``model.layers.{0-3,7}.mlp.x``."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = _LAYER.search(name)
        if found is None:
            numbers.setdefault((name, ""), [])
        else:
            numbers.setdefault((name[: found.start()], name[found.end() :]), []).append(int(found.group()))
    lines = []
    for (before, after), layers in numbers.items():
        if len(layers) > 1:
            lines.append(f"{before}{{{_ranges(sorted(layers))}}}{after}")
        else:
            lines.append(f"{before}{layers[0] if layers else ''}{after}")
    return lines


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as ``0-3,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
