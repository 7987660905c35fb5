"""Decodings recorded from published code, and the settings of this project's samplers that repeat them."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import reference_block
import reference_mdlm
from jax.sharding import Mesh

from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import Engine, Generation, MaskedConfig, PlanAndInfillConfig, Prompt, SamplerConfig

ROOM = 48  # tokens of the longest answer
DREAM_SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded decoding.

    Attributes:
      number: its line in the file, from 1.
      config: the settings that repeat it.
      stop_ids: ids that end an answer besides the model's EOS.
      wanted: by name, what is to be equal; see `found`.
      limit: tokens of the answer; 0: as the settings say.
    """

    number: int
    prompt: list[int]
    config: SamplerConfig
    wanted: dict[str, Any]
    stop_ids: tuple[int, ...] = ()
    limit: int = 0


def read(path: pathlib.Path, vocabulary: int, speculate: str = "off") -> list[Case]:
    """The cases of a decode.jsonl; of plan-and-infill with speculation forwards are not compared."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [case(number, record, vocabulary, speculate) for number, record in enumerate(records, 1)]


def case(number: int, record: dict[str, Any], vocabulary: int, speculate: str = "off") -> Case:
    """A recorded line as a case."""
    params, prompt = dict(record["params"]), record["prompt"]
    if "serial_num_blocks" in params:
        config = PlanAndInfillConfig(blocks=params.pop("serial_num_blocks"), **params, speculate=speculate)
        wanted = {"response": record["response"], "commit_order": record["commit_order"]}
        return Case(number, prompt, config, wanted | {"forwards": record["forwards"]} if speculate == "off" else wanted)
    if "block_size" in params:
        config, limit = reference_block.settings(record, vocabulary)
        return Case(number, prompt, config, reference_block.wanted(record), limit=limit)
    stop_ids = (params["eot_id"],) if params.get("eot_id") is not None else ()
    forwarded = record["tokens_forwarded"]
    wanted = {
        "response": record["response"],
        "order": record["order"],
        "forwards": record["forwards"],
        "tokens_forwarded": sum(forwarded) if isinstance(forwarded, list) else forwarded,
    }
    if record["method"] in ("mdlm", "sedd"):
        return Case(number, prompt, reference_mdlm.settings(record, vocabulary), wanted, limit=params["gen_length"])
    settings = masked_settings(record)
    limit = settings["gen_length"]
    return Case(number, prompt, MaskedConfig(stop="length", **in_room(settings)), wanted, stop_ids, limit)


def masked_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Settings of `MaskedConfig` for a recorded line of one of the masked methods."""
    params = record["params"]
    family = record["method"].split("/")[0]
    given = {name: params[name] for name in ("gen_length", "block_length", "steps", "top_k", "top_p") if name in params}
    if family in ("llada", "fast_dllm", "eb"):
        return given | llada_settings(params)
    if family == "diffullama":
        temperature = params["logits_temp"]
        return given | dict(alignment="shift", schedule="keep_floor", score_temperature=temperature)
    if family == "dkv_llada":
        return given | dkv_llada_settings(params)
    if family.startswith("dllm_cache"):
        names = "prompt_interval", "gen_interval", "transfer_ratio", "cfg_scale", "cfg_interval"
        given |= {name: params[name] for name in names if name in params}
        return given | ({} if "block_length" in params else dream_settings(params)) | dict(cache="dllm")
    return given | dream_settings(params)


def in_room(settings: dict[str, Any]) -> dict[str, Any]:
    """The same for answers of about ROOM tokens, so that shorter ones, which are a request's limit, share a program."""
    if settings.get("select") == "threshold" and settings.get("steps"):  # the steps are to divide the length
        return settings
    length, block = settings["gen_length"], settings.get("block_length", settings["gen_length"])
    if block == length:
        settings = settings | dict(block_length=ROOM, gen_length=ROOM)
    else:
        blocks = -(-ROOM // block)
        settings = settings | dict(gen_length=blocks * block)
        if settings.get("steps"):
            settings["steps"] = settings["steps"] // (length // block) * blocks
    if "order" in settings:
        settings["order"] += tuple(range(length, settings["gen_length"]))
    return settings


def llada_settings(params: dict[str, Any]) -> dict[str, Any]:
    found = {
        name: params[name]
        for name in ("select", "threshold", "factor", "gamma", "cache", "cfg_scale")
        if name in params
    }
    suppress = params.get("logits_eos_inf", False), params.get("confidence_eos_eot_inf", False)
    names = {(False, False): "no", (True, False): "logits", (False, True): "confidence", (True, True): "both"}
    return found | dict(score=params.get("proxy", "confidence"), suppress=names[suppress])


def dream_settings(params: dict[str, Any]) -> dict[str, Any]:
    """Of Dream, Fast-dLLM on Dream and dKV-Cache on Dream."""
    found: dict[str, Any] = dict(alignment="shift", score_temperature=0.0)
    cache = params.get("cache", "none")
    found["cache"] = cache if cache in ("none", "prefix", "dual") else f"dkv_{cache}"
    for name, ours in dict(cache_steps="cache_steps", shift_type="cache_shift").items():
        if name in params:
            found[ours] = params[name]
    if params["alg"] == "confidence_threshold":
        # With a cache the steps mean nothing.
        return (
            found | dict(select="threshold", threshold=params["threshold"]) | ({} if cache == "none" else dict(steps=0))
        )
    return found | dict(schedule="linear_t", score=DREAM_SCORES[params["alg"]], eps=params.get("eps", 1e-3))


def dkv_llada_settings(params: dict[str, Any]) -> dict[str, Any]:
    found = dict(cache=f"dkv_{params['cache']}", cache_steps=params["cache_steps"])
    if params["cache"] == "greedy":
        order = tuple(offset for block in params["unmask_order"] for offset in block)
        found |= dict(cache_window=params["window"], score="given", order=order)
    return found


def decode(
    params: dict, model: ModelConfig, cases: Sequence[Case], batch: int = 16, mesh: Mesh | None = None
) -> Iterator[tuple[Case, Generation]]:
    """Answers to cases, those with the same programs in batches together."""
    groups = collections.defaultdict(list)
    for case in cases:
        groups[str(case.config.static)].append(case)
    for group in groups.values():
        longest = max(len(case.prompt) for case in group)
        engine = Engine(params, model, group[0].config, min(batch, len(group)), max_prompt_length=longest, mesh=mesh)
        waiting = list(enumerate(group))[::-1]
        while waiting or engine.busy:
            while waiting and engine.add(_request(*waiting[-1])) is not None:
                waiting.pop()
            for answer in engine.step(2**30):
                yield group[answer.index], answer


def _request(index: int, case: Case) -> Prompt:
    return Prompt(case.prompt, case.config, index, limit=case.limit, stop_ids=case.stop_ids)


def found(case: Case, answer: Generation) -> dict[str, Any]:
    """Of an answer, what `Case.wanted` has."""
    at = dict(zip(answer.order, zip(answer.committed, answer.rounds)))
    values = {
        "response": answer.tokens if isinstance(case.config, PlanAndInfillConfig) else [at[i][0] for i in sorted(at)],
        "commit_order": [len(case.prompt) + offset for offset in answer.order],
        "order": [at[i][1] for i in sorted(at)],
        "forwards": answer.forwards,
        "tokens_forwarded": answer.tokens_forwarded,
    }
    return {name: values[name] for name in case.wanted}


def mismatches(case: Case, answer: Generation, where: str) -> list[str]:
    """A line for everything that differs."""
    ours = found(case, answer)
    return [
        f"{where} line {case.number}, {name}: {ours[name]}, reference {theirs}"
        for name, theirs in case.wanted.items()
        if ours[name] != theirs
    ]
