"""The one linear layer, evaluated and deployed alike: low-bit base product plus compensation."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decdec_core import ops, prefill, tiles
from decdec_core.calibration import ActivationStatistics
from decdec_core.config import DEFAULT_N_TB, EXTRAS, WEIGHT_BITS, WeightQuant, require_one_of, total_channels
from decdec_core.packing import pack_table
from decdec_core.quantize import QuantizedWeight, for_plain_inputs, weight_layout, weight_of
from decdec_core.residuals import QuantizedResidual

_HALVES = (torch.float16, torch.bfloat16)
_SUMS_AT_ONCE = 1 << 24  # 64 MB of float32
_TOKENS_AT_ONCE = 1 << 15  # of one launch of `compensate`


@dataclass
class Scope:
    """Whether the present forward pass is compensated; one object shared by a model's layers."""

    active: bool = True


def _few(tokens: int, dtype: torch.dtype) -> bool:
    return 0 < tokens <= ops.MOST_TOKENS and dtype in _HALVES


class DecLinear(nn.Module):
    """y = Ŵx + b + sum over the selected channels c of x_c · residual_c (method.md section 5).

    Buffers, as on disk: those of the weight's format (quantize.weight_layout), which are codes, scales and
    zeros, or codes and table; bias (out,) float32; and what `extras` names. With input_order (in,) int32, x
    above is the layer's x[..., input_order]; with input_scale (in,) float32 it is then divided by that. The
    residual and the statistics are no buffers: they stay in host memory through `.to()`.

    Inputs (..., tokens, in), outputs (..., tokens, out) in the input's dtype; the compensation is summed in
    float32. `selection` None, or a pass that `scope` leaves out, gives the base layer bit for bit.

    On a GPU the weight is kept in the kernels' order instead (`tiled`; its buffers are then empty) and the
    residual pinned. A codebook's values are there in the activations' dtype, which a cast of the layer or
    else its first pass tells; their float16 original waits in host memory. A pass in another dtype replaces
    them, and what was captured with them is to be captured again.

    One to eight tokens in half precision take `ops.linear`, and y is rounded once. More, or other settings
    than its kernels have (tiles.fits), take a dense weight decoded for the pass, and y is rounded to the
    input's dtype twice, after the base product and after the compensation; the residual's rows are rounded to
    it too, and the sums are as torch's matrix products carry them. Of the residual they fetch the rows of a
    static selection once; what their tokens chose one by one, while that is less than the residual; else the
    whole, copied while another layer computes (`stage`).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    table: Tensor
    input_order: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: WeightQuant,
        bias: bool = False,
        extras: Collection[str] = (),
    ) -> None:
        """Make an empty layer. Raises DecDECError for bits that are not whole and for unknown extras."""
        super().__init__()
        require_one_of("bits of a layer", config.bits, WEIGHT_BITS)
        for name in extras:
            require_one_of("extra", name, EXTRAS)
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self._layout = weight_layout(config, in_features, out_features)
        for name, (shape, dtype) in self._layout.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        order = torch.arange(in_features, dtype=torch.int32) if "input_order" in extras else None
        self.register_buffer("input_order", order)
        self.register_buffer(
            "input_scale", torch.ones(in_features, dtype=torch.float32) if "input_scale" in extras else None
        )
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self.residual: QuantizedResidual | None = None
        self.statistics: ActivationStatistics | None = None
        self.selection: ops.Selection | None = None
        self.n_tb = DEFAULT_N_TB
        self.scope = Scope()
        self.stage = prefill.Stage()
        self.tiled: ops.TiledWeight | None = None
        self._values = torch.float16  # of a codebook in `tiled`
        self._table: Tensor | None = None
        self._pinned: QuantizedResidual | None = None
        self._dense: Tensor | None = None

    @classmethod
    def join(cls, layers: Sequence[DecLinear]) -> DecLinear:
        """Return one layer with the outputs of all `layers`, which read one input and treat it alike.

        Their config, extras and residual's config are the same; a residual's channel is whole bytes in each.
        The selection, where they have one, is that of the first.
        """
        first = layers[0]
        extras = [name for name in EXTRAS if getattr(first, name) is not None]
        out = sum(layer.out_features for layer in layers)
        whole = cls(first.in_features, out, first.config, first.bias is not None, extras)
        parts = [layer._logical().tensors() for layer in layers]
        for name in parts[0]:
            setattr(whole, name, torch.cat([part[name] for part in parts]))
        for name in extras:
            setattr(whole, name, getattr(first, name))
        if first.bias is not None:
            whole.bias = torch.cat([layer.bias for layer in layers if layer.bias is not None])
        kept = [layer.residual for layer in layers if layer.residual is not None]
        if kept:
            codes = torch.cat([residual.codes for residual in kept], dim=1)
            whole.residual = QuantizedResidual(codes, torch.cat([r.scale for r in kept]), kept[0].config)
        whole.statistics, whole.selection = first.statistics, first.selection
        whole.scope, whole.stage, whole._values = first.scope, first.stage, first._values
        whole.n_tb = first.n_tb
        if whole.device.type == "cuda":
            whole.prepare_for_gpu()
        return whole

    def extra_repr(self) -> str:
        kept = self.residual.config.bits if self.residual else None
        return f"in={self.in_features}, out={self.out_features}, {self.config}, residual_bits={kept}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the low-bit weight as on disk, the input's order and scale among them."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._layout.values()]
        return sum(sizes) + sum(t.nbytes for t in (self.input_order, self.input_scale) if t is not None)

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the same as a GPU keeps it: in the kernels' order where that is made of it."""
        if not tiles.fits(self.config, self.in_features):
            return self.weight_bytes
        on_disk = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._layout.values())
        tiled = tiles.tiled_bytes(self.config, self.in_features, self.out_features)
        return self.weight_bytes - on_disk + tiled

    def dequantize(self) -> Tensor:
        """Return Ŵ (out, in) float32, for reordered and scaled inputs."""
        if self.tiled is not None:
            return ops.dequantize(self._tiled_with(self.tiled, torch.float16), torch.float32)
        return self._logical().dequantize()

    def dense_weight(self) -> Tensor:
        """Return the float32 weight (out, in) for plain inputs: what a plain linear layer would hold."""
        return for_plain_inputs(self.dequantize(), self.input_scale, self.input_order)

    def seen(self, x: Tensor) -> Tensor:
        """Return the input (..., in) as weight, residual and selection see it: reordered and scaled."""
        if self.input_order is not None:
            x = x.index_select(-1, self.input_order)
        return x if self.input_scale is None else x / self.input_scale.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.seen(x)
        tokens = x.reshape(-1, self.in_features)
        if x.is_cuda:
            self.prepare_for_gpu(x.dtype)
        selection = self.selection if self.scope.active else None
        if x.is_cuda:
            y = self._on_gpu(tokens.contiguous(), selection)
        else:
            y = F.linear(tokens, self._base_weight(x), None if self.bias is None else self.bias.to(x.dtype))
            if selection is not None:
                y = self._compensated(tokens.contiguous(), y, selection)
        return y.view(*x.shape[:-1], self.out_features)

    def _compensated(self, tokens: Tensor, y: Tensor, selection: ops.Selection) -> Tensor:
        residual = self.residual
        assert residual is not None
        total = y.float()
        ops.select_and_compensate(
            tokens, selection, residual.codes, residual.scale, residual.config.bits, total
        )
        return total.to(y.dtype)

    def _on_gpu(self, tokens: Tensor, selection: ops.Selection | None) -> Tensor:
        residual, tiled, count = self.residual, self.tiled, tokens.shape[0]
        if residual is None or selection is None or count == 0:
            return self._base(tokens)
        if tiled is not None and self._in_one_launch(count, tokens.dtype, residual):
            return ops.linear(tokens, tiled, selection, residual.codes, residual.scale, self.n_tb)
        whole = self.copied_whole(count, tokens.dtype) is not None
        ahead = whole and prefill.may_copy_ahead(tokens.device)
        if ahead:
            self.stage.begin(self, residual)
        y = self._base(tokens)
        if selection.indices is not None and residual.config.bits < 16:
            self._add_shared(tokens, y, selection.indices[0], residual)
        elif not whole:
            self._add_fetched(tokens, y, selection)
        elif ahead:
            with self.stage.resident(self, count, tokens.dtype) as (codes, scale):
                self._add_whole(tokens, y, selection, codes, scale)
        else:
            self._add_whole(tokens, y, selection, *prefill.on_device(residual, tokens.device))
        return y

    def _base(self, tokens: Tensor) -> Tensor:
        if self.tiled is not None and _few(tokens.shape[0], tokens.dtype):
            return ops.linear(tokens, self.tiled)
        if self.tiled is not None:
            weight = ops.dequantize(self.tiled, tokens.dtype)
        else:
            weight = self.dequantize().to(tokens.dtype)
        return F.linear(tokens, weight, None if self.bias is None else self.bias.to(tokens.dtype))

    def _add_shared(self, tokens: Tensor, y: Tensor, channels: Tensor, residual: QuantizedResidual) -> None:
        scale = residual.scale.to(tokens.device, non_blocking=True)
        x = tokens.index_select(1, channels)
        prefill.add_rows(y, x, residual.codes, scale, residual.config.bits, channels)

    def _add_fetched(self, tokens: Tensor, y: Tensor, selection: ops.Selection) -> None:
        step = min(_TOKENS_AT_ONCE, max(1, _SUMS_AT_ONCE // self.out_features))
        for first in range(0, tokens.shape[0], step):
            part = slice(first, first + step)
            y[part] = self._compensated(tokens[part], y[part], selection)

    def _add_whole(
        self, tokens: Tensor, y: Tensor, selection: ops.Selection, codes: Tensor, scale: Tensor
    ) -> None:
        assert self.residual is not None
        step = prefill.tokens_at_once(self.in_features, self._channels(selection))
        for first in range(0, tokens.shape[0], step):
            part = tokens[first : first + step]
            x = prefill.masked(part, selection(part))
            prefill.add_rows(y[first : first + step], x, codes, scale, self.residual.config.bits)

    def _channels(self, selection: ops.Selection) -> int:
        if selection.indices is not None:
            return selection.indices.shape[1]
        return total_channels(self.in_features, selection.k_chunk)

    def _in_one_launch(self, tokens: int, dtype: torch.dtype, residual: QuantizedResidual) -> bool:
        fits = residual.config.bits == 4 and self.out_features % 32 == 0
        return self.tiled is not None and fits and _few(tokens, dtype)

    def copied_whole(self, tokens: int, dtype: torch.dtype) -> QuantizedResidual | None:
        """Return the pinned residual if a pass over `tokens` tokens of `dtype` copies it whole, else None."""
        residual, selection = self.residual, self.selection
        if residual is None or residual is not self._pinned or selection is None or not self.scope.active:
            return None
        if self._in_one_launch(tokens, dtype, residual):
            return None
        shared = selection.indices is not None and residual.config.bits < 16
        fewer = tokens * self._channels(selection) < self.in_features
        return None if shared or fewer else residual

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.codes.device

    def prepare_for_gpu(self, dtype: torch.dtype | None = None) -> None:
        """Bring a layer whose weight is on a GPU into the form that its kernels take; again, does nothing.

        dtype: of the activations, if it is known. Raises DecDECError where host memory cannot hold the pinned
        residual.
        """
        residual, selection = self.residual, self.selection
        if residual is not None and residual is not self._pinned:
            self.residual = self._pinned = residual.pinned()
        if selection is not None and selection.indices is not None:
            here = self.device
            if selection.indices.device != here:
                self.selection = replace(selection, indices=selection.indices.to(here))
        self._tile(dtype)

    def _tile(self, dtype: torch.dtype | None) -> None:
        """Bring the weight into the kernels' order, and a codebook's values into what `dtype` takes."""
        values = self._values if dtype is None else dtype if dtype in _HALVES else torch.float16
        if self.tiled is None and tiles.fits(self.config, self.in_features):
            weight = self._logical()
            table = weight.tensors().get("table")
            self._table = None if table is None else table.cpu()
            self.tiled = tiles.tile(weight, values, self.bias)
            for name, tensor in weight.tensors().items():
                setattr(self, name, tensor.new_empty(0))
        elif self.tiled is not None and self._table is not None and values != self._values:
            self.tiled = self._tiled_with(self.tiled, values)
        else:
            return
        self._values = values
        if self.device.type == "cuda":
            # a launch may fetch tiles before the one that precedes it has ended
            torch.cuda.current_stream(self.device).synchronize()

    def _tiled_with(self, tiled: ops.TiledWeight, values: torch.dtype) -> ops.TiledWeight:
        """Return `tiled`, its codebook's values, if it has one, in the dtype `values`."""
        if self._table is None or values == self._values:
            return tiled
        return replace(tiled, table=pack_table(self._table.to(self.device, values)))

    def _logical(self) -> QuantizedWeight:
        """Return the weight as on disk."""
        if self.tiled is None:
            return weight_of(self.config, self.in_features, {n: getattr(self, n) for n in self._layout})
        table = None if self._table is None else self._table.to(self.device)
        return tiles.untile(self.tiled, self.config, table)

    def _leave_gpu(self) -> None:
        if self.tiled is not None:
            for name, tensor in self._logical().tensors().items():
                setattr(self, name, tensor)
            self.tiled = self._table = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy of pinned memory is not pinned
        return {**self.__dict__, "_pinned": None, "_dense": None}

    def _base_weight(self, x: Tensor) -> Tensor:
        # decoded once: on a CPU the method is emulated, and decoding for every token would dominate
        if self._dense is None or self._dense.dtype != x.dtype or self._dense.device != x.device:
            self._dense = self.dequantize().to(x.dtype)
        return self._dense

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled is not None:
            logical = self._logical().tensors()
            destination.update({prefix + name: tensor for name, tensor in logical.items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._leave_gpu()
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._leave_gpu()
        self._dense = None
        # their dtypes are the format's: a model cast to another keeps them
        before = {n: t for n, t in self._buffers.items() if t is not None and t.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        cast = fn(torch.empty(0)).dtype
        if cast in _HALVES:
            self._values = cast
        if self.device.type == "cuda":
            self.prepare_for_gpu()
        return self
