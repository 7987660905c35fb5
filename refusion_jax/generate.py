"""Answers prompts with a trained or converted model.

    python -m refusion_jax.generate --checkpoint runs/tiny --prompt "refusion"
    python -m refusion_jax.generate --checkpoint runs/tiny --prompts questions.jsonl --out answers.jsonl
    python -m refusion_jax.generate --checkpoint GSAI-ML/ReFusion --interactive --show-order

In Python, text in and text out:

    from refusion_jax.generate import Decoder

    decoder = Decoder.load("runs/tiny")
    for answer in decoder.generate(["refusion"], slot_threshold=0.6):
        print(answer.text, answer.generation.order, answer.generation.tokens_per_forward)
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from refusion_jax import display
from refusion_jax.checkpoint import load, orbax
from refusion_jax.config import SourceConfig
from refusion_jax.data.sources import Source, open_source
from refusion_jax.data.tokenizers import Tokenizer, load_tokenizer
from refusion_jax.errors import UserError, run_main
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import Generation, SamplerConfig, stream
from refusion_jax.sampling.config import METHODS, SPECULATE, check_prompts

SETTINGS = """
settings the authors used (gen-length 512, temperature 0; blocks = 512 / block):
              slot-threshold  token-threshold  slot-size  block  blocks
  MMLU-Pro         0.9             0.4             16      128       4
  ARC-C            0.8             0.1              8        8      64
  GSM8K            0.9             0.4             32      128       4
  MATH             0.8             0.6             32       64       8
  GPQA             0.8             0.2              8       16      32
  HumanEval        0.9             0.4             32      128       4
  MBPP             0.9             0.3             32      128       4
  demo             0.6             0.3              4       16      32
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a prompt: its text without special tokens, and how it was decoded."""

    text: str
    generation: Generation


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model with its tokenizer, on its devices.

    Attributes:
      slot_size: the largest it was trained with; 32, the authors', where that is not recorded.
    """

    params: dict
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    slot_size: int = 32

    @classmethod
    def load(
        cls, checkpoint: str, *, step: int | None = None, dtype: str = "", mesh: str = "1,1,1", tokenizer: str = ""
    ) -> "Decoder":
        """Reads a checkpoint.

        Args:
          checkpoint: --workdir of a training run, output of a conversion, Hugging Face folder, or name on its hub.
          step: of a run; None: the last.
          dtype: of weights, cache and computation; empty: float32 on CPUs, bfloat16 elsewhere.
          mesh: sizes of the mesh axes data,fsdp,tensor: rows over data x fsdp, weights over tensor; one may be -1: the rest.
          tokenizer: a name, a folder or "bytes"; empty: the checkpoint's own.

        Raises:
          UserError: no such checkpoint, damaged files, no tokenizer, or a mesh that does not fit.
        """
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        model = dataclasses.replace(load.load_model_config(checkpoint, step), dtype=dtype)
        words = load_tokenizer(tokenizer) if tokenizer else load.load_tokenizer_for(checkpoint, step)
        model = load.with_tokenizer(model, words, checkpoint)
        devices = parse_mesh(mesh)
        params = load.load_params(checkpoint, model, devices, sharding.DECODE_RULES, dtype, step)
        sizes = (((run_config(checkpoint, step) or {}).get("objective") or {}).get("slot_sizes")) or [cls.slot_size]
        return cls(params, model, words, devices, max(sizes))

    def settings(self, **given: Any) -> SamplerConfig:
        """The given fields of SamplerConfig; others suit the model: its slot size, blocks of 4 slots, 512 tokens if there is room."""
        given = {name: value for name, value in given.items() if value is not None}
        k = given.setdefault("slot_size", self.slot_size)
        length = given.setdefault("gen_length", min(512, self.model.max_position_embeddings // 2))
        if k > 0 and length > 0:  # else SamplerConfig says what is wrong
            slots = -(-length // k)
            given.setdefault("blocks", slots // next(n for n in range(min(4, slots), slots + 1) if slots % n == 0))
        return SamplerConfig(**given)

    def stream(self, prompts: Sequence[str], config: SamplerConfig, **options: Any) -> Iterator[Answer]:
        """Answers to prompts (one user turn each) as they are finished; options of `sampling.stream`.

        Raises:
          UserError: an empty prompt, or one that does not fit the model.
        """
        if not all(prompt.strip() for prompt in prompts):
            raise UserError(
                f"Prompt {[bool(prompt.strip()) for prompt in prompts].index(False)} is empty; say something."
            )
        ids = self.tokenizer.encode_prompts(prompts) if prompts else []
        for generation in stream(self.params, self.model, config, ids, mesh=self.mesh, **options):
            yield Answer(self.tokenizer.decode(generation.tokens), generation)

    def generate(self, prompts: Sequence[str], *, batch_size: int = 8, seed: int = 0, **settings: Any) -> list[Answer]:
        """Answers in the order of the prompts; `settings` are fields of SamplerConfig."""
        answers = list(self.stream(prompts, self.settings(**settings), batch_size=batch_size, seed=seed))
        return sorted(answers, key=lambda answer: answer.generation.index)


def run_config(checkpoint: str, step: int | None = None) -> dict | None:
    """The training run's config that a checkpoint carries; None where it does not come from a run of this project."""
    folder = load.locate(checkpoint)
    return orbax.read_meta(folder, step)["config"] if load.is_orbax(folder) else None


def held_out(checkpoint: str, step: int | None = None) -> list[Source]:
    """The evaluation sources of the run that a checkpoint comes from: examples that it was not trained on.

    Raises:
      UserError: the checkpoint is not of a run with evaluation data that have prompts.
    """
    config = run_config(checkpoint, step)
    if config is None:
        raise UserError(
            f"{checkpoint} is not a training run of this project, so it has no held-out examples; name a run's "
            "--workdir, or give prompts."
        )
    settings = [{**source, "options": tuple(map(tuple, source["options"]))} for source in config["data"]["evaluation"]]
    sources = [
        open_source(SourceConfig(**source)) for source in settings if source["query_field"] and source["kind"] != "text"
    ]
    if not sources:
        raise UserError(
            f"The run {checkpoint} has no evaluation data with prompts (config.data.evaluation); train with some, or "
            "give prompts."
        )
    return sources


def parse_mesh(text: str) -> Mesh:
    """A mesh from "data,fsdp,tensor"; over the first devices when the sizes ask for fewer than there are."""
    try:
        sizes = [int(size) for size in text.split(",")]
        data, fsdp, tensor = sizes
    except ValueError:
        raise UserError(
            f"--mesh is {text!r}; give three numbers data,fsdp,tensor such as 1,1,4, of which one may be -1 (the rest)."
        ) from None
    wanted = data * fsdp * tensor
    return make_mesh(data, fsdp, tensor, devices=jax.devices()[:wanted] if min(sizes) > 0 else None)


# --- The command line.


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Flags that say which model, and where it runs."""
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="DIR",
        help="workdir of a run, converted checkpoint, Hugging Face folder or name",
    )
    parser.add_argument("--step", type=int, help="of a run; default: the last")
    parser.add_argument("--tokenizer", default="", help="name, folder or 'bytes'; default: the checkpoint's own")
    parser.add_argument(
        "--dtype", default="", choices=("float32", "bfloat16"), help="default: float32 on CPUs, bfloat16 elsewhere"
    )
    parser.add_argument(
        "--mesh",
        default="1,1,1",
        metavar="DATA,FSDP,TENSOR",
        help="rows over data x fsdp, weights over tensor; one may be -1 (the rest)",
    )


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of SamplerConfig."""
    of = {field.name: field.default for field in dataclasses.fields(SamplerConfig)}
    group = parser.add_argument_group("decoding")
    add = lambda name, type_, text, **more: group.add_argument(
        f"--{name}", type=type_, metavar=more.pop("metavar", "N"), help=text, **more
    )
    add("gen-length", int, "tokens an answer may have; default: 512, or half of the model's positions")
    add("slot-size", int, "tokens of a slot; default: the largest the model was trained with, or 32")
    add("blocks", int, "parts decoded strictly left to right; default: blocks of about 4 slots")
    add(
        "slot-threshold",
        float,
        f"choose slots whose first token has a confidence above this; default {of['slot_threshold']}",
        metavar="P",
    )
    add(
        "token-threshold",
        float,
        f"accept drafts whose probability is above this; default {of['token_threshold']}",
        metavar="P",
    )
    add("temperature", float, "0 is greedy (default); above, drafts are sampled", metavar="T")
    add("top-k", int, "sample among the k most probable tokens; default 0: all")
    add("top-p", float, "sample among the fewest tokens with this probability in total; default 1: all", metavar="P")
    group.add_argument("--method", choices=METHODS, help=f"default {of['method']}")
    group.add_argument(
        "--speculate",
        choices=SPECULATE,
        help="put tokens that may be needed next into the same forward: fewer forwards, same tokens; default auto",
    )
    add("window", int, "most tokens of a row's window with speculation; default 0: chosen")


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a call of `sampling.stream`."""
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts decoded at a time; default 8")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default 0")


def decoder_of(arguments: argparse.Namespace) -> Decoder:
    """The model that the flags name."""
    return Decoder.load(
        arguments.checkpoint,
        step=arguments.step,
        dtype=arguments.dtype,
        mesh=arguments.mesh,
        tokenizer=arguments.tokenizer,
    )


def settings_of(arguments: argparse.Namespace, decoder: Decoder, **given: Any) -> SamplerConfig:
    """The sampler's settings that the flags name, `given` ones instead of theirs."""
    names = [field.name for field in dataclasses.fields(SamplerConfig)]
    return decoder.settings(**{name: getattr(arguments, name) for name in names} | given)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m refusion_jax.generate",
        description=__doc__,
        epilog=SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a question; may be given several times")
    what.add_argument(
        "--prompts", type=pathlib.Path, metavar="FILE.jsonl", help='one {"prompt": ...} or {"query": ...} per line'
    )
    what.add_argument(
        "--interactive", action="store_true", help="ask for prompts; answers appear while they are decoded"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE.jsonl",
        help="with --prompts: the same lines with text, tokens, order, rounds, forwards, tokens_per_forward",
    )
    parser.add_argument("--resume", action="store_true", help="go on after the answers that --out holds already")
    parser.add_argument(
        "--skip-bad", action="store_true", help="report lines of --prompts that cannot be answered and do the others"
    )
    parser.add_argument("--show-order", action="store_true", help="colour tokens by the round they were committed in")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="with --show-order; auto: numbers instead of colours when not on a terminal or with NO_COLOR",
    )
    add_batch_arguments(parser)
    add_sampler_arguments(parser)
    arguments = parser.parse_args(argv)
    if bool(arguments.prompts) != bool(arguments.out):
        raise UserError(
            "--prompts and --out go together: a file of prompts and the file that its answers are written to."
        )
    logging.set_verbosity(logging.ERROR)  # Orbax warns that `params` alone is no whole checkpoint

    decoder = decoder_of(arguments)
    config = settings_of(arguments, decoder)
    if arguments.prompts:
        answer_file(decoder, config, arguments)
    elif arguments.interactive:
        answer_interactively(decoder, config, arguments)
    else:
        answer_prompts(decoder, config, arguments)


# --- Prompts from the command line.


def answer_prompts(decoder: Decoder, config: SamplerConfig, arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    answers = list(decoder.stream(arguments.prompt, config, batch_size=arguments.batch_size, seed=arguments.seed))
    seconds = time.perf_counter() - start
    for answer in sorted(answers, key=lambda answer: answer.generation.index):
        if len(answers) > 1:
            print(f"--- {arguments.prompt[answer.generation.index]}")
        show(decoder, answer, arguments)
    sys.stdout.flush()
    print(f"{seconds:.1f} s, compilation included", file=sys.stderr)


def show(decoder: Decoder, answer: Answer, arguments: argparse.Namespace) -> None:
    """Prints an answer, and on stderr how it was decoded."""
    generation = answer.generation
    rounds = max(generation.rounds, default=-1) + 1
    if arguments.show_order:
        color = display.use_color(arguments.color, sys.stdout)
        print(display.paint(display.spans(decoder.tokenizer, generation, decoder.model.eos_token_id), rounds, color))
        print(display.legend(rounds, color))
    else:
        print(answer.text)
    sys.stdout.flush()
    print(
        f"({len(generation.tokens)} tokens in {rounds} rounds and {generation.forwards} forwards: "
        f"{generation.tokens_per_forward:.2f} tokens per forward)",
        file=sys.stderr,
    )


def answer_interactively(decoder: Decoder, config: SamplerConfig, arguments: argparse.Namespace) -> None:
    live = display.Live() if sys.stdout.isatty() else None
    color = arguments.show_order and display.use_color(arguments.color, sys.stdout)
    room = 128  # the same compiled loop serves all prompts up to this; doubled when one is longer
    print("A prompt per line; an empty line, or Ctrl-D, ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt.strip():
            return
        while room < len(decoder.tokenizer.encode_prompt(prompt)):
            room *= 2
        try:
            for answer in decoder.stream(
                [prompt], config, batch_size=1, seed=arguments.seed, every=1 if live else 0, max_prompt_length=room
            ):
                if live:
                    found = display.spans(decoder.tokenizer, answer.generation, decoder.model.eos_token_id)
                    # How many rounds there will be is not known yet: colours start to spread over eight.
                    live.show(found, max([8, *(r + 1 for _, r in found if r is not None)]), color)
            if live:
                live.clear()
            show(decoder, answer, arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)


# --- Prompts from a file.


def answer_file(decoder: Decoder, config: SamplerConfig, arguments: argparse.Namespace) -> None:
    """Answers every line of --prompts; lines of --out are in the same order and written as soon as that allows."""
    records, prompts = read_prompts(decoder, config, arguments.prompts, arguments.skip_bad)
    done = finished_lines(arguments.out, prompts, arguments.resume)
    if done:
        print(f"{done} of {len(prompts)} answers are in {arguments.out} already", file=sys.stderr)
    progress = display.Progress(len(prompts) - done)
    waiting: dict[int, str] = {}
    written = done
    try:
        with arguments.out.open("a", encoding="utf-8") as out:
            options = dict(batch_size=arguments.batch_size, seed=arguments.seed, start=done, every=32)
            for answer in decoder.stream(prompts, config, **options):
                progress.add(answer.generation)
                if not answer.generation.finished:
                    continue
                index = answer.generation.index
                waiting[index] = json.dumps({**records[index], **as_record(answer)}, ensure_ascii=False)
                while written in waiting:
                    out.write(waiting.pop(written) + "\n")
                    out.flush()
                    written += 1
    except OSError as error:
        raise UserError(
            f"Cannot write {arguments.out}: {error.strerror or error}. Make room or choose another --out; --resume "
            "goes on with what is there."
        ) from None
    progress.close()


def as_record(answer: Answer) -> dict[str, Any]:
    """What a line of --out says about an answer (see `Generation`)."""
    fields = ("tokens", "order", "rounds", "forwards", "tokens_per_forward")
    return {"text": answer.text, **{name: getattr(answer.generation, name) for name in fields}}


def read_prompts(
    decoder: Decoder, config: SamplerConfig, path: pathlib.Path, skip_bad: bool
) -> tuple[list[dict], list[str]]:
    """(records, their prompts) of the lines that can be answered; blank lines are no records.

    Raises:
      UserError: the file cannot be read; without `skip_bad`, the first line that cannot be answered.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror or error}. Give a file with one JSON object per line as --prompts."
        ) from None
    check_prompts([], decoder.model, config)
    records, prompts, bad = [], [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record, prompt = parse_line(line)
            check_prompts([decoder.tokenizer.encode_prompt(prompt)], decoder.model, config)
        except UserError as error:
            message = f"{path} line {number}: {str(error).replace('Prompt 0', 'the prompt', 1)}"
            if not skip_bad:
                raise UserError(f"{message} With --skip-bad such lines are reported and the others answered.") from None
            print(f"skipped: {message}", file=sys.stderr)
            bad += 1
            continue
        records.append(record)
        prompts.append(prompt)
    if bad:
        print(f"{bad} lines skipped, {len(prompts)} to answer", file=sys.stderr)
    return records, prompts


def parse_line(line: bytes) -> tuple[dict, str]:
    """The record on a line and its prompt."""
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"malformed JSON at column {error.colno} ({error.msg}): {line.decode('utf-8')[:60]!r}. Write one JSON "
            "object per line."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error}). Convert the file to UTF-8.") from None
    if not isinstance(record, dict) or not ({"prompt", "query"} & set(record)):
        raise UserError(f'{str(record)[:60]!r} has no prompt. Write {{"prompt": "..."}} or {{"query": "..."}}.')
    prompt = record.get("prompt", record.get("query"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"the prompt is {prompt!r}; it must be a text that is not empty.")
    return record, prompt


def finished_lines(path: pathlib.Path, prompts: Sequence[str], resume: bool) -> int:
    """How many answers a file holds already; a last line that was cut off is removed.

    Raises:
      UserError: the file exists and is not to be continued, or holds answers to other prompts.
    """
    if not path.exists() or not path.stat().st_size:
        return 0
    if not resume:
        raise UserError(
            f"{path} exists; --resume goes on after the answers in it, otherwise remove it or choose another --out."
        )
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    for number, line in enumerate(lines):
        try:
            if number >= len(prompts) or parse_line(line)[1] != prompts[number]:
                raise UserError("it answers another prompt")
        except UserError as error:
            raise UserError(
                f"{path} line {number + 1} does not belong to these prompts ({error}), so it cannot be continued. "
                "Remove the file or choose another --out."
            ) from None
    if rest:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - len(rest))
    return len(lines)


if __name__ == "__main__":
    run_main(main)
