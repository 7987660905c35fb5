"""What plan-and-infill keeps of a row, forwards of it, and decides about it (letters as in plan_and_infill.py)."""

import jax
from flax import struct

from refusion_jax.sampling.reduction import Query
from refusion_jax.sampling.state import BaseRow


@struct.dataclass
class Row(BaseRow):
    """Where the decoding of a prompt stands. Slots are numbered within the block."""

    positions: jax.Array  # [slots of the answer * k] in the text, of every place of the canvas
    holes: jax.Array  # [slots of the answer] number of the hole that a slot lies in; a plain answer is one
    phase: jax.Array
    block: jax.Array
    round: jax.Array  # plans used so far
    closed: jax.Array  # [slots of the answer] bool: a stop id in or before it has ended its hole
    remaining: jax.Array  # [n] bool: slots of the block that are not committed
    chosen: jax.Array  # [n] bool: slots of this round
    fill: jax.Array  # [n, k] ids: drafts, then what completion makes of them
    confidence: jax.Array  # [n, k] of `fill`; only speculation looks at it
    prefix: jax.Array  # [n] accepted tokens of each chosen slot
    predicting: jax.Array  # [n] bool: the tokens behind the prefix are to be predicted next


@struct.dataclass
class Window:
    """What a row forwards next, and where in it things are; c stands for "nowhere"."""

    tokens: jax.Array  # [W]
    offsets: jax.Array  # [W] place of each token on the canvas
    positions: jax.Array  # [W]
    mask: jax.Array  # [W, W] bool (query, key)
    used: jax.Array  # tokens that are not padding
    query: Query
    main_at: jax.Array  # [n] chunk of each slot
    plan_at: jax.Array  # [n] chunk of each slot of the next plan
    guess_at: jax.Array  # [n, k] chunk of each slot and cut
    main_end: jax.Array  # main tokens up to the first stop id: what the next plan sees


@struct.dataclass
class Outcome:
    """What a forward decides: the slots it commits, or how the chosen ones go on."""

    taken: jax.Array  # [n] bool: slots to commit; none: the round goes on
    stop_slot: jax.Array  # the committed slot with the first stop id; n: none
    chosen: jax.Array  # [n] bool: slots still in this round
    fill: jax.Array  # [n, k]
    confidence: jax.Array  # [n, k]
    prefix: jax.Array  # [n]
    predicting: jax.Array  # [n] bool
