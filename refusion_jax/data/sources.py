"""The kinds of sources by their names in a config."""

from refusion_jax.config import SourceConfig
from refusion_jax.data import files, libraries
from refusion_jax.data.examples import Source

_KINDS = {
    "json": files.JsonSource,
    "jsonl": files.JsonLinesSource,
    "text": files.TextSource,
    "parquet": files.ParquetSource,
    "array_record": files.ArrayRecordSource,
    "tfds": libraries.TfdsSource,
    "procedural": libraries.ProceduralSource,
}


def open_source(config: SourceConfig) -> Source:
    """Opens a source.

    Raises:
      UserError: here or on first use: an option that this kind does not know, missing or damaged files, malformed
        records (with file and line or record), missing fields, an empty response.
    """
    return _KINDS[config.kind](config)
