"""What gradients are turned into while they travel."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Tuple

import torch

from .._sets import ProcessSet


class Compressor:
    """Turns a tensor into what is sent, and the result back.

    What is sent is reduced as it is, so this fits formats that can be summed. Others are an `ExchangingCompressor`.
    """

    @staticmethod
    def compress(tensor: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        """Returns what to send, and what `decompress` needs to know."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Returns the result in the type of the original."""
        raise NotImplementedError


class ExchangingCompressor(Compressor):
    """A compressor with a state and an exchange of its own, for formats whose sums are not of that format.

    `DistributedOptimizer` takes an instance, or the class, which it then makes one instance of. The state goes by
    the names of tensors, which are those of the optimizer's parameters.
    """

    @staticmethod
    def compress(tensor: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        """An error: it goes with `DistributedOptimizer`, which calls `exchange`."""
        raise ValueError(
            "this compressor has an exchange of its own and goes with DistributedOptimizer (of gradients, not with "
            "op=Adasum); for other calls take Compression.fp16 or Compression.bf16"
        )

    def exchange(
        self, tensor: torch.Tensor, name: str, op: int, prescale: float, postscale: float, process_set: ProcessSet
    ) -> Callable[[], torch.Tensor]:
        """Starts the exchange of a tensor, and returns a function that waits for it and gives the reduced tensor.

        `tensor` may be read until then and is not written. Called by all ranks of the set, for the same names.
        """
        raise NotImplementedError

    def state_dict(self) -> Dict[str, Any]:
        """What must be kept in a checkpoint."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        del state


class NoneCompressor(Compressor):
    """Sends tensors as they are."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor


class _CastCompressor(Compressor):
    sent_as: torch.dtype

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        if not tensor.dtype.is_floating_point or tensor.dtype == cls.sent_as:
            return tensor, None
        return tensor.to(cls.sent_as), tensor.dtype

    @classmethod
    def decompress(cls, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor if ctx is None else tensor.to(ctx)


class FP16Compressor(_CastCompressor):
    """Sends floating-point tensors as float16."""

    sent_as = torch.float16


class BF16Compressor(_CastCompressor):
    """Sends floating-point tensors as bfloat16, which keeps float32's range."""

    sent_as = torch.bfloat16


class OneBitCompressor(ExchangingCompressor):
    """Sends one bit per element, its sign, and one scale per tensor. What a rank thereby leaves out, it adds to the
    next tensor of the same name (error feedback), without which training would not converge.

    Each rank receives the bits of all others: n/32 of the bytes of one tensor on n ranks.
    """

    _WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)

    def __init__(self) -> None:
        self._left_out: Dict[str, torch.Tensor] = {}

    def state_dict(self) -> Dict[str, Any]:
        return {name: tensor.clone() for name, tensor in self._left_out.items()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._left_out = {name: tensor.clone() for name, tensor in state.items()}

    def exchange(
        self, tensor: torch.Tensor, name: str, op: int, prescale: float, postscale: float, process_set: ProcessSet
    ) -> Callable[[], torch.Tensor]:
        from .ops import Average, Sum, allgather_async, synchronize

        if op not in (Average, Sum) or not tensor.dtype.is_floating_point:
            raise ValueError("1-bit compression takes floating-point tensors with op=Average or op=Sum")
        wanted = tensor.detach().to(torch.float32).reshape(-1)
        left_out = self._left_out.get(name)
        wanted = wanted.clone() if left_out is None else wanted + left_out
        scale = wanted.abs().mean() if wanted.numel() else wanted.new_zeros(())
        bits = self._pack(wanted >= 0)
        # What has overflowed (GradScaler then skips the step) must not be left in the feedback for ever.
        if torch.isfinite(scale):
            self._left_out[name] = wanted - torch.where(wanted >= 0, scale, -scale)
        # One row per rank: the scale's four bytes and the bits.
        row = torch.cat([scale.reshape(1).view(torch.uint8), bits]).reshape(1, -1)
        handle = allgather_async(row, f"1bit.{name}", process_set)
        count, shape, dtype = wanted.numel(), tensor.shape, tensor.dtype

        def finish() -> torch.Tensor:
            rows = synchronize(handle)
            total = torch.zeros(count)
            # In the order of the ranks, so that all of them get the same bits.
            for one in rows:
                size = one[:4].clone().view(torch.float32)
                total += torch.where(self._unpack(one[4:], count), size, -size)
            factor = prescale * postscale / (rows.shape[0] if op == Average else 1)
            return (total * factor).to(dtype).reshape(shape)

        return finish

    @classmethod
    def _pack(cls, positive: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros((positive.numel() + 7) // 8 * 8, dtype=torch.uint8)
        padded[: positive.numel()] = positive
        weights = torch.tensor(cls._WEIGHTS, dtype=torch.uint8)
        return (padded.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)

    @classmethod
    def _unpack(cls, packed: torch.Tensor, count: int) -> torch.Tensor:
        weights = torch.tensor(cls._WEIGHTS, dtype=torch.uint8)
        return ((packed.reshape(-1, 1) & weights) != 0).reshape(-1)[:count]


class Compression:
    """The choices for `compression=`."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
    onebit = OneBitCompressor


def exchanging(compression: Any) -> Optional[ExchangingCompressor]:
    """The instance to use where `compression` exchanges by itself."""
    if isinstance(compression, ExchangingCompressor):
        return compression
    if isinstance(compression, type) and issubclass(compression, ExchangingCompressor):
        return compression()
    return None
