"""Rank 0's runner in an engine of several ranks: what it runs, the others run as well."""

import pickle
from dataclasses import replace
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.batch_state import is_special
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.rank_group import on_rank
from nanovllm.engine.step_handle import StepHandle
from nanovllm.engine.step_plan import SlotEntry, StepPlan, StepResult
from nanovllm.engine.workers import Workers
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.model_config import ModelConfig


class ParallelRunner:
    """A :class:`ModelRunner` of rank 0 and the workers beside it; attributes are the runner's.

    Raises:
        ValueError: As the runner does, or there are no ranks to be had.
        EngineDeadError: A rank failed to start or to load its share.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> None:
        check_shares(config, model_config)
        self.workers = Workers(config, max_model_len)
        try:
            parallel = self.workers.join()
            self.runner = self.workers.run(
                lambda: ModelRunner(on_rank(config, 0), model_config, max_model_len, parallel, self.workers.agree)
            )
            self.workers.wait_until_ready()
        except BaseException:
            self.workers.shut_down()
            raise

    def is_step_thread(self) -> bool:
        """Whether the caller is in the thread that steps run in, and what users have called within them."""
        return self.workers.thread.is_current()

    def execute(self, plan: StepPlan) -> "StepHandle | WatchedHandle":
        """As the runner's, on all ranks."""
        handle = self.workers.run(lambda: self._execute(plan))
        # On the CPU it is done by now.
        return handle if self.runner.device.type == "cpu" else WatchedHandle(self.workers, handle)

    def _execute(self, plan: StepPlan) -> StepHandle:
        self.workers.send(message_of(plan))
        return self.runner.execute(plan)

    def close(self) -> None:
        """End the workers and free this rank's share."""
        try:
            self.workers.shut_down()
        finally:
            self.runner.close()

    def __getattr__(self, name: str) -> Any:
        if name == "runner":  # there is none yet
            raise AttributeError(name)
        return getattr(self.runner, name)


class WatchedHandle:
    """A step that has been launched; whoever waits for it hears if a rank ends meanwhile."""

    def __init__(self, workers: Workers, handle: StepHandle) -> None:
        self.workers, self.handle = workers, handle

    def result(self) -> StepResult:
        """As the handle's."""
        return self.workers.run(self.handle.result)


def message_of(plan: StepPlan) -> bytes:
    """``plan`` for the other ranks, which unpickle it: entries lack what only rank 0 needs."""
    return pickle.dumps(replace(plan, entered=[_without_what_rank_0_decides(one) for one in plan.entered]), protocol=5)


def _without_what_rank_0_decides(entry: SlotEntry) -> SlotEntry:
    """``entry`` as the other ranks need it: a request's callables cannot travel, and are nobody else's to call."""
    params, special = entry.params, is_special(entry)
    plain = SamplingParams(temperature=params.temperature if not special else 1.0, detokenize=False)
    if entry.first_logprob is not None:
        plain.prompt_logprobs = params.prompt_logprobs
    return replace(entry, params=plain, stop_token_ids=(), bad_words=(), special=special)


def check_shares(config: EngineConfig, model_config: ModelConfig) -> None:
    """Raise ValueError unless the ranks can share the model evenly."""
    size = config.tensor_parallel_size
    heads, kv_heads = model_config.num_attention_heads, model_config.num_key_value_heads
    inner = model_config.intermediate_size
    for name, number in (("attention heads", heads), ("units in its MLPs", inner)):
        if number % size:
            fits = [
                n
                for n in range(1, heads + 1)
                if heads % n == inner % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
            ]
            raise ValueError(
                f"tensor_parallel_size is {size}, which does not divide the model's {number} {name}; "
                f"use one of {', '.join(map(str, fits))}"
            )
    if kv_heads % size and size % kv_heads:
        raise ValueError(
            f"tensor_parallel_size is {size}: that many ranks cannot share {kv_heads} key-value heads evenly"
        )
