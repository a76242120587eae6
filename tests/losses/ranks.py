"""Losses on one of two ranks, each with its slice of both heads: started twice by `test_sharded.py`.

python ranks.py RANK FOLDER: the results go to FOLDER/RANK.pt.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

FIRST = 10  # rows of the vocabulary on rank 0; rank 1 has the other 13 of 23
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


class Sharded(NamedTuple):
    """A loss of a slice of the heads: `which` is dense.cross_entropy, divergence or sparse.cross_entropy."""

    which: str
    options: dict[str, Any]


def cases() -> dict[str, Sharded]:
    """All that is checked, by name."""
    found: dict[str, Sharded] = {}
    for cap in (None, 4.0):
        found[f"cross_entropy cap={cap}"] = Sharded("ce", {"cap": cap, "z_loss": 0.1})
        for beta in BETAS:
            options = {"cap": cap, "teacher_cap": 7.0, "beta": beta, "temperature": 2.0}
            found[f"beta={beta} cap={cap}"] = Sharded("div", options)
        for tail in (False, True):
            found[f"few tail={tail} cap={cap}"] = Sharded(
                "few", {"cap": cap, "temperature": 2.0, "tail": tail}
            )
    mix = {"next_token": 0.3, "z_loss": 0.1, "temperature": 2.0, "cap": 4.0}
    found["beta=0.5 mixed"] = Sharded("div", {**mix, "beta": 0.5, "teacher_cap": None})
    found["few tail mixed"] = Sharded("few", {**mix, "tail": True})
    return found


def loss_of(which: str, c: Any, few: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """One of the losses of a case."""
    from tests.losses.cases import ce, div, few_ce

    if which == "few":
        return few_ce(c, *few, **options)
    return {"ce": ce, "div": div}[which](c, **options)


def inputs() -> tuple[Any, tuple[Tensor, Tensor]]:
    """The same on every rank, and in the process that compares."""
    from tests.losses.cases import case, few

    torch.manual_seed(1)
    return case(), few(0.7)


def recorded(sizes: list[tuple[int, ...]]) -> None:
    """Have every collective note the sizes of what it is given."""
    for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
        actual: Callable[..., Any] = getattr(dist, name)

        def noting(*args: Any, actual: Callable[..., Any] = actual, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            given += [x for many in given if isinstance(many, list) for x in many]
            sizes.extend(tuple(x.shape) for x in given if isinstance(x, Tensor))
            return actual(*args, **kwargs)

        setattr(dist, name, noting)


def main(rank: int, folder: Path) -> None:
    """Every case, then chunks of few bytes, which is last as it may end in a wait."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    from gemwright.losses.sharded import Slice

    sizes: list[tuple[int, ...]] = []
    recorded(sizes)
    c, few = inputs()
    taken = slice(None, FIRST) if rank == 0 else slice(FIRST, None)
    mine = c._replace(
        weight=c.weight.detach()[taken].clone().requires_grad_(), teacher_weight=c.teacher_weight[taken]
    )
    part = Slice.of(mine.weight, dist.group.WORLD)
    results: dict[str, Any] = {"slice": (part.start, part.total)}

    def run(which: str, options: dict[str, Any], **more: Any) -> list[Tensor]:
        loss = loss_of(which, mine, few, part=part, **options, **more)
        return [loss.detach(), *torch.autograd.grad(loss, (mine.hidden, mine.weight))]

    for name, (which, options) in cases().items():
        results[name] = run(which, options)
    results["sizes"] = sizes
    torch.save(results, folder / f"{rank}.pt")
    part = Slice.of(mine.weight, dist.new_group(timeout=timedelta(seconds=3)))
    try:  # 4 tokens a chunk by rank 0's rows, 3 by rank 1's
        small = run("ce", {"cap": 4.0, "z_loss": 0.1}, chunk_bytes=4 * 4 * FIRST * 7)
    except RuntimeError as error:
        small = str(error)
    torch.save({**results, "small chunks": small}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
