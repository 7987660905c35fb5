"""Qwen3 weights in Hugging Face layout: one table says which tensor is which parameter.

Parameters are stacked over layers here ([layers, ...]) and one tensor per layer there. Everything is read in slices:
no function of this file holds more of a model than it was asked for.
"""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from refusion_jax import storage
from refusion_jax.checkpoint import safetensors
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig, from_huggingface
from refusion_jax.parallel import sharding

READ_BYTES = 64 << 20

# Tensor there ({}: layer), parameter here, axes there -> axes here. Letters written together are one axis there.
# V vocabulary, D hidden, N query heads, K key/value heads, H head_dim, F mlp.
_TABLE = (
    ("model.embed_tokens.weight", "embed/embedding", "V D -> V D"),
    ("model.layers.{}.input_layernorm.weight", "layers/attention_norm/scale", "D -> D"),
    ("model.layers.{}.self_attn.q_proj.weight", "layers/attention/query", "NH D -> D N H"),
    ("model.layers.{}.self_attn.k_proj.weight", "layers/attention/key", "KH D -> D K H"),
    ("model.layers.{}.self_attn.v_proj.weight", "layers/attention/value", "KH D -> D K H"),
    ("model.layers.{}.self_attn.o_proj.weight", "layers/attention/output", "D NH -> N H D"),
    ("model.layers.{}.self_attn.q_norm.weight", "layers/attention/query_norm", "H -> H"),
    ("model.layers.{}.self_attn.k_norm.weight", "layers/attention/key_norm", "H -> H"),
    ("model.layers.{}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
    ("model.layers.{}.mlp.gate_proj.weight", "layers/mlp/gate", "F D -> D F"),
    ("model.layers.{}.mlp.up_proj.weight", "layers/mlp/up", "F D -> D F"),
    ("model.layers.{}.mlp.down_proj.weight", "layers/mlp/down", "D F -> F D"),
    ("model.norm.weight", "final_norm/scale", "D -> D"),
    ("lm_head.weight", "head/embedding", "V D -> V D"),
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table for a model of known sizes.

    Attributes:
      path: of the parameter, as in "layers/mlp/gate".
      names: of its tensors: one for each layer, or the only one.
      stacked: whether the parameter has a leading axis of layers.
      shape, tensor_shape: of the (stacked) parameter and of one tensor.
      inputs: axes of the parameter that a projection sums over: for each row of a tensor there is one output channel.
        Of a table the hidden axis; of a norm's scale none.
    """

    path: str
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    inputs: tuple[int, ...]
    _split: tuple[int, ...]  # shape of a tensor with its merged axes apart
    _permutation: tuple[int, ...]

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """One tensor as the parameter (of one layer): a view."""
        return tensor.reshape(self._split).transpose(self._permutation)

    def to_tensor(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `from_tensor`."""
        return value.transpose(np.argsort(self._permutation)).reshape(self.tensor_shape)


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The table for a model: path -> Parameter. A tied head has no entry of its own."""
    size = {"V": config.vocab_size, "D": config.hidden_size, "N": config.num_heads}
    size |= {"K": config.num_kv_heads, "H": config.head_dim, "F": config.intermediate_size}
    result = {}
    for name, path, axes in _TABLE:
        if path == "head/embedding" and config.tie_embeddings:
            continue
        there, here = (side.split() for side in axes.split("->"))
        letters = "".join(there)
        stacked = "{}" in name
        result[path] = Parameter(
            path=path,
            names=tuple(name.format(i) for i in range(config.num_layers)) if stacked else (name,),
            stacked=stacked,
            shape=(config.num_layers,) * stacked + tuple(size[letter] for letter in here),
            tensor_shape=tuple(int(np.prod([size[letter] for letter in axis])) for axis in there),
            inputs=tuple(stacked + here.index(letter) for axis in there[1:] for letter in axis),
            _split=tuple(size[letter] for letter in letters),
            _permutation=tuple(letters.index(letter) for letter in here),
        )
    return result


def in_file_order(config: ModelConfig) -> list[tuple[str, Parameter]]:
    """(tensor, its parameter), layer by layer, as files written by others have them."""
    table = list(parameters(config).values())
    layers = [(p.names[i], p) for i in range(config.num_layers) for p in table if p.stacked]
    return [(table[0].names[0], table[0]), *layers, *((p.names[0], p) for p in table[1:] if not p.stacked)]


def resolve(source: str | pathlib.Path) -> pathlib.Path:
    """The folder of `source`: a folder, or a name on the Hugging Face hub, which is downloaded (once).

    Raises:
      UserError: no such folder, or the name cannot be downloaded.
    """
    folder = storage.as_path(source)
    if folder.is_dir():
        return folder if not storage.is_local(folder) else pathlib.Path(folder)
    if not storage.is_local(folder):
        raise UserError(f"There is no folder {str(source)!r}, or the environment's credentials may not read it.")
    if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1 or folder.exists():
        raise UserError(
            f"There is no folder {str(source)!r}. Give a checkpoint's folder, or a name on the Hugging Face hub such "
            "as Qwen/Qwen3-0.6B."
        )
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"There is no folder {str(source)!r}, and downloading it needs the huggingface_hub library: pip install "
            "'refusion_jax[hf]'."
        ) from None
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                str(source), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:  # the hub's own kinds, the network library's, or OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"There is no folder {str(source)!r}, and as a name on the Hugging Face hub it could not be downloaded: "
            f"{reason}. Check the name and the network, or give a folder with the downloaded files."
        ) from None


class Weights:
    """The weights of a Hugging Face folder as parameters, read slice by slice.

    Attributes:
      config: from its config.json.
      parameters: path -> Parameter.
      tensors: name -> safetensors.Tensor.
      bytes_read: bytes of all the slices read so far.

    Raises:
      UserError: another architecture; or one list of everything wrong with the files: unreadable, unknown, missing,
        duplicate and misshapen tensors.
    """

    def __init__(self, folder: pathlib.Path):
        if not (folder / "config.json").exists():
            raise UserError(
                f"{folder} has no config.json: it is no Hugging Face checkpoint. Give a folder with config.json and "
                "safetensors files."
            )
        self.config = from_huggingface(folder / "config.json")
        self.parameters = parameters(self.config)
        self.tensors, problems = safetensors.read_folder(folder)
        expected = {name: p.tensor_shape for p in self.parameters.values() for name in p.names}
        if self.config.tie_embeddings and "lm_head.weight" in self.tensors:
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]  # a tied head may be stored once more
        damaged = bool(problems)
        problems += [
            f"unknown tensor {name} {list(self.tensors[name].shape)}" for name in self.tensors if name not in expected
        ]
        for name, shape in expected.items():
            if name in self.tensors and self.tensors[name].shape != shape:
                problems.append(f"{name} is {list(self.tensors[name].shape)}, config.json makes it {list(shape)}")
            elif name not in self.tensors and not damaged:  # what a missing file held is no second finding
                problems.append(f"missing tensor {name} {list(shape)}")
        if problems:
            raise UserError(
                f"The weights in {folder} cannot be read, {safetensors.listed(problems)} Download or export the "
                "folder again, or correct its config.json."
            )
        self.bytes_read = 0

    def dtype(self, path: str) -> np.dtype:
        """The type that holds all the parameter's tensors exactly."""
        dtypes = {self.tensors[name].dtype for name in self.parameters[path].names}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def step(self, path: str) -> int:
        """Entries of the first axis that are best read together: a layer, or some megabytes of a table."""
        shape = self.parameters[path].shape
        return max(1, READ_BYTES // (math.prod(shape[1:]) * self.dtype(path).itemsize))

    def check_tied_head(self) -> None:
        """Raises a UserError when a tied head is stored beside the embedding and differs from it."""
        head, embedding = self.tensors.get("lm_head.weight"), self.tensors["model.embed_tokens.weight"]
        if not self.config.tie_embeddings or head is None:
            return
        step = self.step("embed/embedding")
        for start in range(0, self.config.vocab_size, step):
            rows = slice(start, start + step)
            if not np.array_equal(head.open(rows), embedding.open(rows)):
                raise UserError(
                    f"{head.file} has an lm_head.weight that differs from the embedding, but config.json says "
                    "tie_word_embeddings = true. Set it to false there if the head is a table of its own, or remove "
                    "the tensor."
                )

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """The parameter at `index`, one slice for each axis.

        Only those bytes are read; from a bucket whole rows of a table, and whole tensors of layers, one at a time.
        """
        parameter = self.parameters[path]
        shape = [len(range(*part.indices(size))) for part, size in zip(index, parameter.shape)]
        out = np.empty(shape, self.dtype(path))
        if not parameter.stacked:
            tensor = self.tensors[parameter.names[0]]  # whose axes are the parameter's
            out[:] = tensor.open(index[0])[(slice(None), *index[1:])]
            self.bytes_read += out.nbytes
            return out
        for i, name in enumerate(parameter.names[index[0]]):
            tensor = self.tensors[name]
            out[i] = parameter.from_tensor(tensor.open())[index[1:]]
            self.bytes_read += out[i].size * tensor.dtype.itemsize
        return out


def load_params(weights: Weights, config: ModelConfig, mesh: Mesh, rules: sharding.Rules, dtype: str) -> dict:
    """Sharded parameters; each process reads the bytes of its own shards, a parameter at a time.

    Args:
      config: what the caller runs; must agree with `weights.config` in its architecture.
      dtype: of the parameters.
    """
    shardings = traverse_util.flatten_dict(sharding.param_shardings(config, mesh, rules), sep="/")
    target = jnp.dtype(dtype)
    params = {}
    for path, parameter in weights.parameters.items():
        seen: dict[Any, np.ndarray] = {}  # replicas ask for the same slice once for each device

        def read(index):
            key = tuple(s.indices(n) for s, n in zip(index, parameter.shape))
            if key not in seen:
                seen[key] = weights.read(path, index).astype(target, copy=False)
            return seen[key]

        params[path] = jax.make_array_from_callback(parameter.shape, shardings[path], read, dtype=target)
        params[path].block_until_ready()
    return traverse_util.unflatten_dict(params, sep="/")
