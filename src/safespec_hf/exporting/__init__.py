"""A guarded model as one repository, that code which has never heard of us loads and runs guarded."""

from .export import export_guarded
from .push import push_guarded

__all__ = ["export_guarded", "push_guarded"]
