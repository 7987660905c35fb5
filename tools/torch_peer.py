"""The PyTorch side of `benchmark.py peer`: a process that answers every line of JSON with one.

    python tools/torch_peer.py FOLDER [AUTHORS]

FOLDER holds a model in Hugging Face layout; AUTHORS, a checkout of the authors' code, replaces the model's class and
adds their decoding. Runs in any environment with torch and transformers: nothing of refusion_jax is imported.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
import types
from collections.abc import Callable
from typing import Any


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """What `work` returns as "result", with seconds, CPU seconds of all threads, and bytes of memory at its peak above
    those before it (None where /proc does not tell).
    """
    before = _memory("VmRSS", reset=True)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = _memory("VmHWM")
    return dict(result=result, seconds=wall, cpu_seconds=cpu, peak_bytes=None if before is None else peak - before)


def _memory(name: str, reset: bool = False) -> int | None:
    """Bytes that /proc tells of this process; `reset` makes the peak start from here."""
    try:
        if reset:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


class Peer:
    """A model and what is done with it."""

    def __init__(self, folder: str, authors: str):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.torch, self.folder = torch, folder
        if authors:
            sys.path.insert(0, authors)
            import generate
            from qwen3.modeling_qwen3_refusion import Qwen3ForCausalLM

            self.authors, self.model_class = generate, Qwen3ForCausalLM
        else:
            self.model_class = transformers.AutoModelForCausalLM
        self.model = self._load().eval()

    def _load(self):
        return self.model_class.from_pretrained(self.folder, torch_dtype=self.torch.float32)

    def never(self, ids: list[int], logical_vocab: int) -> None:
        """From now on these ids are never predicted, nor in training those of rows past the logical vocabulary."""
        self.logical_vocab = logical_vocab
        self._refuse(self.model, ids)

    def _refuse(self, model, ids: list[int]) -> None:
        def refuse(module, inputs, logits):
            least = self.torch.finfo(logits.dtype).min
            logits[..., ids] = least
            logits[..., self.logical_vocab :] = least

        model.lm_head.register_forward_hook(refuse)

    def autoregressive(self, prompts: list[list[int]], new: int, eos: int) -> list[list[int]]:
        """Greedy continuations of a batch of prompts, padded on the left."""
        longest = max(map(len, prompts))
        tokens = self.torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in prompts])
        real = self.torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with self.torch.no_grad():
            out = self.model.generate(
                tokens,
                attention_mask=real,
                max_new_tokens=new,
                do_sample=False,
                num_beams=1,
                eos_token_id=eos,
                pad_token_id=eos,
            )
        return out[:, longest:].tolist()

    def plan_and_infill(
        self, prompts: list[list[int]], gen_length: int, mask: int, eos: int, **settings: Any
    ) -> list[list[int]]:
        """Answers of the authors' loop, one prompt after another."""
        tokenizer = types.SimpleNamespace(eos_token_id=eos)
        answers = []
        for prompt in prompts:
            out, _ = self.authors.generate_refusion(
                self.model, tokenizer, self.torch.tensor([prompt]), gen_length=gen_length, mask_id=mask, **settings
            )
            answers.append(out[0, len(prompt) :].tolist())
        return answers

    @functools.cached_property
    def trained(self):
        """A second copy of the model, and its optimizer."""
        model = self._load().train()
        self._refuse(model, [])
        return model, self.torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)

    def restart_training(self) -> None:
        """The next step starts from the weights in the folder."""
        self.__dict__.pop("trained", None)

    def train(self, examples: list[list[int]], prompt_lengths: list[int]) -> float:
        """One step on examples padded to the longest: the loss, mean over response tokens, before it."""
        model, optimizer = self.trained
        longest = max(map(len, examples))
        pad = lambda rows, value: self.torch.tensor([row + [value] * (longest - len(row)) for row in rows])
        labels = [[-100] * p + example[p:] for example, p in zip(examples, prompt_lengths)]
        loss = model(
            input_ids=pad(examples, 0),
            attention_mask=pad([[1] * len(example) for example in examples], 0),
            labels=pad(labels, -100),
            use_cache=False,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("authors", nargs="?", default="")
    arguments = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def answer(work: Callable[[], dict[str, Any]]) -> bool:
        try:
            found = work()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)
        return "error" not in found

    peer = None

    def start() -> dict[str, Any]:
        nonlocal peer
        peer = Peer(arguments.folder, arguments.authors)
        return {"torch": peer.torch.__version__, "threads": peer.torch.get_num_threads()}

    if answer(start):
        for line in sys.stdin:
            request = json.loads(line)
            work = functools.partial(getattr(peer, request.pop("do")), **request)
            if not answer(functools.partial(measured, work)):
                break


if __name__ == "__main__":
    main()
