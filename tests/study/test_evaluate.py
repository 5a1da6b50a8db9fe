"""What is left when an evaluation cannot be compared."""

import pytest

from sa_jax.errors import UserError
from sa_jax.evals.statistics import rate
from sa_jax.study import evaluate
from sa_jax.training.config import default_config
from sa_jax.training.start import Start


def test_a_refused_comparison_leaves_the_page(tmp_path):
    scores = {"accuracy": {**rate(5, 20), "n": 20}}
    summaries = {"math500": {"settings": {"shots": 0}, "scores": scores}}
    start = Start("model", "hf", None, "model")
    with pytest.raises(UserError, match="none of the evals math500"):
        evaluate._write_results(
            tmp_path, start, default_config(), 0, summaries, tmp_path / "elsewhere"
        )
    assert "| accuracy | 20 | 5 | 25.0 % |" in (tmp_path / "results.md").read_text()
