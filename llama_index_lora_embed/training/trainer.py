"""sentence-transformers' trainer with atomic checkpoints, this package's samplers, and errors that say what to do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import GradientCheckpointingLayer, PrinterCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState

from llama_index_lora_embed.core.errors import DeviceMemoryError, NonFiniteLossError, warn_user
from llama_index_lora_embed.models.adapter_directory import WEIGHTS_NAME
from llama_index_lora_embed.models.kernels.precision import autocast
from llama_index_lora_embed.models.windows import COUNTS
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.arguments import recomputes_activations
from llama_index_lora_embed.training.checkpointing.checkpoints import step_of, write_checkpoint
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.lora import check_finite, restore_weights
from llama_index_lora_embed.training.objectives.collator import GroupCollator
from llama_index_lora_embed.training.objectives.samplers import ExampleBatchSampler, GroupBatchSampler

if TYPE_CHECKING:
    from llama_index_lora_embed.training.arguments import LoraTrainingArguments

_LOSS_WEIGHTS = "loss.safetensors"
_SHORT = 64  # tokens below which texts are not worth shortening


class LoraTrainer(SentenceTransformerTrainer):
    """Trains one adapter, by default without dropout in the frozen base, and writes complete checkpoints or none.

    A checkpoint holds the `selection`, and records what decides the result of the run (`run_record`) and what the run
    found by trying (`resolved`).

    Args:
        precision: Of the steps, "bf16" or "fp32".
        base_dropout: Leave the frozen base's dropout on.
        warmup_ratio: Share of all steps; None leaves warmup to the arguments.
        discard_evaluations: Do not load a checkpoint's evaluations, which cannot be compared with new ones.
        **kwargs: As for SentenceTransformerTrainer.
    """

    args: LoraTrainingArguments

    def __init__(
        self,
        *,
        selection: CheckpointSelection,
        precision: str,
        base_dropout: bool = False,
        warmup_ratio: float | None,
        run_record: dict[str, Any],
        resolved: dict[str, Any] | None = None,
        discard_evaluations: bool = False,
        **kwargs: Any,
    ) -> None:
        self.selection = selection
        self.precision = precision
        self.base_dropout = base_dropout
        self.warmup_ratio = warmup_ratio
        self.run_record = run_record
        self.resolved = resolved or {}
        self.discard_evaluations = discard_evaluations
        self.saved_step = -1
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # without a progress bar, it prints a dict at each log

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the adapter's README is written with the manifest."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning-rate schedule over the steps that are really taken, with a warmup in which every step learns.

        Step i of a warmup of n steps, counted from 1, has i/(n + 1) of the peak; transformers starts at 0, and rounds
        the warmup up, so that a run of one step would have rate 0.
        """
        if self.warmup_ratio is not None:
            self.args.warmup_steps = round(self.warmup_ratio * num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR) and (warmup := self.args.get_warmup_steps(num_training_steps)):
            scheduler.lr_lambdas = [partial(_factor, warmup, factor) for factor in scheduler.lr_lambdas]
            _set_rates(scheduler)
        return scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by this package's samplers.

        Every process gets the whole batches of groups, because all passages of a batch are negatives; the collator
        tokenizes this process's share. Batches of examples are given to the processes in turn; accelerate would skip
        those that are not full.
        """
        collator: Any = self.data_collator
        data: Any = self.train_dataset
        world, size = distributed.world_size(), self.args.train_batch_size
        sampler: GroupBatchSampler | ExampleBatchSampler
        if isinstance(collator, GroupCollator):
            sampler = GroupBatchSampler(data, size * world, False, seed=self.args.seed)
        else:
            make: Any = self.args.batch_sampler
            if getattr(make, "func", make) is not ExampleBatchSampler:  # the user's own sampler
                return super().get_train_dataloader()
            sampler = make(data, size, False, seed=self.args.seed, rank=distributed.rank(), world=world)
        loader: DataLoader[Any] = DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # as if there were one process; accelerate still moves tensors to the device and sets the epoch
        loader = prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)
        return loader

    def compute_loss_context_manager(self) -> ExitStack:
        """Autocast for the loss alone; evaluations choose their own precision."""
        stack = ExitStack()
        stack.enter_context(autocast(self.precision, self.args.device))
        return stack

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One step; stops at the first loss that is not finite, before it changes the weights.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite.
            DeviceMemoryError: The device's memory does not hold the step.
        """
        longest = max((t.shape[-1] for name, t in inputs.items() if name.endswith("input_ids")), default=0)
        longest *= max((int(t.max()) for name, t in inputs.items() if name.endswith(COUNTS)), default=1)
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            collator: Any = self.data_collator
            chunk = getattr(collator, "mini_batch_size", None)
            gradcache = isinstance(collator, GroupCollator) and not recomputes_activations(self.args)
            size = self.args.per_device_train_batch_size
            raise out_of_memory(size, longest, error, mini_batch_size=chunk, gradcache=gradcache) from error
        if distributed.highest(int(not torch.isfinite(loss))):
            raise self._not_finite(f"a loss of {loss.item()}")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient's norm, which can be infinite or NaN where the loss is finite; then it raises."""
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(torch.as_tensor(norm))):  # the same in all processes, which share their gradients
            raise self._not_finite(f"a gradient of norm {float(norm)}")
        return norm

    def _not_finite(self, got: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{got} at step {self.state.global_step + 1}",
            "a finite number",
            f"Lower learning_rate (now {self.args.learning_rate:g}) or set precision='fp32'; nothing was written, and "
            "earlier checkpoints are intact.",
        )

    def report(self, metrics: dict[str, float]) -> None:
        """Log an evaluation and call the callbacks, as transformers does for its own evaluations."""
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.log({name: round(value, 4) for name, value in named.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss without the frozen base's dropout; `lora_dropout` stays on.

        The base's dropout costs time (random numbers, and torch's slower attention) and gained nothing
        (CONTRIBUTING.md).
        """
        model.train(self.base_dropout)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and hasattr(module, "lora_dropout"):
                module.lora_dropout.train()
            elif isinstance(module, GradientCheckpointingLayer):
                module.training = True  # the layer's own flag alone: in eval mode transformers checkpoints nothing
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss_weights(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters of the loss itself, which are not in the adapter's file."""
        if not isinstance(self.loss, torch.nn.Module):
            return {}
        of_model = {id(parameter) for parameter in self.model.parameters()}
        named = self.loss.named_parameters()
        return {name: p for name, p in named if p.requires_grad and id(p) not in of_model}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # the parent also pickles the arguments, which nothing here loads
        self.model.save_pretrained(str(output_dir or self.args.output_dir), create_model_card=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a complete checkpoint of finite weights, or none; on a full disk, warn and go on."""
        check_finite(self.model, f"at step {self.state.global_step}")
        self.store_flos()
        states = self._random_states()

        def write(folder: Path) -> None:
            self._save(str(folder))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            for name, state in states.items():
                (folder / name).write_bytes(state)
            if weights := self._loss_weights():
                save_file({name: p.detach().cpu().contiguous() for name, p in weights.items()}, folder / _LOSS_WEIGHTS)
            self.selection.save(folder)
            stateful: Any = self.state.stateful_callbacks  # as in transformers' own checkpoints
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    stateful[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

        if distributed.is_main():
            target = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            try:
                write_checkpoint(target, write, self.run_record, self.args.save_total_limit, self.resolved)
                self.saved_step = self.state.global_step
            # torch.save turns a full disk into a RuntimeError, safetensors into an error of its own
            except (OSError, RuntimeError, SafetensorError) as error:
                warn_user(
                    f"The checkpoint of step {self.state.global_step} could not be written to {str(target)!r} "
                    f"({type(error).__name__}: {error}). Earlier checkpoints are intact. "
                    + ("" if self.control.should_training_stop else "Training goes on: free some space until the next.")
                )
        self.saved_step = distributed.share(self.saved_step)

    def save_now(self) -> bool:
        """Save a checkpoint of this step unless there is one; return whether there is one now."""
        if self.saved_step != self.state.global_step:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return self.saved_step == self.state.global_step

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load weights, evaluations and state of a checkpoint before training goes on."""
        self._load_from_checkpoint(str(checkpoint))
        self.discard_evaluations = True  # train() loads the checkpoint again, which must not undo new evaluations
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _random_states(self) -> dict[str, bytes]:
        """Random states of every process: file name to content."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            own = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        if distributed.world_size() == 1:
            return own
        gathered: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(gathered, own)
        return {name: state for part in gathered for name, state in part.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        stored = load_file(path / WEIGHTS_NAME)  # undamaged: `latest_checkpoint` has verified it
        restore_weights(self.model, {name.removeprefix("base_model.model."): t for name, t in stored.items()})
        if weights := self._loss_weights():
            kept = load_file(path / _LOSS_WEIGHTS)
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.copy_(kept[name])
        if not self.discard_evaluations:
            self.selection.load(path)
        self.saved_step = step_of(path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, but keep this run's learning rate and decay, which `allow_changes` may have changed."""
        optimizer: Any = self.optimizer
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = self.lr_scheduler
        if checkpoint is None or not hasattr(scheduler, "lr_lambdas"):
            return
        scheduler.base_lrs = [group.get("initial_lr", self.args.learning_rate) for group in fresh]
        for group, options in zip(optimizer.param_groups, fresh, strict=True):
            group.update(options)
        _set_rates(scheduler)


def _factor(warmup: int, factor: Callable[[int], float], step: int) -> float:
    """Share of the peak rate after `step` steps; `factor` is that of transformers, which starts at 0."""
    return (step + 1) / (warmup + 1) if step < warmup else factor(step)


def _set_rates(scheduler: LambdaLR) -> None:
    """Set the rates of a scheduler's present step."""
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def out_of_memory(
    batch_size: int, tokens: int, error: BaseException, *, mini_batch_size: int | None, gradcache: bool
) -> DeviceMemoryError:
    """An error that suggests what can be done about a step that the device's memory does not hold.

    `tokens` are those of its longest text; `gradcache` says whether the objective can be computed in chunks, which hold
    `mini_batch_size` texts if that is done already.
    """
    advice = []
    if gradcache and mini_batch_size is None:
        size = max(1, min(8, batch_size // 4))
        advice.append(
            f"compute the batch in chunks (GradCache) with objective=ObjectiveSettings(mini_batch_size={size}) or fewer"
        )
    elif gradcache and mini_batch_size is not None and mini_batch_size > 1:
        advice.append(f"lower mini_batch_size from {mini_batch_size} to {mini_batch_size // 2} or fewer")
    if batch_size >= 4:  # a batch of one has no negatives
        advice.append(f"batch_size={batch_size // 2}")
    if tokens > _SHORT:
        advice.append(f"max_seq_length={max(_SHORT, tokens // 2)}")
    advice += [
        "batch_size='auto', if it is not that already",
        "a smaller base",
        "or free device memory that other programs use",
    ]
    return DeviceMemoryError(
        f"too little device memory for a step of batch_size={batch_size} with texts of up to {tokens} tokens "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
        "a step that fits",
        f"One of these helps: {'; '.join(advice)}.",
    )
