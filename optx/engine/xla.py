"""What XLA is told when it compiles the engine's programs."""

import functools

import jax

# On GPUs the steps of a dispatch run as one CUDA graph, the loop of several ticks included: left out, every tick of it waits
# for the host (4.0 ms in place of 3.6 for 8 billion int4 weights at batch 1 on an H100).
COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"

# XLA's rule cuts the contracted axis of products with few outputs and adds up the parts in a kernel of its own. Left to choose
# without it, the libraries are faster: 128 rows by 4096 x 6144, 4096 x 4096 and 12288 x 4096 take 75 us in place of 91, 256 rows
# 93 in place of 101 (one H100).
UNCUT = {"xla_gpu_experimental_force_split_k": 1}


def options(graphs: bool) -> dict | None:
    """`compiler_options` of a program's ticks on the running backend; graphs: as in EngineOptions."""
    if jax.default_backend() != "gpu":
        return None
    known = {name: value for name, value in UNCUT.items() if has(name, value)}
    return {"xla_gpu_enable_command_buffer": COMMANDS if graphs else "", **known}


@functools.cache
def has(name: str, value) -> bool:
    """Whether the running XLA has an option: experimental ones come and go."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
