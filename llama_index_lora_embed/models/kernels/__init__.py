"""Kernels: what torch, peft and transformers compute, faster or in less memory.

Each module has one switch and one parity test (in `tests/models/kernels/`), and says when it can be deleted.

| module | used in | replaces | switch |
|---|---|---|---|
| `attention` | training, evaluation | torch's attention in bfloat16, and of packed texts | `fused_attention=False` |
| `packing` | training | padding in an encoder's layers | `fused_attention=False` |
| `activations` | training | float32 activations for the backward pass | `ObjectiveSettings(mini_batch_size=None)` |
| `lora` | training | peft's forward of a LoRA layer | `fused_lora=False` |
| `decoders` | training on a GPU | RMSNorm, rotary embedding and gated MLP of decoders | `fused_decoder=False` |
| `cuda_graphs`, `causal` | training on a GPU | the launch of each kernel, masks of decoders | `cuda_graphs=False` |
| `precision` | training, evaluation | float32 | `precision="fp32"` |
| `linear` | embedding, evaluation | torch's float32 matrix product | `torch.backends.mkldnn.enabled = False` |
| `parallel` | embedding, evaluation | one forward pass on all threads | `torch.set_num_threads(1)` |

`fused_attention`, `fused_lora`, `fused_decoder`, `cuda_graphs` and `precision` are fields of `TrainingSettings` and
keywords of `LoraFinetuneEngine`; `lora` and `precision` work on processors and GPUs, others that do not say so on
processors alone. `training_kernels` in `step` applies those of a training step.
"""
