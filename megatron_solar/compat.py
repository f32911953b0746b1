"""Every call into megatron-core, written for 0.16.1. Nothing else imports megatron.

On CUDA the layers are Transformer Engine's where it is installed, otherwise megatron's own; on the
CPU megatron's own with the RMSNorm below, since torch's wrapper refuses sequence parallelism, and with the
attention below where context ranks share a sequence, since megatron's own does not know of them.
"""

import copy
import dataclasses
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor

from megatron_solar.apex_choice import choose_apex, weight_gradient_fusion
from megatron_solar.context_parallel import causal_mask, in_order_of_tokens, share_of_sequence
from megatron_solar.prebuilt_index import check_prebuilt
from megatron_solar.rope import inverse_frequencies
from megatron_solar.sample_order import OrderedSamples, build_index
from megatron_solar.sample_request import SampleRequest
from megatron_solar.weights import PRECISION_DTYPES, padded_vocab_size, vocabulary_rows
from orchestrator.layout import ParallelLayout
from orchestrator.model_shape import TransformerShape
from orchestrator.settings import PrecisionSettings, TrainingSettings

HAS_WEIGHT_GRADIENT_KERNEL = choose_apex()  # before megatron, which takes whatever is called apex
"""Whether Apex's kernel is here; nothing else of Apex is used."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # missing optional kernels and deprecations of torch, 20 lines a rank
    from megatron.core import parallel_state
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.megatron_tokenizer import MegatronLegacyTokenizer
    from megatron.core.datasets.utils import Split
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

# megatron logs its own start-up at INFO and WARNING from every rank; errors are what a log needs.
logging.getLogger("megatron").setLevel(logging.ERROR)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with the statistics in fp32, as Hugging Face's Llama computes it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # With sequence parallelism each rank sees its part of the tokens; megatron then sums these gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Return the normalized and scaled input, in its own type."""
        wide = x_SBH.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x_SBH.dtype)


class GatheringAttention(DotProductAttention):
    """megatron's own attention over sequences that context-parallel ranks share, by gathering keys and values.

    A rank holds the keys and values of whole sequences for as long as a layer computes; the backward pass adds up what
    all ranks' queries want of them. Never run on a GPU: there Transformer Engine has its own, which passes them on in
    a ring.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # megatron-core 0.16.1 refuses to build it otherwise
        super().__init__(alone, *arguments, **options)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        """Attend from a rank's tokens, [sequence / ranks, batch, heads, size], to all that are before them."""
        group = parallel_state.get_context_parallel_group()
        key, value = (
            in_order_of_tokens(gather_from_sequence_parallel_region(part.contiguous(), group=group), group.size())
            for part in (key, value)
        )
        mask = causal_mask(key.shape[0], group.rank(), group.size(), key.device)
        context: Tensor = super().forward(query, key, value, mask, **options)
        return context


class PaddedGPTModel(GPTModel):
    """GPTModel whose loss knows nothing of the rows that pad the vocabulary.

    megatron-core's cross entropy sums over every column, padding included: zero weights would still add
    exp(0) for each, and would be trained. With -inf their share and their gradient are exactly zero.
    """

    real_columns: int
    """Of this rank's logits."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the cross entropy of each token, [batch, sequence], over the unpadded vocabulary."""
        if self.real_columns < logits.shape[-1]:
            logits[..., self.real_columns :] = -math.inf
        loss: Tensor = super().compute_language_model_loss(labels, logits)
        return loss


def initialize_parallel(layout: ParallelLayout, seed: int, *, timeout_seconds: float = 1800) -> None:
    """Build the process groups of a layout; torch.distributed is initialized already.

    Args:
        timeout_seconds: how long a collective in one of them may take, rounded up to minutes.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline_parallel if layout.virtual_pipeline_parallel > 1 else None
        ),
        context_parallel_size=layout.context_parallel,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    model_parallel_cuda_manual_seed(seed)


def tensor_rank() -> int:
    """This rank's place on the tensor-parallel axis."""
    return int(parallel_state.get_tensor_model_parallel_rank())


def data_rank() -> int:
    """This rank's place on the data-parallel axis: which samples it reads."""
    return int(parallel_state.get_data_parallel_rank())


def replica_rank() -> int:
    """This rank's number among those with the same weights, over the data- and the context-parallel axis."""
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def context_ranks() -> int:
    """How many ranks share a sequence."""
    return int(parallel_state.get_context_parallel_world_size())


def context_share(whole_BS: Tensor) -> Tensor:
    """Return this rank's tokens of whole sequences."""
    if context_ranks() == 1:
        return whole_BS
    return share_of_sequence(whole_BS, 1, parallel_state.get_context_parallel_rank(), context_ranks())


def is_last_stage() -> bool:
    """Whether this rank holds the output layer."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used."""
    return importlib.util.find_spec("transformer_engine") is not None


def transformer_config(
    shape: TransformerShape,
    layout: ParallelLayout,
    training: TrainingSettings,
    precision: PrecisionSettings,
    device: str,
) -> TransformerConfig:
    """Return megatron's configuration of a shape on a layout."""
    dtype = PRECISION_DTYPES[precision.dtype]
    on_cpu = device == "cpu"
    interleaved = layout.virtual_pipeline_parallel > 1
    return _without_warnings(
        TransformerConfig,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_size,
        layernorm_epsilon=shape.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == "bf16",
        **_fp8_config(precision),
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_parallel if interleaved else None,
        sequence_parallel=layout.sequence_parallel and layout.tensor_parallel > 1,
        context_parallel_size=layout.context_parallel,
        recompute_granularity=None if layout.recompute == "none" else layout.recompute,
        recompute_method=layout.recompute_method if layout.recompute == "full" else None,
        recompute_num_layers=layout.recompute_layers if layout.recompute == "full" else None,
        use_cpu_initialization=on_cpu,
        deterministic_mode=training.deterministic,
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        # Kernels that exist for CUDA only.
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=not on_cpu,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=_fusion(device) == "all",
        cross_entropy_loss_fusion=False,
    )


def _fusion(device: str) -> str:
    return weight_gradient_fusion(
        device, has_transformer_engine=has_transformer_engine(), has_kernel=HAS_WEIGHT_GRADIENT_KERNEL
    )


def _fp8_config(precision: PrecisionSettings) -> dict[str, Any]:
    """Return megatron's settings of FP8. Without Transformer Engine it ignores them without a word (fp8_proof.py)."""
    if precision.fp8 == "none":
        return {}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8,
        "first_last_layers_bf16": bool(precision.first_bf16_layers or precision.last_bf16_layers),
        "num_layers_at_start_in_bf16": precision.first_bf16_layers,
        "num_layers_at_end_in_bf16": precision.last_bf16_layers,
        "fp8_amax_history_len": precision.amax_history,
        "fp8_amax_compute_algo": precision.amax_choice,
    }


def fp8_recipe(config: TransformerConfig) -> Any:
    """Return the recipe that megatron hands to Transformer Engine for a configuration in FP8."""
    from megatron.core.fp8_utils import get_fp8_recipe  # asks for Transformer Engine

    return get_fp8_recipe(config)


def build_chunk(
    shape: TransformerShape, config: TransformerConfig, sequence_length: int, device: str, virtual_stage: int | None
) -> GPTModel:
    """Build the part of the model that this rank holds as one pipeline chunk.

    Its logits have a column for each row of padding; in the loss they count nothing.
    """
    ranks = config.tensor_model_parallel_size
    if device == "cuda" and has_transformer_engine():
        spec: Any = get_gpt_layer_with_transformer_engine_spec()
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if config.context_parallel_size > 1:
            layer.submodules.self_attention.submodules.core_attention = GatheringAttention
        layers = get_num_layers_to_build(config, vp_stage=virtual_stage)
        # Passed explicitly: megatron's own choice is torch's, which refuses sequence parallelism.
        spec = TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
    chunk = PaddedGPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(shape.vocab_size, ranks),
        max_sequence_length=sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        vp_stage=virtual_stage,
    )
    if _fusion(device) == "layers":
        # Set where Transformer Engine's layers read it in each step; megatron's one option for all needs Apex.
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    chunk.real_columns = vocabulary_rows(shape.vocab_size, tensor_rank(), ranks)
    # megatron-core 0.16.1 scales by `factor` alone, with Llama 3.1's own values for the rest.
    chunk.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(chunk.rotary_pos_emb.inv_freq.device)
    return chunk


def layer_offset(config: TransformerConfig, virtual_stage: int | None) -> int:
    """Return the model's index of the first layer of a chunk."""
    return int(get_transformer_layer_offset(config, vp_stage=virtual_stage))


def wrap_data_parallel(
    config: TransformerConfig, chunk: GPTModel, is_first: bool, layout: ParallelLayout
) -> DistributedDataParallel:
    """Wrap a chunk for gradient reduction with the distributed optimizer."""
    return DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=layout.overlap_gradient_reduce,
            overlap_param_gather=layout.overlap_parameter_gather,
            bucket_size=layout.bucket_parameters or None,
            use_distributed_optimizer=True,
        ),
        module=chunk,
        disable_bucketing=not is_first,
    )


def connect_schedule(
    config: TransformerConfig, chunks: Sequence[DistributedDataParallel], optimizer: Any, layout: ParallelLayout
) -> None:
    """Tell megatron's schedules how to scale a loss and when to reduce gradients, as Megatron-LM's training does.

    With overlap a reduction starts in the backward pass of the last micro-batch; stages of a pipeline after the first
    start theirs together, when they have nothing else to do. Gathering needs no more than the hooks of the wrapped
    chunks.
    """
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if layout.overlap_gradient_reduce:
        waits = [chunk.no_sync for chunk in chunks]
        starts = [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func = waits if len(chunks) > 1 else waits[0]
        config.grad_sync_func = starts if len(chunks) > 1 else starts[0]


def complete_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Have this rank hold the newest weights whole; collective over the replicas.

    With `overlap_parameter_gather` an optimizer's step leaves each rank with its own part of them, and the next
    forward pass gathers the others'. Whoever reads weights before that calls this first; otherwise it does nothing.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _without_warnings(build: Callable[..., Any], **options: Any) -> Any:
    """Call a constructor of megatron's without its notes on options that were not set here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(**options)


def build_optimizer(
    training: TrainingSettings,
    precision: PrecisionSettings,
    chunks: Sequence[DistributedDataParallel],
    frozen_steps: Mapping[torch.nn.Parameter, int] = MappingProxyType({}),
) -> Any:
    """Build the distributed Adam over a rank's chunks, its state filled with zeros.

    Args:
        frozen_steps: over how many steps from the first one a parameter keeps its bits; others are not in it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.optim.swa_utils of megatron's import
        config = OptimizerConfig(
            optimizer="adam",
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_eps,
            clip_grad=training.gradient_clip,
            bf16=precision.dtype == "bf16",
            params_dtype=PRECISION_DTYPES[precision.dtype],
            fp8_recipe=None if precision.fp8 == "none" else precision.fp8,
            use_distributed_optimizer=True,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        )
        groups = _parameter_groups(training, chunks, config, frozen_steps)
        optimizer = get_megatron_optimizer(config, list(chunks), groups)
    for part in _parts(optimizer):
        if isinstance(part.optimizer, _TORCH_ADAMS):
            _prefill(part.optimizer)
        else:  # Transformer Engine's, by megatron's own rule; never run yet
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def _parameter_groups(
    training: TrainingSettings,
    chunks: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    frozen_steps: Mapping[torch.nn.Parameter, int],
) -> dict[ParamKey, Any]:
    """Return what groups of parameters have of their own: megatron's (norms do not decay), and those of a run.

    A parameter takes what all its keys say. Transformer Engine's Adam counts steps for each group, so that parts
    that thaw at the same step are one.
    """
    groups: dict[ParamKey, Any] = dict(get_standard_config_overrides(config))
    for steps in sorted(set(frozen_steps.values())):
        is_frozen = ParamPredicate(f"frozen {steps}", lambda each, steps=steps: frozen_steps.get(each) == steps)
        groups[ParamKey(predicate=is_frozen)] = {"frozen_steps": steps}
    if not training.decay_embeddings:
        is_tied = any(chunk.module.share_embeddings_and_output_weights for chunk in chunks)
        names = ("*.word_embeddings.weight", *(["*.output_layer.weight"] if is_tied else []))
        groups[ParamKey(name=names)] = {"wd_mult": 0.0}
    return groups


def set_learning_rate(optimizer: Any, learning_rate: float, weight_decay: float) -> None:
    """Set this step's rate; norms carry no weight decay, as megatron's groups say."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def gradient_norm(optimizer: Any, step: int) -> float:
    """Return the global norm of the gradients, which now lie in the optimizer in fp32; collective.

    What is frozen in the step, counted from 1, has none from here on: neither norm nor Adam sees it.
    """
    optimizer.prepare_grads()
    for group in optimizer.param_groups:
        if step <= group.get("frozen_steps", 0):
            for parameter in group["params"]:
                parameter.grad = None
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: Any, norm: float) -> None:
    """Clip the gradients by their global norm, step, and give the new weights to all replicas; collective.

    With `gradient_norm` before it this is the optimizer's own `step`, cut in two so that a step whose gradients
    are no good can be left out. Transformer Engine's Adam counts a step for groups without gradients as well, which
    is taken back (never run yet).
    """
    for part in _parts(optimizer):
        parameters = [parameter for parameter in part.get_parameters() if parameter.grad is not None]
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    for part in _parts(optimizer):
        for group in [] if isinstance(part.optimizer, _TORCH_ADAMS) else part.optimizer.param_groups:
            if group["params"] and all(parameter.grad is None for parameter in group["params"]):
                group["step"] -= 1


def watch_local_gradients(chunks: Sequence[DistributedDataParallel], see: Callable[[int, Tensor], None]) -> None:
    """Have each part of this rank's own gradients seen when it is complete, before replicas add theirs to it.

    megatron starts the reduction of a group of buckets in one place, overlapped with the backward pass or not.

    Args:
        see: gets the part's number and its gradients; with overlap a part may come twice in the first step.
    """

    def watched(group: Any, first: int) -> Callable[..., Any]:
        start = group.start_grad_sync

        def start_grad_sync(*arguments: Any, **options: Any) -> Any:
            for number, bucket in enumerate(group.buckets, first):
                see(number, bucket.grad_data)
            return start(*arguments, **options)

        return start_grad_sync

    count = 0
    for chunk in chunks:
        for group in chunk.bucket_groups:
            group.start_grad_sync = watched(group, count)
            count += len(group.buckets)


def gather_over_replicas(values: Tensor) -> Tensor:
    """Return every replica's values, [replicas, ...], in the order of `ranks_of_replicas`; collective."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    everyone = [torch.empty_like(values) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, values, group=group)
    return torch.stack(everyone)


def ranks_of_replicas() -> list[int]:
    """Return the ranks that should hold the same weights as this one, itself included."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return list(torch.distributed.get_process_group_ranks(group))


def run_schedule(
    forward_step: Callable[..., Any],
    chunks: Sequence[Any],
    batches: Sequence[dict[str, Tensor]],
    layout: ParallelLayout,
    sequence_length: int,
    *,
    forward_only: bool = False,
) -> list[Tensor]:
    """Run megatron's schedule (none, plain pipeline or interleaved) over a step's micro-batches.

    The batches are whole sequences; of these a context-parallel rank computes its share.

    Returns:
        the loss of each micro-batch on the last stage, an empty list elsewhere.
    """
    if forward_only:
        complete_weights(chunks)
    shares = [{name: context_share(part_BS) for name, part_BS in batch.items()} for batch in batches]
    iterators = [iter(shares) for _ in chunks]
    results: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=layout.micro_batch_size,
        forward_only=forward_only,
    )
    return results


class _Ids(MegatronLegacyTokenizer):
    """What GPTDataset wants to know of a tokenizer: its identity and its end of document."""

    def __init__(self, fingerprint: str, vocab_size: int, end_of_document: int) -> None:
        super().__init__(fingerprint)
        self._size = vocab_size
        self._end = end_of_document

    def tokenize(self, text: str) -> Any:
        raise TypeError("the training loop reads token ids only")

    @property
    def vocab(self) -> Any:
        raise TypeError("the training loop reads token ids only")

    @property
    def inv_vocab(self) -> Any:
        raise TypeError("the training loop reads token ids only")

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def eod(self) -> int:
        return self._end

    @property
    def pad(self) -> int:
        return -1


@dataclasses.dataclass(frozen=True)
class EpochOpener:
    """Opens an epoch of a shard: a GPTDataset of exactly one epoch, in the order of `sample_order`."""

    request: SampleRequest
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Prefixes to read in place of a shard's own, by which megatron calls its index files."""

    def __call__(self, folder: Path, prefix: str, epoch: int, *, is_built: bool) -> GPTDataset:
        """Open epoch `epoch` of the shard at `prefix`, with its indexes in `folder`."""
        request = self.request
        config = _without_warnings(
            GPTDatasetConfig,
            random_seed=request.seed + epoch,
            sequence_length=request.data.sequence_length,
            blend_per_split=[([prefix], None), None, None],
            path_to_cache=str(folder),
            fast_cache_load=is_built,  # never builds, and does without the documents' numbers
            tokenizer=_Ids(request.tokenizer_sha256, request.vocab_size, request.end_of_document),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = GPTDataset.build_low_level_dataset(self.copies.get(prefix, prefix), config)
        numbers = None if is_built else np.arange(len(documents), dtype=np.int32)
        return _without_warnings(
            GPTDataset,
            indexed_dataset=documents,
            dataset_path=prefix,
            indexed_indices=numbers,
            num_samples=None,
            index_split=Split.train,
            config=config,
        )


def blend(shards: NDArray[np.int16], samples: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
    """Fill the shard of each sample and its number within the shard, by weights that sum to one."""
    helpers.build_blending_indices(shards, samples, weights, len(weights), len(shards), False)


def build_datasets(request: SampleRequest, cache: Path, copies: Mapping[str, str]) -> dict[str, OrderedSamples]:
    """Open the samples of each split in the order of `sample_order`; rank 0 builds the index, the others wait.

    Where `data.index` names a folder nothing is built. Collective where torch.distributed is initialized.

    Args:
        copies: prefixes of shards to read in place of their own.

    Returns:
        them by their split, as `request.sources` has them; an item has int64 `tokens`, `labels` and `position_ids` of
        sequence_length.

    Raises:
        DataError: the index that was built ahead is not of these samples, or not whole.
    """
    digests, open_epoch = request.digests(), EpochOpener(request, copies)
    folder = Path(request.data.index) if request.data.index else cache
    is_distributed = torch.distributed.is_initialized()
    if not is_distributed or torch.distributed.get_rank() == 0:
        if request.data.index:
            check_prebuilt(folder, request)
        else:
            for name, source in request.sources.items():
                build_index(source, folder / name, digests[name], open_epoch, blend)
    if is_distributed:
        torch.distributed.barrier()
    return {
        name: OrderedSamples(source, folder / name, digests[name], open_epoch)
        for name, source in request.sources.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnedRange:
    """The elements of one parameter that this rank updates: with the distributed optimizer a flat range."""

    name: str
    """Parameter's name in its chunk."""
    chunk: int
    start: int
    stop: int
    states: dict[str, Tensor]
    """`weight` (fp32 master), `exp_avg` and `exp_avg_sq`, each flat, stop - start long; writing to them counts."""


def owned_ranges(chunks: Sequence[DistributedDataParallel], optimizer: Any) -> list[OwnedRange]:
    """Return what this rank owns of weights and optimizer; over all data-parallel ranks each element once.

    The master copy stands for the weight: in bf16 the model's weight is its rounding after every step.
    """
    names = {
        parameter: (name, index)
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
    }
    found = []
    for part in _parts(optimizer):
        for parameter in part.model_param_group_index_map:
            place = part._get_model_param_range_map(parameter)["param"]
            states = part._get_main_param_and_optimizer_states(parameter)
            name, index = names[parameter]
            found.append(
                OwnedRange(
                    name=name,
                    chunk=index,
                    start=place.start,
                    stop=place.end,
                    states={
                        "weight": states["param"].detach(),
                        "exp_avg": states["exp_avg"],
                        "exp_avg_sq": states["exp_avg_sq"],
                    },
                )
            )
    return found


def publish_weights(
    chunks: Sequence[DistributedDataParallel], optimizer: Any, applied_after: Callable[[int], int]
) -> None:
    """Make the model's weights those of the loaded master copies, on every data-parallel rank; collective.

    torch's Adam counts its steps for each parameter, Transformer Engine's for each group.

    Args:
        applied_after: how many of the steps done after a given one had their gradients applied.
    """
    with torch.no_grad():
        for part in _parts(optimizer):
            part._copy_main_params_to_model_params()
            for group in part.optimizer.param_groups:
                step = applied_after(group.get("frozen_steps", 0))
                if isinstance(part.optimizer, _TORCH_ADAMS):
                    for parameter in group["params"]:
                        part.optimizer.state[parameter]["step"] = torch.tensor(float(step))
                else:
                    group["step"] = step
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


def broadcast_from_first_replica(parameter: Tensor) -> None:
    """Give a parameter of the first replica to the others; collective over each such group."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        torch.distributed.broadcast(parameter, torch.distributed.get_global_rank(group, 0), group=group)


_TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


def _parts(optimizer: Any) -> list[Any]:
    """Return the distributed optimizers that megatron may have chained."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _prefill(adam: torch.optim.Optimizer) -> None:
    """Give torch's Adam its state before the first step, so that it can be saved and loaded from step 0 on."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
