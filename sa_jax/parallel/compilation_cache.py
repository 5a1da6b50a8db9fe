"""JAX's persistent compilation cache, on by default: a step of a known shape is compiled once.

Each user has one folder, `~/.cache/sa_jax/jax` (or under XDG_CACHE_HOME), with a folder for each
platform in it. The environment variable SA_JAX_COMPILATION_CACHE names another folder, or turns the
cache off (`off`). If JAX itself was given a folder (JAX_COMPILATION_CACHE_DIR), that one is used.
"""

import contextlib
import os
import re
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from sa_jax.buckets import in_bucket
from sa_jax.parallel.xla_flags import is_deterministic

VARIABLE = "SA_JAX_COMPILATION_CACHE"
OFF = "off"


def enable(env: Mapping[str, str] = os.environ) -> None:
    """Turns the cache on for this process; starts the devices. A folder that cannot be written is
    no error: the process then compiles as if there were no cache. All processes must call it."""
    setting, problem = env.get(VARIABLE, ""), ""
    backend = jax.devices()[0].platform
    given = "" if setting else jax.config.values["jax_compilation_cache_dir"] or ""
    folder = "" if setting == OFF else given or str(cache_folder(env, backend))
    if folder and not given:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            folder, problem = "", f"{folder}: {error.strerror or error}"
    if backend == "gpu" and jax.process_count() > 1 and not _all_find_the_same(folder):
        if folder:
            problem = f"not all processes share {folder}, or not all nodes are alike"
        folder = ""
    if problem:
        logging.warning("no compilation cache: %s", problem)
    if is_deterministic():
        # Else XLA would take the kernels that earlier runs found the fastest: they are kept beside
        # the programs, whatever the flags of those runs were.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if not folder:
        jax.config.update("jax_enable_compilation_cache", False)
    elif not given:
        jax.config.update("jax_compilation_cache_dir", folder)
        # Also small steps, and those of a second: on CPU the many small programs take the time.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _all_find_the_same(folder: str) -> bool:
    """Whether all processes find the same programs in the folder ('': none); all must call it.

    Only process 0 writes to the cache. XLA's processes divide among them the kernels that they time
    on GPUs, and exchange what they found. So where process 0 alone has a program, and does not
    compile it, the others would wait for its part for a day. JAX's key of a program has its folder
    and its machine in it.
    """
    number = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    mark, is_first = os.path.join(folder, f"shared-{number:08x}"), jax.process_index() == 0
    if folder and is_first:
        with contextlib.suppress(OSError):
            Path(mark).touch()
    multihost_utils.sync_global_devices("sa_jax compilation cache")
    sees = in_bucket(folder) or (bool(folder) and os.path.exists(mark))
    key = np.uint32(zlib.crc32(f"{folder} {_machine()}".encode()) | 1)
    seen = multihost_utils.process_allgather(key if sees else np.uint32(0))
    if folder and is_first:
        with contextlib.suppress(OSError):
            os.remove(mark)
    return bool(np.all(seen == key))


def _machine() -> tuple[Any, ...]:
    """What differs between the nodes of a cluster: driver, memory of a GPU, CPU."""
    device, cpuinfo = jax.local_devices()[0], Path("/proc/cpuinfo")
    cpus = re.findall("model name.*", cpuinfo.read_text()) if cpuinfo.exists() else []
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return device.client.platform_version, memory, *cpus[:1]


def cache_folder(env: Mapping[str, str], backend: str) -> Path:
    """Where programs for a backend ('cpu', 'gpu', 'tpu') are kept.

    A CPU program may use every instruction of the machine it was compiled on, and a home folder may
    be shared by several kinds of machine: jax's key of a program has these instructions in it.
    """
    base = env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home(), ".cache")
    return Path(env.get(VARIABLE) or Path(base, "sa_jax", "jax")).absolute() / backend
