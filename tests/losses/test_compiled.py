"""Compiled kernels against the definitions, with logits far beyond a cap and a last chunk that is shorter."""

import pytest
import torch

from gemwright.device import can_compile
from tests.losses.cases import (
    assert_equal_to_exact,
    bytes_for,
    case,
    div,
    exact_div,
    exact_few,
    few,
    few_ce,
    with_gradients,
)


@pytest.mark.compiled
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.5, 2.0), (1.0, 2.0)])
def test_compiled_kernels_of_divergences_equal_the_definition(beta: float, temperature: float):
    assert can_compile()  # else these would be the eager kernels again
    c = case()
    with torch.no_grad():
        c.hidden[::4] *= 1000
    options = {"beta": beta, "temperature": temperature, "next_token": 0.3, "z_loss": 0.1}
    ours = div(c, 4.0, 7.0, chunk_bytes=bytes_for(3, 2), **options)
    assert_equal_to_exact(with_gradients(ours, c), with_gradients(exact_div(c, 4.0, 7.0, **options), c), 1e-4)


@pytest.mark.compiled
@pytest.mark.parametrize(("tail", "temperature"), [(False, 1.0), (True, 2.0)])
def test_compiled_kernels_of_few_ids_equal_the_definition(tail: bool, temperature: float):
    assert can_compile()
    c, (ids, probs) = case(), few(0.7 if tail else 1.0)
    with torch.no_grad():
        c.hidden[::4] *= 1000
    options = {"tail": tail, "temperature": temperature, "next_token": 0.3}
    ours = few_ce(c, ids, probs, 4.0, chunk_bytes=bytes_for(3, 1), **options)
    exact = exact_few(c, ids, probs, 4.0, **options)
    assert_equal_to_exact(with_gradients(ours, c), with_gradients(exact, c), 1e-4)
