"""A model with its tokenizer on its devices: text in, text out.

from refusion_jax.decoder import Decoder
from refusion_jax.infilling import Hole

decoder = Decoder.load("runs/tiny")
for answer in decoder.generate(["refusion"], slot_threshold=0.6):
    print(answer.text, answer.generation.order, answer.generation.tokens_per_forward)
print(decoder.infill(["def add(a, b):\n", Hole(16), "\nprint(add(1, 2))"]).text)
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from refusion_jax.checkpoint import load, orbax
from refusion_jax.config import OBJECTIVES, SourceConfig
from refusion_jax.data.examples import Source
from refusion_jax.data.sources import open_source
from refusion_jax.data.tokenizers import Tokenizer, load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.infilling import Filled, Hole, Template, filled, request
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import Engine, Generation, SamplerConfig, stream
from refusion_jax.sampling.batching import serve
from refusion_jax.sampling.config import check_batch
from refusion_jax.sampling.methods import METHODS, config_class, sampler_config, suited
from refusion_jax.sampling.programs import decode_params
from refusion_jax.settings import build, of_kind


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a prompt.

    Attributes:
      text: without special tokens.
      generation: its ids, and how they were decoded.
    """

    text: str
    generation: Generation


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model with its tokenizer, on its devices.

    Attributes:
      params: as `sampling.programs.decode_params` gives them.
      objective: what it was trained with; None where that is not recorded.
    """

    params: dict
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    objective: Any = None

    @classmethod
    def load(
        cls,
        checkpoint: str,
        *,
        step: int | None = None,
        dtype: str = "",
        mesh: str = "1,1,1",
        tokenizer: str = "",
        context_length: int = 0,
        trained_length: int = 0,
    ) -> "Decoder":
        """Reads a checkpoint.

        Args:
          checkpoint: --workdir of a training run, output of a conversion, Hugging Face folder, or name on its hub.
          step: of a run; None: the last.
          dtype: of weights (except int8 ones), cache and computation; empty: float32 on CPUs, bfloat16 elsewhere.
          mesh: sizes of the mesh axes data,fsdp,tensor: rows over data x fsdp, weights over tensor; one may be -1: the
            rest.
          tokenizer: a name, a folder or "bytes"; empty: the checkpoint's own.
          context_length: tokens of prompt and answer that the rotary base is scaled for; 0: as the checkpoint says.
          trained_length: the length that the model was trained for, which it is scaled from; 0: as the checkpoint says.

        Raises:
          UserError: no such checkpoint, damaged files, no tokenizer, a mesh that does not fit, or lengths between which
            nothing can be scaled.
        """
        run = run_config(checkpoint, step)
        objective = of_kind(OBJECTIVES, run.get("objective") or {}, "config.objective") if run else None
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        model = dataclasses.replace(load.load_model_config(checkpoint, step), dtype=dtype)
        if context_length or trained_length:
            model = dataclasses.replace(
                model,
                max_position_embeddings=context_length or model.max_position_embeddings,
                original_max_position_embeddings=trained_length
                or model.original_max_position_embeddings
                or model.max_position_embeddings,
            )
        words = load_tokenizer(tokenizer) if tokenizer else load.load_tokenizer_for(checkpoint, step)
        model = load.with_tokenizer(model, words, checkpoint)
        devices = parse_mesh(mesh)
        params = load.load_params(checkpoint, model, devices, sharding.DECODE_RULES, dtype, step)
        params = decode_params(params, devices)  # once, and not for every call
        return cls(params, model, words, devices, objective)

    def settings(self, method: str | None = None, **given: Any) -> SamplerConfig:
        """The settings of a method; what is not given (None), the method among it, suits the model.

        Raises:
          UserError: the model cannot be decoded in this way, or the method has no such setting.
        """
        method = suited(self.objective, method)
        given = {name: value for name, value in given.items() if value is not None}
        return sampler_config(method, **config_class(method).suited(self.model, self.objective, given))

    def stream(self, prompts: Sequence[str], config: SamplerConfig, **options: Any) -> Iterator[Answer]:
        """Answers to prompts (one user turn each) as they are finished; options of `sampling.stream`.

        Raises:
          UserError: an empty prompt, or one that does not fit the model; no such batch size or seed.
        """
        for index, prompt in enumerate(prompts):
            if not prompt.strip():
                raise UserError(f"Prompt {index} is empty; say something.")
        ids = self.tokenizer.encode_prompts(prompts) if prompts else []
        for generation in stream(self.params, self.model, config, ids, mesh=self.mesh, **options):
            yield Answer(self.tokenizer.decode(generation.tokens), generation)

    def generate(self, prompts: Sequence[str], *, batch_size: int = 8, seed: int = 0, **settings: Any) -> list[Answer]:
        """Answers in the order of the prompts; `settings` as for `Decoder.settings`."""
        answers = list(self.stream(prompts, self.settings(**settings), batch_size=batch_size, seed=seed))
        return sorted(answers, key=lambda answer: answer.generation.index)

    def infill(self, parts: Sequence[str | Hole], prompt: str = "", *, seed: int = 0, **settings: Any) -> Filled:
        """A text with its holes filled; `settings` as for `Decoder.settings`.

        Args:
          parts: texts and holes in order.
          prompt: what the text answers; empty: it stands by itself.

        Raises:
          UserError: the template cannot be filled, or this model or method cannot fill it.
        """
        template = Template(parts, prompt)
        template.check()
        config = self.settings(**settings | {"gen_length": sum(template.sizes)})
        return self.fill([template], config, seed=seed)[0]

    def fill(
        self, templates: Sequence[Template], config: SamplerConfig, *, batch_size: int = 8, seed: int = 0
    ) -> list[Filled]:
        """Templates with their holes filled, `batch_size` at a time, with at most config.gen_length tokens in the holes
        of each.

        Raises:
          UserError: a template cannot be filled, or this model or method cannot fill it; no such batch size or seed.
        """
        check_batch(batch_size, seed)
        requests = [request(t, self.tokenizer, self.model, config, i, seed) for i, t in enumerate(templates)]
        longest = max((len(r.tokens) for r in requests), default=0)
        batch = min(batch_size, max(1, len(requests)))
        engine = Engine(self.params, self.model, config, batch, max_prompt_length=longest, mesh=self.mesh)
        answers = sorted(serve(engine, requests), key=lambda answer: answer.index)
        return [filled(template, self.tokenizer, answer) for template, answer in zip(templates, answers)]


def run_config(checkpoint: str, step: int | None = None) -> dict | None:
    """The training run's config that a checkpoint carries; None where it does not come from a run of this project."""
    folder = load.locate(checkpoint)
    return orbax.read_meta(folder, step)["config"] if load.is_orbax(folder) else None


def held_out(checkpoint: str, step: int | None = None) -> list[Source]:
    """The evaluation sources of the run that a checkpoint comes from: examples that it was not trained on."""
    return run_sources(checkpoint, "evaluation", step)


def run_sources(checkpoint: str, part: str, step: int | None = None) -> list[Source]:
    """The sources of the run that a checkpoint comes from whose answers can be checked; part: train or evaluation.

    Raises:
      UserError: the checkpoint is not of a run with such data that have prompts.
    """
    config, kind = run_config(checkpoint, step), "held-out" if part == "evaluation" else "training"
    if config is None:
        raise UserError(
            f"{checkpoint} is not a training run of this project, so it has no {kind} examples; name a run's "
            "--workdir, or give prompts."
        )
    configs = [build(SourceConfig, source, f"config.data.{part}") for source in config["data"][part]]
    sources = [open_source(config) for config in configs if config.query_field and config.kind != "text"]
    if not sources:
        raise UserError(
            f"The run {checkpoint} has no {part} data with prompts, so no answers that can be checked "
            f"(config.data.{part}); train with some, or give prompts."
        )
    return sources


def task_names(sources: Sequence[Source]) -> list[str]:
    """What the task of each source is called: as its data; numbered where several are called the same."""
    names = [pathlib.Path(source.config.path).stem for source in sources]
    return [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def read_settings(path: pathlib.Path | None) -> dict[str, Any]:
    """The object in a file of --settings."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read --settings {path}: {error}. Give a file with one JSON object.") from None
    if not isinstance(found, dict):
        raise UserError(f"--settings {path} holds a {type(found).__name__}; it must be one JSON object.")
    strange = [name for name, value in found.items() if by_task(found) and not isinstance(value, dict)]
    if strange:
        raise UserError(
            f"--settings {path} has {strange[0]!r} = {found[strange[0]]!r} beside settings by task; put it into those "
            "of the tasks that it is for."
        )
    return found


def by_task(settings: Mapping[str, Any]) -> bool:
    """Whether what a file of --settings holds is for each task its own."""
    return any(isinstance(value, dict) for value in settings.values())


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
    own = jax.local_devices()  # of several processes each decodes by itself
    return make_mesh(data, fsdp, tensor, devices=own[:wanted] if min(sizes) > 0 else own)


# --- The same from a command line: flags that several commands have.


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
    parser.add_argument(
        "--context-length",
        type=int,
        default=0,
        metavar="N",
        help="tokens of prompt and answer, more than the model was trained for: scales its rotary base (NTK)",
    )
    parser.add_argument(
        "--trained-length", type=int, default=0, metavar="N", help="that it was trained for; default: what it says"
    )


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting of every method."""
    group = parser.add_argument_group("decoding", "What is not given suits the model.")
    group.add_argument("--method", choices=list(METHODS), help="default: what the model was trained for")
    having: dict[str, list[tuple[str, dataclasses.Field]]] = {}
    for method, config in METHODS.items():
        for field in dataclasses.fields(config):
            having.setdefault(field.name, []).append((method, field))
    for name, fields in having.items():
        methods, field = [method for method, _ in fields], fields[0][1]
        choices = dict.fromkeys(choice for _, field in fields for choice in field.metadata["choices"])
        of = "" if len(methods) == len(METHODS) else f" ({', '.join(methods)})"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=_numbers if isinstance(field.default, tuple) else type(field.default),
            choices=list(choices) or None,
            metavar=None if choices else name.split("_")[-1].upper(),
            help=f"{field.metadata['text']}; default {field.default}{of}".replace("%", "%%"),
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of "2,0,1"."""
    return tuple(int(number) for number in text.split(","))


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where settings stand that are not given by flags."""
    parser.add_argument(
        "--settings",
        type=pathlib.Path,
        metavar="FILE.json",
        help='of the sampler: {"slot_threshold": 0.8, ...}, or by task as tools/tune_sampler.py writes them; flags '
        "come before it",
    )
    parser.add_argument(
        "--task", default="", metavar="NAME", help="whose settings to take where --settings has several"
    )


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
        context_length=arguments.context_length,
        trained_length=arguments.trained_length,
    )


def settings_of(arguments: argparse.Namespace, decoder: Decoder, **given: Any) -> SamplerConfig:
    """The sampler's settings: `given` ones, then flags, then those of a file, where the command takes one, then what
    suits the model. A `method` that is given takes of flags and file what it has.
    """
    configs = [METHODS[given["method"]]] if "method" in given else METHODS.values()
    names = {"method", *(field.name for config in configs for field in dataclasses.fields(config))}
    of_file = _settings_of_file(arguments) if "settings" in arguments else {}
    if "method" in given:
        of_file = {name: value for name, value in of_file.items() if name in names}
    return decoder.settings(**of_file | flags_given(arguments, names) | given)


def flags_given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Of the sampler's flags with these names those that were given."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _settings_of_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that --settings holds, for --task where it has them by task."""
    found, task = read_settings(arguments.settings), arguments.task
    if not by_task(found):
        return found
    if task not in found and (task or len(found) > 1):
        raise UserError(
            f"--settings {arguments.settings} has settings for {', '.join(found)}; choose with --task, which is "
            f"{task!r}."
        )
    return found[task or next(iter(found))]
