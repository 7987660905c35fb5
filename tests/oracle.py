"""Plan-and-infill decoding as a plain Python loop, straight from the method: no cache, no batch, no JAX.

`decode` takes any forward function `probs(tokens, positions, mask) -> [length, vocab]`. The whole sequence, committed
tokens and window, is forwarded every time; the mask keeps what each committed token saw when it was committed, because
the slots of a completion do not see one another. `numpy_qwen3` is such a forward function in float64.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np

Forward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass
class Decoded:
    """What a decoding did. `tokens`: by position, cut after the first EOS; the rest in commit order."""

    tokens: list[int]
    commit_order: list[int]  # positions
    commit_tokens: list[int]
    rounds: list[int]  # which plan led to the commit
    forwards: int
    tokens_forwarded: int
    paths: Counter  # how often each branch of the algorithm was taken
    margin: float  # distance of the closest decision to going the other way (relative)


class Context:
    """Committed tokens with what each of them sees, and the forward pass of a window on top of them."""

    def __init__(self, probs: Forward, prompt: list[int], positions: list[int], banned: list[int]):
        self.probs, self.banned = probs, banned
        self.tokens = np.array(prompt)
        self.positions = np.array(positions)
        self.mask = np.tril(np.ones((len(prompt), len(prompt)), bool))
        self.forwards = self.tokens_forwarded = 0
        self.margin = np.inf

    def extended(self, tokens, positions, window_mask):
        n, w = len(self.tokens), len(tokens)
        mask = np.zeros((n + w, n + w), bool)
        mask[:n, :n] = self.mask
        mask[n:, :n] = True
        mask[n:, n:] = window_mask
        return np.concatenate([self.tokens, tokens]), np.concatenate([self.positions, positions]), mask

    def forward(self, tokens, positions, window_mask=None) -> np.ndarray:
        """Probabilities [window, vocab] of a window whose tokens see all committed tokens and, inside,
        `window_mask`.
        """
        w = len(tokens)
        window_mask = np.tril(np.ones((w, w), bool)) if window_mask is None else window_mask
        self.forwards += 1
        self.tokens_forwarded += w
        probs = self.probs(*self.extended(np.asarray(tokens), np.asarray(positions), window_mask))[-w:].copy()
        probs[:, self.banned] = 0
        return probs / probs.sum(-1, keepdims=True)

    def commit(self, tokens, positions, window_mask):
        self.tokens, self.positions, self.mask = self.extended(tokens, positions, window_mask)

    def above(self, value: float, threshold: float) -> bool:
        self.margin = min(self.margin, abs(value - threshold))
        return value > threshold

    def argmax(self, probs: np.ndarray) -> np.ndarray:
        top = np.sort(probs, axis=-1)[:, -2:]
        self.margin = min(self.margin, ((top[:, 1] - top[:, 0]) / top[:, 1]).min())
        return probs.argmax(-1)


def decode(
    probs: Forward,
    prompt: list[int],
    *,
    gen_length: int,
    slot_size: int,
    blocks: int,
    slot_threshold: float,
    token_threshold: float,
    mask_id: int,
    eos_id: int,
    banned: list[int] = (),
    positions: list[int] | None = None,
    holes: list[tuple[int, int]] | None = None,
) -> Decoded:
    """Section 4 of the method at temperature 0. `banned` ids enter no softmax and no argmax.

    With holes (position, tokens) the prompt is what is given of a text, its tokens at `positions`; a hole that has got
    its EOS is left alone from there on.
    """
    k = slot_size
    slots = -(-gen_length // k)
    assert slots % blocks == 0
    start = len(prompt)
    context = Context(probs, prompt, positions or list(range(start)), list(banned))
    holes = holes or [(start, slots * k)]
    begins = [position + i for position, size in holes for i in range(0, size, k)]
    hole_of = [hole for hole, (_, size) in enumerate(holes) for _ in range(0, size, k)]
    paths, rounds, closed = Counter(), [], set()

    def places(chosen):
        return np.concatenate([begins[s] + np.arange(k) for s in chosen])

    def close(last):
        closed.update(s for s in range(last, len(begins)) if hole_of[s] == hole_of[last])

    def commit(tokens, positions, mask, path):
        paths[path] += 1
        rounds.extend([round_index] * len(tokens))
        context.commit(np.asarray(tokens), np.asarray(positions), mask)

    round_index = -1
    for block in range(blocks):
        numbers = range(block * slots // blocks, (block + 1) * slots // blocks)
        remaining = [s for s in numbers if s < len(begins) and s not in closed]
        while remaining:
            round_index += 1
            # Plan.
            p = context.forward(np.full(len(remaining) * k, mask_id), places(remaining))
            drafts = context.argmax(p).reshape(-1, k)
            scores = p.max(-1).reshape(-1, k)[:, 0]
            picked = [i for i in range(len(remaining)) if context.above(scores[i], slot_threshold)]
            if not picked:
                paths["single best"] += 1
                picked = [int(context.argmax(scores[None])[0])] if len(scores) > 1 else [0]
            chosen, drafts = [remaining[i] for i in picked], drafts[picked]
            # Verify.
            flat = drafts.reshape(-1)
            p = context.forward(flat, places(chosen))
            accepted = np.array(
                [i % k == 0 or context.above(p[i - 1, flat[i]], token_threshold) for i in range(len(flat))]
            )
            n = leading(accepted)
            eos = [i for i in range(n) if flat[i] == eos_id]
            if eos or n >= k:
                n = eos[0] + 1 if eos else n // k * k
                if eos:
                    paths["eos verified, earlier slots open"] += remaining[0] < chosen[eos[0] // k]
                    close(chosen[eos[0] // k])
                remaining = [s for s in remaining if s not in chosen[: -(-n // k)] and s not in closed]
                commit(
                    flat[:n], places(chosen)[:n], np.tril(np.ones((n, n), bool)), "eos verified" if eos else "verified"
                )
                continue
            # Complete.
            paths["completed"] += 1
            filled = drafts.copy()
            prefix = [leading(a) for a in accepted.reshape(-1, k)]
            while True:
                alive, open_ = still_open(filled, prefix, eos_id)
                if not open_:
                    break
                where = places([chosen[i] for i in alive])
                diagonal = np.kron(np.eye(len(alive)), np.tril(np.ones((k, k)))).astype(bool)
                for i in alive:
                    filled[i, prefix[i] :] = mask_id
                p = context.forward(filled[alive].reshape(-1), where, diagonal).reshape(len(alive), k, -1)
                for i in open_:
                    filled[i, prefix[i] :] = context.argmax(p[i, prefix[i] :])
                p = context.forward(filled[alive].reshape(-1), where, diagonal).reshape(len(alive), k, -1)
                for i in open_:
                    prefix[i] = leading(
                        np.array(
                            [
                                j <= prefix[i] or context.above(p[i, j - 1, filled[i, j]], token_threshold)
                                for j in range(k)
                            ]
                        )
                    )
            flat = filled[alive].reshape(-1)
            n = len(flat)
            if eos_id in flat:
                n = list(flat).index(eos_id) + 1
                last = chosen[alive[-1]]
                close(last)
                paths["eos completed"] += 1
                paths["eos completed, earlier slots open"] += any(s < last and s not in chosen for s in remaining)
            commit(flat[:n], where[:n], diagonal[:n, :n], "completion")
            remaining = [s for s in remaining if s not in [chosen[i] for i in alive] and s not in closed]

    response = dict(zip(context.positions[start:].tolist(), context.tokens[start:].tolist()))
    tokens = [response[p] for p in sorted(response)]
    if eos_id in tokens:
        tokens = tokens[: tokens.index(eos_id) + 1]
    return Decoded(
        tokens=tokens,
        commit_order=context.positions[start:].tolist(),
        commit_tokens=context.tokens[start:].tolist(),
        rounds=rounds,
        forwards=context.forwards,
        tokens_forwarded=context.tokens_forwarded,
        paths=paths,
        margin=context.margin,
    )


def leading(accepted: np.ndarray) -> int:
    """Length of the leading run of True."""
    return len(accepted) if accepted.all() else int(accepted.argmin())


def still_open(filled: np.ndarray, prefix: list[int], eos_id: int) -> tuple[list[int], list[int]]:
    """Slots of a completion that are not discarded, and among them those not full: an accepted EOS makes a slot
    final.
    """
    k = filled.shape[1]
    for i in range(len(filled)):
        if eos_id in filled[i, : prefix[i]]:
            return list(range(i + 1)), [j for j in range(i) if prefix[j] < k]
    return list(range(len(filled))), [j for j in range(len(filled)) if prefix[j] < k]


def numpy_qwen3(params: dict, *, rope_theta: float, eps: float = 1e-6, logical_vocab: int | None = None) -> Forward:
    """Qwen3 in numpy float64 on the project's parameter tree, dense mask [length, length] (query, key)."""
    params = {k: v for k, v in flat_items(params)}

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale

    def rope(x, positions):  # [length, heads, head_dim], the two halves are the real and imaginary parts
        half = x.shape[-1] // 2
        angle = positions[:, None] * rope_theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def forward(tokens, positions, mask):
        x = params["embed/embedding"][tokens]
        for layer in range(len(params["layers/attention_norm/scale"])):
            w = {k[7:]: v[layer] for k, v in params.items() if k.startswith("layers/")}
            h = norm(x, w["attention_norm/scale"])
            q = rope(norm(np.einsum("td,dnh->tnh", h, w["attention/query"]), w["attention/query_norm"]), positions)
            key = rope(norm(np.einsum("td,dnh->tnh", h, w["attention/key"]), w["attention/key_norm"]), positions)
            value = np.einsum("td,dnh->tnh", h, w["attention/value"])
            group = q.shape[1] // key.shape[1]
            scores = np.einsum("tnh,snh->nts", q, key.repeat(group, 1)) / np.sqrt(q.shape[-1])
            weights = softmax(np.where(mask, scores, -np.inf))
            x = x + np.einsum("nts,snh,nhd->td", weights, value.repeat(group, 1), w["attention/output"], optimize=True)
            h = norm(x, w["mlp_norm/scale"])
            gate, up = h @ w["mlp/gate"], h @ w["mlp/up"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp/down"]
        table = params.get("head/embedding", params["embed/embedding"])
        return softmax((norm(x, params["final_norm/scale"]) @ table.T)[:, :logical_vocab])

    return forward


def flat_items(tree: dict, prefix: str = ""):
    """("a/b/c", float64 array) pairs of a nested dict of arrays."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value, np.float64)
