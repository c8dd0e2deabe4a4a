"""CUDA graphs: a pass of the transformer and its backward pass are each launched at once, not kernel by kernel.

On a GPU the kernels of a small model take less time than Python and the driver take to launch them. Here texts are
padded a little, so that there are few shapes; the second time that a batch has the same shape, the kernels of its two
passes are recorded, and from then on replayed. What cannot be recorded (dropout, hooks, other inputs than tokens, a
recording for which there is no memory) is computed as always. Switch: `TrainingSettings.cuda_graphs`. Delete this
module when a training run with `cuda_graphs=False` is as fast:
`python benchmarks/speed.py --contenders d2 --device cuda --settings default no-graphs`.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, cuda, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput

from llama_index_lora_embed.models.kernels.attention import NAME
from llama_index_lora_embed.models.kernels.decoders import FAMILIES

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)
_DEVICE = "cuda"
_TAKEN = {"input_ids", "attention_mask", "token_type_ids"}
_MOST = 16  # recordings; passes of further shapes are computed as always
_ROOM = 2.5  # passes for which there must be memory: a recording's own, and one of another shape
_TEXTS, _SHORT, _LONG = 8, 16, 64  # multiples that are padded to: texts, tokens up to 128, tokens beyond


@contextmanager
def cuda_graphs(model: SentenceTransformer) -> Iterator[bool]:
    """Have the transformer of a model on a GPU replay its passes in training.

    Args:
        model: The `forward` of its transformer is replaced, and restored on exit.

    Yields:
        Whether it was; not on other devices.
    """
    transformer: Any = model.transformers_model
    if model.device.type != _DEVICE or transformer is None or "forward" in transformer.__dict__:
        yield False
        return
    causal = is_causal(transformer, model.max_seq_length)
    if not causal and getattr(model.tokenizer, "padding_side", "right") == "left":
        yield False
        return
    transformer.forward = _RecordedForward(transformer, causal)
    try:
        yield True
    finally:
        del transformer.forward
        cuda.empty_cache()


def is_causal(transformer: nn.Module, tokens: int | None) -> bool:
    """Whether every layer lets a token of a text of so many tokens see all earlier ones, and no later one."""
    config: Any = transformer.config
    attention = [module.is_causal for module in transformer.modules() if hasattr(module, "is_causal")]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        type(transformer).__name__ in {f"{family}Model" for family in FAMILIES}
        and config._attn_implementation in {"sdpa", NAME}
        and all(attention)
        and getattr(config, "is_causal", True) is not False
        and not getattr(config, "use_bidirectional_attention", False)
        and (window is None or (tokens is not None and tokens <= window))
    )


def moved_to_start(mask: Tensor) -> Tensor:
    """Which token of a text comes at each place, int [texts, tokens], so that padding comes last."""
    return mask.bool().logical_not().long().argsort(dim=1, stable=True)


@contextmanager
def causal_attention(config: Any) -> Iterator[None]:
    """Within it, attention of a model with this configuration is causal, and knows no padding."""
    before = config._attn_implementation
    config._attn_implementation = _CAUSAL
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    kept = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kept)


# transformers makes no mask for an attention that has none registered
_CAUSAL = "lora_embed_causal"
AttentionInterface.register(_CAUSAL, _attention)


class _User:
    """Lives as long as what a pass computed can still be differentiated."""


class _Slot:
    """Recordings that share their memory, because a step uses one of them at a time."""

    def __init__(self) -> None:
        self.pool = cuda.graph_pool_handle()
        self.recordings: dict[Any, _Recording] = {}
        self.user: weakref.ref[_User] | None = None

    def take(self) -> _User | None:
        """Take the slot; None if another pass has it."""
        if self.user is not None and self.user() is not None:
            return None
        user = _User()
        self.user = weakref.ref(user)
        return user


class _Recording:
    """The two passes of one shape, with the memory that they read from and write to."""

    def __init__(self, forward: _RecordedForward, inputs: dict[str, Tensor], given: dict[str, Any], pool: Any) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.parameters = [parameter for parameter in forward.transformer.parameters() if parameter.requires_grad]
        self.graphs = cuda.CUDAGraph(), cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": pool, "stream": forward.stream, "capture_error_mode": "thread_local"}
        forward.stream.wait_stream(cuda.current_stream())
        with cuda.stream(forward.stream):  # libraries prepare themselves for a stream, which cannot be recorded
            states = forward.states(self.inputs, given)
            torch.autograd.grad(states, self.parameters, torch.zeros_like(states), allow_unused=True)
            del states
        cuda.current_stream().wait_stream(forward.stream)
        with _no_garbage_collection():
            with cuda.graph(self.graphs[0], **options):
                states = forward.states(self.inputs, given)
            self.incoming = torch.zeros_like(states)
            with cuda.graph(self.graphs[1], **options):
                found = torch.autograd.grad(states, self.parameters, self.incoming, allow_unused=True)
                # laid out like the parameters, as fused optimizers need it
                self.gradients = [None if gradient is None else gradient.contiguous() for gradient in found]
        self.states = states.detach()
        # what the graphs read must stay where it is
        self.memory = [value.data for value in (*forward.transformer.parameters(), *forward.transformer.buffers())]
        self.places = [parameter.data_ptr() for parameter in self.parameters]

    def reads_current_weights(self) -> bool:
        """Whether the trained parameters are still where they were."""
        return [parameter.data_ptr() for parameter in self.parameters] == self.places

    def replay(self, inputs: dict[str, Tensor]) -> Tensor:
        """The last layer's hidden states [texts, tokens, width], which the next replay overwrites."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graphs[0].replay()
        return self.states.detach()

    def replay_backward(self, gradient: Tensor) -> None:
        """Add to the gradients of the trained parameters."""
        self.incoming.copy_(gradient)
        self.graphs[1].replay()
        pairs = [(p, g) for p, g in zip(self.parameters, self.gradients, strict=True) if g is not None]
        old = [(p.grad, g) for p, g in pairs if p.grad is not None]
        new = [(p, g) for p, g in pairs if p.grad is None]
        if old:
            torch._foreach_add_([total for total, _ in old], [g for _, g in old])
        if new:  # copies, because the next replay overwrites the recorded ones
            copies = torch._foreach_mul([g for _, g in new], 1.0)
            for (parameter, _), copy in zip(new, copies, strict=True):
                parameter.grad = copy


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Within it no object dies in a cycle: to free its memory on the GPU would end a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Replay(torch.autograd.Function):
    """A recorded pass; arguments of `apply`: a tensor that requires gradients, the recording, its inputs and user."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recording: _Recording, inputs: dict[str, Tensor], user: _User) -> Tensor:
        ctx.recording, ctx.user = recording, user
        return recording.replay(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.recording.replay_backward(grad)
        ctx.user = None
        return None, None, None, None


class _RecordedForward:
    """Stands in for the `forward` of a transformer.

    With `causal` attention no token sees those after it, so that texts which are padded at their end need no mask, and
    attention takes half of the time. Texts that are padded at their beginning are moved there first.
    """

    def __init__(self, transformer: Any, causal: bool) -> None:
        self.transformer = transformer
        self.causal = causal
        self.original = transformer.forward
        self.stream = cuda.Stream()  # type: ignore[no-untyped-call]
        self.anchor = torch.zeros((), requires_grad=True, device=transformer.device)
        self.slots: list[_Slot] = []
        self.seen: dict[Any, int] = {}  # shapes, and the bytes that their activations took
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        given = {name: value for name, value in kwargs.items() if name not in inputs}
        if args or self.failed or not self._takes(inputs, given):
            return self.original(*args, **kwargs)
        texts, tokens = inputs["input_ids"].shape
        order = None
        if self.causal:
            order = moved_to_start(inputs.pop("attention_mask"))
            inputs = {name: value.gather(1, order) for name, value in inputs.items()}
        inputs = {name: self._padded(name, value) for name, value in inputs.items()}
        dtype = torch.get_autocast_dtype(_DEVICE) if torch.is_autocast_enabled(_DEVICE) else None
        key = (inputs["input_ids"].shape, dtype, *sorted(inputs))
        slot, user = self._free_slot()
        # without autocast's cache of cast weights, which a recording would fill with memory of its own
        with nullcontext() if dtype is None else torch.autocast(_DEVICE, dtype=dtype, cache_enabled=False):
            recording = self._recording(slot, key, inputs, given)
            if recording is not None:
                states: Tensor = _Replay.apply(self.anchor, recording, inputs, user)  # type: ignore[no-untyped-call]
            else:
                before = cuda.memory_allocated()
                states, keep = self.states(inputs, given), [user]
                states.register_hook(lambda gradient: keep.clear())  # type: ignore[no-untyped-call]
                self.seen[key] = cuda.memory_allocated() - before
        states = states[:texts, :tokens]
        if order is not None:
            states = states.gather(1, order.argsort(1)[..., None].expand_as(states))
        return BaseModelOutput(last_hidden_state=states)

    def states(self, inputs: dict[str, Tensor], given: dict[str, Any]) -> Tensor:
        """Hidden states of the last layer, [texts, tokens, width]."""
        with causal_attention(self.transformer.config) if self.causal else nullcontext():
            states: Tensor = self.original(**inputs, **given).last_hidden_state
        return states

    def _takes(self, inputs: dict[str, Tensor], given: dict[str, Any]) -> bool:
        """Whether this is a training pass over tokens that gives the last layer's states."""
        ids = inputs.get("input_ids")
        return (
            ids is not None
            and torch.is_grad_enabled()
            and ids.ndim == 2
            and all(value.shape == ids.shape and value.device == self.anchor.device for value in inputs.values())
            and {"input_ids", "attention_mask"} <= inputs.keys() <= _TAKEN
            and all(value is None or value is (name == "return_dict") for name, value in given.items())
            and not self.transformer.training
            and not any(map(_is_special, self.transformer.modules()))
        )

    def _padded(self, name: str, value: Tensor) -> Tensor:
        """A few more tokens, and texts that repeat the last one, so that there are few shapes."""
        texts, tokens = value.shape
        more = -tokens % (_SHORT if tokens <= 2 * _LONG else _LONG)
        config = self.transformer.config
        if tokens + more > (getattr(config, "max_position_embeddings", None) or tokens):
            more = 0
        fill = getattr(config, "pad_token_id", None) or 0 if name == "input_ids" else 0
        value = F.pad(value, (0, more), value=fill)
        return torch.cat([value, value[-1:].expand(-texts % _TEXTS, -1)])

    def _free_slot(self) -> tuple[_Slot, _User]:
        for slot in self.slots:
            if (user := slot.take()) is not None:
                return slot, user
        self.slots.append(slot := _Slot())
        user = slot.take()
        assert user is not None
        return slot, user

    def _recording(self, slot: _Slot, key: Any, inputs: dict[str, Tensor], given: dict[str, Any]) -> _Recording | None:
        """That of a slot and a shape, made where the shape was seen before."""
        if key in slot.recordings and slot.recordings[key].reads_current_weights():
            return slot.recordings[key]
        slot.recordings.pop(key, None)
        full = sum(len(slot.recordings) for slot in self.slots) >= _MOST
        if key not in self.seen or full or _free_bytes() < _ROOM * self.seen[key]:
            return None
        try:
            slot.recordings[key] = _Recording(self, inputs, given, slot.pool)
        except RuntimeError as error:
            self.failed = True
            logger.info("no CUDA graphs from here on: %s", error)
            cuda.empty_cache()
        return slot.recordings.get(key)


def _is_special(module: nn.Module) -> bool:
    """Whether a module's passes differ from each other, or somebody wants to see each of them."""
    return bool(
        (isinstance(module, nn.Dropout) and module.training and module.p)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _free_bytes() -> int:
    """Memory of the GPU that nothing uses, what torch keeps for itself included."""
    return int(cuda.mem_get_info()[0] + cuda.memory_reserved() - cuda.memory_allocated())
