"""Make the demo checkpoint: generate the text, train the tokenizer and a tiny Qwen3, write `nanovllm/demo`.

    pip install torch transformers tokenizers safetensors
    python tools/train_demo_model.py --work build/demo

The text is drawn on the fly from `demo_tasks.py`: short chats whose answers are known exactly, half of them
with thinking. Contents that are held out for `eval_demo_model.py` are never drawn. The loss is taken on the
last answer (scratchpad included) only. Matrices are trained with Muon, the embedding and the norms with AdamW
(Muon: https://kellerjordan.github.io/posts/muon). Two CPU cores with AVX512-BF16 take about an hour.

The run writes its state to `--work` at intervals and continues from it with `--resume`; `--init DIR`
starts from the weights and the tokenizer of an earlier checkpoint.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo_tasks import TASKS, Example, held_out_examples, make_example
from eval_demo_model import DEMO_MODEL
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import distributed
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 1280  # an upper limit: the text may give fewer merges
MAX_LENGTH = 4096
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]  # not special: they stay visible when special tokens are skipped

# How often each task is drawn, and with which share of thinking (default: half). Arithmetic without a scratchpad is
# what takes longest to learn.
TASK_WEIGHTS = {
    "introduce": 5,
    "primes": 10,
    "add": 22,
    "subtract": 22,
    "count": 11,
    "sort": 16,
    "words": 9,
    "json": 7,
    "recall": 9,
    "manners": 3,
}
THINKING_SHARE = {"add": 0.3, "subtract": 0.3}

# Turns between <|im_start|> and <|im_end|>. The scratchpads of past answers are dropped, because the model
# never needs them again; a fresh answer starts with an empty scratchpad when thinking is off.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role: ' ~ message.role) }}
    {%- endif %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


# -------------------------------------------------------------------------------------------------- tokenizer


def training_examples(rng: random.Random) -> Iterator[Example]:
    """An endless stream of training chats in the proportions of `TASK_WEIGHTS`."""
    tasks, weights = list(TASK_WEIGHTS), list(TASK_WEIGHTS.values())
    while True:
        yield make_example(rng.choices(tasks, weights)[0], rng, held_out=False)


def answer_text(example: Example, thinking: bool) -> str:
    """What the model is to write after the generation prompt, the end of turn included."""
    scratchpad = f"<think>\n{example.thought}\n</think>\n\n" if thinking else ""
    return f"{scratchpad}{example.answer}<|im_end|>"


def train_tokenizer(directory: Path, seed: int) -> None:
    """Train a byte-level BPE tokenizer on generated text and write its two files.

    Digits stay single tokens, so that arithmetic sees places rather than arbitrary chunks. There is no
    normalizer: any text is decoded to exactly what was encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    # Words with the space before them; single digits; punctuation with the space before it, and with the one
    # after it when a digit follows (", " and " + " are then one token between numbers); other white space.
    pattern = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?|\s+(?=\s)|\s"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL_TOKENS) + len(THINK_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = training_examples(random.Random(f"tokenizer {seed}"))
    corpus: list[str] = []
    for example in (next(stream) for _ in range(30_000)):
        corpus += [message["role"] + "\n" + message["content"] for message in example.messages]
        corpus += [example.thought, example.answer]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))

    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {
                    "content": token,
                    **plain,
                    "special": token in SPECIAL_TOKENS,
                }
                for token in SPECIAL_TOKENS + THINK_TOKENS
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": MAX_LENGTH,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )


# ------------------------------------------------------------------------------------------------- checkpoint


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is the same for the same value."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config_dict(tokenizer: Any) -> dict[str, Any]:
    """config.json in the spelling of the published Qwen3 files; heads x head_dim is not the hidden size."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 576,
        "max_position_embeddings": MAX_LENGTH,
        "max_window_layers": 4,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(tokenizer),
    }


def build_model(config: dict[str, Any]) -> Qwen3ForCausalLM:
    """The model in float32 with fresh weights."""
    published_only = ("architectures", "torch_dtype", "transformers_version", "rope_theta", "rope_scaling")
    settings = {key: value for key, value in config.items() if key not in published_only}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    # Plain matmul attention: on rows this short, a CPU trains with it twice as fast as with the fused kernel.
    return Qwen3ForCausalLM(Qwen3Config(**settings, rope_parameters=rope, attn_implementation="eager")).float()


def save_checkpoint(model: Qwen3ForCausalLM, tokenizer: Any, source: Path, directory: Path) -> None:
    """Write the checkpoint in bfloat16, with the tokenizer files copied from `source`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if source != directory:
            (directory / name).write_bytes((source / name).read_bytes())
    write_json(directory / "config.json", config_dict(tokenizer))
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    write_json(
        directory / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": [end_of_turn, end_of_text],
            "pad_token_id": end_of_text,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
    )
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in sorted(model.state_dict().items())
        if name != "lm_head.weight"  # tied to the embedding
    }
    # Written as bytes, because save_file would make it readable to its owner only.
    (directory / "model.safetensors").write_bytes(to_safetensors(weights, metadata={"format": "pt"}))


# --------------------------------------------------------------------------------------------------- training


def encode(tokenizer: Any, example: Example, thinking: bool) -> tuple[list[int], int]:
    """Token ids of a whole chat with its answer, and the length of the prompt."""
    prompt = tokenizer.apply_chat_template(
        list(example.messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    backend = tokenizer.backend_tokenizer
    prompt_ids = backend.encode(prompt, add_special_tokens=False).ids
    return prompt_ids + backend.encode(answer_text(example, thinking), add_special_tokens=False).ids, len(prompt_ids)


def pad(chats: list[tuple[list[int], int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token targets of encoded chats, both [chats, longest - 1].

    Targets are -100 where no loss is taken. Padding stands on the right, where causal attention never sees it,
    so no attention mask is needed.
    """
    width = max(len(ids) for ids, _ in chats) - 1
    inputs = torch.full((len(chats), width), pad_id)
    targets = torch.full((len(chats), width), -100)
    for row, (ids, prompt_length) in enumerate(chats):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:])
    return inputs, targets


def make_batches(
    tokenizer: Any, examples: Iterator[Example], rng: random.Random, size: int, parts: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One optimizer step's chats as a few (inputs, targets) pairs of similar length."""
    chats = []
    for example in itertools.islice(examples, size):
        thinking = rng.random() < THINKING_SHARE.get(example.task, 0.5)
        chats.append(encode(tokenizer, example, thinking))
    chats.sort(key=lambda chat: len(chat[0]))
    # Equal numbers of tokens rather than of chats, so that short chats stand in tall batches.
    total, taken = sum(len(ids) for ids, _ in chats), 0
    groups: list[list[tuple[list[int], int]]] = [[] for _ in range(parts)]
    for chat in chats:
        groups[min(parts - 1, taken * parts // total)].append(chat)
        taken += len(chat[0])
    return [pad(group, tokenizer.pad_token_id) for group in groups if group]


def answer_loss(backbone: Any, embedding: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of the answers; logits are computed only where there is a target."""
    hidden = backbone(input_ids=inputs, use_cache=False).last_hidden_state
    supervised = targets != -100
    logits = F.linear(hidden[supervised], embedding)
    return F.cross_entropy(logits.float(), targets[supervised], reduction="sum")


def schedule(progress: float) -> float:
    """Learning rate factor at a share of the steps: warm-up to 2%, constant to 40%, then cosine to zero."""
    if progress < 0.02:
        return max(0.02, progress / 0.02)
    return 1.0 if progress < 0.4 else 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.4) / 0.6)))


@torch.inference_mode()
def quick_exam(model: Qwen3ForCausalLM, tokenizer: Any, questions: int) -> str:
    """A line with each task's accuracy in percent, thinking off/on, on a few held-out questions.

    The whole reference is read at once rather than generated: if the model prefers the reference's token at every
    position, then greedy decoding writes exactly the reference. Costs seconds instead of minutes.
    """
    model.eval()
    cells = []
    for task in TASKS:
        rates = []
        for thinking in (False, True):
            chats = [encode(tokenizer, e, thinking) for e in held_out_examples(task, questions, seed=1)]
            inputs, targets = pad(chats, tokenizer.pad_token_id)
            preferred = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
            right = ((preferred == targets) | (targets == -100)).all(dim=1)
            rates.append(f"{100 * right.float().mean():.0f}")
        cells.append(f"{task} {'/'.join(rates)}")
    model.train()
    return ", ".join(cells)


def share_gradients(model: Qwen3ForCausalLM, targets: int) -> None:
    """Turn every process's gradients of its summed loss into those of the mean loss over all processes.

    Args:
        model: the same weights in every process.
        targets: number of targets in this process's batches.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([torch.tensor([float(targets)]), *(g.flatten() for g in gradients)])
    if distributed.is_initialized():
        distributed.all_reduce(flat)
    for gradient, shared in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(shared.view_as(gradient)).div_(flat[0])


class Training:
    """The model, its optimizers and how far they are.

    Muon trains the layers' matrices; AdamW the embedding and the norms, without decay.
    """

    def __init__(self, model: Qwen3ForCausalLM, muon_lr: float, adam_lr: float) -> None:
        self.model = model
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.peak_rates = [muon_lr, adam_lr]
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def update(self, rate_factor: float) -> None:
        """Clip the gradients and take an optimizer step at a share of the peak learning rates."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peak_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def save(self, path: Path) -> None:
        """Write what `load` needs, all or nothing."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a saved state."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]


def train(rank: int, args: argparse.Namespace) -> None:
    """Run one of the training processes; the first one also saves and reports."""
    if args.processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.processes))
        rendezvous = f"file://{(args.work / 'rendezvous').resolve()}"
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed)
    state_file = args.work / "state.pt"
    source: Path = args.init or args.work
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = build_model(config_dict(tokenizer))
    if args.init:
        model.load_state_dict(load_file(args.init / "model.safetensors"), strict=False)
        model.tie_weights()
    run = Training(model, args.muon_lr, args.adam_lr)
    if args.resume and state_file.exists():
        run.load(state_file)
    backbone = torch.compile(model.model, dynamic=True) if args.compile else model.model
    model.train()
    rng = random.Random(f"training {args.seed} {run.step} {rank}")
    examples = training_examples(rng)
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, vocabulary {len(tokenizer)}, starting at step {run.step}", flush=True)

    loss_sum, target_sum, log_tokens, log_seconds = 0.0, 0, run.tokens, run.seconds
    while run.step < args.steps:
        started = time.perf_counter()
        targets_here = 0
        for inputs, targets in make_batches(tokenizer, examples, rng, args.batch // args.processes, args.parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = answer_loss(backbone, model.model.embed_tokens.weight, inputs, targets)
            loss.backward()
            loss_sum += loss.item()
            targets_here += int((targets != -100).sum())
            run.tokens += inputs.numel() * args.processes
        share_gradients(model, targets_here)
        run.update(schedule(run.step / args.steps))
        target_sum += targets_here
        run.seconds += time.perf_counter() - started

        if rank != 0:
            continue
        last = run.step == args.steps
        if run.step % args.log_every == 0 or last:
            speed = (run.tokens - log_tokens) / (run.seconds - log_seconds)
            print(
                f"step {run.step}, {run.seconds / 60:.1f} min, {run.tokens:,} tokens, {speed:,.0f} tok/s, "
                f"loss {loss_sum / target_sum:.4f}",
                flush=True,
            )
            loss_sum, target_sum, log_tokens, log_seconds = 0.0, 0, run.tokens, run.seconds
        if run.step % args.save_every == 0 or last:
            run.save(state_file)
        if run.step % args.exam_every == 0 or last:
            print(f"  exam: {quick_exam(model, tokenizer, args.exam_questions)}", flush=True)
    if rank == 0:
        save_checkpoint(model, tokenizer, source, args.out)
        print(f"wrote {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=DEMO_MODEL, help="where the checkpoint goes (default: nanovllm/demo)"
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for the training state and the tokenizer")
    parser.add_argument("--steps", type=int, default=7500, help="optimizer steps")
    parser.add_argument("--resume", action="store_true", help="continue from the state in --work, if there is one")
    parser.add_argument("--init", type=Path, help="start from the weights and the tokenizer of this checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=80, help="chats an optimizer step")
    parser.add_argument("--processes", type=int, default=2, help="share each step among this many processes")
    parser.add_argument("--parts", type=int, default=3, help="forward passes a step and process, sorted by length")
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--exam-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--exam-questions", type=int, default=64, metavar="N", help="questions a task and mode")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "rendezvous").unlink(missing_ok=True)
    if not args.init and not (args.resume and (args.work / "state.pt").exists()):
        train_tokenizer(args.work, args.seed)
    # One thread a process, because at this size the threads of one process mostly wait for each other.
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=train, args=(rank, args), daemon=True) for rank in range(1, args.processes)]
    for process in others:
        process.start()
    train(0, args)


if __name__ == "__main__":
    main()
