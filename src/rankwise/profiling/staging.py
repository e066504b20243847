"""One module's batch gradients: summed as they come, or kept for their Gram matrix.

A batch counts for every module or for none, and whether it counts is known only when its backward
pass is over. Until then its contribution is staged: as the factors `x (T, d_in)`, `g (T, d_out)`
where they are smaller than the product `g' x (d_out, d_in)`, else as the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.spectra import effective_rank, singular_values, token_singular_values

TOKEN_SPACE = 0.75
"""A spectrum is computed from tokens while there are at most this part of min(d_in, d_out)."""
_BLOCK = 2**22
"""Entries of the block of all batches' gradient rows that a Gram matrix is summed over."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class BatchGradient:
    """`G_b = sum_t g_t x_t'` of one module and batch, as factors while those are smaller."""

    def __init__(self) -> None:
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._product: Tensor | None = None

    def add(self, x: Float[Tensor, "t d_in"], g: Float[Tensor, "t d_out"]) -> None:
        """Add one use of the module."""
        if self._product is None:
            self._factors.append((x, g))
            size = sum(a.numel() + b.numel() for a, b in self._factors)
            if size > x.shape[1] * g.shape[1]:
                self._product = _product(self._factors)
                self._factors.clear()
        else:
            self._product.addmm_(g.to(self._product.dtype).T, x.to(self._product.dtype))

    @property
    def is_empty(self) -> bool:
        """Whether the batch did not reach the module."""
        return self._product is None and not self._factors

    def arrays(self) -> dict[str, Tensor]:
        """What it holds, for a checkpoint."""
        if self._product is not None:
            return {"product": self._product}
        pairs = enumerate(self._factors)
        return {f"{side}{i}": t for i, pair in pairs for side, t in zip("xg", pair, strict=True)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> BatchGradient:
        """The batch gradient that `arrays` came from."""
        new = cls()
        new._product = arrays.get("product")
        count = sum(key.startswith("x") for key in arrays)
        new._factors = [(arrays[f"x{i}"], arrays[f"g{i}"]) for i in range(count)]
        return new

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)` of a batch that reached the module."""
        if self._product is not None:
            return self._product.shape[0], self._product.shape[1]
        x, g = self._factors[0]
        return g.shape[1], x.shape[1]

    def rows(self, start: int, end: int) -> Float[Tensor, "rows d_in"]:
        """Rows `start` to `end` of the gradient, of a batch that reached the module."""
        if self._product is not None:
            return self._product[start:end]
        return _product([(x, g[:, start:end]) for x, g in self._factors])


def _under(prefix: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays whose names begin so, without the beginning."""
    return {k.removeprefix(prefix): t for k, t in arrays.items() if k.startswith(prefix)}


def _product(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    (x, g), *rest = factors
    wide = wide_dtype(x.dtype)
    product = g.to(wide).T @ x.to(wide)
    for x, g in rest:
        product.addmm_(g.to(wide).T, x.to(wide))
    return product


class Use(NamedTuple):
    """One use of a module in a batch: its part of the gradient is `weight * g' x`."""

    x: Float[Tensor, "t d_in"]
    g: Float[Tensor, "t d_out"]
    weight: float


@dataclass(frozen=True)
class TokenGradient:
    """A mean gradient of few tokens, `G = sum_u weight_u g_u' x_u`, that need not be formed."""

    uses: tuple[Use, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the gradient, `(d_out, d_in)`."""
        return self.uses[0].g.shape[1], self.uses[0].x.shape[1]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The x of each use; layers that share their input hold the same tensors."""
        return tuple(use.x for use in self.uses)

    def rows(self, start: int, end: int) -> Float[Tensor, "rows d_in"]:
        """Some rows of the gradient, fp32 or wider."""
        first, *rest = (Use(x, g[:, start:end], weight) for x, g, weight in self.uses)
        rows = _weighted_product(first)
        for use in rest:
            _add_(rows, use)
        return rows

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The gradient as a matrix."""
        return self.rows(0, self.shape[0])

    def singular_values(self, x_gram: Float[Tensor, "t t"] | None = None) -> Float[Tensor, " k"]:
        """Of the gradient: see `token_singular_values`."""
        x = torch.cat(self.inputs)
        g = torch.cat([g.to(wide_dtype(g.dtype)) * weight for _, g, weight in self.uses])
        return token_singular_values(x, g, x_gram=x_gram)


MeanGradient = Tensor | TokenGradient
"""A mean gradient `(d_out, d_in)`, as a matrix or as the tokens that make it."""


def dense(gradient: MeanGradient) -> Float[Tensor, "d_out d_in"]:
    """The gradient as a matrix."""
    return gradient.dense() if isinstance(gradient, TokenGradient) else gradient


class GradientSum:
    """Running `sum_b n_b G_b` of one module; a batch enters as a whole or not at all.

    While all batches together have at most `TOKEN_SPACE min(d_in, d_out)` tokens they are kept as
    factors and their sum is never formed. After that a staged product is the new sum itself, beside
    the old one, so that keeping or dropping a batch costs no pass over memory; at the end of a
    backward pass, when the activations are gone, there are two sums. The GID of the mean is taken
    after 1, 2, 4, ... batches if asked for.
    """

    def __init__(self, *, convergence: bool) -> None:
        self._convergence = convergence
        self._kept: list[Use] = []  # instead of the sum
        self._total: Tensor | None = None
        self._staged_total: Tensor | None = None
        self._staged: list[Use] = []
        self._items: list[int] = []
        self._gids: list[float] = []

    def add(self, x: Float[Tensor, "t d_in"], g: Float[Tensor, "t d_out"], items: int) -> None:
        """Stage one use of the module in a batch of `items` labelled items."""
        use = Use(x, g, items)
        held = sum(u.x.numel() + u.g.numel() for u in [*self._staged, use])
        if self._staged_total is None and (
            self._fits_token_space(use) or held < x.shape[1] * g.shape[1]
        ):
            self._staged.append(use)
        elif self._staged_total is None:
            self._staged_total = self._sum_with(use)
        else:
            _add_(self._staged_total, use)

    def keep(self, items: int) -> None:
        """Let the staged batch count."""
        if self._staged_total is not None:
            self._total, self._kept = self._staged_total, []
        if self._fits_token_space():
            self._kept += self._staged
        else:
            for use in self._staged:
                if self._total is None:
                    self._total, self._kept = self._sum_with(use), []
                else:
                    _add_(self._total, use)
        self.drop()
        self._items.append(items)
        if self._convergence and _is_power_of_two(len(self._items)):
            self._gids.append(_gid(self._mean()))

    def drop(self) -> None:
        """Forget the staged batch."""
        self._staged_total = None
        self._staged = []

    def arrays(self) -> dict[str, Tensor]:
        """Everything kept so far, for a checkpoint between two batches."""
        found = {"items": torch.tensor(self._items), "gids": torch.tensor(self._gids).double()}
        if self._total is not None:
            return found | {"total": self._total}
        for i, use in enumerate(self._kept):
            found |= {f"x{i}": use.x, f"g{i}": use.g}
        return found | {"weights": torch.tensor([use.weight for use in self._kept]).double()}

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Go on from what `arrays` gave."""
        self._items = arrays["items"].tolist()
        self._gids = arrays["gids"].tolist()
        self._total = arrays.get("total")
        weights = arrays["weights"].tolist() if self._total is None else []
        self._kept = [Use(arrays[f"x{i}"], arrays[f"g{i}"], w) for i, w in enumerate(weights)]

    def finish(self) -> tuple[MeanGradient | None, Tensor | None, list[float]]:
        """The mean gradient, no Gram matrix, and the GIDs after `prefixes(N)` batches."""
        if self._convergence and not _is_power_of_two(len(self._items)):
            self._gids.append(_gid(self._mean()))
        if self._total is not None:
            return self._total.div_(sum(self._items)), None, self._gids
        return self._mean(), None, self._gids

    def _mean(self) -> MeanGradient | None:
        """The mean, or the sum where that is a matrix: their GID is the same."""
        if self._total is not None or not self._kept:
            return self._total
        total = sum(self._items)
        return TokenGradient(tuple(Use(x, g, weight / total) for x, g, weight in self._kept))

    def _fits_token_space(self, *more: Use) -> bool:
        uses = [*self._kept, *self._staged, *more]
        if self._total is not None or not uses:
            return False
        tokens = sum(len(use.x) for use in uses)
        return tokens <= TOKEN_SPACE * min(uses[0].x.shape[1], uses[0].g.shape[1])

    def _sum_with(self, use: Use) -> Float[Tensor, "d_out d_in"]:
        """A new sum of what counts so far and one use more."""
        if self._total is not None:
            wide = self._total.dtype
            return torch.addmm(self._total, use.g.to(wide).T, use.x.to(wide), alpha=use.weight)
        return TokenGradient((*self._kept, use)).dense()


class KeptGradients:
    """Every batch gradient of one module, for their exact Gram matrix."""

    def __init__(self, *, convergence: bool) -> None:
        self._convergence = convergence
        self._kept: list[BatchGradient] = []
        self._items: list[int] = []
        self._shape: tuple[int, int] | None = None
        self._like = torch.zeros(())
        self._staged = BatchGradient()

    def add(self, x: Float[Tensor, "t d_in"], g: Float[Tensor, "t d_out"], items: int) -> None:
        """Stage one use of the module."""
        self._shape = (g.shape[1], x.shape[1])
        self._like = torch.zeros((), dtype=wide_dtype(x.dtype), device=g.device)
        self._staged.add(x, g)

    def keep(self, items: int) -> None:
        """Let the staged batch count."""
        self._kept.append(self._staged)
        self._items.append(items)
        self._staged = BatchGradient()

    def drop(self) -> None:
        """Forget the staged batch."""
        self._staged = BatchGradient()

    def arrays(self) -> dict[str, Tensor]:
        """Everything kept so far, for a checkpoint between two batches."""
        found = {"items": torch.tensor(self._items)}
        for b, kept in enumerate(self._kept):
            found |= {f"{b}.{key}": tensor for key, tensor in kept.arrays().items()}
        return found

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Go on from what `arrays` gave."""
        self._items = arrays["items"].tolist()
        self._kept = [
            BatchGradient.from_arrays(_under(f"{b}.", arrays)) for b in range(len(self._items))
        ]
        for kept in self._kept:
            if not kept.is_empty:
                self._shape = kept.shape
                like = next(iter(kept.arrays().values()))
                self._like = torch.zeros((), dtype=wide_dtype(like.dtype), device=like.device)

    def finish(self) -> tuple[Tensor | None, Tensor | None, list[float]]:
        """The mean gradient, `C_ab = <G_a, G_b> / M` in fp64, and the GIDs of the prefixes.

        The gradients meet a few rows of all batches at a time; each row's products are in the
        gradients' dtype, after scaling, and their sum is in fp64.
        """
        m = len(self._kept)
        counts = prefixes(m) if self._convergence else [m]
        gram = torch.zeros(m, m, dtype=torch.float64)
        if self._shape is None:
            return None, gram, [0.0] * (len(counts) if self._convergence else 0)
        d_out, d_in = self._shape
        weights = self._prefix_weights(counts)
        means = self._like.new_empty(len(counts), d_out, d_in)
        step = max(_BLOCK // (m * d_in), 1)
        for start in range(0, d_out, step):
            end = min(start + step, d_out)
            block = self._like.new_zeros(end - start, m, d_in)
            for b, kept in enumerate(self._kept):
                if not kept.is_empty:
                    block[:, b] = kept.rows(start, end)
            means[:, start:end] = (weights @ block).transpose(0, 1)
            gram += _gram_of_rows(block)
        gids = [_gid(mean) for mean in means] if self._convergence else []
        return means[-1].clone(), gram / m, gids

    def _prefix_weights(self, counts: Sequence[int]) -> Float[Tensor, "prefixes m"]:
        weights = self._like.new_zeros(len(counts), len(self._items))
        for row, n in enumerate(counts):
            items = self._like.new_tensor(self._items[:n], dtype=weights.dtype)
            weights[row, :n] = items / sum(self._items[:n])
        return weights


def _gram_of_rows(block: Float[Tensor, "rows m d_in"]) -> Float[Tensor, "m m"]:
    """`sum_r block_r block_r'` in fp64, scaled first: squares of small gradients underflow."""
    peak = block.abs().amax()
    if not float(peak):
        return torch.zeros(block.shape[1], block.shape[1], dtype=torch.float64)
    scaled = block / peak
    products = scaled @ scaled.mT
    if products.device.type == "mps":  # it has no fp64
        products = products.cpu()
    total = (products.sum(0, dtype=torch.float64) * peak.double() ** 2).cpu()
    return (total + total.mT) / 2  # a BLAS may round the two halves differently


def _weighted_product(use: Use) -> Tensor:
    wide = wide_dtype(use.x.dtype)
    nothing = torch.zeros((), dtype=wide, device=use.g.device)
    return torch.addmm(nothing, use.g.to(wide).T, use.x.to(wide), beta=0, alpha=use.weight)


def _add_(total: Tensor, use: Use) -> None:
    total.addmm_(use.g.to(total.dtype).T, use.x.to(total.dtype), alpha=use.weight)


def prefixes(batches: int) -> list[int]:
    """Where convergence is looked at: after 1, 2, 4, ... batches, and after all of them.

    Example:
        >>> prefixes(6)
        [1, 2, 4, 6]
    """
    powers = [2**i for i in range(batches.bit_length()) if 2**i < batches]
    return [*powers, batches]


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _gid(gradient: MeanGradient | None) -> float:
    if gradient is None:
        return 0.0
    if isinstance(gradient, TokenGradient):
        return effective_rank(gradient.singular_values())
    return effective_rank(singular_values(gradient))
