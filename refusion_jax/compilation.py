"""Compiled programs are kept on disk: a command that starts again, with the same sizes, compiles nothing.

They lie in ~/.cache/refusion_jax/programs (under XDG_CACHE_HOME where that is set) and may be deleted at any time. The
environment decides otherwise: JAX_COMPILATION_CACHE_DIR names another folder (of several hosts, one that all of them
see), JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

import os
import pathlib
import sys

import jax

HELP = (
    "Compiled programs are kept in ~/.cache/refusion_jax/programs; JAX_COMPILATION_CACHE_DIR names another folder,\n"
    "JAX_ENABLE_COMPILATION_CACHE=false keeps none."
)


def keep_programs() -> None:
    """Makes JAX keep what it compiles from now on; commands that compile call this first.

    A folder that cannot be written is said on stderr and costs nothing else.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "refusion_jax" / "programs"
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not permitted")
    except (OSError, RuntimeError) as error:  # a RuntimeError: there is no home
        print(f"compiled programs are not kept: cannot write {folder} ({error})", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
