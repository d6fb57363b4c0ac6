"""Decode steps on the CPU, recorded once for each number of rows and replayed in one call.

What CUDA graphs are to a GPU: see ``nanovllm/kernels/cpu/recording.py``. The model's own code is what is recorded; a
step that does anything else than launch our kernels (a dtype or a layer they are not for) is run as before.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from nanovllm.attention.base import AttentionMetadata, AttentionStep
from nanovllm.attention.cpu import CpuAttention

logger = logging.getLogger(__name__)

# Steps of more rows take so long that launching them costs next to nothing.
MAX_ROWS = 128

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionStep], torch.Tensor]

_recording = threading.Lock()  # torch's dispatch modes are not for several threads at once


class RecordedSteps:
    """The recordings of an engine. They share their memory, so one is replayed at a time.

    Args:
        forward: The model: token ids, positions and attention to hidden states.
        attention: Its backend, whose cache is allocated.
        num_slots: Most rows of a step.
    """

    def __init__(self, forward: Forward, attention: CpuAttention, num_slots: int) -> None:
        from nanovllm.kernels.cpu import recording

        self.recording = recording
        self.forward_model, self.attention = forward, attention
        self.max_rows = min(MAX_ROWS, num_slots)
        self.token_ids = torch.zeros(self.max_rows, dtype=torch.int64, device="cpu")
        self.positions = torch.zeros(self.max_rows, dtype=torch.int64, device="cpu")
        self.is_possible = True
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.recordings: dict[int, tuple[Any, torch.Tensor]] = {}  # by rows, and where they leave the hidden states
        self.threads = 0  # so that it is done again if it is interrupted
        self.step = self.attention.static_decode(self.max_rows)
        self.pool = self.recording.Pool()
        self.threads = torch.get_num_threads()

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor | None:
        """Hidden states of a step of one token a row.

        Args:
            token_ids: int64 [rows].
            positions: int64 [rows].
            metadata: The step's rows; the same ``block_tables`` every time.

        Returns:
            [rows, hidden_size], good until the next step; None if the step is too large, or cannot be recorded.
        """
        rows = len(token_ids)
        if rows > self.max_rows or not self.is_possible:
            return None
        if torch.get_num_threads() != self.threads:  # each has memory of its own
            self._start_afresh()
        sizes = self.step.update(metadata)
        if sizes is None:
            return None
        self.token_ids[:rows], self.positions[:rows] = token_ids, positions
        if rows not in self.recordings:
            try:
                # In a thread of its own, where no Ctrl-C arrives: a thread that is interrupted on its way out of a
                # recording would go on noting launches instead of running them.
                with ThreadPoolExecutor(1) as apart:
                    self.recordings[rows] = apart.submit(self._record, rows).result()
            except self.recording.NotRecordableError as reason:
                logger.info("decode steps are launched one operation at a time: %s", reason)
                self.is_possible = False
                return None
        recording, hidden = self.recordings[rows]
        kernels, spec = self.attention.kernels, self.attention.spec
        recording.set_tasks(kernels.attention_kernel(spec.dtype == torch.bfloat16), sizes[0] * spec.num_kv_heads)
        recording.set_tasks(kernels.combine_kernel, sizes[1] * spec.num_heads)
        recording.replay()
        return hidden

    @torch.inference_mode()
    def _record(self, rows: int) -> tuple[Any, torch.Tensor]:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with _recording, self.recording.recorded(self.pool) as recorder:
            hidden = self.forward_model(self.token_ids[:rows], self.positions[:rows], self.step)
        return self.recording.Recording(recorder.launches), hidden
