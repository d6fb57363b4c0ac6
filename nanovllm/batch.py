"""Batch jobs: a file of requests in, a file of answers out. Killed at any moment, the same call continues it.

A line of the output bears the row's id and a hash of everything its answer depends on: the id, the prompt, the
parameters, the checkpoint. A row is done when the last line with its id bears its hash; rows that are done are not
run again. Rows without a seed take theirs from the hash, so neither order nor restarts change an answer.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.progress import ProgressBar
from nanovllm.utils.validation import check_bool, check_int, unknown_argument

FSYNC_SECONDS = 1.0
CONTENT_OF_URL = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
OPENAI_KEYS = {"custom_id", "method", "url", "body"}
CHAT_OPTIONS: dict[str, type] = {
    "chat_template": str,
    "chat_template_kwargs": dict,
    "tools": list,
    "add_generation_prompt": bool,
    "continue_final_message": bool,
}
PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)} - {"logits_processors"}
OTHER_PARAMETERS = {"max_completion_tokens", "top_logprobs"}
NULLABLE = {name for name in PARAMETERS if SamplingParams.__dataclass_fields__[name].default is None}
IGNORED = {"model", "user", "metadata", "store"}  # they change no answer
# Parameters that we lack, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "stream_options": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "response_format": (None, {"type": "text"}),
}


@dataclasses.dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a batch job did.

    Args:
        num_rows: Rows of the input.
        num_skipped: Rows that were done before.
        num_answered: Rows answered now.
        num_errors: Rows that became error rows now.
        prompt_tokens: Of the rows answered now.
        output_tokens: Generated now.
        seconds: What this run took, without loading the model.
    """

    num_rows: int
    num_skipped: int
    num_answered: int
    num_errors: int
    prompt_tokens: int
    output_tokens: int
    seconds: float


@dataclasses.dataclass(slots=True)
class _Row:
    """A row of the input: where it stands, what it asks for, and what its answer depends on."""

    line: int
    row_id: str | int
    digest: str = ""
    url: str | None = None  # None: a plain row
    content: str = ""  # "messages" or "prompt"
    value: Any = None
    chat: dict[str, Any] = dataclasses.field(default_factory=dict)
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)


def run_batch(
    llm: LLM,
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    sampling_params: SamplingParams | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    retry_errors: bool = False,
    use_tqdm: bool = True,
) -> BatchSummary:
    """Answer the rows of a JSONL file, appending a line to another as each is finished.

    Call it again with the same arguments to continue what was killed, interrupted or failed.

    Args:
        llm: The model.
        input_path: A row a line: ``{"prompt": ...}`` or ``{"messages": [...]}`` with an optional "custom_id" or "id"
            and parameters, or OpenAI's batch format. Ids are unique; a row without one has its line number.
        output_path: Is made, or continued if it is a batch job's.
        sampling_params: What rows do not say themselves; None takes the checkpoint's defaults.
        chat_template_kwargs: The same, for the chat template.
        retry_errors: Run error rows again. The new line follows the old one.
        use_tqdm: Show a progress bar.

    Returns:
        Counts of this run. Rows that cannot be run become error rows, and are counted.

    Raises:
        FileNotFoundError: There is no input.
        ValueError: Ids repeat, or the output was not written by a batch job; nothing was run or written.
        BlockingIOError: Another job is writing the output.
    """
    with BatchJob(input_path, output_path, retry_errors=retry_errors) as job:
        return job.run(
            llm, sampling_params=sampling_params, chat_template_kwargs=chat_template_kwargs, use_tqdm=use_tqdm
        )


class BatchJob:
    """The files of a batch job, checked, and the output locked until :meth:`close`; needs no model yet.

    Arguments and errors are those of :func:`run_batch`.
    """

    def __init__(
        self,
        input_path: str | os.PathLike[str],
        output_path: str | os.PathLike[str],
        *,
        retry_errors: bool = False,
    ) -> None:
        self.input_path, self.output_path = Path(input_path), Path(output_path)
        if not self.input_path.is_file():
            raise FileNotFoundError(f"there is no file {self.input_path}; give a JSONL file with a row a line")
        if self.output_path.exists() and self.input_path.samefile(self.output_path):
            raise ValueError(f"{self.output_path} is both input and output; give the output a name of its own")
        self.num_rows = _check_ids(self.input_path)
        self._file = _open_locked(self.output_path)
        try:
            self._done = _read_done(self._file, self.output_path, retry_errors)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def run(
        self,
        llm: LLM,
        *,
        sampling_params: SamplingParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> BatchSummary:
        """Run the rows that are not done; arguments and result are those of :func:`run_batch`."""
        started = time.perf_counter()
        defaults = sampling_params if sampling_params is not None else llm.get_default_sampling_params()
        context, model = _context(llm), Path(llm.engine.config.model).name
        running: dict[int, _Row] = {}  # by the number of the prompt; as many as the engine has taken
        skipped = answered = errors = prompt_tokens = output_tokens = num_taken = 0

        def prompts() -> Iterator[tuple[Any, SamplingParams]]:
            nonlocal skipped, errors, num_taken
            for number, line in _rows(self.input_path):
                row = _Row(number, number)
                try:
                    record = json.loads(line)
                    row.row_id = _row_id(record, number)
                    _parse(record, row, defaults, chat_template_kwargs or {})
                    asked = [row.url, row.content, row.value, row.chat, _canonical(row.params)]
                    row.digest = _hash(row.row_id, asked, context)
                    if self._is_done(row):
                        skipped += 1
                        bar.skip()
                        continue
                    prompt = _prompt(llm, row)
                # Whatever a row provokes, in the tokenizer too, concerns that row only.
                except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                    row.digest = row.digest or _hash(row.row_id, line.decode("latin-1"), context)
                    if self._is_done(row):
                        skipped += 1
                        bar.skip()
                        continue
                    self._write(_error_line(row, "invalid_request_error", str(error)))
                    errors += 1
                    bar.update(1)
                    continue
                params = row.params
                if params.seed is None:
                    params = dataclasses.replace(params, seed=int(row.digest[:15], 16))
                running[num_taken] = row
                num_taken += 1
                yield prompt, params

        with _Bar(llm.engine, self.num_rows, enabled=use_tqdm) as bar:
            with closing(llm.generate_iter(prompts(), ordered=False, on_error="return")) as outputs:
                for output in outputs:
                    row = running.pop(output.prompt_index or 0)
                    reasons = {completion.finish_reason for completion in output.outputs}
                    if output.error is not None:
                        # Prompts that were refused have no id. The caller numbers them; the row has its line.
                        kind = "server_error" if output.request_id else "invalid_request_error"
                        message = output.error.replace(f"prompt {output.prompt_index}", "the prompt")
                        self._write(_error_line(row, kind, message))
                        errors += 1
                    elif not reasons <= {"stop", "length"}:
                        self._write(_error_line(row, "server_error", "the request was aborted"))
                        errors += 1
                    else:
                        self._write(_answer_line(row, output, model))
                        answered += 1
                        prompt_tokens += len(output.prompt_token_ids)
                        output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
                    bar.update(1)
        self._sync()
        seconds = time.perf_counter() - started
        return BatchSummary(self.num_rows, skipped, answered, errors, prompt_tokens, output_tokens, seconds)

    def close(self) -> None:
        """Close the output and release it."""
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._file.close()

    def __enter__(self) -> "BatchJob":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
