"""The toy study's folder of data: written once, never mixed with other settings."""

import pytest

from sa_jax.data.toy.study import write_toy_study
from sa_jax.errors import UserError

SIZES = {"seed": 0, "pretrain_size": 8, "insertion_size": 8, "removal_size": 8, "heldout_size": 16}


def test_a_folder_of_other_settings_is_refused_and_left_alone(tmp_path):
    def contents() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    write_toy_study(tmp_path, vocab_size=300, **SIZES)
    before = contents()
    write_toy_study(tmp_path, vocab_size=300, **SIZES)
    with pytest.raises(UserError, match="with removal_size=8, not with removal_size=9; .*--out "):
        write_toy_study(tmp_path, vocab_size=300, **SIZES | {"removal_size": 9})
    assert contents() == before
