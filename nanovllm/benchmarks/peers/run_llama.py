"""llama.cpp, greedy: prompts one after another, what they share once, then all sequences together.

The benchmark's other engines sample; here the argmax of each row of logits is taken, which costs less.
"""

import ctypes
import itertools
import time
from typing import Any

from nanovllm.benchmarks.peers.protocol import serve, usable_cpus

BATCH_TOKENS = 2048
MICRO_BATCH_TOKENS = 512
Row = tuple[int, int, int, bool]
"""Token, position, sequence, and whether its logits are wanted."""


class LlamaPeer:
    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp as llama

        self.llama = llama
        llama.llama_backend_init()
        model = settings["model"]
        self.model = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp did not load {model}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        description = ctypes.create_string_buffer(128)
        llama.llama_model_desc(self.model, description, len(description))
        self.setup = f"llama-cpp-python {llama.__version__}, {description.value.decode()}, greedy"

    def run(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[float, list[int]]:
        llama = self.llama
        context = llama.llama_init_from_model(self.model, self._context_params(prompts, output_lens))
        if not context:
            raise MemoryError("llama.cpp did not create a context")
        try:
            start = time.perf_counter()
            made = self._generate(context, prompts, output_lens)
            return time.perf_counter() - start, made
        finally:
            llama.llama_free(context)

    def _context_params(self, prompts: list[list[int]], output_lens: list[int]) -> Any:
        params = self.llama.llama_context_default_params()
        # 256 cells of slack a sequence; one cache for all, where cells can belong to several sequences.
        params.n_ctx = sum(map(len, prompts)) + sum(output_lens) + 256 * len(prompts)
        params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
        params.n_seq_max, params.kv_unified = len(prompts), True
        params.n_threads = params.n_threads_batch = len(usable_cpus())
        return params

    def _generate(self, context: Any, prompts: list[list[int]], output_lens: list[int]) -> list[int]:
        """How many tokens each prompt got."""
        llama, memory = self.llama, self.llama.llama_get_memory(context)
        shared = common_prefix([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else 0
        if shared:
            self._prefill(context, prompts[0][:shared], 0, 0, wanted=False)
            for sequence in range(1, len(prompts)):
                llama.llama_memory_seq_cp(memory, 0, sequence, 0, shared)
        last = [
            self._prefill(context, prompt[shared:], shared, sequence, wanted=True)
            for sequence, prompt in enumerate(prompts)
        ]
        made = [1] * len(prompts)
        while live := [s for s, n in enumerate(output_lens) if made[s] < n]:
            for first in range(0, len(live), BATCH_TOKENS):
                part = live[first : first + BATCH_TOKENS]
                rows = [(last[s], len(prompts[s]) + made[s] - 1, s, True) for s in part]
                for sequence, token in zip(part, self._decode(context, rows), strict=True):
                    last[sequence] = token
                    made[sequence] += 1
                    if made[sequence] == output_lens[sequence]:
                        llama.llama_memory_seq_rm(memory, sequence, -1, -1)
        return made

    def _prefill(self, context: Any, tokens: list[int], position: int, sequence: int, *, wanted: bool) -> int:
        """Compute tokens from a position on; the best token after the last one, if wanted (else 0)."""
        best: list[int] = []
        for first in range(0, len(tokens), BATCH_TOKENS):
            part = tokens[first : first + BATCH_TOKENS]
            ends_here = wanted and first + len(part) == len(tokens)
            rows = [
                (token, position + first + i, sequence, ends_here and i == len(part) - 1)
                for i, token in enumerate(part)
            ]
            best = self._decode(context, rows)
        return best[0] if best else 0

    def _decode(self, context: Any, rows: list[Row]) -> list[int]:
        """Run the rows; the best next token of each whose logits are wanted, in order."""
        import numpy as np

        llama, batch = self.llama, self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := llama.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = (llama.llama_get_logits_ith(context, i) for i, row in enumerate(rows) if row[3])
        return [int(np.ctypeslib.as_array(row, shape=(self.vocab_size,)).argmax()) for row in logits]


def common_prefix(lists: list[list[int]]) -> int:
    """How many elements all lists begin with alike."""
    columns = zip(*lists, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def main() -> None:
    serve(LlamaPeer)


if __name__ == "__main__":
    main()
