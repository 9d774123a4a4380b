"""Loads a head strictly: from safetensors only, and with every weight that its config asks for, or not at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..errors import HeadFileError

if TYPE_CHECKING:
    from typing_extensions import Self

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class StrictModel(PreTrainedModel):
    """A small model that belongs to a target. Its config has `num_features`, 0 if it does not say what to read.

    Attributes:
        title (`str`): What errors call it.
    """

    title: ClassVar[str]
    config: Any

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers' own keywords are in `kwargs`
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> Self:
        """[`~transformers.PreTrainedModel.from_pretrained`], but strict, from safetensors only and in eval mode.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or id on the Hub.
            kwargs: For loading: `revision`, `token`, `cache_dir`, `local_files_only`, `dtype`, ...

        Raises:
            HeadFileError: If a file is missing or damaged, or a weight is missing, unknown, misshapen or not finite.
        """
        name = pretrained_model_name_or_path
        hub_kwargs = {key: kwargs.pop(key) for key in _HUB_KWARGS if key in kwargs}
        config, weights = cls._read_files(name, kwargs.pop("config", None), hub_kwargs)
        # What transformers would resolve by itself may be a pickle, or a bot's conversion of one. It gets no choice.
        kwargs |= {"config": config, "state_dict": weights, "use_safetensors": True}
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(None, *model_args, **kwargs)
        head: Self = loaded[0]
        head._check_weights(name, info=loaded[1])
        head.config.name_or_path = head.name_or_path = str(name)
        return head.eval()

    @classmethod
    def _read_files(
        cls, name: str | os.PathLike[str], config: Any, hub_kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        assert cls.config_class is not None
        try:
            config = config or cls.config_class.from_pretrained(name, **hub_kwargs)
            file = cached_file(name, SAFE_WEIGHTS_NAME, **hub_kwargs)
            assert file is not None  # it raises by itself
            weights = load_file(file)
        except SafetensorError as error:
            raise HeadFileError(
                f"The `{SAFE_WEIGHTS_NAME}` of {str(name)!r} is not a whole safetensors file ({error}): it is cut "
                "short, damaged, or in another format, such as a pickle, which is never read. Download or save the "
                "head again."
            ) from error
        except (OSError, TypeError, ValueError) as error:  # the latter two from values in config.json
            raise HeadFileError(f"No {cls.title} could be loaded from {str(name)!r}: {error}") from error
        if config.model_type != cls.config_class.model_type or config.num_features == 0:
            raise HeadFileError(
                f"{str(name)!r} holds no {cls.title}: its `config.json` is of model type {config.model_type!r}, with "
                f"hidden_size={config.hidden_size} and hidden_layers={config.hidden_layers}."
            )
        return config, weights

    def _check_weights(self, name: str | os.PathLike[str], info: dict[str, Any]) -> None:
        # transformers only warns of these, and goes on with random weights
        problems = {
            "missing": sorted(info["missing_keys"]),
            "unknown": sorted(info["unexpected_keys"]),
            "of another shape than the config asks for": sorted(key for key, *_ in info["mismatched_keys"]),
            **self._bad_values(),
        }
        found = "; ".join(f"{', '.join(keys)} {what}" for what, keys in problems.items() if keys)
        if found:
            raise HeadFileError(
                f"The weights of the {self.title} {str(name)!r} don't fit its config, or are bad: {found}."
            )

    def _bad_values(self) -> dict[str, list[str]]:
        # a risk of nan would never reach a threshold
        return {"not finite": [key for key, weight in self.named_parameters() if not bool(weight.isfinite().all())]}
