"""What an exported repository says of itself: where target, head and draft are, and what guards."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..config import SafeSpecConfig
from ..errors import HeadFileError, SafeSpecError
from ..heads.loading import HUB_KWARGS, explain_hub_error, hub_arguments, no_such_folder

MODEL_TYPE = "safespec_guarded"
"""Unknown to transformers, so that a repository is never loaded without its code, and with it unguarded."""
CODE = "guarded"
AUTO_MAP = {
    "AutoConfig": f"{CODE}.GuardedConfig",
    "AutoModelForCausalLM": f"{CODE}.GuardedModelForCausalLM",
    # for a target that reads images, too, servers and pipelines ask these
    "AutoModelForImageTextToText": f"{CODE}.GuardedModelForCausalLM",
    "AutoModelForMultimodalLM": f"{CODE}.GuardedModelForCausalLM",
    # before any other, `transformers serve` asks whether it is a model of this kind
    "AutoModelForDecision": f"{CODE}.NoDecisionModel",
}
FORMAT = 1
VERSION = importlib.metadata.version("safespec-hf")
TARGET, HEAD, DRAFT = "target", "head", "draft"


@dataclass(frozen=True, slots=True)
class Part:
    """Where one part is: in a folder of the repository itself, or in another one.

    Attributes:
        folder (`str`, *optional*): The folder.
        repo_id (`str`, *optional*): Or the other repository on the Hub.
        revision (`str`, *optional*): The commit there.
        model_id, architecture (`str`, *optional*): What the model in it is: its id on the Hub, and its class.
    """

    folder: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    model_id: str | None = None
    architecture: str | None = None

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.repo_id is None):
            raise ValueError(f"a part is in a `folder` or in another repository, `repo_id`, but got {asdict(self)}")

    def locate(self, name: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Name and arguments for `from_pretrained`, given those of the repository."""
        if self.repo_id is None:
            return str(name), {**hub_kwargs, "subfolder": self.folder}
        return self.repo_id, {**hub_kwargs, "revision": self.revision}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The entry `safespec` of a repository's `config.json`.

    Attributes:
        target, head, draft ([`Part`]): Where they are; a draft is optional.
        policy ([`SafeSpecConfig`]): How every call is guarded.
        ignore_mismatches (`tuple[str, ...]`): Fields of the head's binding that were excused when it was attached.
    """

    target: Part
    head: Part
    draft: Part | None = None
    policy: SafeSpecConfig = field(default_factory=SafeSpecConfig)
    ignore_mismatches: tuple[str, ...] = ()

    @property
    def is_light(self) -> bool:
        """Whether the target's weights are elsewhere."""
        return self.target.repo_id is not None

    def to_config(self) -> dict[str, Any]:
        """The whole `config.json`. An auto class stands for the architecture: others load without the guard."""
        parts = {name: _known(part) for name in (TARGET, HEAD, DRAFT) if (part := getattr(self, name)) is not None}
        rest = {"policy": self.policy.to_dict(), "ignore_mismatches": list(self.ignore_mismatches)}
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["AutoModelForCausalLM"],
            "auto_map": AUTO_MAP,
            "safespec": {"format": FORMAT, "version": VERSION, **parts, **rest},
        }


def _known(part: Part) -> dict[str, str]:
    return {name: value for name, value in asdict(part).items() if value is not None}


def take_hub_kwargs(kwargs: MutableMapping[str, Any]) -> dict[str, Any]:
    """Takes the arguments that say how a repository's files are fetched out of others."""
    taken = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
    taken.pop("subfolder", None)
    return taken


def read_manifest(name: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> Manifest:
    """What an exported repository says of itself.

    Args:
        name (`str` or `os.PathLike`): Folder, or id on the Hub.
        hub_kwargs (`Mapping`): How its files are fetched: `revision`, `token`, ...

    Raises:
        HeadFileError: If there is no such repository, or none that this version can read; says why.
    """
    try:
        arguments = hub_arguments(name, hub_kwargs, "guarded model")
        config, _ = PreTrainedConfig.get_config_dict(name, **arguments)
    except (OSError, ValueError) as error:
        why = explain_hub_error(name, error, hub_kwargs) or error
        if not os.path.isdir(name) and "/" not in str(name):
            why = no_such_folder(name, "guarded model")
        raise HeadFileError(f"No guarded model could be loaded from {str(name)!r}: {why}") from error
    return parse_manifest(config, name)


def parse_manifest(config: Mapping[str, Any], name: str | os.PathLike[str]) -> Manifest:
    """The manifest in the content of a `config.json`.

    Raises:
        HeadFileError: If there is none, or one that this version can't read.
    """
    entry = config.get("safespec")
    if config.get("model_type") != MODEL_TYPE or not isinstance(entry, dict):
        raise HeadFileError(
            f"{str(name)!r} is not a guarded model: its `config.json` is of model type {config.get('model_type')!r}, "
            f"where `safespec export` writes {MODEL_TYPE!r}."
        )
    if entry.get("format") != FORMAT:
        raise HeadFileError(
            f"{str(name)!r} was written by safespec-hf {entry.get('version')}, in format {entry.get('format')}. This "
            f"is {VERSION}, which reads format {FORMAT}: install the other version, or export the model again."
        )
    try:
        parts = {key: Part(**entry[key]) for key in (TARGET, HEAD, DRAFT) if key != DRAFT or key in entry}
        policy = SafeSpecConfig.from_dict(entry["policy"])
        return Manifest(**parts, policy=policy, ignore_mismatches=tuple(entry["ignore_mismatches"]))
    except (KeyError, TypeError, ValueError) as error:
        raise HeadFileError(
            f"The entry `safespec` in the `config.json` of {str(name)!r} is damaged: {error!r}."
        ) from error


def check_policy(policy: SafeSpecConfig) -> None:
    """Raises for a policy under which a repository would not be guarded, or could not answer.

    Raises:
        SafeSpecError: If it only observes, or needs a head of the draft, which is not part of an export.
    """
    if policy.policy == "observe":
        raise SafeSpecError(
            "`policy='observe'` guards nothing, and can't be exported as the policy of a guarded model."
        )
    if policy.num_draft_segments > 1:
        raise SafeSpecError(
            f"`num_draft_segments={policy.num_draft_segments}` needs a safety head of the draft, which is not part of "
            "an export: whoever loads it could not generate. Export with a policy that leaves the field at 1."
        )
