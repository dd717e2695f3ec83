"""Which models the decode step of csrc runs in one call, and how their modules become its values and pointers."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models import config, norm, rope_scaling
from llmctl.models.attention import Attention
from llmctl.models.cache import Cache
from llmctl.models.ffn import GatedMlp, Mlp
from llmctl.models.head import softcapped
from llmctl.models.linear import Linear
from llmctl.models.quantized_linear import QuantizedLinear
from llmctl.models.transformer import Block, Stack
from llmctl.ops import decode_step as ops
from llmctl.ops.dispatch import DTYPES, inference_library
from llmctl.ops.sampling import Settings

MAX_TOKENS = 4096
"""Of a prompt so many at once; the step's memory grows with them."""


class NotCovered(Exception):
    """This model, or a part of it, is nothing that the step knows."""


class DecodeStep:
    """Tokens to logits, with the bits of the modules. It borrows the weights of the model as they are when it is made."""

    def __init__(self, model: Stack):
        """Raises NotCovered."""
        self._kept: list[object] = []
        self._dtype = model.embed_tokens.weight.dtype
        self._model = model
        check_stack(model)
        self._layers = (ops.Layer * len(model.layers))(*(self._layer(layer) for layer in model.layers))
        self._decoder = self._described()
        self._rotaries = (ops.Rotary * len(model.rotaries))()
        self._args = ops.Args(n_rotaries=len(self._rotaries))
        self._call = ops.bound(self._decoder, self._args)
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._caches = self._first_keys = None

    @classmethod
    def of(cls, model: Stack) -> DecodeStep | None:
        """None where the model, the device or the settings want the modules."""
        if inference_library() is None:
            return None
        try:
            return cls(model)
        except NotCovered:
            return None

    def __deepcopy__(self, memo: dict) -> DecodeStep:
        """The same for a cache's copy: it is the model's."""
        return self

    def takes(self, ids_BT: torch.Tensor) -> bool:
        is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return is_plain and ids_BT.is_cpu

    def logits(self, ids_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        """[B, V] of what follows the ids, which continue what the cache holds."""
        logits_BV = torch.empty(ids_BT.shape[0], self._decoder.head.n_out, dtype=self._dtype)
        self._args.logits, self._args.sampling = logits_BV.data_ptr(), None
        self._run(ids_BT, cache)
        return softcapped(self._model.config.head, logits_BV)

    def draw(
        self, ids_BT: torch.Tensor, cache: Cache, settings: Settings, position: int, n_steps: int = 1
    ) -> list[torch.Tensor]:
        """The tokens [B] that follow, -1 where logits are NaN; and, of so many steps, those that follow on them, as long as
        there are numbers. With more than one step the settings have neither penalties nor a report."""
        batch = ids_BT.shape[0]
        tokens_NB = torch.empty(n_steps, batch, dtype=torch.int64)
        at, values = tokens_NB.data_ptr(), tokens_NB.numpy()
        self._args.logits, self._args.sampling = None, ops.address(settings.args)
        settings.args.position, self._args.drawn = position, at
        self._run(ids_BT, cache)
        for step in range(1, n_steps):
            if values[step - 1].min() < 0:
                return list(tokens_NB[:step])
            self._point_at(cache, cache.length + 1)
            args = self._args
            args.tokens, args.n_new, args.offset = at + 8 * batch * (step - 1), 1, cache.length
            args.drawn, settings.args.position = at + 8 * batch * step, position + step
            self._call()
            cache.length += 1
        return list(tokens_NB)

    def _run(self, ids_BT: torch.Tensor, cache: Cache) -> None:
        batch, n_new = ids_BT.shape
        end = cache.length + n_new
        if end > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} positions; {end} were asked of it")
        self._point_at(cache, end)
        args, starts_B = self._args, cache.starts_B
        starts_B = None if starts_B is None else starts_B.contiguous()
        args.starts, args.batch, args.capacity = ops.pointer(starts_B), batch, cache.capacity
        at_once = max(1, MAX_TOKENS // batch)
        for chunk_BT in [ids_BT] if n_new <= at_once else ids_BT.split(at_once, 1):
            chunk_BT = chunk_BT.contiguous()
            args.tokens, args.n_new, args.offset = chunk_BT.data_ptr(), chunk_BT.shape[1], cache.length
            self._call()
            cache.length += args.n_new

    def _point_at(self, cache: Cache, end: int) -> None:
        """The structures hold the addresses of this cache, and of tables up to this length."""
        if self._rotaries and end > self._rotaries[0].n_positions:
            self._grow_tables(min(cache.capacity, 2 * end))
        if cache.layers[0].keys is self._first_keys:
            return
        self._first_keys = cache.layers[0].keys
        self._caches = (ops.KvCache * len(cache.layers))(*(ops.kv_cache(*entry.tensors) for entry in cache.layers))
        self._args.caches = ops.address(self._caches)

    def _grow_tables(self, length: int) -> None:
        found = (table.lookup(None, None, 0, length, torch.device("cpu")) for table in self._model.rotaries)
        self._tables = [(cos.to(self._dtype).contiguous(), sin.to(self._dtype).contiguous()) for cos, sin in found]
        for rotary, (cos, sin) in zip(self._rotaries, self._tables, strict=True):
            rotary.cos, rotary.sin, (rotary.n_positions, rotary.dims) = cos.data_ptr(), sin.data_ptr(), cos.shape
        self._args.rotaries = ops.address(self._rotaries)

    def _described(self) -> ops.Decoder:
        model, spec = self._model, self._model.config
        positions = model.embed_positions
        # as the modules multiply: by the scale in the weights' own type
        scale = float(torch.tensor(spec.embedding_scale, dtype=self._dtype))
        return ops.Decoder(
            ops.address(self._layers),
            self._pointer(model.embed_tokens.weight),
            None if positions is None else self._pointer(positions.weight[spec.positions.offset :]),
            self._norm(model.embed_norm),
            self._norm(model.norm),
            self._head(model),
            len(model.layers),
            *model.embed_tokens.weight.shape,
            0 if positions is None else positions.weight.shape[0] - spec.positions.offset,
            scale,
            spec.head.scale,
            ops.dtype(self._dtype),
        )

    def _head(self, model: Stack) -> ops.Matrix:
        if isinstance(model.lm_head, QuantizedLinear):
            return self._matrix(model.lm_head)
        return self._matrix_of(model.head_weight, model.output_bias)

    def _layer(self, block: Block) -> ops.Layer:
        mixer, ffn = block.mixer, block.ffn
        spec = mixer.spec
        is_gated = type(ffn) is GatedMlp
        return ops.Layer(
            *(self._norm(getattr(block, f"mixer_{place}norm")) for place in ("", "output_", "sum_")),
            *(self._norm(getattr(block, f"ffn_{place}norm")) for place in ("", "output_", "sum_")),
            self._norm(mixer.q_norm),
            self._norm(mixer.k_norm),
            *(self._matrix(part) for part in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)),
            self._matrix(ffn.gate_proj) if is_gated else ops.Matrix(),
            self._matrix(ffn.up_proj),
            self._matrix(ffn.down_proj),
            *(spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.window or 0),
            spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            spec.softcap or 0.0,
            spec.qk_norm_over == "head",
            -1 if mixer.rotary is None else mixer.rotary,
            ops.activation(self._model.config.block(mixer.layer).ffn.activation),
        )

    def _norm(self, module: nn.Module) -> ops.Norm:
        check_module(module)
        match module:
            case nn.Identity():
                return ops.Norm()
            case norm.LayerNorm():
                return ops.norm("layer", self._kept_as(module.weight), self._kept_as(module.bias), module.eps)
            case norm.RMSNorm() | norm.OffsetRMSNorm():
                offset = getattr(module, "offset", 0.0)
                return ops.norm("rms", self._kept_as(module.weight), None, module.eps, offset)
        raise NotCovered(type(module).__name__)

    def _matrix(self, module: nn.Module) -> ops.Matrix:
        check_module(module)
        if type(module) is Linear:
            return self._matrix_of(module.weight, module.bias)
        if type(module) is not QuantizedLinear or module.quantized is None or module.columns_K is not None:
            raise NotCovered(type(module).__name__)
        weight = module.quantized.args()
        self._kept += [module.quantized, weight]
        bias = None if module.bias is None else module.bias.to(self._dtype)
        return ops.quantized_matrix(weight, self._kept_as(bias))

    def _matrix_of(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ops.Matrix:
        return ops.matrix(self._kept_as(weight), self._kept_as(bias))

    def _pointer(self, tensor: torch.Tensor) -> int:
        return self._kept_as(tensor).data_ptr()

    def _kept_as(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """The tensor, which stays alive as long as the step; NotCovered where it is not of the model's type or not here."""
        if tensor is None:
            return None
        is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_contiguous()
        if not is_plain or tensor.device.type != "cpu" or tensor.dtype != self._dtype:
            raise NotCovered(f"{tensor.dtype} on {tensor.device}")
        self._kept.append(tensor)
        return tensor


def check_stack(model: Stack) -> None:
    """NotCovered for anything but a dense decoder whose positions do not depend on a text's length."""
    spec = model.config
    has_more = model.virtual is not None or model.embed_types is not None or model.relative_bias is not None
    has_more |= spec.head.transform is not None or spec.float32_residual or spec.token_dropout is not None
    blocks = [spec.block(i) for i in range(spec.n_layers)]
    is_known = all(
        type(block.mixer) is config.Attention
        and block.mixer.causal
        and block.cross_attention is None
        and isinstance(block.ffn, (config.Mlp, config.GatedMlp))
        for block in blocks
    )
    if has_more or not is_known or not spec.predicts_tokens or model.embed_tokens.weight.dtype not in DTYPES:
        raise NotCovered(spec.family)
    ropes = [table.rope for table in model.rotaries]
    if any(map(rope_scaling.heeds_length, ropes)) or max(block.mixer.head_dim for block in blocks) > ops.MAX_HEAD_DIM:
        raise NotCovered(spec.family)
    for layer in model.layers:
        for module, kinds in ((layer, [Block]), (layer.mixer, [Attention]), (layer.ffn, [Mlp, GatedMlp])):
            check_module(module)
            if type(module) not in kinds or (module.training and spec.dropout):
                raise NotCovered(type(module).__name__)
    check_module(model)
    check_module(model.embed_tokens)
    if type(model.embed_tokens) is not nn.Embedding:
        raise NotCovered(type(model.embed_tokens).__name__)


def check_module(module: nn.Module) -> None:
    """NotCovered where somebody else has a hand in the forward pass."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise NotCovered(f"hooks of {type(module).__name__}")
