"""Answers prompts with a trained or converted model.

    python -m refusion_jax.generate --checkpoint runs/tiny --prompt "refusion"
    python -m refusion_jax.generate --checkpoint runs/tiny --prompts questions.jsonl --out answers.jsonl
    python -m refusion_jax.generate --checkpoint GSAI-ML/ReFusion --interactive --show-order
    python -m refusion_jax.generate --checkpoint runs/tiny --infill templates.jsonl --slot-size 8

In Python: `refusion_jax.decoder.Decoder`.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging

from refusion_jax import compilation, display, infilling
from refusion_jax.decoder import (
    Answer,
    Decoder,
    add_batch_arguments,
    add_file_arguments,
    add_model_arguments,
    add_sampler_arguments,
    decoder_of,
    settings_of,
)
from refusion_jax.errors import UserError, run_main
from refusion_jax.parallel import distributed
from refusion_jax.progress import Progress
from refusion_jax.sampling import SamplerConfig
from refusion_jax.sampling.config import check_prompt, check_prompts

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


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    if bool(arguments.prompts) != bool(arguments.out) and not arguments.infill:
        raise UserError(
            "--prompts and --out go together: a file of prompts and the file that its answers are written to."
        )
    for name in ("resume", "skip_bad"):
        if getattr(arguments, name) and not arguments.prompts:
            raise UserError(f"--{name.replace('_', '-')} is about a file of --prompts; leave it out, or give one.")
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that `params` alone is no whole checkpoint

    if arguments.prompts:
        distributed.initialize()
        with distributed.together():
            decoder = decoder_of(arguments)
            answer_file(decoder, settings_of(arguments, decoder), arguments)
        return
    decoder = decoder_of(arguments)
    if arguments.infill:
        fill_file(decoder, arguments)
        return
    config = settings_of(arguments, decoder)
    if arguments.interactive:
        answer_interactively(decoder, config, arguments)
    else:
        answer_prompts(decoder, config, arguments)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m refusion_jax.generate",
        description=__doc__,
        epilog=f"{SETTINGS}\n{compilation.HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a question; may be given several times")
    what.add_argument(
        "--prompts", type=pathlib.Path, metavar="FILE.jsonl", help='one {"prompt": ...} or {"query": ...} per line'
    )
    what.add_argument(
        "--infill",
        type=pathlib.Path,
        metavar="FILE.jsonl",
        help='texts with holes, one {"template": ["text", 16, "text"]} per line, numbers being tokens of a hole (of '
        'plan-and-infill: whole slots); with "prompt": what the text answers. Printed, or written to --out',
    )
    what.add_argument(
        "--interactive", action="store_true", help="ask for prompts; answers appear while they are decoded"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE.jsonl",
        help="with --prompts or --infill: the same lines with text, tokens, order, rounds, forwards, "
        "tokens_per_forward; holes of templates too",
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
    add_file_arguments(parser)
    add_batch_arguments(parser)
    add_sampler_arguments(parser)
    return parser.parse_args(argv)


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
        try:
            while room < len(decoder.tokenizer.encode_prompt(prompt)):
                room *= 2
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
    """Answers every line of --prompts; lines of --out are in the same order and written as soon as that allows.

    Several processes take the lines in turn. Each writes a file of its own, and when all are done the first one puts
    these together.
    """
    records, prompts = read_prompts(decoder, config, arguments.prompts, arguments.skip_bad)
    index, count = jax.process_index(), jax.process_count()
    done = finished_lines(arguments.out, prompts, arguments.resume)
    share = range(done, len(prompts))[index::count]
    own = distributed.part_of(arguments.out)
    kept = finished_lines(own, [prompts[i] for i in share], arguments.resume) if count > 1 else 0
    if done or kept:
        print(f"{done + kept} of {len(prompts)} answers are in {own} already", file=sys.stderr)
    progress = Progress("answer", len(share) - kept, enabled=index == 0)
    tally, waiting = display.Tally(), {}
    try:
        with own.open("a", encoding="utf-8") as out:
            left = share[kept:]
            options = dict(batch_size=arguments.batch_size, seed=arguments.seed, start=left.start, stride=count)
            for answer in decoder.stream(prompts, config, every=32, **options):
                progress.show(tally.done, tally.add(answer.generation))
                if not answer.generation.finished:
                    continue
                at = answer.generation.index
                waiting[at] = json.dumps({**records[at], **as_record(answer)}, ensure_ascii=False)
                while left and left[0] in waiting:
                    out.write(waiting.pop(left[0]) + "\n")
                    out.flush()
                    left = left[1:]
        distributed.join_parts(arguments.out)
    except OSError as error:
        raise UserError(
            f"Cannot write {arguments.out}: {error.strerror or error}. Make room or choose another --out; --resume "
            "goes on with what is there."
        ) from None
    progress.say(str(tally))


def as_record(answer: Answer | infilling.Filled) -> dict[str, Any]:
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
    lines = read_lines(path)
    check_prompts([], decoder.model, config)
    records, prompts, bad = [], [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record, prompt = parse_line(line)
            check_prompt(decoder.tokenizer.encode_prompt(prompt), decoder.model, config)
        except UserError as error:
            message = f"{path} line {number}: {error}"
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


def read_lines(path: pathlib.Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror or error}. Give a file with one JSON object per line."
        ) from None


def parse_record(line: bytes) -> Any:
    """The JSON on a line."""
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"malformed JSON at column {error.colno} ({error.msg}): {line.decode('utf-8')[:60]!r}. Write one JSON "
            "object per line."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error}). Convert the file to UTF-8.") from None


def parse_line(line: bytes) -> tuple[dict, str]:
    """The record on a line and its prompt."""
    record = parse_record(line)
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


# --- Texts with holes.


def fill_file(decoder: Decoder, arguments: argparse.Namespace) -> None:
    """Fills the template on every line of --infill; prints the texts, or writes them to --out, in the same order."""
    if arguments.out and arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out.")
    lines = {number: line for number, line in enumerate(read_lines(arguments.infill), 1) if line.strip()}
    records = _each(lines, parse_record, arguments.infill)
    templates = _each(records, infilling.from_record, arguments.infill)
    if not templates:
        raise UserError(f'{arguments.infill} has no line; write {{"template": ["text", 16, "text"]}} on each.')
    longest = max(sum(template.sizes) for template in templates.values())
    config = settings_of(arguments, decoder, gen_length=longest)
    _each(templates, lambda t: infilling.request(t, decoder.tokenizer, decoder.model, config), arguments.infill)
    results = decoder.fill(list(templates.values()), config, batch_size=arguments.batch_size, seed=arguments.seed)
    try:
        with arguments.out.open("w", encoding="utf-8") if arguments.out else contextlib.nullcontext(sys.stdout) as out:
            for record, result in zip(records.values(), results):
                found = {**record, **as_record(result), "holes": result.holes}
                out.write((json.dumps(found, ensure_ascii=False) if arguments.out else result.text) + "\n")
    except OSError as error:
        raise UserError(f"Cannot write {arguments.out}: {error.strerror or error}. Choose another --out.") from None


def _each(lines: dict[int, Any], fn: Callable[[Any], Any], path: pathlib.Path) -> dict[int, Any]:
    """`fn` of what is on each line of a file; what it refuses is said with the line's number."""
    found = {}
    for number, line in lines.items():
        try:
            found[number] = fn(line)
        except UserError as error:
            raise UserError(f"{path} line {number}: {error}") from None
    return found


if __name__ == "__main__":
    run_main(main)
