"""What a tensor-parallel rank other than 0 does, from its start to its end; see ``workers.py``."""

import contextlib
import logging
import os
import pickle
import shutil
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.rank_group import RankGroup, on_rank
from nanovllm.engine.workers import library_versions
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.utils.model_config import load_model_config


def main(parent: int, directory: str, fd: int, memory: int, rank: int) -> None:
    """Serve rank 0 until it says that it is over or is gone.

    Args:
        parent: The process that rank 0 is in.
        directory: What to remove should it be gone.
        fd: A socket at whose other end it is.
        memory: A file descriptor of memory that all ranks share.
        rank: This rank.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which then ends us or goes on
    threading.Thread(target=_end_with, args=(parent, directory), daemon=True).start()
    connection, code = Connection(fd), 0
    try:
        _serve(connection, Path(directory), memory, rank)
    except BaseException:
        code = 1
        with contextlib.suppress(OSError):  # rank 0 is gone
            _say(connection, "error", traceback.format_exc())
    if os.getppid() != parent:
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(code)  # other threads, such as those of a process group whose peers are gone, are not waited for


def _serve(connection: Connection, directory: Path, memory: int, rank: int) -> None:
    config, max_model_len, expected_versions = pickle.loads(connection.recv_bytes())
    own_versions = library_versions()
    if own_versions != expected_versions:
        raise RuntimeError(f"this rank runs {own_versions}, rank 0 {expected_versions}: they must be the same")
    logging.getLogger("nanovllm").setLevel(logging.ERROR)  # rank 0 says what there is to say
    _say(connection, "hello", rank)
    size = config.tensor_parallel_size
    parallel = ParallelGroup(rank, size, RankGroup(directory / "store", memory, rank, config))

    def agree(number: int) -> int:
        _say(connection, "number", number)
        return pickle.loads(connection.recv_bytes())

    model_config = load_model_config(config.model, config.hf_overrides)
    runner = ModelRunner(on_rank(config, rank), model_config, max_model_len, parallel, agree)
    _say(connection, "ready", rank)
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):  # it is over
            return
        runner.execute(pickle.loads(message))


def _say(connection: Connection, kind: str, value: Any) -> None:
    connection.send_bytes(pickle.dumps((kind, value)))


def _end_with(parent: int, directory: str) -> None:
    """End this process, whatever it does, as soon as its parent is gone, and remove what that has left behind."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)
