"""A model with its tokenizer on its devices: text in, text out.

from refusion_jax.decoder import Decoder

decoder = Decoder.load("runs/tiny")
for answer in decoder.generate(["refusion"], slot_threshold=0.6):
    print(answer.text, answer.generation.order, answer.generation.tokens_per_forward)
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from refusion_jax.checkpoint import load, orbax
from refusion_jax.config import SourceConfig
from refusion_jax.data.examples import Source
from refusion_jax.data.sources import open_source
from refusion_jax.data.tokenizers import Tokenizer, load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import Generation, SamplerConfig, stream
from refusion_jax.sampling.config import METHODS, SPECULATE
from refusion_jax.sampling.programs import decode_params
from refusion_jax.settings import build


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
          dtype: of weights (except int8 ones), cache and computation; empty: float32 on CPUs, bfloat16 elsewhere.
          mesh: sizes of the mesh axes data,fsdp,tensor: rows over data x fsdp, weights over tensor; one may be -1: the
            rest.
          tokenizer: a name, a folder or "bytes"; empty: the checkpoint's own.

        Raises:
          UserError: no such checkpoint, damaged files, no tokenizer, or a mesh that does not fit.
        """
        objective = (run_config(checkpoint, step) or {}).get("objective") or {}
        if objective.get("kind") == "masked":
            raise UserError(
                f"{checkpoint} was trained with the objective 'masked', in which a token sees what comes after it. "
                "The samplers here decode causal models: take a checkpoint of the objective 'refusion' or "
                "'autoregressive'."
            )
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        model = dataclasses.replace(load.load_model_config(checkpoint, step), dtype=dtype)
        words = load_tokenizer(tokenizer) if tokenizer else load.load_tokenizer_for(checkpoint, step)
        model = load.with_tokenizer(model, words, checkpoint)
        devices = parse_mesh(mesh)
        params = load.load_params(checkpoint, model, devices, sharding.DECODE_RULES, dtype, step)
        params = decode_params(params, devices)  # once, and not for every call
        return cls(params, model, words, devices, max(objective.get("slot_sizes") or [cls.slot_size]))

    def settings(self, **given: Any) -> SamplerConfig:
        """The given fields of SamplerConfig; others suit the model.

        These are its slot size, blocks of about 4 slots, and 512 tokens or half of its positions.
        """
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
        for index, prompt in enumerate(prompts):
            if not prompt.strip():
                raise UserError(f"Prompt {index} is empty; say something.")
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
    configs = [build(SourceConfig, source, "config.data.evaluation") for source in config["data"]["evaluation"]]
    sources = [open_source(config) for config in configs if config.query_field and config.kind != "text"]
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


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of SamplerConfig."""
    default = {field.name: field.default for field in dataclasses.fields(SamplerConfig)}
    group = parser.add_argument_group("decoding")
    for name, type_, metavar, text in (
        ("gen-length", int, "N", "tokens an answer may have; default: 512, or half of the model's positions"),
        ("slot-size", int, "N", "tokens of a slot; default: the largest the model was trained with, or 32"),
        ("blocks", int, "N", "parts decoded strictly left to right; default: blocks of about 4 slots"),
        ("slot-threshold", float, "P", "choose slots whose first token has a confidence above this; default {}"),
        ("token-threshold", float, "P", "accept drafts whose probability is above this; default {}"),
        ("temperature", float, "T", "0 is greedy (default); above, drafts are sampled"),
        ("top-k", int, "N", "sample among the k most probable tokens; default 0: all"),
        ("top-p", float, "P", "sample among the fewest tokens with this probability in total; default 1: all"),
        ("window", int, "N", "most tokens of a row's window with speculation; default 0: chosen"),
    ):
        text = text.format(default[name.replace("-", "_")])
        group.add_argument(f"--{name}", type=type_, metavar=metavar, help=text)
    group.add_argument("--method", choices=METHODS, help=f"default {default['method']}")
    group.add_argument(
        "--speculate",
        choices=SPECULATE,
        help="put tokens that may be needed next into the same forward: fewer forwards, same tokens; default auto",
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
    )


def settings_of(arguments: argparse.Namespace, decoder: Decoder, **given: Any) -> SamplerConfig:
    """The sampler's settings that the flags name, `given` ones instead of theirs."""
    names = [field.name for field in dataclasses.fields(SamplerConfig)]
    return decoder.settings(**{name: getattr(arguments, name) for name in names} | given)
