"""Sources that a library supplies: TFDS data sets and procedural tasks."""

import functools
import hashlib
import importlib.metadata
import os

from refusion_jax.data import tasks
from refusion_jax.data.examples import Source
from refusion_jax.errors import UserError


class TfdsSource(Source):
    """A TFDS data set by name (prepared on first use) or by a prepared one's folder.

    The option `data_dir` says where sets are kept.
    """

    options = ("data_dir",)

    @functools.cached_property
    def _builder(self):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"data source {self.name!r} needs the tensorflow-datasets library ({error}). Install it: "
                "pip install tensorflow-datasets."
            ) from error
        path = os.path.expanduser(self.config.path)
        if os.path.isdir(path):
            if not os.path.exists(os.path.join(path, "dataset_info.json")):
                raise UserError(
                    f"the folder {self.config.path!r} is not a prepared TFDS data set (no dataset_info.json). Give "
                    "the folder of a version, such as 'DIR/my_dataset/1.0.0', or a data set's name with the option "
                    "data_dir."
                )
            return tfds.builder_from_directory(path)
        try:
            builder = tfds.builder(self.config.path, file_format="array_record", **dict(self.config.options))
            builder.download_and_prepare()
            return builder
        except Exception as error:  # an unknown name, no network, a missing optional package
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the TFDS data set {self.config.path!r} could not be found or prepared: {reason}. Give a known name "
                "with network access, or the folder of a prepared data set."
            ) from error

    def _content_key(self, notes):
        info, split = self._builder.info, self._split()
        files = [(os.path.basename(f), os.path.getsize(f), _ends_of(f)) for f in split.filepaths]
        return info.full_name, self.config.split, split.num_examples, files

    def _split(self):
        splits = self._builder.info.splits
        if self.config.split not in splits:
            raise UserError(
                f"data source {self.name!r} has no split {self.config.split!r}; it has {', '.join(splits) or 'none'}. "
                "Set the source's split to one of them."
            )
        return splits[self.config.split]

    @functools.cached_property
    def _records(self):
        self._split()
        return self._builder.as_data_source(split=self.config.split)


def _ends_of(path: str) -> str:
    """Hash of a file's first and last 64 kB: a prepared set can be terabytes, and is written once."""
    with open(path, "rb") as file:
        first = file.read(1 << 16)
        file.seek(max(os.path.getsize(path) - (1 << 16), 0))
        return hashlib.blake2b(first + file.read(), digest_size=16).hexdigest()


class ProceduralSource(Source):
    """A reasoning-gym task (see `tasks.Task`)."""

    options = None

    @functools.cached_property
    def _records(self):
        return tasks.Task(self.config.path, self.config.size, self.config.seed, dict(self.config.options))

    def _content_key(self, notes):
        version = importlib.metadata.version("reasoning-gym") if self._records else ""
        return self.config.path, self.config.size, self.config.seed, sorted(self.config.options), version

    def __getitem__(self, i):
        return self._records[i]

    def score(self, i, generated):
        return self._records.score(i, generated)
