r"""Compares every attention kernel that this machine can run with the float32 reference.

A row a length and kernel: the largest difference of output and gradients, relative to the largest
number (expected: below 0.03 in bfloat16); whether a second run gave the same bits; milliseconds of
forward and backward. The last line tells of the self-test.

Example:
  python scripts/check_attention.py --lengths=256
"""

from absl import flags

from sa_jax import cli

LENGTHS = flags.DEFINE_list("lengths", "4096,8192", "Tokens a row, with commas.")


def main():
    from sa_jax.llama.compare_kernels import compare_kernels

    compare_kernels([int(length) for length in LENGTHS.value])


if __name__ == "__main__":
    cli.run(main, __doc__)
