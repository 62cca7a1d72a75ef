"""A trainer that cannot be built leaves the model as it was, so that the advice of its error can be followed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from lavender.alignment.objective import HEAD_NAME, detach


@contextmanager
def undone_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """If the block raises, take alignment and PEFT's layers off the model, and let the same weights train as before.

    Args:
        model: a model without alignment and without PEFT's layers.
    """
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    except BaseException:
        _take_off_peft(model)
        if HEAD_NAME in dict(model.named_children()):
            detach(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        raise


def _take_off_peft(model: nn.Module) -> None:
    """Put the original modules back into the places of PEFT's layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.original_module)
    vars(model).pop("peft_config", None)
