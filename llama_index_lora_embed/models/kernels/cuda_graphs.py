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
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, cuda, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import import_utils

from llama_index_lora_embed.models.kernels.causal import causal_attention, is_causal, moved_to_start

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)
aten: Any = torch.ops.aten
_DEVICE = "cuda"
_READ = "last_hidden_state"
_TAKEN = {"input_ids", "attention_mask", "token_type_ids"}
_MOST = 16  # recordings; passes of further shapes are computed as always
_LOCK = threading.Lock()  # one recording at a time: each waits for the whole GPU first
# operations that wait for the GPU, and those that copy to it where their tensors are on two devices
_WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim}
_COPIES = {aten._to_copy, aten.copy_}
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
    reads: Any = getattr(model[0], "modality_config", {}).get("text", {})
    causal = is_causal(transformer, model.max_seq_length)
    left = getattr(model.tokenizer, "padding_side", "right") == "left"
    # another output than the last hidden states would be missing
    if reads.get("method_output_name") != _READ or (left and not causal):
        yield False
        return
    transformer.forward = _RecordedForward(transformer, causal)
    try:
        yield True
    finally:
        del transformer.forward
        cuda.empty_cache()


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
        self.parameters = forward.trained()
        self.places = [parameter.data_ptr() for parameter in self.parameters]
        self.graphs = cuda.CUDAGraph(), cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": pool, "stream": forward.stream, "capture_error_mode": "thread_local"}
        with _leaves_of_its_own(forward.transformer) as leaves:
            forward.stream.wait_stream(cuda.current_stream())
            with cuda.stream(forward.stream):  # libraries prepare themselves for a stream, which cannot be recorded
                with _Legal(), _transformers_records():  # type: ignore[no-untyped-call]
                    states = forward.states(self.inputs, given)
                _gradients(states, leaves, torch.zeros_like(states))
                del states
            cuda.current_stream().wait_stream(forward.stream)
            with _no_garbage_collection():
                with cuda.graph(self.graphs[0], **options):
                    states = forward.states(self.inputs, given)
                self.incoming = torch.zeros_like(states)
                with cuda.graph(self.graphs[1], **options):
                    self.gradients = _gradients(states, leaves, self.incoming)
        self.states = states.detach()
        # what the graphs read must stay where it is
        self.memory = [value.data for value in (*forward.transformer.parameters(), *forward.transformer.buffers())]

    def trains(self, parameters: list[nn.Parameter]) -> bool:
        """Whether these are its parameters, where they were when it was made."""
        return [parameter.data_ptr() for parameter in parameters] == self.places

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


def _gradients(states: Tensor, leaves: list[nn.Parameter], incoming: Tensor) -> list[Tensor | None]:
    """Gradients of the leaves, laid out like them, as fused optimizers need it."""
    with torch.autocast(_DEVICE, enabled=False):
        found = torch.autograd.grad(states, leaves, incoming, allow_unused=True)
        return [None if gradient is None else gradient.contiguous() for gradient in found]


@contextmanager
def _leaves_of_its_own(transformer: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Within it the trained parameters are other leaves with the same memory; yields them, each once.

    autograd remembers on which stream a leaf was first used, as long as a graph of that pass is alive, and to wait for
    that stream would end a recording.
    """
    own: dict[nn.Parameter, nn.Parameter] = {}
    places = [
        (module, name, parameter)
        for module in transformer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = own.setdefault(parameter, nn.Parameter(parameter.detach()))
        yield list(own.values())
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


class _Legal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at operations that wait for the GPU or copy from the processor, which would break a recording."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        devices = {value.device.type for value in tree_leaves((args, result)) if isinstance(value, Tensor)}
        copies = function.overloadpacket in _COPIES and len(devices) > 1
        if copies or (function.overloadpacket in _WAITING and _DEVICE in devices):
            raise RuntimeError(f"{function} cannot be recorded")
        return result


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


@contextmanager
def _transformers_records() -> Iterator[None]:
    """Within it transformers takes the path of a recording, which reads no masks."""
    before = import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = lambda: True
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = before


class _Replay(torch.autograd.Function):
    """A recorded pass; arguments of `apply`: a tensor that requires gradients, the recording, its inputs and user."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recording: _Recording, inputs: dict[str, Tensor], user: _User) -> Tensor:
        ctx.recording, ctx.user = recording, user
        return recording.replay(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if ctx.user is None:
            raise RuntimeError("a recorded pass can be differentiated once; cuda_graphs=False allows more")
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
        self.stream = cuda.Stream(transformer.device)  # type: ignore[no-untyped-call]
        self.anchor = torch.zeros((), requires_grad=True, device=transformer.device)
        self.slots: list[_Slot] = []
        self.seen: dict[Any, int] = {}  # shapes, and the bytes that their activations took
        self.refused: set[Any] = set()  # shapes for which there was no memory
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
                states, keep = self._plain(inputs, given), [user]
                if states.requires_grad:
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

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained now."""
        return [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]

    def _plain(self, inputs: dict[str, Tensor], given: dict[str, Any]) -> Tensor:
        """The states of a pass that is not recorded; recordings give their memory to it if there is too little."""
        try:
            return self.states(inputs, given)
        except torch.OutOfMemoryError:
            if not any(slot.recordings for slot in self.slots):
                raise
        self._stop("there is too little memory for them")
        return self.states(inputs, given)

    def _stop(self, why: object) -> None:
        logger.info("no CUDA graphs from here on: %s", why)
        self.failed, self.slots = True, []
        gc.collect()
        cuda.empty_cache()

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
            and not getattr(self.transformer.config, "output_hidden_states", False)  # losses switch it on
            and any(parameter.requires_grad for parameter in self.transformer.parameters())
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
        known = slot.recordings.get(key)
        if known is not None and known.trains(self.trained()):
            return known
        slot.recordings.pop(key, None)
        full = sum(len(slot.recordings) for slot in self.slots) >= _MOST
        if key not in self.seen or key in self.refused or full:
            return None
        cuda.empty_cache()
        if cuda.mem_get_info()[0] < _ROOM * self.seen[key]:
            self.refused.add(key)
            return None
        stream = cuda.current_stream()
        try:
            with _LOCK:
                slot.recordings[key] = _Recording(self, inputs, given, slot.pool)
        except RuntimeError as error:
            cuda.set_stream(stream)  # a recording that breaks leaves its own
            self._stop(error)
            return None
        return slot.recordings[key]


def _is_special(module: nn.Module) -> bool:
    """Whether a module's passes differ from each other, or somebody wants to see each of them."""
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    return bool(
        (isinstance(module, nn.Dropout) and module.training and module.p)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters)
    )
