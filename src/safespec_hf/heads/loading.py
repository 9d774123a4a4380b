"""Loads a head strictly: from safetensors only, and with every weight that its config asks for, or not at all."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import HfApi, constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # `HTTPError` is that of its HTTP library
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..checks import check_value
from ..errors import HeadFileError

if TYPE_CHECKING:
    from typing_extensions import Self

PROBE_TIMEOUT_S = 3.0
PROBE_MEMORY_S = 30.0
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that say how files are fetched."""

WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")
OTHERS_FIELDS = (
    "model_type",
    "name_or_path",
    "torch_dtype",
    "auto_map",
    "attn_implementation",
    "output_attentions",
    "num_labels",
)
"""What transformers itself puts into a config beside the fields of [`~transformers.PreTrainedConfig`]."""


class StrictConfig(PreTrainedConfig):
    """A config in which every field means something: transformers keeps what it does not know, and guesses the rest.

    Raises:
        TypeError: If there are fields that nobody reads, such as a mistyped one or one of a newer version.
        ValueError: If the weights' `dtype` is none, or a file lacks a field or is another model's.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        if unknown := [name for name in kwargs if name not in OTHERS_FIELDS and not name.startswith("_")]:
            raise TypeError(
                f"{type(self).__name__} has no {' and no '.join(f'`{name}`' for name in unknown)}: mistyped, or of a "
                "newer version of safespec-hf or transformers than this one."
            )
        dtype = self.dtype if self.dtype is not None else kwargs.get("torch_dtype")
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        check_value("dtype", dtype, name is None or name in WEIGHT_DTYPES, f"one of {WEIGHT_DTYPES}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """That of a file, which has every field that has no `None` for a default.

        Raises:
            ValueError: Names the fields that it lacks, or the model that it is of.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"its `{CONFIG_NAME}` holds no object")
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"its `{CONFIG_NAME}` is of model type {kind!r}, not {cls.model_type!r}")
        own = [field for field in fields(cls) if field.name in cls.__annotations__]
        if missing := [field.name for field in own if field.default is not None and field.name not in config_dict]:
            raise ValueError(f"its `{CONFIG_NAME}` does not say {', '.join(f'`{name}`' for name in missing)}")
        config: Self = super().from_dict(config_dict, **kwargs)
        return config


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
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        config, weights = cls._read_files(name, kwargs.pop("config", None), hub_kwargs)
        # What transformers would resolve by itself may be a pickle, or a bot's conversion of one. It gets no choice.
        kwargs |= {"config": config, "state_dict": weights, "use_safetensors": True}
        cls._check(name, cls._find_misfits(config, weights))
        head: Self = super().from_pretrained(None, *model_args, **kwargs)
        cls._check(name, head._bad_values())
        head.config.name_or_path = head.name_or_path = str(name)
        return head.eval()

    @classmethod
    def _read_files(
        cls, name: str | os.PathLike[str], config: Any, hub_kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        assert cls.config_class is not None
        if "/" not in str(name) and not os.path.isdir(name):
            raise HeadFileError(no_such_folder(name, cls.title))
        try:
            arguments = hub_arguments(name, hub_kwargs, cls.title)
            config = config or cls.config_class.from_pretrained(name, **arguments)
            file = cached_file(name, SAFE_WEIGHTS_NAME, **arguments)
            assert file is not None  # it raises by itself
            weights = load_file(file)
        except SafetensorError as error:
            raise HeadFileError(
                f"The `{SAFE_WEIGHTS_NAME}` of {str(name)!r} is not a whole safetensors file ({error}): it is cut "
                "short, damaged, or in another format, such as a pickle, which is never read. Download or save the "
                "head again."
            ) from error
        except (OSError, TypeError, ValueError) as error:  # the latter two from values in config.json
            why = explain_hub_error(name, error, hub_kwargs) or error
            raise HeadFileError(f"No {cls.title} could be loaded from {str(name)!r}: {why}") from error
        if config.model_type != cls.config_class.model_type or config.num_features == 0:
            raise HeadFileError(
                f"{str(name)!r} holds no {cls.title}: its `config.json` is of model type {config.model_type!r}, with "
                f"hidden_size={config.hidden_size} and hidden_layers={config.hidden_layers}."
            )
        return config, weights

    @classmethod
    def _find_misfits(cls, config: Any, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """What transformers would fill with random weights or cast to numbers that say nothing, before it can."""
        with torch.device("meta"):  # a damaged config may ask for more than any memory has
            wanted = cls(config).state_dict()
        both = [(key, weights[key], wanted[key]) for key in sorted(wanted.keys() & weights.keys())]
        kinds = [key for key, weight, like in both if weight.is_floating_point() != like.is_floating_point()]
        return {
            "missing": sorted(wanted.keys() - weights.keys()),
            "unknown": sorted(weights.keys() - wanted.keys()),
            "of another shape than the config asks for": [
                key for key, *pair in both if pair[0].shape != pair[1].shape
            ],
            "stored as another kind of number": [f"{key} ({weights[key].dtype})" for key in kinds],
        }

    @classmethod
    def _check(cls, name: str | os.PathLike[str], problems: Mapping[str, list[str]]) -> None:
        found = "; ".join(f"{', '.join(keys)} {what}" for what, keys in problems.items() if keys)
        if found:
            raise HeadFileError(
                f"The weights of the {cls.title} {str(name)!r} don't fit its config, or are bad: {found}."
            )

    def _bad_values(self) -> dict[str, list[str]]:
        # a risk of nan would never reach a threshold
        return {"not finite": [key for key, weight in self.named_parameters() if not bool(weight.isfinite().all())]}


def hub_arguments(name: str | os.PathLike[str], hub_kwargs: Mapping[str, Any], title: str = "model") -> dict[str, Any]:
    """Arguments under which loading `name` never waits for a Hub that isn't there.

    The Hub's client retries for some 20 seconds per file. So it is asked once, shortly; if it doesn't answer, loading
    may only use what an earlier run has left in the cache.

    Args:
        name (`str` or `os.PathLike`): Folder, or id on the Hub.
        hub_kwargs (`Mapping`): What `from_pretrained` was given: `revision`, `local_files_only`, ...
        title (`str`, *optional*, defaults to `"model"`): What is loaded, for the error.

    Raises:
        FileNotFoundError: If `name` is no folder and can't be an id.

    Example:

        >>> from safespec_hf.heads.loading import hub_arguments
        >>> hub_arguments("owner/head", {"local_files_only": True})
        {'local_files_only': True}
    """
    arguments = dict(hub_kwargs)
    if os.path.isdir(name):
        return arguments
    if _can_only_be_a_path(str(name)):
        raise FileNotFoundError(no_such_folder(name, title))
    if not arguments.get("local_files_only") and not is_hub_reachable():
        arguments |= {"local_files_only": True, "force_download": False}
    return arguments


def explain_hub_error(
    name: str | os.PathLike[str], error: BaseException, hub_kwargs: Mapping[str, Any], kind: str = "repo"
) -> str | None:
    """Why loading `name` failed, if it is because of the Hub: it can't be reached, or has no such repository.

    Args:
        name (`str` or `os.PathLike`): Folder, or id on the Hub.
        error (`BaseException`): What loading it raised.
        hub_kwargs (`Mapping`): What [`hub_arguments`] was given.
        kind (`str`, *optional*, defaults to `"repo"`): What the Hub was asked for.
    """
    if os.path.isdir(name) or (isinstance(error, FileNotFoundError) and _can_only_be_a_path(str(name))):
        return None
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    page = f"{HfApi().endpoint}/{name}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"the {kind} is gated: ask for access at {page}, then log in with `hf auth login` or pass `token`."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"no such {kind} on the Hub ({page}), or a private one: check the id, or log in with `hf auth login` or "
            "pass `token`. There is no such folder here either."
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return None  # it names the revision
    offline = {
        "HF_HUB_OFFLINE is set": constants.HF_HUB_OFFLINE,
        "`local_files_only` is set": hub_kwargs.get("local_files_only"),
        f"Hub unreachable ({HfApi().endpoint})": _is_silent(),
    }
    if reason := next((reason for reason, holds in offline.items() if holds), None):
        return (
            f"{reason}, and the {kind} is not whole in the cache. Go online, or give a folder: there is none of that "
            "name here."
        )
    return None


def no_such_folder(name: str | os.PathLike[str], title: str = "model") -> str:
    """What is said of a path at which there is nothing, or nothing that can be loaded."""
    found = "that is a file" if os.path.isfile(name) else f"looked in {str(Path.cwd())!r}"
    return f"no such folder: {str(name)!r} ({found}). Give the folder of a {title}, or its id on the Hub, owner/name."


def find_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a repository is at, as the Hub says, or else its cache; `None` if neither knows.

    Args:
        name (`str`): Id on the Hub.
        revision (`str`, *optional*): Branch, tag or commit. Default: the main branch.
    """
    try:
        if is_hub_reachable():
            return HfApi().model_info(name, revision=revision).sha
    except (HfHubHTTPError, HFValidationError, HTTPError):
        return None
    file = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def is_hub_reachable() -> bool:
    """Whether the Hub, or what `HF_ENDPOINT` says, answers within 3 seconds; a failure is remembered for 30.

    Asked through the Hub's own client, so with its proxies and certificates. An answer that is an error is an answer.
    """
    if constants.HF_HUB_OFFLINE or _is_silent():
        return False
    endpoint = HfApi().endpoint
    answers: list[int] = []
    # in a thread, since looking up a host's name has no time-out of its own
    probe = threading.Thread(target=_probe, args=(endpoint, answers), daemon=True)
    probe.start()
    probe.join(PROBE_TIMEOUT_S)
    if answers:
        return True
    _silent_until[endpoint] = time.monotonic() + PROBE_MEMORY_S
    return False


_silent_until: dict[str, float] = {}  # endpoint to a reading of the clock


def _is_silent() -> bool:
    return time.monotonic() < _silent_until.get(HfApi().endpoint, 0.0)


def _probe(endpoint: str, answers: list[int]) -> None:
    try:
        answers.append(get_session().head(endpoint, timeout=PROBE_TIMEOUT_S).status_code)
    except (HTTPError, OSError):
        return


def _can_only_be_a_path(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False
