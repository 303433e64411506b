"""Hugging Face transformers: `from_pretrained(..., quantization_config=QLoRAConfig(...))`.

Importing this module registers the configuration and its quantiser. transformers builds the model
without storage and hands over one tensor at a time; each weight is quantised as it comes, so that
no more than one dense one is in memory. `save_pretrained` writes bitsandbytes' format.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from qlora_ref import tensor_format
from qlora_ref.checkpoint import quantization_config
from qlora_ref.checks import check_block_size
from qlora_ref.codebooks import CODEBOOKS
from qlora_ref.convert import EXPERTS, LINEAR, ConversionReport, Decision, reasons_to_keep
from qlora_ref.linear import Linear4bit, dense_linear, is_conv1d
from qlora_ref.lora import count_parameters, lora_layers, replace_module
from qlora_ref.module4bit import Module4bit, layers_4bit
from qlora_ref.parameter4bit import Parameter4bit
from qlora_ref.places import described, find, install, own_bytes, restore_experts
from qlora_ref.quantized import QuantizedTensor, quantize

QUANT_METHOD = "qlora_ref"


class QLoRAConfig(QuantizationConfigMixin):  # type: ignore[misc]  # no types in transformers
    """How `from_pretrained` quantises a model.

    codebook       a name of codebooks.CODEBOOKS
    block_size     int, even
    double_quant   bool
    compute_dtype  torch.dtype, its name, or None: the dtype of each layer's input
    skip           names of modules to keep, besides those that `convert_model` always keeps
    scale_search   bool: in place of absmax the scales of least error, as for `quantize`

    What needs the whole model or more than a name, `calibration` and a codebook of your own, is for
    `convert_model` on the dense model; `save_pretrained` and `from_pretrained` as here.
    Raises ValueError or TypeError for options out of range.
    """

    load_in_4bit, load_in_8bit = True, False  # what other libraries ask

    def __init__(
        self,
        codebook: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        skip: Sequence[str] = (),
        scale_search: bool = False,
    ) -> None:
        if not isinstance(codebook, str) or codebook not in CODEBOOKS:
            raise ValueError(
                f"codebook must be one of {sorted(CODEBOOKS)}, got {codebook!r}: levels of your "
                "own are for convert_model"
            )
        check_block_size(block_size)
        if isinstance(skip, str):
            raise TypeError(f"skip must be a list of names, got {skip!r}: write [{skip!r}]")
        self.quant_method = QUANT_METHOD
        self.codebook, self.block_size, self.double_quant = codebook, block_size, double_quant
        self.compute_dtype, self.skip = _dtype(compute_dtype), list(skip)
        self.scale_search = scale_search

    @classmethod
    def from_bitsandbytes(cls, config: BitsAndBytesConfig) -> QLoRAConfig:
        """The same in our words. Raises NotImplementedError for 8 bits, which we do not have."""
        if not config.load_in_4bit:
            raise NotImplementedError(
                "qlora_ref quantises to 4 bits, not to 8 (LLM.int8): pass load_in_4bit=True"
            )
        return cls(
            config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            compute_dtype=config.bnb_4bit_compute_dtype,
            skip=config.llm_int8_skip_modules or (),
        )

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read what `to_dict` gives, or what config.json says of codebooks of our own.

        Raises ValueError for a model that was saved with adapters of `add_lora` in it.
        """
        if config_dict.get("adapters"):
            raise ValueError(
                "this was saved with adapters of add_lora in it, as a Trainer's checkpoint: load "
                "the base, add_lora, and resume from it; save_adapter and merge_lora write what "
                "can be loaded by itself"
            )
        ours = inspect.signature(cls).parameters
        config = cls(**{name: config_dict[name] for name in ours if name in config_dict})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        dtype = None if self.compute_dtype is None else str(self.compute_dtype)
        return {**self.__dict__, "compute_dtype": dtype and dtype.removeprefix("torch.")}


class QLoRAQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads, saves and restores a model with 4-bit layers."""

    requires_calibration = False
    is_trainable = True
    quantized_element_size = 0.5  # bytes, where memory is planned

    def __init__(self, config: QLoRAConfig | BitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        foreign = isinstance(config, BitsAndBytesConfig)
        self.settings = QLoRAConfig.from_bitsandbytes(config) if foreign else config
        self.report: ConversionReport | None = None
        self.quantized: dict[Module4bit, QuantizedTensor] = {}  # while loading
        self.errors: list[str] = []
        self._model: weakref.ref[nn.Module] | None = None
        self._reasons: dict[str, str | None] = {}
        self._shapes: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def update_device_map(self, device_map: Any) -> Any:
        """Onto the first GPU if there is one, unless the caller says where."""
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, **kwargs: Any
    ) -> None:
        self._check_places(device_map)
        skip = () if self.pre_quantized else self.settings.skip
        self._reasons = reasons_to_keep(model, skip)
        self._shapes = {name: described(model, name) for name in self._reasons}
        # A file has several tensors for one in 4 bits: names end like this, and in what follows it.
        experts = {name for name in self._reasons if isinstance(find(model, name), Tensor)}
        ends = {"weight", *(".".join(name.split(".")[-2:]) for name in experts)}
        self.serialized_names = {end: _stored_names(end) for end in sorted(ends)}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor is a weight that goes to 4 bits."""
        module, _, leaf = param_name.rpartition(".")
        names = (param_name, module) if leaf == "weight" else (param_name,)
        return any(self._reasons.get(name, "") is None for name in names)

    def get_quantize_ops(self) -> ConversionOps:
        """What quantises one weight as it is read."""
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        """What puts one 4-bit weight of a file together."""
        return {"deserialize": _Deserialize}

    def install(
        self, model: nn.Module, key: str, missing_keys: set[str], make: Callable[[], Any]
    ) -> None:
        """Put a 4-bit layer in the place of a dense one, with the weight that `make` gives."""
        # transformers would log an error and go on; it is raised when all tensors are read.
        missing_keys.discard(key)
        try:
            weight = make()
            layer = install(model, key, weight)
        except (TypeError, ValueError) as error:
            self.errors.append(f"{key}: {error}")
            return
        self.quantized[layer] = weight
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = self.settings.compute_dtype
        for initialized in (layer, layer.weight):  # else transformers would fill it anew
            initialized._is_hf_initialized = True  # type: ignore[union-attr, assignment]

    def _check_places(self, device_map: Any) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "meta" in places:
            raise ValueError('device_map puts layers on "meta", where they have no values')
        if "disk" in places and not self.pre_quantized:
            raise ValueError(
                "layers that go to disk cannot be quantised on the way: load with QLoRAConfig and "
                "without disk once, save_pretrained, and load that with this device_map"
            )

    @property
    def is_qat_trainable(self) -> bool:
        """The Trainer's question whether a model may train without PEFT: with `add_lora` it may."""
        model = None if self._model is None else self._model()
        return model is not None and bool(lora_layers(model))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._check_places(getattr(model, "hf_device_map", None))
        self._model = weakref.ref(model)
        if self.errors:
            raise ValueError("; ".join(self.errors[:5]))
        # transformers has meanwhile replaced buffers that no file holds, our scales, by empty ones.
        for layer, weight in self.quantized.items():
            layer.set_quantized_weight(weight)
        self.quantized.clear()
        self.report = self._report(model)
        _act_as_4bit(model)
        # Saving runs these conversions backwards; what is in 4 bits stays as it is.
        conversions = getattr(model, "_weight_conversions", None) or []
        converted = self.report.converted
        kept = [c for c in conversions if not _has_deserialize(c) and not _makes(c, converted)]
        model._weight_conversions = kept  # type: ignore[assignment]
        return model

    def _report(self, model: nn.Module) -> ConversionReport:
        decisions = []
        for name, reason in self._reasons.items():
            kind, shape, before = self._shapes[name]
            found = find(model, name)
            converted = isinstance(found, Module4bit)
            what = EXPERTS if isinstance(found, Parameter4bit) else LINEAR
            why = what if converted else reason or "not in 4 bits in the file"
            decisions.append(Decision(name, kind, shape, converted, why, before, own_bytes(found)))
        return ConversionReport(decisions)

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile: torch.compile takes 4-bit layers as they are."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """Called before a model is saved: lets its config.json say what its layers now are."""
        if "disk" in getattr(model, "hf_device_map", {}).values():
            raise NotImplementedError(
                "a model with layers on disk cannot be saved again: load it without disk"
            )
        if lora_layers(model):  # a checkpoint of a Trainer, which loads it as a state dict
            model.config.quantization_config = {"quant_method": QUANT_METHOD, "adapters": True}
        elif layers_4bit(model):
            written = quantization_config(model, self.settings.compute_dtype)
            model.config.quantization_config = written
        else:  # merged to float since
            self.remove_quantization_config(model)
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        dtype = _dtype(dtype)  # a saved configuration has its name
        restore_experts(model, dtype)
        for name, layer in layers_4bit(model).items():
            if not isinstance(layer, Linear4bit):
                raise NotImplementedError(f"{name} is a {type(layer).__name__}, not a linear layer")
            dense = dense_linear(layer.dequantize(dtype), layer.bias, layer.training)
            replace_module(model, name, dense)
        _act_as_dense(model)
        return model


class _Quantize(ConversionOps):  # type: ignore[misc]
    def __init__(self, hf_quantizer: QLoRAQuantizer) -> None:
        # transformers looks for an attribute of this name, else it casts what the op is given.
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        settings = self.hf_quantizer.settings
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if is_conv1d(model.get_submodule(key.rpartition(".")[0])):
                weight = weight.t()
            options = settings.codebook, settings.block_size, settings.double_quant
            search = settings.scale_search
            make = functools.partial(quantize, weight, *options, scale_search=search)
            self.hf_quantizer.install(model, key, missing_keys, make)
        return {}  # the layer is in its place


class _Deserialize(ConversionOps):  # type: ignore[misc]
    def __init__(self, hf_quantizer: QLoRAQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> _Deserialize:
        return _Deserialize(self.hf_quantizer)  # every tensor gets a copy; they share the quantiser

    def convert(
        self,
        input_dict: dict[str, Any],
        target_patterns: Sequence[str] = (),
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        name = target_patterns[0]  # "weight", or the end of the name of a tensor of experts
        if list(tensors) == [name]:  # this one is dense
            meant = model.get_parameter_or_buffer(full_layer_name)
            return {name: tensors[name].to(meant.dtype)}
        make = functools.partial(tensor_format.from_tensors, tensors, name)
        self.hf_quantizer.install(model, full_layer_name, missing_keys, make)
        return {}


def from_pretrained(path: Path | str, model_class: Any = None, **kwargs: Any) -> Any:
    """Load a 4-bit checkpoint, of ours or of bitsandbytes, with our layers.

    path         directory or hub name
    model_class  AutoModelForCausalLM unless it is given
    kwargs       as for its `from_pretrained`; not `quantization_config`, which the files say

    Raises ValueError for a checkpoint that is not in 4 bits.
    """
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        raise ValueError(f"{path} is not in 4 bits: pass quantization_config=QLoRAConfig()")
    if not isinstance(stored, dict):
        stored = stored.to_dict()
    if stored.get("quant_method") != QUANT_METHOD:
        stored = QLoRAConfig.from_bitsandbytes(BitsAndBytesConfig.from_dict(stored)).to_dict()
    config.quantization_config = stored
    model_class = model_class or transformers.AutoModelForCausalLM
    return model_class.from_pretrained(path, config=config, **kwargs)


def use_for_bitsandbytes_checkpoints(enabled: bool = True) -> None:
    """Let `from_pretrained` load with our layers whatever is marked as bitsandbytes' in 4 bits.

    For the whole process; `enabled=False` gives transformers its own quantiser back.
    """
    ours = QLoRAQuantizer if enabled else _BITSANDBYTES_QUANTIZER
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = ours


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"compute_dtype must be a floating-point dtype or None, got {dtype!r}")
    return found


def _stored_names(name: str) -> list[str]:
    keys = (*tensor_format.SCALE_KEYS, *tensor_format.state_keys())
    return [name, *(f"{name}.{key}" for key in keys)]


def _has_deserialize(conversion: Any) -> bool:
    return any(isinstance(op, _Deserialize) for op in getattr(conversion, "operations", ()))


def _makes(conversion: Any, names: Sequence[str]) -> bool:
    """Whether a conversion puts one of these tensors together."""
    if not hasattr(conversion, "operations"):
        return False
    targets = conversion.target_patterns
    return any(name.endswith(target) for name in names for target in targets)


def _act_as_4bit(model: Any) -> None:
    """What PEFT, TRL, accelerate and the Trainer ask of a model in 4 bits."""
    model.is_loaded_in_4bit = True
    # transformers' own would import bitsandbytes to count.
    model.num_parameters = types.MethodType(_num_parameters, model)
    if set(map(str, getattr(model, "hf_device_map", {}).values())) == {"cpu"}:
        del model.hf_device_map  # accelerate would ask for bitsandbytes to train on the CPU


def _act_as_dense(model: Any) -> None:
    model.is_loaded_in_4bit = False
    model.__dict__.pop("num_parameters", None)


def _num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As transformers counts; a quantised weight counts as the values that it stands for."""
    skipped = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return count_parameters(model, only_trainable, exclude=skipped if exclude_embeddings else [])


_BITSANDBYTES_QUANTIZER = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(QUANT_METHOD)(QLoRAConfig)
    auto.register_quantizer(QUANT_METHOD)(QLoRAQuantizer)
