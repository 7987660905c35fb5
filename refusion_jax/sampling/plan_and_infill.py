"""Plan-and-infill decoding (method section 4) as one step for a batch of rows, each in its own phase.

Letters: n slots of a block, k tokens of a slot, c chunks of a window, W = c * k tokens of a window, B rows.

A *chunk* is a slot with its first `cut` tokens known and masks behind them. Every phase forwards chunks on top of the cache:

    plan       every remaining slot, cut 0; each chunk sees the chunks before it
    verify     every chosen slot's draft, cut k; each sees the chunks before it
    complete   every chosen slot, cut k (verify) or its accepted prefix (predict); each sees only itself

These are the *main* chunks, and what is committed is always a prefix of them. Behind them the window has room for chunks that
*may* be needed next (speculation); they change nothing but the number of forwards:

    plan       the next plan, right if every main token up to the first EOS is committed; sees those tokens
    guess      a chosen slot cut where its draft may be rejected: the predict forward that would follow. When it predicts what was
               verified already, that verify is known too, and completion goes on to the next rejected token at once.

The functions below are written for one row and vmapped; only the forward pass and the reduction see the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.attention import Appended
from refusion_jax.model.cache import KVCache
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.sampling.config import Settings
from refusion_jax.sampling.reduction import Reduced, reduce_logits
from refusion_jax.sampling.state import State

PLAN, VERIFY, COMPLETE, DONE = range(4)
MAIN, NEXT_PLAN, GUESS = range(3)


@struct.dataclass
class Row:
    """Where the decoding of a prompt stands. Slots are numbered within the block."""

    phase: jax.Array
    prompt_length: jax.Array
    block: jax.Array
    round: jax.Array  # plans used so far
    ended: jax.Array  # bool: an EOS has been committed
    remaining: jax.Array  # [n] bool: slots of the block that are not committed
    chosen: jax.Array  # [n] bool: slots of this round
    fill: jax.Array  # [n, k] ids: drafts, then what completion makes of them
    confidence: jax.Array  # [n, k] of `fill`; only speculation looks at it
    prefix: jax.Array  # [n] accepted tokens of each chosen slot
    predicting: jax.Array  # [n] bool: the tokens behind the prefix are to be predicted next
    key: jax.Array  # stream of this prompt
    # The log: committed tokens in commit order.
    count: jax.Array
    tokens: jax.Array  # [length]
    offsets: jax.Array  # [length] position in the response
    rounds: jax.Array  # [length]
    forwards: jax.Array
    tokens_forwarded: jax.Array

    @property
    def done(self) -> jax.Array:
        return self.phase == DONE


@struct.dataclass
class Window:
    """What a row forwards next, and where in it things are."""

    tokens: jax.Array  # [W]
    positions: jax.Array  # [W]
    mask: jax.Array  # [W, W] bool (query, key)
    next_tokens: jax.Array  # [W]
    keys: jax.Array  # [W] PRNG keys of the drafts of the next plan
    used: jax.Array  # chunks that are not padding
    main_at: jax.Array  # [n] chunk of each slot; c where there is none
    plan_at: jax.Array  # [n]
    guess_at: jax.Array  # [n, k] chunk of each slot and cut
    main_end: jax.Array  # main tokens up to the first EOS: what the next plan sees
    next_block: jax.Array  # bool: the carried plan is that of the next block


@dataclasses.dataclass(frozen=True)
class PlanAndInfill:
    """The static part of a decoding; two equal ones share their compiled programs.

    Attributes:
      slots: n, slots of a block.
      chunks: c, chunks of a window, at least n.
      carry_plan, carry_guesses: which speculative chunks may fill the window.
    """

    model: ModelConfig
    slots: int
    slot_size: int
    blocks: int
    chunks: int
    carry_plan: bool = False
    carry_guesses: bool = False

    @property
    def length(self) -> int:
        """Tokens of a whole response."""
        return self.slots * self.slot_size * self.blocks

    @property
    def window(self) -> int:
        return self.chunks * self.slot_size

    def empty(self, batch: int, cache_length: int) -> State:
        """A batch of finished rows; `cache_length` must hold prompt, response and window."""
        n, k = self.slots, self.slot_size
        of = lambda shape, value, dtype=jnp.int32: jnp.full((batch, *shape), value, dtype)
        rows = Row(
            phase=of((), DONE),
            prompt_length=of((), 0),
            block=of((), 0),
            round=of((), 0),
            ended=of((), False, bool),
            remaining=of((n,), True, bool),
            chosen=of((n,), False, bool),
            fill=of((n, k), 0),
            confidence=of((n, k), 0, jnp.float32),
            prefix=of((n,), 0),
            predicting=of((n,), False, bool),
            key=jax.vmap(jax.random.key)(jnp.zeros(batch, jnp.uint32)),
            count=of((), 0),
            tokens=of((self.length,), 0),
            offsets=of((self.length,), 0),
            rounds=of((self.length,), 0),
            forwards=of((), 0),
            tokens_forwarded=of((), 0),
        )
        return State(cache=KVCache.empty(self.model, batch, cache_length), rows=rows)

    def prefill(
        self,
        params: dict,
        state: State,
        settings: Settings,
        rows: jax.Array,
        prompts: jax.Array,
        lengths: jax.Array,
        keys: jax.Array,
    ) -> State:
        """Puts new prompts into rows of the batch; the forward over the prompts carries their first plan.

        Args:
          rows: [R] rows to fill; one that is past the batch is padding.
          prompts: [R, P] ids, padded at the end.
          lengths: [R].
          keys: [R] PRNG keys.
        """
        count, padded = prompts.shape
        fresh = self.empty(count, padded + self.window)
        fresh = fresh.replace(
            rows=fresh.rows.replace(
                phase=jnp.full(count, PLAN), prompt_length=lengths, key=keys, tokens_forwarded=lengths
            )
        )
        window = jax.vmap(self.layout, (0, None))(fresh.rows, settings)
        tokens = jnp.concatenate([prompts, window.tokens], axis=1)
        positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(padded), prompts.shape), window.positions], axis=1)
        mask = jnp.broadcast_to(
            jnp.tri(padded + self.window, dtype=bool), (count, padded + self.window, padded + self.window)
        )
        in_prompt = jnp.broadcast_to((jnp.arange(padded) < lengths[:, None])[:, None], (count, self.window, padded))
        mask = mask.at[:, padded:].set(jnp.concatenate([in_prompt, window.mask], axis=2))
        hidden, cache = self.forward(params, tokens, positions, fresh.cache, mask)
        reduced = reduce_logits(self.model, params, hidden[:, padded:], window.next_tokens, window.keys, settings)
        fresh_rows, _ = jax.vmap(self.advance, (0, 0, 0, None))(fresh.rows, window, reduced, settings)

        return state.insert(State(cache.commit(lengths), fresh_rows), rows, padded)

    def step(self, params: dict, state: State, settings: Settings) -> State:
        """One forward pass of every row's window and what follows from it."""
        window = jax.vmap(self.layout, (0, None))(state.rows, settings)
        hidden, cache = self.forward(params, window.tokens, window.positions, state.cache, window.mask)
        reduced = reduce_logits(self.model, params, hidden, window.next_tokens, window.keys, settings)
        rows, committed = jax.vmap(self.advance, (0, 0, 0, None))(state.rows, window, reduced, settings)
        return State(cache=cache.commit(committed), rows=rows)

    def forward(
        self, params: dict, tokens: jax.Array, positions: jax.Array, cache: KVCache, mask: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        hidden, context = Qwen3(self.model).apply({"params": params}, tokens, positions, Appended(cache, mask))
        return hidden, context.cache

    # ------------------------------------------------------------------ what a row forwards

    def layout(self, row: Row, settings: Settings) -> Window:
        """The window of a row in whatever phase it is."""
        n, k, c = self.slots, self.slot_size, self.chunks
        slot, column = jnp.arange(n), jnp.arange(k)
        planning = row.phase == PLAN

        main = jnp.where(planning, row.remaining, row.chosen) & (row.phase != DONE)
        cut = jnp.where(planning, 0, jnp.where(row.predicting, row.prefix, k))

        # The next plan, if all of main is committed up to its first EOS.
        eos_at = self.first(row.fill == self.model.eos_token_id)
        eos_slot = self.first(main & (eos_at < k))
        main_end = jnp.where(
            eos_slot < n, jnp.sum(main & (slot < eos_slot)) * k + eos_at[eos_slot % n] + 1, jnp.sum(main) * k
        )
        after = row.remaining & ~row.chosen & (slot < eos_slot)
        next_block = ~after.any() & (eos_slot == n) & ~row.ended & (row.block + 1 < self.blocks)
        plan = jnp.where(next_block, True, after) & ~planning & (row.phase != DONE) & ~row.predicting.any()
        plan &= self.carry_plan & (main.sum() + plan.sum() <= c)

        # Guesses: every place a draft may be rejected at, the likely ones (low confidence) first, in the order they are met.
        open_ = (
            row.chosen & ~row.predicting & (row.prefix < k) & (eos_at >= row.prefix) & ~planning & (row.phase != DONE)
        )
        guess = open_[:, None] & (column > row.prefix[:, None]) & self.carry_guesses
        likely = row.confidence <= settings.token_threshold

        # Candidates in order of need: main, next plan, guesses cut by cut, likely ones first. As many as there is room for.
        by_cut = lambda flags: flags.T.reshape(-1)
        wanted = jnp.concatenate([main, plan, by_cut(guess & likely), by_cut(guess & ~likely)])
        candidate_slot = jnp.concatenate([slot, slot, jnp.tile(slot, 2 * k)])
        candidate_cut = jnp.concatenate([cut, jnp.zeros(n, jnp.int32), jnp.tile(jnp.repeat(column, n), 2)])
        at = jnp.where(wanted, jnp.cumsum(wanted) - 1, c)
        candidate = jnp.full(c, 2 * n).at[at].set(jnp.arange(len(wanted)), mode="drop")
        chunk_slot, chunk_cut = candidate_slot[candidate], candidate_cut[candidate]
        role = jnp.where(candidate < n, MAIN, jnp.where(candidate < 2 * n, NEXT_PLAN, GUESS))
        guess_at = jnp.minimum(*at[2 * n :].reshape(2, k, n)).T
        chunk_block = row.block + ((role == NEXT_PLAN) & next_block)

        tokens = jnp.where(column < chunk_cut[:, None], row.fill[chunk_slot], self.model.mask_token_id)
        offsets = ((chunk_block * n + chunk_slot)[:, None] * k + column).reshape(-1)
        draft_key = jax.random.fold_in(row.key, row.round + 1)

        # Every chunk sees itself up to each token; some see what is before them.
        chunk, role = jnp.repeat(jnp.arange(c), k), jnp.repeat(role, k)
        token = jnp.arange(c * k)
        same, before = chunk[:, None] == chunk, chunk[:, None] > chunk
        together = (role[:, None] == MAIN) & (role == MAIN) & (row.phase != COMPLETE)
        planned = (role[:, None] == NEXT_PLAN) & ((role == NEXT_PLAN) | (token < main_end))
        return Window(
            tokens=tokens.reshape(-1),
            positions=row.prompt_length + offsets,
            mask=(same & (token[:, None] >= token)) | (before & (together | planned)),
            next_tokens=jnp.roll(tokens, -1, axis=1).reshape(-1),
            keys=jax.vmap(jax.random.fold_in, (None, 0))(draft_key, offsets),
            used=jnp.minimum(wanted.sum(), c),
            main_at=at[:n],
            plan_at=at[n : 2 * n],
            guess_at=guess_at,
            main_end=main_end,
            next_block=next_block,
        )

    # ------------------------------------------------------------------ what follows from it

    def advance(self, row: Row, window: Window, reduced: Reduced, settings: Settings) -> tuple[Row, jax.Array]:
        """The row after the forward, and how many tokens of the window it committed."""
        n, k, c = self.slots, self.slot_size, self.chunks
        slot, column = jnp.arange(n), jnp.arange(k)
        per_chunk = jax.tree.map(lambda x: x.reshape(c, k), reduced)
        of = lambda at: jax.tree.map(
            lambda x: x.at[at].get(mode="clip"), per_chunk
        )  # absent chunks read another's: never used
        main, guess = of(window.main_at), of(window.guess_at)
        verifying, completing = row.phase == VERIFY, row.phase == COMPLETE

        # -- Acceptance. A slot's first token, and one more than the accepted prefix, are accepted whatever their probability.
        given = jnp.roll(main.next_prob, 1, axis=1)
        rejected = (column > row.prefix[:, None]) & (given <= settings.token_threshold)
        run = self.first(rejected)
        eos_at = self.first(row.fill == self.model.eos_token_id)

        # -- Verify: the leading run of accepted tokens of all drafts together.
        stops = row.chosen & (run < k)
        reached = row.chosen & (jnp.cumsum(stops) <= stops)  # every slot before it is accepted
        eos_slot = self.first(reached & (eos_at < run))
        verified = jnp.where(eos_slot < n, reached & (slot <= eos_slot), reached & (run == k))
        commit_verified = verifying & verified.any()

        # -- Complete. Where a guess predicts again what was verified up to the next rejected token, the verify that would
        #    follow is known: it stops at that token. So a slot stops at the first rejected token whose guess does not do so.
        #    (In a global verify, only the first chosen slot saw what it sees in a completion.)
        upto = self.first((guess.top != row.fill[:, None]) & (column >= column[:, None]))
        following = self.first(rejected[:, None] & (column > column[:, None]))
        known = (window.guess_at < c) & ((upto > following) | (upto == k))
        known &= (completing | (slot == self.first(row.chosen)))[:, None]
        stop = self.first(rejected & ~known)
        here = jnp.minimum(stop, k - 1)[:, None]
        guessed = (jnp.take_along_axis(window.guess_at, here, 1) < c)[:, 0]
        at_stop = lambda x: jnp.take_along_axis(x, here[:, None], axis=1)[:, 0]

        predict = row.predicting & completing
        prefix = jnp.where(predict, row.prefix, stop)
        behind = column >= prefix[:, None]
        fill = jnp.where(behind, jnp.where(predict[:, None], main.top, at_stop(guess.top)), row.fill)
        confidence = jnp.where(
            behind, jnp.where(predict[:, None], main.top_prob, at_stop(guess.top_prob)), row.confidence
        )
        has_eos = row.chosen & (self.first(fill == self.model.eos_token_id) < prefix)
        final = has_eos | (prefix == k)
        predicting = row.chosen & ~predict & ~guessed & ~final
        last = self.first(has_eos)
        alive = row.chosen & (slot <= last)  # what is behind an EOS is discarded
        completed = (completing | (verifying & (alive.sum() == 1))) & (final | ~alive).all() & ~commit_verified

        # -- Commit a prefix of the main chunks.
        commit = commit_verified | completed
        taken = commit & jnp.where(commit_verified, verified, alive)
        eos_slot = jnp.where(commit_verified, eos_slot, last)
        ends = commit & (eos_slot < n)
        count = jnp.sum(taken) * k - jnp.where(ends, k - 1 - eos_at[eos_slot % n], 0)
        remaining = row.remaining & ~taken & ~(ends & (slot >= eos_slot))
        ended = row.ended | ends
        index = jnp.arange(n * k)
        to = jnp.where(index < count, row.count + index, self.length)
        log = lambda old, new: old.at[to].set(new, mode="drop")
        offsets = window.positions[: n * k] - row.prompt_length

        # -- Next phase.
        over = commit & ~remaining.any()
        done = over & (ended | (row.block + 1 == self.blocks))
        block = row.block + (over & ~done)
        remaining = jnp.where(over & ~done, True, remaining)
        carried = commit & (count == window.main_end) & (window.plan_at < c).any() & ~done
        planned = (row.phase == PLAN) | carried
        draft = of(jnp.where(carried, window.plan_at, window.main_at))
        score = jnp.where(remaining, draft.draft_prob[:, 0], -1)
        chosen = score > settings.slot_threshold
        chosen = jnp.where(chosen.any(), chosen, slot == jnp.argmax(score))
        phase = jnp.where(planned, VERIFY, jnp.where(commit, PLAN, COMPLETE))
        phase = jnp.where(done | (row.phase == DONE), DONE, phase)

        return row.replace(
            phase=phase.astype(jnp.int32),
            block=block,
            round=row.round + planned,
            ended=ended,
            remaining=remaining,
            chosen=jnp.where(planned, chosen, alive),
            fill=jnp.where(planned, draft.draft, fill),
            confidence=jnp.where(planned, draft.draft_prob, confidence),
            prefix=jnp.where(planned, 0, prefix),
            predicting=jnp.where(planned, False, predicting),
            count=row.count + count,
            tokens=log(row.tokens, window.tokens[: n * k]),
            offsets=log(row.offsets, offsets),
            rounds=log(row.rounds, row.round - 1),
            forwards=row.forwards + (row.phase != DONE),
            tokens_forwarded=row.tokens_forwarded + window.used * k,
        ), count

    @staticmethod
    def first(flags: jax.Array) -> jax.Array:
        """Index of the first True along the last axis; its length if there is none."""
        size = flags.shape[-1]
        return jnp.min(jnp.where(flags, jnp.arange(size), size), axis=-1)
