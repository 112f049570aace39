"""What the loaded plugins offer under one hook, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

from lmcache.core.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from lmcache.plugins.loading import PluginInfo

Spec = TypeVar("Spec")


class Offers(Mapping[str, Spec], Generic[Spec]):
    """The descriptions of one kind by name; no two share a name, whatever its case."""

    def __init__(self, hook: str, kind: type[Spec], named_by: str, noun: str) -> None:
        """`named_by` is the field of a description that holds its name, `noun` what it is."""
        self.hook = hook
        self.noun = noun
        self._kind = kind
        self._named_by = named_by
        self._offers: dict[str, tuple[str, Spec, PluginInfo]] = {}

    def add(self, spec: object, plugin: PluginInfo) -> None:
        """Take a description in, or raise a `PluginError` that says who is at fault."""
        if not isinstance(spec, self._kind):
            raise PluginError(
                f"{plugin} offers {spec!r} in {self.hook}, expected {self._kind.__name__}"
            )
        name = str(getattr(spec, self._named_by))
        if name in self:
            raise PluginError(
                f"{self.noun} {name!r} is offered twice, by {self.owner(name)} and by {plugin}"
            )
        self._offers[name.lower()] = (name, spec, plugin)

    def find(self, name: str) -> Spec:
        """The description of that name, or a `ConfigError` that lists the known ones."""
        if name in self:
            return self[name]
        known = ", ".join(self) or "none"
        raise ConfigError(f"no {self.noun} {name!r}; known: {known}")

    def owner(self, name: str) -> PluginInfo:
        """The plugin that offers it."""
        return self._offers[name.lower()][2]

    def __getitem__(self, name: str) -> Spec:
        return self._offers[name.lower()][1]

    def __iter__(self) -> Iterator[str]:
        return (self._offers[key][0] for key in sorted(self._offers))

    def __len__(self) -> int:
        return len(self._offers)
