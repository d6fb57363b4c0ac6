"""The loops behind the calls of :class:`nanovllm.LLM`: add requests, run steps, hand out what comes."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.prompts import as_it_is
from nanovllm.engine.request import LostRequest, Owner, PreparedRequest
from nanovllm.outputs import CompletionOutput, RequestOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.progress import ProgressBar

# Prompts that iterate takes from its iterator and tokenises at a time.
CHUNK = 64


def run(
    engine: LLMEngine,
    prepared: Sequence[PreparedRequest | Exception],
    use_tqdm: bool,
    prompts: Sequence[Any] = (),
    leaders: Mapping[int, int] | None = None,
) -> list[RequestOutput]:
    """Run requests to their end.

    Args:
        engine: Where.
        prepared: The requests; the bad ones among them become error outputs.
        use_tqdm: Show a progress bar.
        prompts: What the requests were made of, for those outputs.
        leaders: By request, an earlier one that it shares its beginning with.

    Returns:
        An output a request, in their order.
    """
    owner = Owner()
    outputs: dict[int, RequestOutput] = {}
    ids: dict[int, str] = {}
    try:
        for index, request in enumerate(prepared):
            if isinstance(request, Exception):
                outputs[index] = _error_output(index, prompts[index], request)
            else:
                leader_id = ids.get(leaders.get(index, -1)) if leaders else None
                ids[index] = engine.add_prepared(request, owner=owner, prompt_index=index, leader_id=leader_id)
        with ProgressBar(engine, len(prepared), enabled=use_tqdm) as bar:
            bar.update(len(outputs))
            while len(outputs) < len(prepared):
                engine.advance(owner)
                finished = list(_received(owner))
                outputs.update((output.prompt_index, output) for output in finished)
                bar.update(len(finished))
    finally:
        _leave(engine, owner)  # what an exception, or Ctrl-C, has left
    return [outputs[index] for index in range(len(prepared))]


def stream(engine: LLMEngine, prepared: Sequence[PreparedRequest]) -> Generator[StreamOutput, None, None]:
    """Run requests, and yield each piece of text as it comes. What is left when it is closed is dropped."""
    owner, left = Owner(stream=True), len(prepared)
    try:
        for index, request in enumerate(prepared):
            engine.add_prepared(request, owner=owner, prompt_index=index)
        while left:
            engine.advance(owner)
            for piece in _received(owner):
                left -= piece.output is not None
                yield piece
    finally:
        _leave(engine, owner)


def iterate(
    engine: LLMEngine,
    prompts: Iterator[Any],
    sampling_params: SamplingParams | None,
    *,
    ordered: bool,
    room: int,
    on_error: str,
) -> Generator[RequestOutput, None, None]:
    """Run prompts as there is room for them; see :meth:`nanovllm.LLM.generate_iter`."""
    owner = Owner()
    held: dict[int, RequestOutput] = {}  # finished, and not yielded yet
    num_taken = num_running = num_yielded = 0
    more, failure = True, None
    refill = min(CHUNK, max(1, room // 4))  # tokenising several at a time is faster, but the engine must not wait
    try:
        while more or num_running:
            num_held = len(held)
            while more and room - num_running >= refill:
                pairs, more, failure = _take(prompts, min(CHUNK, room - num_running), sampling_params)
                prepared = engine.intake.prepare([p for p, _ in pairs], [p for _, p in pairs], num_taken)
                for (prompt, _), request in zip(pairs, prepared, strict=True):
                    if isinstance(request, PreparedRequest):
                        engine.add_prepared(request, owner=owner, prompt_index=num_taken)
                        num_running += 1
                    elif on_error == "raise":
                        more, failure = False, request
                        break
                    else:
                        held[num_taken] = _error_output(num_taken, prompt, request)
                    num_taken += 1
                if len(held) > num_held:
                    break  # bad prompts take no room: an endless run of them must not be gathered first
            engine.advance(owner)
            for output in _received(owner):
                held[output.prompt_index] = output
                num_running -= 1
            while num_yielded in held if ordered else held:
                yield held.pop(num_yielded if ordered else next(iter(held)))
                num_yielded += 1
    finally:
        _leave(engine, owner)
    if failure is not None:
        raise failure


def _leave(engine: LLMEngine, owner: Owner) -> None:
    """Drop what a call has left behind."""
    engine.abandon(owner)
    owner.inbox.clear()  # what was lost holds its cause, whose traceback holds the owner: a cycle


def _received(owner: Owner) -> Iterator[Any]:
    """What came for ``owner``; RuntimeError if one of its requests was lost to somebody else's failure."""
    for outcome in owner.take():
        if isinstance(outcome, LostRequest):
            raise outcome.error(f"request {outcome.request_id} was dropped: {outcome.cause}") from outcome.cause
        yield outcome


_Pair = tuple[Any, SamplingParams | None]


def _take(
    source: Iterator[Any], number: int, sampling_params: SamplingParams | None
) -> tuple[list[_Pair], bool, Exception | None]:
    """Up to ``number`` prompts with their parameters, whether there may be more, and what the iterator raised."""
    pairs: list[_Pair] = []
    try:
        while len(pairs) < number:
            pairs.append(_as_pair(next(source), sampling_params))
    except StopIteration:
        return pairs, False, None
    except Exception as error:
        return pairs, False, error
    return pairs, True, None


def _as_pair(item: Any, sampling_params: SamplingParams | None) -> _Pair:
    """An item of :meth:`LLM.generate_iter` as a prompt and its parameters, which the iterator may go on to change."""
    prompt, params = item, sampling_params
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (SamplingParams, type(None))):
        prompt, params = item[0], item[1] or sampling_params
    return as_it_is(prompt), params and params.clone()


def _error_output(index: int, prompt: Any, error: Exception) -> RequestOutput:
    """What a prompt gives back that could not be run."""
    text = prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, Mapping) else None
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
    return RequestOutput(
        request_id="",
        prompt=text if isinstance(text, str) else None,
        prompt_token_ids=[],
        outputs=[completion],
        finished=True,
        prompt_index=index,
        error=str(error),
    )
