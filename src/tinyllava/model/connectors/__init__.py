"""The modules of the connectors: those that map patches one by one, and those with learned queries."""

from importlib import import_module

from torch import nn

from tinyllava.parts.connectors import Options, find_connector, num_tokens, resolve_options


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
    file, _, class_name = connector.module.partition(":")
    cls = getattr(import_module(f"tinyllava.model.connectors.{file}"), class_name)
    module: nn.Module = cls(vision_width, language_width, num_patches, **resolved)
    return module
