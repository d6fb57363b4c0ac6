"""Batch jobs: a file of requests in, a file of answers out. Killed at any moment, the same call continues it.

A line of the output bears the row's id and a hash of everything its answer depends on: the id, the prompt, the
parameters, the checkpoint and how it is computed. A row is done when the last line with its id bears its hash, unless
it says that the engine's room cut the answer off and there is more room now; rows that are done are not run again. Rows
without a seed take theirs from the hash, so neither order nor restarts change an answer.
"""

import dataclasses
import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanovllm.batch_input import check_rows, lines
from nanovllm.batch_rows import (
    BatchRow,
    answer_line,
    canonical,
    engine_context,
    hash_id,
    hash_of,
    line_head,
    line_id,
    load_line,
    longest_sequence,
    make_prompt,
    metadata_of,
    parse_record,
    row_id_of,
)
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.file_lock import lock
from nanovllm.utils.model_name import model_name
from nanovllm.utils.progress import ProgressBar
from nanovllm.utils.text import counted, kind_of

FSYNC_SECONDS = 1.0
NAMED_ERRORS = 10  # rows that a summary names


@dataclasses.dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a batch job did.

    Args:
        num_rows: Rows of the input.
        num_skipped: Rows that were done before, error rows among them.
        num_skipped_errors: Those of them that are error rows.
        num_answered: Rows answered now.
        num_errors: Rows that became error rows now.
        num_cut_off: Rows answered now of which a completion ended at ``max_tokens`` or ``max_model_len``.
        prompt_tokens: Of the rows answered now.
        output_tokens: Generated now.
        seconds: What this run took, without loading the model.
        error_ids: The ids of the rows that became error rows now, of the first ten at most.
        first_error: The message of the first row that became an error row now; None without one.
        skipped_error_ids: The ids of those that are error rows, of the first ten at most.
    """

    num_rows: int
    num_skipped: int
    num_answered: int
    num_errors: int
    num_cut_off: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    error_ids: tuple[str, ...] = ()
    first_error: str | None = None
    num_skipped_errors: int = 0
    skipped_error_ids: tuple[str, ...] = ()


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
            and parameters, or OpenAI's batch format. Ids are unique; a row without one has "line-" and its number.
            A row's "metadata" stands in its line of the output, too.
        output_path: Is made, or continued if it is a batch job's.
        sampling_params: What rows do not say themselves; None takes the checkpoint's defaults.
        chat_template_kwargs: The same, for the chat template.
        retry_errors: Run error rows again. The new line follows the old one.
        use_tqdm: Show a progress bar.

    Returns:
        Counts of this run. Rows that cannot be run become error rows, and are counted.

    Raises:
        TypeError: An argument has the wrong type.
        FileNotFoundError: There is no input.
        ValueError: Ids repeat, the input is not UTF-8 or not JSONL (a CSV file, an array), or the output was not
            written by a batch job; nothing was run or written. Or the input has other rows than before the job began to
            run; what was finished is there.
        BlockingIOError: Another job is writing the output.
        OSError: The output cannot be written, as on a full disk. What was finished is there; call it again.
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
        if os.fspath(output_path) == "-":
            raise ValueError("the output is '-': a job that can be continued needs a file; name one, or './-'")
        if not self.input_path.exists():
            hint = " (a pipe cannot be read more than once)" if os.fspath(input_path) == "-" else ""
            raise FileNotFoundError(f"there is no file {self.input_path}{hint}; give a JSONL file with a row a line")
        if not self.input_path.is_file():
            raise ValueError(f"{self.input_path} is not a file; a job reads its rows more than once: keep them in one")
        if self.output_path.exists() and not self.output_path.is_file():
            raise ValueError(f"{self.output_path} is not a file; a job appends to one, and reads what is there")
        if self.output_path.exists() and self.input_path.samefile(self.output_path):
            raise ValueError(f"{self.output_path} is both input and output; give the output a name of its own")
        self.num_rows = check_rows(self.input_path)
        self.output = _Output(self.output_path, retry_errors)
        self._has_run = False

    def run(
        self,
        llm: LLM,
        *,
        sampling_params: SamplingParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> BatchSummary:
        """Run the rows that are not done, once; arguments and result are those of :func:`run_batch`."""
        # A mistake here would make an error row of every row.
        if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
            raise TypeError(f"sampling_params is {kind_of(sampling_params)}; pass a SamplingParams")
        if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
            raise TypeError(f"chat_template_kwargs is {chat_template_kwargs!r}; it must be a dictionary")
        if self._has_run:
            raise RuntimeError("this batch job has run; make a new one to run what it has left")
        self._has_run = True
        started = time.perf_counter()
        defaults = sampling_params if sampling_params is not None else llm.get_default_sampling_params()
        bar = _Bar(llm.engine, self.num_rows, enabled=use_tqdm)
        with bar:
            run = _Run(llm, self.input_path, self.num_rows, self.output, defaults, chat_template_kwargs or {}, bar)
            with closing(llm.generate_iter(run.prompts(), ordered=False, on_error="return")) as outputs:
                for output in outputs:
                    run.take(output)
        self.output.sync()
        return BatchSummary(
            num_rows=self.num_rows,
            num_skipped=run.num_skipped,
            num_answered=run.num_answered,
            num_errors=run.num_errors,
            num_cut_off=run.num_cut_off,
            prompt_tokens=run.prompt_tokens,
            output_tokens=run.output_tokens,
            seconds=time.perf_counter() - started,
            error_ids=tuple(run.error_ids),
            first_error=run.first_error,
            num_skipped_errors=run.num_skipped_errors,
            skipped_error_ids=tuple(run.skipped_error_ids),
        )

    def close(self) -> None:
        """Close the output and release it."""
        self.output.close()

    def __enter__(self) -> "BatchJob":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Run:
    """One run over the rows: gives the engine what is not done, and writes what comes back."""

    def __init__(
        self,
        llm: LLM,
        input_path: Path,
        num_rows: int,
        output: "_Output",
        defaults: SamplingParams,
        template_kwargs: Mapping[str, Any],
        bar: "_Bar",
    ) -> None:
        self.llm, self.input_path, self.output, self.bar = llm, input_path, output, bar
        self.defaults, self.template_kwargs = defaults, template_kwargs
        self.num_rows = num_rows
        self.context, self.model = engine_context(llm), model_name(llm.engine.config.model)
        self.room = longest_sequence(llm)
        self.num_skipped = self.num_skipped_errors = self.num_answered = self.num_errors = self.num_cut_off = 0
        self.prompt_tokens = self.output_tokens = 0
        self.first_error: str | None = None
        self.error_ids: list[str] = []
        self.skipped_error_ids: list[str] = []
        self._running: dict[int, BatchRow] = {}  # by number of the prompt; no more than the engine has taken
        self._num_taken = 0

    def prompts(self) -> Iterator[tuple[Any, SamplingParams]]:
        """Prompts of the rows that are not done. Rows that cannot be run become error rows on the way."""
        num_rows = 0
        for number, line in lines(self.input_path):
            num_rows += 1
            row = BatchRow(number, line_id(number))
            prompt, error = None, None
            try:
                self._parse(row, line)
                if not self.output.is_done(row.digest, self.room):
                    prompt = make_prompt(self.llm, row)
            except (RecursionError, TypeError, ValueError) as caught:
                error = str(caught) or type(caught).__name__
                row.digest = row.digest or hash_of(row.row_id, line.decode("latin-1"), self.context)
            if self.output.is_done(row.digest, self.room):
                self.num_skipped += 1
                if self.output.is_error(row.digest):
                    self.num_skipped_errors += 1
                    if len(self.skipped_error_ids) < NAMED_ERRORS:
                        self.skipped_error_ids.append(str(row.row_id))
                self.bar.skip()
            elif error is not None:
                self._fail(row, "invalid_request_error", error)
            else:
                seed = row.params.seed if row.params.seed is not None else int(row.digest[:15], 16)
                self._running[self._num_taken] = row
                self._num_taken += 1
                yield prompt, dataclasses.replace(row.params, seed=seed)
        if num_rows != self.num_rows:
            raise ValueError(
                f"{self.input_path} has changed while the job ran: it had {counted(self.num_rows, 'row')}, and has "
                f"{num_rows}; run the job again for what is in it now"
            )

    def take(self, output: RequestOutput) -> None:
        """Write what a request gave back."""
        assert output.prompt_index is not None
        row = self._running.pop(output.prompt_index)
        if output.error is not None:
            # A prompt that was refused never became a request. Its number means nothing to the reader of the file.
            kind = "server_error" if output.request_id else "invalid_request_error"
            self._fail(row, kind, output.error.replace(f"prompt {output.prompt_index}", "the prompt"))
        elif any(completion.finish_reason not in ("stop", "length") for completion in output.outputs):
            self._fail(row, "server_error", "the request was aborted")
        else:
            self.output.append(answer_line(row, output, self.model, self.room))
            self.num_answered += 1
            self.num_cut_off += any(completion.finish_reason == "length" for completion in output.outputs)
            self.prompt_tokens += len(output.prompt_token_ids)
            self.output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
            self.bar.update(1)

    def _parse(self, row: BatchRow, line: bytes) -> None:
        record = load_line(line)
        row.metadata = metadata_of(record)  # before anything is refused: an error row bears it, too
        row.row_id = row_id_of(record, row.line)
        parse_record(record, row, self.defaults, self.template_kwargs)
        asked = [row.url, row.content, row.value, row.chat, canonical(row.params)]
        row.digest = hash_of(row.row_id, asked, self.context)

    def _fail(self, row: BatchRow, kind: str, message: str) -> None:
        self.output.append(line_head(row) | {"error": {"message": message, "type": kind, "line": row.line}})
        self.num_errors += 1
        if len(self.error_ids) < NAMED_ERRORS:
            self.error_ids.append(str(row.row_id))
        self.first_error = self.first_error or f"line {row.line}: {message}"
        self.bar.update(1)


class _Bar(ProgressBar):
    def skip(self) -> None:
        """Count a row that was done before: it says nothing about the speed."""
        if self._bar is not None:
            self._bar.initial += 1
        self.update(1)


# ---- the files


_START = b'{"hash": "'  # of each line of the output


class _Output:
    """The output, locked: which rows are done, and lines to append.

    A line is with the operating system before the next row is looked at, so killing the process loses none; a power
    failure may lose the last second's.
    """

    def __init__(self, path: Path, retry_errors: bool) -> None:
        self._path = path
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115  (closed by close())
        try:
            lock(
                self._file, f"{path} is being written by another batch job; wait for it to end, or name another output"
            )
            self._done, self._cut_off_at, self._failed = self._read(retry_errors)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def is_done(self, digest: str, room: int) -> bool:
        """Whether the row with this hash needs not be run: it was, and no fewer than ``room`` tokens cut it off."""
        place = _place(self._done, digest)
        return place is not None and not 0 < self._cut_off_at[place] < room

    def is_error(self, digest: str) -> bool:
        """Whether the row with this hash is done, and an error row."""
        return _place(self._failed, digest) is not None

    def append(self, line: dict[str, Any]) -> None:
        """Write a line."""
        try:
            data = json.dumps(line, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # lone surrogates in what the row said
            data = json.dumps(line).encode()
        try:
            self._file.write(data + b"\n")
            self._file.flush()
        except OSError as error:
            self._file.raw.close()  # type: ignore[attr-defined]  # with what it holds, else to be written once more
            raise self._explained(error) from error
        if time.monotonic() - self._synced >= FSYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have all that was written put on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._explained(error) from error
        if os.fstat(self._file.fileno()).st_nlink == 0 and not self._path.exists():
            raise FileNotFoundError(
                f"{self._path} was deleted while the job ran, and its rows with it; start the job again, and leave the "
                "file where it is"
            )
        self._synced = time.monotonic()

    def _explained(self, error: OSError) -> OSError:
        """The same error, with the file and what becomes of the job."""
        advice = "rows that were finished are there; once it can be written, the same command continues with the rest"
        return OSError(error.errno, f"{error.strerror} ({advice})", os.fspath(self._path))

    def close(self) -> None:
        """Close the file, which unlocks it."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def _read(self, retry_errors: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sorted hashes of the rows that are done, at how many tokens each was cut off, and hashes of error rows.

        That is 24 bytes a row, for jobs are long; tokens are 0 where the engine's room was enough.

        Raises:
            ValueError: The file is not a batch job's. It is left as it is.
        """
        ids, hashes, failed, cut_off_at = bytearray(), bytearray(), bytearray(), array("q")
        end, torn = 0, False
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            try:
                entry = json.loads(line)
                row_hash, row_id, error = bytes.fromhex(entry["hash"]), entry["custom_id"], entry["error"]
                length = entry.get("cut_off_at", 0)
                if len(row_hash) != 16 or type(length) is not int or not line.startswith(_START) or length >> 63:
                    raise ValueError("not a line of ours")
            except (LookupError, RecursionError, TypeError, ValueError) as cause:
                # Of a line that was not on the disk yet when the power failed, a file may have zeros.
                head = line.rstrip(b"\0") if end else line
                if line.endswith(b"\n") or not (line.startswith(_START) or _START.startswith(head)):
                    raise ValueError(
                        f"line {number} of {self._path} was not written by a batch job; name another output, or mend "
                        "or move away this one"
                    ) from cause
                torn = True
                break
            ids += hash_id(row_id)
            hashes += row_hash
            failed.append(error is not None)
            cut_off_at.append(length)
            end += len(line)
        if torn:  # the process was killed, or the power failed, while it wrote
            self._file.truncate(end)
        elif end and not line.endswith(b"\n"):  # ... just before the end of the line
            self._file.write(b"\n")
            self._file.flush()
        _, last = np.unique(np.frombuffer(ids, "S16")[::-1], return_index=True)
        last = len(hashes) // 16 - 1 - last
        is_error = np.frombuffer(failed, bool)[last]
        errors = last[is_error & (not retry_errors)]
        done = last[~is_error] if retry_errors else last
        all_hashes = np.frombuffer(hashes, "S16")
        done = done[np.argsort(all_hashes[done])]
        return all_hashes[done], np.frombuffer(cut_off_at, np.int64)[done], np.sort(all_hashes[errors])


def _place(hashes: np.ndarray, digest: str) -> int | None:
    """Where a hash is among sorted ones; None if it is not."""
    key = bytes.fromhex(digest).rstrip(b"\0")  # numpy drops zeros at the end
    place = int(np.searchsorted(hashes, np.bytes_(key)))
    return place if place < len(hashes) and bytes(hashes[place]) == key else None
