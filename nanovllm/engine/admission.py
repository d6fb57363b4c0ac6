"""When sequences that wait join those that run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """When waiting sequences join those that run.

    Where a step that only decodes is much cheaper than one with a prompt in it (a captured graph), it pays to let a
    few slots fall vacant and fill them together.

    Args:
        vacancies: Sequences that end first once slots or blocks have run out, or as many as wait.
        patience: Steps to wait for that at most.
        mixed: Whether a step may hold prompts and decoding sequences; else prompts go first, by themselves.
    """

    vacancies: int = 1
    patience: int = 32
    mixed: bool = True


class Gathering:
    """Vacancies that are gathered: since slots or blocks ran out, until enough sequences have ended."""

    def __init__(self) -> None:
        self._is_going_on = False
        self._num_ended = 0
        self._num_steps = 0

    def begin(self) -> None:
        """Slots or blocks have run out."""
        if not self._is_going_on:
            self._is_going_on, self._num_ended, self._num_steps = True, 0, 0

    def end(self) -> None:
        """There is nobody to gather for."""
        self._is_going_on = False

    def note_ended(self) -> None:
        """A resident has ended."""
        self._num_ended += 1

    def step_passes(self, policy: AdmissionPolicy, num_waiting: int, num_running: int) -> bool:
        """Another step is planned; returns whether those who wait may join in it."""
        if self._is_going_on:
            self._num_steps += 1
            enough = self._num_ended >= min(policy.vacancies, num_waiting)
            late = self._num_steps > policy.patience
            self._is_going_on = not (enough or late or num_running == 0)
        return not self._is_going_on
