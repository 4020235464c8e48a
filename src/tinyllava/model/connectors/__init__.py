"""The modules of the connectors: those that map each patch, and those with learned queries."""

from importlib import import_module

from torch import nn

from tinyllava.errors import ConfigError
from tinyllava.parts.connectors import Connector, Options, find_connector, num_tokens, resolve_options
from tinyllava.parts.user_code import locate


def build_connector(
    name: str, *, vision_width: int, language_width: int, num_patches: int, options: Options
) -> nn.Module:
    """Build a connector: a module that maps [I, M, X] to [I, T, D].

    Raises:
        UnknownNameError, ConfigError: no such connector, or sizes that do not fit.
    """
    connector = find_connector(name)
    resolved = resolve_options(connector, options)
    num_tokens(connector, num_patches, resolved)  # refuses sizes that no matrix product would name
    if isinstance(connector.module, type):
        return _build_own(connector, vision_width, language_width, num_patches, resolved)
    file, _, class_name = connector.module.partition(":")
    cls = getattr(import_module(f"tinyllava.model.connectors.{file}"), class_name)
    module: nn.Module = cls(vision_width, language_width, num_patches, **resolved)
    return module


def _build_own(
    connector: Connector, vision_width: int, language_width: int, num_patches: int, options: Options
) -> nn.Module:
    """Build a connector of a user's code, whose errors are reported with their file and line."""
    assert isinstance(connector.module, type)
    try:
        module: nn.Module = connector.module(vision_width, language_width, num_patches, **options)
    except Exception as error:  # the user's code may raise anything
        place = locate(error, connector.name.rpartition(":")[0])
        raise ConfigError(f"{place}: {type(error).__name__}: {error}") from error
    return module
