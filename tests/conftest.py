"""Eight virtual CPU devices and a shared compilation cache for every test."""

import itertools
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# For the TPU compiler: not to ask the cloud which machine this is, and to run in many processes.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAXREF_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jaxref-tests")

import jax
import pytest

collect_ignore = ["oracles"]  # scripts that need the peers they ask

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax-tests")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# The CPU's newer emitters take twice the time to compile, and hardly less to run what tests run.
# The flag is read at the first compilation; the TPU's compiler does not know it and reads later.
_flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{_flags} --xla_cpu_use_fusion_emitters=false"
jax.jit(lambda: 0)()
os.environ["XLA_FLAGS"] = _flags

_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def compile_quickly(request):
    """XLA optimises little, which takes two thirds of the time, as tests compile much and compute
    little. A test of what the compiler makes is marked `optimized`."""
    quick = not request.node.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    if next(_tests) % 200 == 0:  # a process of thousands of tests would hold gigabytes of programs
        jax.clear_caches()
