"""From a step's logits to its tokens.

Rows that ask for no more than a temperature are most of them, and one kernel draws all rows as if they were. Where the
device runs behind the host, or logits are spread over ranks, that is how every step begins, in a captured graph or not:

    logits --> drawn by temperature alone --> tokens of the plain rows
                                    |
               rows that ask for more, if any --> drawn again by everything they ask for --> their tokens

The plain rows keep what they have: their draws depend on no other row, and cost what they always cost. Elsewhere, on
the CPU, a row costs what it asks for, and all are drawn at once.
"""

from typing import Any

import torch
from torch import nn

from nanovllm.engine.batch_state import BatchState, PromptLogprobsInput, SamplePlaces
from nanovllm.engine.step_handle import DeviceLogprobs, StepHandle
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.sampler import Sampler

# Rows of logits that exist at a time for the log-probabilities of prompt tokens: 37 MiB at a vocabulary of 151,936.
PROMPT_LOGIT_ROWS = 64

PromptLogprobs = dict[int, tuple[int, list[DeviceLogprobs]]]  # by row of the plan: first position, and what follows


class Drawing:
    """Draws the tokens of a rank's steps.

    Args:
        model: Whose logits they are.
        state: Of the sequences.
        sampler: Draws by everything there is, from whole logits.
        plain_sampler: Draws by temperature alone, from this rank's logits.
        parallel: This rank. Only the first one draws by more than a temperature, and tells the others.
        apart: Whether rows that ask for more are drawn by themselves.
    """

    def __init__(
        self,
        model: Any,
        state: BatchState,
        sampler: Sampler,
        plain_sampler: nn.Module,
        parallel: ParallelGroup,
        apart: bool,
    ) -> None:
        self.model, self.state, self.parallel, self.apart = model, state, parallel, apart
        self.sampler, self.plain_sampler = sampler, plain_sampler

    def draw(self, logits: torch.Tensor, places: SamplePlaces, prompt_logprobs: PromptLogprobs) -> StepHandle:
        """Draw for all sampling rows, from this rank's logits [sampling rows, columns]."""
        if not self.apart:
            return StepHandle(*self._draw_whole(logits, places), prompt_logprobs)
        plain = self.state.plain_rows(self.state.params[places.slot_index], places.positions)
        tokens = self.plain_sampler(logits, plain)
        self.state.write(places, tokens)
        return self.draw_again(tokens, logits, places.slots, places.longest, prompt_logprobs)

    def draw_again(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        slots: list[int],
        longest: int,
        prompt_logprobs: PromptLogprobs,
    ) -> StepHandle:
        """Draw for the rows that ask for more than a temperature, by which all ``tokens`` [rows] were drawn.

        Args:
            tokens: Drawn, and noted in the state; those of the rows that are drawn again are replaced.
            logits: This rank's [rows, columns].
            slots: Each row's slot.
            longest: At least the largest position of a drawn token.
            prompt_logprobs: What else the step gives.
        """
        state = self.state
        special = state.special_rows(slots)
        if special is None:
            return StepHandle(tokens, prompt_logprobs=prompt_logprobs)
        positions = state.num_computed[special.slot_index].long()  # by now, those of the sampled tokens
        places = SamplePlaces(special.slots, special.slot_index, positions, longest)
        whole = self.model.whole_logits(logits[special.index]).float()
        if self.parallel.rank == 0:  # a request's own callables are called once
            drawn, errors, logprobs = self._draw_whole(whole, places)
            self.parallel.broadcast(drawn)
        else:
            drawn, errors, logprobs = self.parallel.broadcast(torch.empty_like(special.index)), {}, None
            state.write(places, drawn)
        tokens[special.index] = drawn.to(tokens.dtype)
        return StepHandle(
            tokens,
            {special.rows[row]: error for row, error in errors.items()},
            None if logprobs is None else ([special.rows[row] for row in logprobs[0]], logprobs[1]),
            prompt_logprobs,
        )

    def _draw_whole(
        self, logits: torch.Tensor, places: SamplePlaces
    ) -> tuple[torch.Tensor, dict[int, str], tuple[list[int], DeviceLogprobs] | None]:
        """Draw tokens from float32 logits [sampling rows, vocab_size], which are changed.

        Returns:
            The tokens, what went wrong by row, and the rows that ask for log-probabilities with these.
        """
        state = self.state
        sample = state.sample_input(places)
        asking = sample.asking
        raw = None if asking is None else logits[asking]  # a copy: what follows changes the logits
        errors = state.rules.apply(
            logits, places.slots, places.slot_index, places.positions, places.longest, state.token_ids
        )
        tokens = self.sampler(logits, sample.rows)
        state.append(places, tokens)
        if raw is None or asking is None:
            return tokens, errors, None
        computed = DeviceLogprobs.compute(raw, tokens[asking], list(sample.logprobs.values()))
        return tokens, errors, (list(sample.logprobs), computed)

    def prompt_logprobs(self, hidden: torch.Tensor, row: PromptLogprobsInput) -> tuple[int, list[DeviceLogprobs]]:
        """Log-probabilities of a row's prompt tokens, a few at a time, from a step's hidden states [tokens, size]."""
        pieces = []
        hidden_pieces = hidden[row.hidden_rows].split(PROMPT_LOGIT_ROWS)
        for some, targets in zip(hidden_pieces, row.targets.split(PROMPT_LOGIT_ROWS), strict=True):
            logits = self.model.compute_logits(some)
            if self.parallel.rank == 0:
                pieces.append(DeviceLogprobs.compute(logits, targets, [row.num_logprobs] * len(targets)))
        return row.first, pieces
